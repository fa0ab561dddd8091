"""A worker of the real supervisor that trains nothing and needs no torch: it starts in 0.1 s.

Places, records, stacks, the pipe to the supervisor and committed checkpoints are the real ones.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL, PREEMPTED
from launch.group import ATTEMPT, PARENT, PIPE
from launch.last_words import leave_record
from launch.parent import Stacks, die_with, obey
from launch.signals import STOP_SIGNALS
from trainer.checkpoint import commit
from trainer.checkpoint.commit import committed_steps
from trainer.directory import CHECKPOINTS
from trainer.whereabouts import Whereabouts

WORKER = "tests.faults.plain_worker"
STEP_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the ranks of a run do, in all of its starts."""

    steps: int = 8
    save_every: int = 3
    kind: str = ""
    """What goes wrong on rank 1 in one step."""
    step: int = 5
    starts: int = 1
    """In how many starts it does."""
    moves: bool = False
    """Whether it does so one step later in each start."""

    def strikes(self, step: int, start: int) -> bool:
        at = self.step + (start - 1 if self.moves else 0)
        return bool(self.kind) and step == at and start <= self.starts

    def write(self, attempt: Path) -> None:
        attempt.mkdir(parents=True)
        (attempt / "config.yaml").write_text(json.dumps(asdict(self)))


def save(folder: Path, step: int) -> None:
    final = commit.step_folder(folder, step)
    staging = final.with_suffix(".tmp")
    staging.mkdir()
    commit.commit(staging, final, {"step": step, "generation": 1}, [], lambda: None)


def await_others(attempt: Path) -> None:
    """Begin together, as ranks that connect do: a busy machine starts them seconds apart."""
    deadline = time.monotonic() + 120.0
    while len(list(attempt.glob("place.*"))) < int(os.environ["WORLD_SIZE"]):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)


def strike(kind: str, rank: int, attempt: Path, place: dict[str, object]) -> None:
    """End or hang as rank 1 does; rank 0 notices that, or waits for a rank that does not come."""
    record = {"code": INTERNAL, "reason": kind, "time": time.time(), **place}
    if rank == 0:
        time.sleep(600.0 if kind in ("stop", "hang") else 0.2)
        leave_record(attempt, 0, record | {"is_consequence": True})
        os._exit(INTERNAL)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        time.sleep(600.0)
    if kind == "exit 0":
        os._exit(FINISHED)
    if kind == "bad config":
        record |= {"code": BAD_CONFIG, "is_final": True}
    if kind == "out of memory":
        record |= {"is_oom": True}
    leave_record(attempt, 1, record)
    os._exit(int(str(record["code"])))


def main() -> None:
    if "orphan" not in sys.argv:
        die_with(int(os.environ[PARENT]))
    attempt, rank = Path(os.environ[ATTEMPT]), int(os.environ["RANK"])
    tree = yaml.safe_load((attempt / "config.yaml").read_text())
    plan = Plan(**{each.name: tree[each.name] for each in fields(Plan)})
    checkpoints = attempt.parent.parent / CHECKPOINTS
    stopped: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: stopped.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    whereabouts = Whereabouts()
    obey(int(os.environ[PIPE]), attempt, rank, whereabouts)
    stacks = Stacks(attempt, rank)
    whereabouts.share(attempt, rank)
    await_others(attempt)
    first = max(committed_steps(checkpoints), default=0) + 1
    for step in range(first, plan.steps + 1):
        whereabouts.enter("train_step", step)
        time.sleep(STEP_SECONDS)
        if plan.strikes(step, int(attempt.name)):
            strike(plan.kind, rank, attempt, whereabouts.place)
        whereabouts.enter("control")
        if rank == 0 and (step % plan.save_every == 0 or stopped):
            checkpoints.mkdir(exist_ok=True)
            save(checkpoints, step)
        if stopped:
            break
    code = PREEMPTED if stopped else FINISHED
    reason = f"stopped by {signal.Signals(stopped[0]).name}" if stopped else "finished"
    leave_record(attempt, rank, {"code": code, "reason": reason, "time": time.time()})
    stacks.close()
    os._exit(code)


if __name__ == "__main__":
    main()
