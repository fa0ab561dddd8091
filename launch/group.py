"""The workers of one start on this machine: started, told of signals, looked at, and killed.

Standard library only.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.exit_codes import FINISHED, PREEMPTED
from launch.traces import STOPPED, cpu_seconds, read_places, read_records, read_waits, state_of
from launch.verdict import Witness

# What a worker is told beside torchrun's variables.
ATTEMPT, PARENT, PIPE = "TESSERA_ATTEMPT", "TESSERA_SUPERVISOR_PID", "TESSERA_SUPERVISOR_PIPE"
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
"""Of torchrun's variables: how often all ranks were started again by what started them."""
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
ASK = b"?"
STACKS_SECONDS = 1.0  # for ranks to write their stacks, and what they wait for


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a run, and its share of the ranks."""

    processes: int
    """Of each node."""
    rank: int = 0
    count: int = 1
    """Of nodes."""
    address: str = "127.0.0.1"
    """Of node 0, for all others; loopback: nobody else may connect."""

    @property
    def ranks(self) -> range:
        return range(self.rank * self.processes, (self.rank + 1) * self.processes)

    @property
    def world_size(self) -> int:
        return self.count * self.processes


class Group:
    """Processes that run the module `worker`, with the folder of their start in common."""

    lost, refusal = "", ""
    """Other nodes that are gone, and why one started nothing: of a run on several."""
    heard: Sequence[int] = ()
    """Signals that reached other nodes."""

    def __init__(
        self, node: Node, attempt: Path, worker: str, port: int | None = None, restarts: int = 0
    ) -> None:
        """`port` is where rank 0 will listen; None: any free one. `restarts` were before."""
        self.node, self.attempt, self.worker, self.port = node, attempt, worker, port
        self.restarts = restarts
        self.workers: list[subprocess.Popen[bytes]] = []
        self.pipes: list[int] = []
        """Write ends, one per worker: a worker ends when the other end does."""
        self.ended: list[int | None] = []
        """Return codes; None where we had to kill."""
        self.places_then: list[dict[str, Any]] = [{}] * node.processes
        """Where each rank was when the first failure was seen."""
        self.woken: set[int] = set()
        """Workers that were stopped and went on only to be asked: what they do then is no cause."""
        self._oom_kills = oom_kills()

    def start(self) -> None:
        from trainer.ports import free_port  # here: the help needs nothing of the trainer

        port = self.port or free_port()
        for rank in self.node.ranks:
            theirs, mine = os.pipe()
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", self.worker],
                    env=self._environment(rank, port) | {PIPE: str(theirs)},
                    pass_fds=(theirs,),
                    start_new_session=True,  # the terminal's Ctrl-C reaches us alone: we forward it
                )
            )
            os.close(theirs)
            self.pipes.append(mine)

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        node, environment = self.node, dict(os.environ)
        threads = max(1, len(os.sched_getaffinity(0)) // node.processes)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        if node.count == 1:  # all ranks are on this machine: nobody else may connect
            for library in ("GLOO", "NCCL"):
                environment.setdefault(f"{library}_SOCKET_IFNAME", LOOPBACK_INTERFACE)
        return environment | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - node.ranks.start),
            "WORLD_SIZE": str(node.world_size),
            "LOCAL_WORLD_SIZE": str(node.processes),
            "GROUP_RANK": str(node.rank),
            "GROUP_WORLD_SIZE": str(node.count),
            "MASTER_ADDR": node.address,
            "MASTER_PORT": str(port),
            RESTART_COUNT: str(self.restarts),
            ATTEMPT: str(self.attempt),
            PARENT: str(os.getpid()),
            **safe_paths(os.environ),
        }

    @property
    def is_running(self) -> bool:
        return any(worker.poll() is None for worker in self.workers)

    @property
    def has_failed(self) -> bool:
        """Whether a rank has ended that should not have; 0 without a record is no good end."""
        codes = [worker.poll() for worker in self.workers]
        if any(code not in (None, FINISHED, PREEMPTED) for code in codes):
            return True
        if codes.count(None) == len(codes):
            return False
        records = read_records(self.attempt, self.node.ranks)
        return any(
            code is not None and record.get("code") != code
            for code, record in zip(codes, records, strict=True)
        )

    def send(self, number: int) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def places(self) -> list[dict[str, Any]]:
        """Return where each rank is now; its process can be seen before it has said anything."""
        places = read_places(self.attempt, self.node.ranks)
        return [
            place | {
                "pid": worker.pid, "state": state_of(worker.pid),
                "cpu_seconds": cpu_seconds(worker.pid),
            }
            for place, worker in zip(places, self.workers, strict=True)
        ]  # fmt: skip

    def note_failure(self) -> None:
        """Keep where all ranks are now: afterwards they leave."""
        self.places_then = self.places()

    def interrogate(self) -> None:
        """Let hanging ranks leave their stacks, and what they wait for; wake stopped ones for it.

        A signal that was sent to a stopped process is the first thing that it meets. Stacks come
        first: they are read without Python's lock, and what answers the question moves its own.
        """
        self.note_failure()
        left = [rank for rank, worker in enumerate(self.workers) if worker.poll() is None]
        for rank in left:
            self.workers[rank].send_signal(signal.SIGUSR2)
            if self.places_then[rank]["state"] == STOPPED:
                self.woken.add(rank)
                self.workers[rank].send_signal(signal.SIGCONT)
        time.sleep(STACKS_SECONDS / 2)
        for rank in left:
            if rank not in self.woken:
                with suppress(BrokenPipeError):  # it has ended meanwhile
                    os.write(self.pipes[rank], ASK)
        time.sleep(STACKS_SECONDS / 2)

    def kill(self) -> None:
        """Kill what is left, and what a rank that failed has left behind."""
        self.ended = [
            None if rank in self.woken else worker.poll()
            for rank, worker in enumerate(self.workers)
        ]
        for worker in self.workers:
            if worker.poll() not in (FINISHED, PREEMPTED):
                with suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
        for worker in self.workers:
            worker.wait()
        for pipe in self.pipes:
            os.close(pipe)
        self.pipes = []

    def witnesses(self) -> list[Witness]:
        """Return what is known of every rank.

        One that waits in a collective has left no record, but noticed the others' absence."""
        records = read_records(self.attempt, self.node.ranks)
        waits = read_waits(self.attempt, self.node.ranks)
        was_oom = None if self._oom_kills is None else (oom_kills() or 0) > self._oom_kills
        return [
            Witness(
                rank=self.node.ranks[index], place=place, return_code=code,
                record={} if index in self.woken else record or wait,
                was_out_of_memory=was_oom,
            )
            for index, (place, record, wait, code) in enumerate(
                zip(self.places_then, records, waits, self.ended, strict=True)
            )
        ]  # fmt: skip


def safe_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables under which Python finds our packages, and none in the user's directory.

    A `models/` folder there must not shadow ours.
    """
    ours, known = str(Path(__file__).resolve().parent.parent), environ.get("PYTHONPATH")
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ours}:{known}" if known else ours}


def oom_kills() -> int | None:
    """Return how many processes of our cgroup the kernel has killed for memory; None: unknown."""
    try:
        own = dict(
            line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
        )
    except (OSError, ValueError):
        return None
    root = Path("/sys/fs/cgroup")
    files = (
        Path(f"{root}{own.get('', '/')}", "memory.events"),  # version 2
        Path(f"{root}/memory{own.get('memory', '/')}", "memory.oom_control"),  # version 1
    )
    for file in files:
        if file.exists():
            lines = dict(line.split() for line in file.read_text().splitlines())
            return int(lines["oom_kill"]) if "oom_kill" in lines else None
    return None
