"""The training library: run, loop, engines, data, tasks, checkpoints, callbacks. Knows no Hydra."""
