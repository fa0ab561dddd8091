"""Starts N workers on this machine, forwards signals, and leaves nobody behind.

Standard library only. Stands in for torchrun, which turns every exit code into 1, dies on SIGUSR1
with its workers running on, and leaves orphans when it is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from launch.exit_codes import FINISHED, INTERNAL, MEANINGS, PREEMPTED
from launch.verdict import Witness, judge, read_places, read_records

GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
POLL_SECONDS = 0.05
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# What a worker is told beside torchrun's variables.
ATTEMPT, PARENT = "TESSERA_ATTEMPT", "TESSERA_SUPERVISOR_PID"
WORKER = "launch.worker"


class Supervisor:
    """One start of N workers: processes that run the module `worker`."""

    def __init__(self, processes: int, attempt: Path, worker: str = WORKER) -> None:
        self.attempt, self.processes, self.worker = attempt, processes, worker
        self.workers: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []
        self.failed_at: float | None = None
        self.places: list[dict[str, Any]] = [{}] * processes
        """Where each rank was when the first failure was seen."""
        self.ended: list[int | None] = []
        """Return codes; None where we had to kill."""

    def run(self) -> int:
        """Start the workers, wait for all of them, and return the exit code of the run."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        try:
            self._start()  # with signals blocked, as they were on the way here: workers inherit it
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            self._wait()
        finally:
            self._kill()
        return self._verdict()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signals.append(number)

    def _start(self) -> None:
        from trainer.ports import free_port  # here: the help needs nothing of the trainer

        port = free_port()
        for rank in range(self.processes):
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", self.worker],
                    env=self._environment(rank, port),
                    start_new_session=True,  # the terminal's Ctrl-C reaches us alone: we forward it
                )
            )

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        environment = dict(os.environ)
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes))
        )
        return environment | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            ATTEMPT: str(self.attempt),
            PARENT: str(os.getpid()),
            **safe_paths(os.environ),
        }

    def _wait(self) -> None:
        forwarded = 0
        while any(worker.poll() is None for worker in self.workers):
            time.sleep(POLL_SECONDS)
            while forwarded < len(self.signals):
                self._send(self.signals[forwarded])
                forwarded += 1
            if forwarded > 1:
                return  # a second signal: leave at once
            has_failed = any(w.poll() not in (None, FINISHED, PREEMPTED) for w in self.workers)
            if has_failed and self.failed_at is None:
                self.failed_at = time.monotonic()
                self.places = read_places(self.attempt, self.processes)
            if self.failed_at and time.monotonic() - self.failed_at > GRACE_SECONDS:
                return

    def _send(self, number: int) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def _kill(self) -> None:
        """Kill what is left, with its children."""
        self.ended = [worker.poll() for worker in self.workers]
        for worker in self.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
        for worker in self.workers:
            worker.wait()

    def _verdict(self) -> int:
        records = read_records(self.attempt, self.processes)
        codes = {
            rank: self._code(worker, records[rank]) for rank, worker in enumerate(self.workers)
        }
        if len(set(codes.values())) == 1 and codes[0] in (FINISHED, PREEMPTED):
            return codes[0]
        if len(self.signals) > 1:
            print("tessera: stopped at once by a second signal", file=sys.stderr)
            return 128 + self.signals[-1]
        blamed, sentence = judge(
            [
                Witness(rank=rank, place=place, record=record, return_code=code)
                for rank, (place, record, code) in enumerate(
                    zip(self.places, records, self.ended, strict=True)
                )
            ]
        )
        code = codes[blamed] if codes[blamed] not in (FINISHED, PREEMPTED) else INTERNAL
        print(
            f"tessera: {sentence}; last committed step: {self._last_step()}; "
            f"exit code {code} ({MEANINGS.get(code, '')})",
            file=sys.stderr,
            flush=True,
        )
        return code

    @staticmethod
    def _code(worker: "subprocess.Popen[bytes]", record: dict[str, Any]) -> int:
        """Return a worker's code; leaving with 0 but without a record is a failure."""
        code = worker.returncode
        return code if code in MEANINGS and record.get("code") == code else INTERNAL

    def _last_step(self) -> str:
        folder = self.attempt.parent.parent / "checkpoints"
        steps = sorted(folder.glob("step_????????/MANIFEST.json"))
        return steps[-1].parent.name.removeprefix("step_").lstrip("0") if steps else "none"


def safe_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables under which Python finds our packages, and none in the user's directory.

    A `models/` folder there must not shadow ours.
    """
    ours, known = str(Path(__file__).resolve().parent.parent), environ.get("PYTHONPATH")
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ours}:{known}" if known else ours}


def main() -> int:
    return Supervisor(int(sys.argv[1]), Path(sys.argv[2])).run()


if __name__ == "__main__":
    sys.exit(main())
