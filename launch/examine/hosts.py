"""Whether the hosts of a job agree: versions, clocks, and the folder of runs."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.examine.finding import Finding
from launch.examine.folder import MAX_SKEW_SECONDS, PROBE, existing
from launch.examine.gathering import gather
from trainer.distributed import Ranks

TRIES = 8
PATIENCE_SECONDS = 5.0
"""For a file to be seen elsewhere: NFS clients remember for 3 s what they saw of a folder."""


def first_ranks(hosts: Sequence[str]) -> list[int]:
    """Return the first rank of each host."""
    return [rank for rank, host in enumerate(hosts) if host not in hosts[:rank]]


def compare_versions(told: Sequence[tuple[str, list[Finding]]]) -> list[Finding]:
    """Name packages that not all hosts have in the same version; `told` is one entry per host."""
    found = []
    here, mine = told[0]
    versions = {each.check: each.found for each in mine}
    for host, findings in told[1:]:
        other = {each.check: each.found for each in findings}
        for name in sorted(versions.keys() | other.keys()):
            a, b = versions.get(name, "none"), other.get(name, "none")
            if a != b:
                found.append(Finding(
                    check="versions differ", found=f"{name} {a} on {here}, {b} on {host}",
                    needed="the same on all hosts", is_fine=False,
                    remedy="install the same environment everywhere, or put it on a shared disk",
                ))  # fmt: skip
    return found


def compare_clocks(ranks: Ranks, leaders: Sequence[int]) -> list[Finding]:
    """Ask each host for its time; the answer that came fastest counts. Collective."""
    rank = ranks.placement.rank
    worst, where = 0.0, 0
    for leader in leaders[1:]:
        if rank == 0:
            skew = min(_ask(ranks, leader) for _ in range(TRIES))[1]
            if abs(skew) >= abs(worst):
                worst, where = skew, leader
        elif rank == leader:
            for _ in range(TRIES):
                _answer(ranks)
    (_, (worst, where)), *_ = told = gather(ranks, [worst, where])
    return [Finding(
        check="clocks of hosts", found=f"{abs(worst):.3f} s apart at most ({told[where][0]})",
        needed=f"<= {MAX_SKEW_SECONDS:.0f} s", is_fine=abs(worst) <= MAX_SKEW_SECONDS,
        remedy="let all hosts follow the same time server (chrony or ntpd)",
    )]  # fmt: skip


def _ask(ranks: Ranks, leader: int) -> tuple[float, float]:
    """Return how long the answer took, and how far the other clock is ahead."""
    clock = torch.zeros(1, dtype=torch.float64)
    begin = time.time()
    dist.send(clock, leader, group=ranks.control_group)
    dist.recv(clock, leader, group=ranks.control_group)
    end = time.time()
    return end - begin, float(clock) - (begin + end) / 2


def _answer(ranks: Ranks) -> None:
    clock = torch.zeros(1, dtype=torch.float64)
    dist.recv(clock, 0, group=ranks.control_group)
    clock.fill_(time.time())
    dist.send(clock, 0, group=ranks.control_group)


def check_shared(ranks: Ranks, runs: Path, leaders: Sequence[int]) -> list[Finding]:
    """Let rank 0 write a file, and the other hosts look for it. Collective."""
    rank = ranks.placement.rank
    name = ranks.broadcast_text(f"{PROBE}{time.time_ns()}" if rank == 0 else "")
    path = existing(runs) / name
    try:
        if rank == 0:
            with suppress(OSError):  # then nobody sees it, rank 0 neither
                path.touch()
        ranks.barrier()
        told: list[tuple[str, Any]] = gather(ranks, rank not in leaders or _is_seen(path))
    finally:
        if rank == 0:
            path.unlink(missing_ok=True)
    blind = [host for host, has_seen in told if not has_seen]
    return [Finding(
        check="shared folder", found=f"{path.parent} of {told[0][0]} is another one on "
        f"{', '.join(blind)}" if blind else f"{path.parent} is the same on {len(leaders)} hosts",
        needed="one folder for all hosts", is_fine=not blind,
        remedy="set runs=DIR on a disk that all hosts mount (NFS, Lustre, ..)",
    )]  # fmt: skip


def _is_seen(path: Path) -> bool:
    end = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
