"""`tessera train`: compose, check, then train: here, under our supervisor or as a torchrun rank."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch.binding import bind_run, convert
from launch.compose import compose
from launch.deadline import end_time, refuse_past
from launch.determinism import hold
from launch.exit_codes import FINISHED, PREEMPTED
from launch.menu import lines
from launch.protocol import Job, Launch, Supervised
from launch.request import LEASE_SECONDS, Request, once_free
from launch.signals import leaving_on_signals
from launch.start_up import keep_compiled, resting_collector
from launch.truth import truth
from launch.words import refuse_idle, split_off

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


def main(arguments: list[str]) -> int:
    """Run `tessera train` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE + "\n".join(lines()))
        return 0
    with leaving_on_signals(), resting_collector():
        return _train(read_request(arguments))


def _train(request: Request) -> int:
    hold(request.tree.get("deterministic"), os.environ)
    keep_compiled(request.tree.get("engine"), os.environ)
    end = end_time(request.tree["stop_at"], os.environ)
    if not request.is_dry:
        from launch.worker import refuse_lone_rank

        refuse_lone_rank(os.environ)
        if "RANK" in os.environ:
            return _train_as_rank(request)
    refuse_past(request.tree["stop_at"])
    max_steps = request.tree["max_steps"]
    # Before torch is imported, where that is possible: a refusal is fast.
    may_join = bool(request.tree["launch"].get("endpoint"))  # a node that comes to others
    folder = None if max_steps is None else request.choose(max_steps, may_join=may_join)
    run, launch = bind_with_launch(request.tree, request.words)
    run.check(launch.world_size)
    run = settled(run)
    folder = folder or request.choose(run.num_steps, may_join=may_join)
    job = Job(run=run, tree=request.tree, folder=folder, end=end, words=request.words)
    if request.is_dry:
        _show(job, launch)
        return 0
    return launch.start(job)


def _show(job: Job, launch: Launch) -> None:
    """Print the config, and what would be started."""
    import yaml

    print(yaml.safe_dump(job.tree, sort_keys=False), end="")
    _print_shards(job.run, launch.world_size)
    print(launch.preview(job), end="")
    print(
        f"# checked for {launch.world_size} process(es); would train {job.run.num_steps} steps in "
        f"{job.folder}; nothing was started"
    )


def settled(run: Any) -> Any:
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


def read_request(arguments: list[str]) -> Request:
    """Compose a command line; ValueError for what does not fit."""
    own, words = split_off("train", arguments, ["dry_run"])
    tree = compose(words).named
    for key, kind in _NEEDED_FIRST.items():
        if key not in tree:
            raise ValueError(f"{key} is missing; leave the root config's line for it as it is")
        convert(tree[key], kind, key)
    if not isinstance(tree.get("launch"), dict):
        raise ValueError("launch is missing; set launch=local")
    is_dry = truth("dry_run", own.get("dry_run", "false").lower())
    return Request(tree=tree, is_dry=is_dry, words=tuple(words))


def bind_with_launch(tree: dict[str, Any], words: Sequence[str] = ()) -> tuple[Any, Launch]:
    """Return the Run of a config that was composed from `words`, and how it is started."""
    run = bind_run(tree)
    refuse_idle(words, tree)
    launch: Launch = convert(tree["launch"], Launch, "launch")
    launch.check()
    return run, launch


def _train_as_rank(request: Request) -> int:
    """Train as one rank of torchrun: rank 0 chooses the folder for all."""
    from launch.node_watch import AGENT
    from launch.worker import execute, leave, placement_from
    from trainer.parent_death import die_with

    run, launch = bind_with_launch(request.tree, request.words)
    placement = placement_from(os.environ)
    if launch.world_size not in (1, placement.world_size):
        raise ValueError(
            f"launch asks for {launch.world_size} processes, which has no effect under torchrun, "
            f"which started {placement.world_size}; leave it out"
        )
    if isinstance(launch, Supervised) and (launch.restarts or launch.own_limit):
        raise ValueError(
            f"{launch.own_limit or f'launch.restarts={launch.restarts}'} has no effect under "
            "torchrun, which looks after its ranks itself; leave it out"
        )
    under_agent = AGENT in os.environ
    if under_agent:
        die_with(os.getppid())
    code = execute(run, placement, partial(_locate, request, under_agent))
    leave(FINISHED if under_agent and code == PREEMPTED else code)


def _locate(request: Request, is_patient: bool, num_steps: int) -> Path:
    """Return a new attempt; after the loss of a node, wait for the end of its lease of the run."""
    seconds = LEASE_SECONDS if is_patient else 0.0
    attempt = once_free(partial(request.locate, num_steps), seconds)
    assert attempt is not None  # nothing stops the wait but its end
    return attempt
