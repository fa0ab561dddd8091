"""Starts the jobs of a sweep, so many at a time; none of them outlives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from launch.exit_codes import FINISHED
from launch.group import safe_paths
from launch.signals import on_stop
from launch.sweep_plan import SweepJob

POLL_SECONDS = 0.1
DEVICES = "CUDA_VISIBLE_DEVICES"


class SweepRunner:
    """Runs jobs; each in a session of its own, so that the terminal's Ctrl-C reaches us alone."""

    def __init__(self, slots: int, logs: Path, devices: list[str]) -> None:
        """With several slots the output of each job goes into a file of `logs`.

        `devices` are GPUs that slots share out; none: nothing is said about them.
        """
        self.slots, self.logs, self.devices = slots, logs, devices
        self.signals: list[int] = []
        self.codes: dict[str, int] = {}
        """Exit codes of the jobs that have ended, by name."""
        self._running: dict[int, tuple[SweepJob, subprocess.Popen[bytes], IO[bytes] | None]] = {}

    def run(
        self, jobs: list[SweepJob], *, stop_on_failure: bool, tell: Callable[[str], None]
    ) -> None:
        """Run all jobs, or those that start before a signal, or before one fails."""
        before = on_stop(self._receive)
        waiting, forwarded = list(jobs), 0
        try:
            while waiting or self._running:
                has_failed = any(code != FINISHED for code in self.codes.values())
                if self.signals or (stop_on_failure and has_failed):
                    waiting = []
                while waiting and len(self._running) < self.slots:
                    job = waiting.pop(0)
                    number = len(jobs) - len(waiting)
                    tell(f"job {number} of {len(jobs)}: {job.name}{self._start(job)}")
                time.sleep(POLL_SECONDS)
                for received in self.signals[forwarded:]:
                    self._forward(received)
                    forwarded += 1
                self._reap(tell)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signals.append(number)

    def _start(self, job: SweepJob) -> str:
        """Start a job in a free slot; return where its output is, if it is not here."""
        slot = next(number for number in range(self.slots) if number not in self._running)
        output: IO[bytes] | None = None
        if self.slots > 1:
            self.logs.mkdir(parents=True, exist_ok=True)
            output = open(self.logs / f"{job.name}.txt", "ab")  # noqa: SIM115  until it ends
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.sweep_job", str(os.getpid()), *job.job.words],
            env=self._environment(job, slot), stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        self._running[slot] = job, process, output
        return f", output in {output.name}" if output else ""

    def _environment(self, job: SweepJob, slot: int) -> dict[str, str]:
        environment = dict(os.environ) | safe_paths(os.environ)
        if self.slots > 1:
            cores = len(os.sched_getaffinity(0)) // (self.slots * job.launch.world_size)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        if self.devices:
            share = len(self.devices) // self.slots
            environment[DEVICES] = ",".join(self.devices[slot * share : (slot + 1) * share])
        return environment

    def _forward(self, number: int) -> None:
        for _, process, _ in self._running.values():
            if process.poll() is None:
                process.send_signal(number)

    def _reap(self, tell: Callable[[str], None]) -> None:
        for slot, (job, process, output) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[slot]
            if output:
                output.close()
            self.codes[job.name] = code if code >= 0 else 128 - code
            tell(f"{job.name} ended with exit code {self.codes[job.name]}")
