"""The ranks of `tessera doctor` on this machine: processes, whose findings come as they are made.

Standard library only: torch is imported by them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

from launch.examine.finding import RANKS, Finding
from launch.group import LOOPBACK_INTERFACE, PARENT, safe_paths

LIMIT_SECONDS = 600.0


def default_processes(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Return one per GPU that may be used, else two where there are two cores."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip():
        return len(visible.split(","))
    gpus = [path for path in devices.glob("nvidia*") if path.name[6:].isdigit()]
    if gpus and visible is None:
        return len(gpus)
    return min(2, len(os.sched_getaffinity(0)))


def examine_here(processes: int, runs: Path, *, is_quick: bool) -> Iterator[Finding | str]:
    """Start ranks, pass on what they find, and say which of them failed; none is left behind."""
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "launch.examine.rank", str(runs), str(is_quick).lower(),
                 environment["MASTER_PORT"]],
                env=environment, stdout=subprocess.PIPE, stderr=error,
            )
            for environment, error in zip(_environments(processes), errors, strict=True)
        ]  # fmt: skip
        timer, deadline = Timer(LIMIT_SECONDS, _kill, [ranks]), time.monotonic() + LIMIT_SECONDS
        timer.start()
        stage = "starting"
        try:
            assert ranks[0].stdout
            for text in ranks[0].stdout:
                said = json.loads(text)
                stage = said if isinstance(said, str) else stage
                yield said if isinstance(said, str) else Finding(**said)
            for rank in ranks:
                rank.wait()
        finally:
            timer.cancel()
            _kill(ranks)
            told = [rank.communicate()[0] for rank in ranks]
        if time.monotonic() > deadline:
            yield _late(stage)
            return
        for text in b"".join(told[1:]).splitlines():
            yield Finding(**json.loads(text))
        for number, (rank, error) in enumerate(zip(ranks, errors, strict=True)):
            if rank.returncode:
                error.seek(0)
                yield _ended(number, rank.returncode, error.read().decode(errors="replace"))


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()


def _ended(rank: int, code: int, text: str) -> Finding:
    last = (text.strip().splitlines() or ["it said nothing"])[-1]
    return Finding(
        check=RANKS, found=f"rank {rank} ended with code {code}: {last[:300]}",
        needed="every rank to come to its end", is_fine=False,
        remedy="start it again with processes=1, and see whether that works",
    )  # fmt: skip


def _late(stage: str) -> Finding:
    return Finding(
        check=RANKS, found=f"{stage}: not done after {LIMIT_SECONDS:.0f} s",
        needed="every rank to come to its end", is_fine=False,
        remedy="see what else runs here (the load), and whether a device hangs (nvidia-smi)",
    )  # fmt: skip


def _environments(processes: int) -> Iterator[dict[str, str]]:
    from trainer.ports import free_port

    port = str(free_port())
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    for rank in range(processes):
        yield {
            "OMP_NUM_THREADS": threads,
            "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
            "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE,
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            PARENT: str(os.getpid()),
            **safe_paths(os.environ),
        }  # fmt: skip
