"""One rank of `tessera doctor`: what its host and device can do, and how it reaches the others."""

import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.examine.finding import RANKS, Finding, from_text, to_text
from launch.examine.folder import examine_folder
from launch.examine.machine import examine_machine

if TYPE_CHECKING:
    from trainer.distributed import Placement, Ranks

TIMEOUT_SECONDS = 90.0
"""For a rank to come, and for each collective: all start within seconds where all is well."""
KERNEL_SECONDS = 300.0
"""For the ranks that compile: 21 s of a free core with nothing compiled before, 168 s were seen on
a machine with ten other programs for each core."""


def examine_ranks(placement: "Placement", runs: Path, *, is_quick: bool) -> Iterator[Finding | str]:
    """Yield findings, the same on every rank but for RANKS; before each stage, what it does.

    Collective.
    """
    from launch.examine.kernels import check_torch
    from launch.last_words import without_advice
    from trainer.distributed import Ranks

    torch_build = check_torch()
    yield torch_build
    problem = _too_many(placement)
    if problem:
        yield problem
        return
    stage = "connecting"
    try:
        yield f"connecting {placement.world_size} rank(s)"
        ranks = Ranks(placement, TIMEOUT_SECONDS)
        for stage, look in _stages(ranks, runs, torch_build, is_quick=is_quick).items():
            yield stage
            yield from look()
    except (RuntimeError, OSError) as error:  # gloo's and NCCL's errors are RuntimeErrors
        text = " ".join(without_advice(str(error)).split())[:300]
        yield Finding(
            check=RANKS, found=f"{stage}, rank {placement.rank}: {text}",
            needed=f"{placement.world_size} ranks that reach each other", is_fine=False,
            remedy="look at the first rank that failed, at firewalls, and at the interface "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        )  # fmt: skip


def _too_many(placement: "Placement") -> Finding | None:
    import torch

    count = torch.cuda.device_count()
    if not count or placement.local_rank < count:
        return None
    return Finding(
        check=RANKS, found=f"rank {placement.rank} is number {placement.local_rank + 1} of its "
        f"host, which shows {count} GPU(s)", needed="a GPU for each rank", is_fine=False,
        remedy=f"start {count} per host",
    )  # fmt: skip


def _stages(ranks: "Ranks", runs: Path, build: Finding, *, is_quick: bool) -> dict[str, Any]:
    """Return what is done, in this order, by what it is called on the way."""
    from launch.examine import hosts, speed
    from launch.examine.gathering import gather

    names = [host for host, _ in gather(ranks, "")]
    leaders = hosts.first_ranks(names)
    stages: dict[str, Any] = {}
    if len(leaders) > 1:
        stages["comparing hosts"] = lambda: _hosts(ranks, runs, build, leaders, is_quick)
        stages["comparing clocks"] = lambda: hosts.compare_clocks(ranks, leaders)
        stages["looking for the folder of runs"] = lambda: hosts.check_shared(ranks, runs, leaders)
    stages["trying kernels"] = lambda: _kernels(ranks, names)
    if not is_quick:
        stages["multiplying matrices"] = lambda: speed.compare_devices(ranks)
        if len(names) > 1:
            stages["timing collectives"] = lambda: speed.time_collectives(ranks)
            stages["timing every pair of ranks"] = lambda: speed.compare_links(ranks)
    return stages


def _hosts(
    ranks: "Ranks", runs: Path, build: Finding, leaders: list[int], is_quick: bool
) -> Iterator[Finding]:
    """Yield what is bad on hosts other than the first, and in what they differ. Collective."""
    from launch.examine.gathering import gather
    from launch.examine.hosts import compare_versions

    mine: list[Finding] = []
    rank = ranks.placement.rank
    if rank in leaders:
        mine = [*examine_machine(), build]
        if rank:  # the first host has been looked at already
            mine += examine_folder(runs, is_quick=is_quick)
    told = gather(ranks, to_text(mine))
    each = [(told[leader][0], from_text(told[leader][1])) for leader in leaders]
    for host, findings in each[1:]:
        for finding in findings:
            if not finding.is_fine:
                yield Finding(**vars(finding) | {"found": f"{finding.found} (on {host})"})
    versions = [(host, [f for f in findings if f.check in _VERSIONED]) for host, findings in each]
    yield Finding(check="hosts", found=", ".join(host for host, _ in each))
    yield from compare_versions(versions)


_VERSIONED = {"python", "torch build"}


def _kernels(ranks: "Ranks", hosts: list[str]) -> Iterator[Finding]:
    """Yield what every host can do; its ranks share the work. Collective."""
    from torch import distributed as dist

    from launch.examine.gathering import gather
    from launch.examine.kernels import names, try_kernel

    rank = ranks.placement.rank
    mates = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    mine = names(ranks.device)[mates.index(rank) :: len(mates)]
    patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=KERNEL_SECONDS))
    found = to_text([try_kernel(name, ranks.device) for name in mine])
    dist.barrier(group=patient)
    told = gather(ranks, found)
    seen: set[tuple[str, str]] = set()
    for host, text in told:
        for finding in from_text(text):
            if (finding.check, finding.found) not in seen:
                seen.add((finding.check, finding.found))
                place = "" if finding.is_fine or len(set(hosts)) == 1 else f" (on {host})"
                yield Finding(**vars(finding) | {"found": finding.found + place})


def main() -> None:
    """Be a rank of this machine alone; rank 0 tells its parent what it finds, line by line.

    The others tell it what went wrong with themselves alone.
    """
    from launch.group import PARENT
    from launch.parent import die_with
    from launch.worker import leave, placement_from

    die_with(int(os.environ[PARENT]))
    runs, quick, port = sys.argv[1:]
    placement = placement_from(os.environ)
    local = type(placement)(**vars(placement) | {"loopback_port": int(port)})
    for found in examine_ranks(local, Path(runs), is_quick=quick == "true"):
        is_own = isinstance(found, Finding) and found.check == RANKS
        if local.is_main or is_own:
            print(json.dumps(found if isinstance(found, str) else vars(found)), flush=True)
    leave(0)


if __name__ == "__main__":
    main()
