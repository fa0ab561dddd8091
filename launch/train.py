"""`tessera train`: compose, check, then train: here, under our supervisor or as a torchrun rank."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.binding import bind, convert
from launch.compose import compose
from launch.deadline import end_time, note_end
from launch.determinism import hold
from launch.group import safe_paths
from launch.local import LocalLaunch
from launch.menu import lines
from launch.signals import STOP_SIGNALS, leaving_on_signals

USAGE = """usage: tessera train [experiment=NAME] [group=choice] [key=value] ...

  tessera train experiment=demo                          a small Llama on this machine
  tessera train experiment=demo launch.processes=2       the same on two processes
  tessera train experiment=pretrain_text data.path=DIR   your own text
  dry_run=true                                           check and print the config, start nothing

"""
# What the choice of the folder reads, before the whole config is bound.
_NEEDED_FIRST: dict[str, Any] = {
    "name": str,
    "runs": str,
    "resume": str,
    "max_steps": int | None,
    "max_epochs": float | None,
    "resume_step": int | None,
    "resume_allow": list[str],
    "stop_at": str | None,
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A composed command line, before anything of it was checked."""

    tree: dict[str, Any]
    """The resolved config, `launch` included: what config.yaml stores."""
    is_dry: bool

    def locate(self, num_steps: int) -> Path:
        """Choose the run's folder, refuse what it cannot go on with; return a new attempt in it."""
        folder = self.choose(num_steps)
        return self.write(folder)

    def choose(self, num_steps: int) -> Path:
        """Return the folder of a run so long; ValueError when it is in use or belongs to another
        config."""
        from trainer.checkpoint.commit import committed_steps
        from trainer.checkpoint.lock import refuse_if_locked
        from trainer.directory import CHECKPOINTS, CONFIG, choose_run, read_rewind
        from trainer.drift import check_drift
        from trainer.stored_config import read_stored

        tree = self.tree
        folder = choose_run(tree["runs"], tree["name"], num_steps, tree["resume"])
        refuse_if_locked(folder)
        steps = committed_steps(folder / CHECKPOINTS)
        has_rewound = read_rewind(folder) == tree["resume_step"]
        if tree["resume_step"] is not None and tree["resume_step"] not in steps and not has_rewound:
            raise ValueError(
                f"resume_step={tree['resume_step']} has no checkpoint in {folder / CHECKPOINTS}; "
                f"set it to {f'one of {steps}' if steps else 'null'}"
            )
        if steps and (folder / CONFIG).exists():
            try:
                changes = check_drift(read_stored(folder / CONFIG), tree, tree["resume_allow"])
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
            for key, (was, now) in changes.items():
                if not key.startswith(("resume", "launch", "name", "runs")):
                    print(f"# changed since this run was saved: {key}: {was} -> {now}")
        return folder

    def write(self, folder: Path) -> Path:
        """Make a new attempt in `folder`, with the resolved config in it."""
        import yaml

        from trainer.directory import CONFIG, new_attempt
        from trainer.files import write_text

        attempt = new_attempt(folder)
        write_text(attempt / CONFIG, yaml.safe_dump(self.tree, sort_keys=False))
        return attempt


def main(arguments: list[str]) -> int:
    """Run `tessera train` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE + "\n".join(lines()))
        return 0
    with leaving_on_signals():
        return _train(_request(arguments))


def _train(request: Request) -> int:
    hold(request.tree.get("deterministic"), os.environ)
    end = end_time(request.tree["stop_at"], os.environ)
    if "RANK" in os.environ and not request.is_dry:
        return _train_as_rank(request)
    max_steps = request.tree["max_steps"]
    # Before torch is imported, where that is possible: a refusal is fast.
    folder = None if max_steps is None else request.choose(max_steps)
    run, local = bind_run(request.tree)
    run.check(local.processes)
    run = _settled(run)
    folder = folder or request.choose(run.num_steps)
    if request.is_dry:
        import yaml

        print(yaml.safe_dump(request.tree, sort_keys=False), end="")
        _print_shards(run, local.processes)
        print(
            f"# checked for {local.processes} process(es); would train {run.num_steps} steps in "
            f"{folder}; nothing was started"
        )
        return 0
    # From here on a signal means: stop with 75. It waits until a handler can say so.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    attempt = request.write(folder)
    note_end(end)
    if local.is_supervised:
        return _become_supervisor(local, attempt)
    from launch.worker import execute
    from trainer.distributed import Placement

    return execute(run, Placement(), lambda _: attempt)


def _settled(run: Any) -> Any:
    """Return the run with what its data says, before anything is started."""
    from launch.terminal import configure_logging
    from trainer.settle import settle

    configure_logging(rank=0)  # making the data may take a while
    return settle(run)


def _print_shards(run: Any, processes: int) -> None:
    """Print what the first rank would hold of every weight, where several share the model."""
    from trainer.preview import shards

    if processes == 1:
        return
    print(f"# rank 0 of {processes} would hold:")
    for shard in shards(run, processes):
        times = f" x {shard.count}" if shard.count > 1 else ""
        print(f"#   {shard.name}{times}: {list(shard.local)} of {list(shard.whole)}")


def _request(arguments: list[str]) -> Request:
    options = [word for word in arguments if word.startswith("dry_run=")]
    composed = compose([word for word in arguments if word not in options])
    tree = composed.tree
    if tree.get("name") is None:
        tree["name"] = composed.experiment or "run"
    for key, kind in _NEEDED_FIRST.items():
        if key not in tree:
            raise ValueError(f"{key} is missing; leave the root config's line for it as it is")
        convert(tree[key], kind, key)
    if "launch" not in tree:
        raise ValueError("launch is missing; set launch=local")
    is_dry = options[-1].partition("=")[2].lower() if options else "false"
    if is_dry not in ("true", "false"):
        raise ValueError(f"dry_run={is_dry} is neither true nor false; set it to one of them")
    return Request(tree=tree, is_dry=is_dry == "true")


def bind_run(tree: dict[str, Any]) -> tuple[Any, LocalLaunch]:
    """Return the Run of a composed config, and how it is started."""
    run = bind({key: value for key, value in tree.items() if key != "launch"})
    local = bind(tree["launch"], "launch")
    local.check()
    return run, local


def _train_as_rank(request: Request) -> int:
    """Train as one rank of torchrun: rank 0 chooses the folder for all."""
    from launch.worker import execute, leave, placement_from

    run, local = bind_run(request.tree)
    placement = placement_from(os.environ)
    if local.processes not in (1, placement.world_size):
        raise ValueError(
            f"launch.processes={local.processes} has no effect under torchrun, which started "
            f"{placement.world_size}; leave it out"
        )
    leave(execute(run, placement, request.locate))


def _become_supervisor(local: LocalLaunch, attempt: Path) -> int:
    """Replace this process, which has torch in memory, by a small one that watches the workers."""
    os.environ |= safe_paths(os.environ)
    sys.stdout.flush()
    limits = json.dumps(local.watchdog and vars(local.watchdog))
    words = [str(local.processes), str(attempt), str(local.max_restarts), limits]
    os.execv(sys.executable, [sys.executable, "-m", "launch.supervisor", *words])
