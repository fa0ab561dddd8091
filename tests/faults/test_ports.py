"""Ranks of one machine listen at the loopback interface alone: torch asks nobody who he is."""

import os
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import torch

from launch.group import ATTEMPT, LOOPBACK_INTERFACE, Group, Node
from launch.worker import placement_from
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from trainer.distributed import Placement, Ranks
from trainer.ports import free_port


def listening() -> list[str]:
    """Return the addresses at which this process listens."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    own = {os.readlink(link) for link in links if link.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                raw = bytes.fromhex(words[1].partition(":")[0])
                parts = [raw[n : n + 4][::-1] for n in range(0, len(raw), 4)]
                found.append(str(ip_address(b"".join(parts))))
    return found


def addresses(placement: Placement, port: int) -> list[str]:
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
    ranks = Ranks(replace(placement, loopback_port=port), COLLECTIVE_SECONDS)
    assert ranks.total([1]) == [2]
    torch.distributed.new_group(backend="gloo")
    return listening()


def test_no_rank_listens_at_an_interface_that_others_reach() -> None:
    found = run_ranks(2, addresses, free_port())
    assert all(len(own) > 1 for own in found)  # the store and gloo; gloo
    assert {address for own in found for address in own} == {"127.0.0.1"}


def test_workers_of_the_supervisor_are_told_so(tmp_path: Path) -> None:
    environ = Group(Node(processes=2), tmp_path, "launch.worker")._environment(1, 20_001)
    assert (environ["GLOO_SOCKET_IFNAME"], environ["NCCL_SOCKET_IFNAME"]) == (
        LOOPBACK_INTERFACE, LOOPBACK_INTERFACE,
    )  # fmt: skip
    assert placement_from(environ).loopback_port == 20_001
    del environ[ATTEMPT]  # torchrun's ranks, which may be on several machines
    assert placement_from(environ).loopback_port is None
