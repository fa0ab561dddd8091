"""A tiny run in which one rank does something wrong at one step: test-side specs, real code paths.

`python -m tests.faults.injected` is a worker of the supervisor that reads the fault from the folder
of its start; with `N ATTEMPT` behind, it is a supervisor of N such workers.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.group import ATTEMPT, PARENT
from launch.supervisor import Supervisor
from tests.runs import tiny_run
from trainer.callbacks.protocol import Callback
from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import Step, StepLoader
from trainer.data.pretraining import PretrainingData
from trainer.distributed import Placement
from trainer.engines.native import NativeEngine
from trainer.engines.native_trainer import NativeTrainer
from trainer.engines.protocol import Surroundings
from trainer.parallel.laid_out import LaidOut
from trainer.progress import Progress
from trainer.protocols import StepResult
from trainer.run import Run

WORKER = "tests.faults.injected"
STEP = 3


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong on rank `rank` at step 3: in the data, in train_step or at the log point."""

    kind: str
    phase: str
    rank: int = 1
    seconds: float = 60.0
    """How long a sleep takes."""

    def strike(self, phase: str, step: int) -> None:
        """Do it, if this is the place; a collective is skipped where the others have one more."""
        if (phase, step) != (self.phase, STEP):
            return
        is_here = dist.get_rank() == self.rank
        if self.kind == "skipped collective" and not is_here:
            # Not of the kind that the others issue next: where sizes differ, gloo ends the process.
            dist.broadcast(torch.ones(5), src=self.rank)
        if not is_here:
            return
        if self.kind == "skipped collective":
            time.sleep(2.0)  # of two ranks, the one that waited longest is believed
        if self.kind == "error":
            raise ArithmeticError("broken on purpose")
        if self.kind == "sleep":
            time.sleep(self.seconds)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "additional collective":
            dist.all_reduce(torch.ones(7))


@dataclass(frozen=True, kw_only=True)
class FaultyLoader(StepLoader):
    """Strikes before it reads."""

    fault: Fault

    def step(self, number: int) -> Step:
        self.fault.strike("data", number + 1)
        return super().step(number)


@dataclass(frozen=True, kw_only=True)
class FaultyData(PretrainingData):
    """Builds the faulty loader."""

    fault: Fault

    def build(self, **settings: Any) -> tuple[StepLoader, EvalLoader | None]:
        loader, eval_loader = super().build(**settings)
        return FaultyLoader(**vars(loader), fault=self.fault), eval_loader


@dataclass(frozen=True, kw_only=True)
class FaultyEngine(NativeEngine):
    """Builds the native engine, which strikes before it trains."""

    fault: Fault

    def build(self, laid_out: LaidOut, around: Surroundings) -> NativeTrainer:
        engine = super().build(laid_out, around)
        train_step = engine.train_step

        def faulty_step(step: int, micro_batches: list[Any], num_tokens: int) -> StepResult:
            self.fault.strike("train_step", step)
            return train_step(step, micro_batches, num_tokens)

        engine.train_step = faulty_step  # type: ignore[method-assign]
        return engine


@dataclass(frozen=True, kw_only=True)
class FaultyCallback(Callback):
    """Strikes at the log point: its own spec and callback."""

    fault: Fault

    def build(self) -> "FaultyCallback":
        return self

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        self.fault.strike("log", progress.step)


def faulty_run(cache: Path, fault: Fault, timeout_seconds: float) -> Run:
    run = tiny_run(cache, timeout_seconds=timeout_seconds, data_micro_rows=1)
    return replace(
        run,
        data=FaultyData(**vars(run.data), fault=fault),
        engine=FaultyEngine(fault=fault),
        callbacks={"fault": FaultyCallback(fault=fault)},
    )


def prepare(attempt: Path, cache: Path, fault: Fault, timeout_seconds: float) -> None:
    """Leave the fault where the workers look for it."""
    attempt.mkdir(parents=True)
    settings = {"cache": str(cache), "fault": asdict(fault), "timeout_seconds": timeout_seconds}
    (attempt / "config.yaml").write_text(json.dumps(settings))


def execute_fault(placement: Placement, attempt: Path) -> int:
    """Train as one rank, up to its exit record; return the exit code."""
    from launch.worker import execute

    torch.set_num_threads(1)
    settings = json.loads((attempt / "config.yaml").read_text())
    run = faulty_run(
        Path(settings["cache"]), Fault(**settings["fault"]), settings["timeout_seconds"]
    )
    return execute(run, placement, lambda _: attempt)


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(Supervisor(int(sys.argv[1]), Path(sys.argv[2]), worker=WORKER).run())
    from launch.parent import die_with
    from launch.worker import leave, placement_from

    die_with(int(os.environ[PARENT]))
    leave(execute_fault(placement_from(os.environ), Path(os.environ[ATTEMPT])))


if __name__ == "__main__":
    main()
