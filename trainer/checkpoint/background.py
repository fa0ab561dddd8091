"""This rank's writer process, and the memory through which it gets what it writes."""

import json
import mmap
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import xxhash

from trainer.checkpoint import writer
from trainer.checkpoint.writer import Job, Result
from trainer.errors import StorageError
from trainer.sizes import in_memory

_PATHS = [str(Path(writer.__file__).parents[2]), str(Path(xxhash.__file__).parents[1])]
_START = (
    f"import sys; sys.path[:0] = {_PATHS!r}; from trainer.checkpoint.writer import main; main()"
)
# The writer ends with its rank, and not by itself when a whole group of processes is signalled.
_LEFT_TO_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PIPE_BYTES = 1 << 20  # a job that does not fit in waits for the process to start


class Flight(NamedTuple):
    """The save that is under way."""

    number: int
    """Of this start: what the ranks say of one save is never taken for the next one's."""
    step: int
    seconds_paused: float
    writes: bool
    """Whether this rank writes a part."""


class Writer:
    """Starts the process with the first job, keeps it, and starts another one after a failure."""

    def __init__(self, kept_open: list[int]) -> None:
        """`kept_open`: descriptors that the process holds as long as it lives, such as a lock."""
        self._kept_open = kept_open
        self._descriptor = os.memfd_create("checkpoint")  # has no name that could survive us
        self._map: mmap.mmap | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0

    def memory(self, num_bytes: int) -> mmap.mmap:
        """Return shared memory of at least that size: the same each time, unless it must grow."""
        if self._map is None or num_bytes > len(self._map):
            try:
                os.ftruncate(self._descriptor, num_bytes)
                self._map = mmap.mmap(self._descriptor, num_bytes)
            except OSError as error:
                raise StorageError(
                    f"no shared memory of {in_memory(num_bytes)} for a copy of what is saved: "
                    f"{error.strerror}; free memory, or raise the limit (ulimit -f)"
                ) from error
        return self._map

    def submit(self, job: Job) -> None:
        """Hand a job over; OSError where no process can be started."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        self._number += 1
        line = memoryview(f"{json.dumps([self._number, job])}\n".encode())
        while line:
            line = line[self._process.stdin.write(line) :]

    def _start(self) -> "subprocess.Popen[bytes]":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_RANK)  # is inherited
        try:
            return subprocess.Popen(
                [sys.executable, "-S", "-I", "-c", _START, str(self._descriptor), str(os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pipesize=PIPE_BYTES,
                pass_fds=[self._descriptor, *self._kept_open],
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def result(self, seconds: float) -> Result | None:
        """Return how the job ended, after waiting so long; None: it goes on."""
        assert self._process is not None
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], seconds)[0]:
            if not (line := self._process.stdout.readline()):
                code = self._process.wait()
                return Result(error=f"the process that writes checkpoints ended with code {code}")
            number, *fields = json.loads(line)
            if number == self._number:  # else of the job before: rank 0 committed what it wrote
                return Result(*fields)
        return None

    def kill(self) -> None:
        """End the process at once, whatever it does; what it wrote is debris."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
