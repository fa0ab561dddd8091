"""The training library: run, loop, engines, data, tasks, checkpoints and callbacks. Knows no Hydra."""
