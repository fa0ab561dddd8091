"""Who this process is among the ranks, and the process groups that connect them."""

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where this process stands; launch reads it from torchrun's variables."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    is_distributed: bool = False
    """Whether torchrun's variables are set, so that `env://` finds the other ranks."""
    loopback_port: int | None = None
    """Where rank 0 listens, for this machine alone; None: `env://` says where, and torch listens
    there at every interface, for anybody: it asks nobody who he is."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


class Ranks:
    """The connected ranks: a device, and a gloo control group that never waits for a GPU."""

    def __init__(self, placement: Placement, timeout_seconds: float) -> None:
        self.placement, self.device = placement, placement.device
        timeout = timedelta(seconds=timeout_seconds)
        _set_default_timeout(timeout)
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend = "nccl" if is_cuda else "gloo"
            if placement.loopback_port is not None:
                dist.init_process_group(
                    backend,
                    store=_loopback_store(placement, placement.loopback_port, timeout),
                    rank=placement.rank,
                    world_size=placement.world_size,
                    timeout=timeout,
                    device_id=self.device if is_cuda else None,
                )
            elif placement.is_distributed:
                dist.init_process_group(
                    backend,
                    rank=placement.rank,
                    world_size=placement.world_size,
                    timeout=timeout,
                    device_id=self.device if is_cuda else None,
                )
            else:
                # One process: a store in memory, so that no port is opened.
                # torch.distributed imports the class without re-exporting it to type checkers.
                store = dist.HashStore()  # type: ignore[attr-defined]
                dist.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
        self.control_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")

    def maximum(self, values: list[int]) -> list[int]:
        """Return the maximum of each value over all ranks. Collective: all ranks must call this."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control_group)
        return tensor.tolist()

    def total(self, values: list[int]) -> list[int]:
        """Return the sum of each value over all ranks. Collective: all ranks must call this."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.control_group)
        return tensor.tolist()

    def barrier(self) -> None:
        """Wait for every rank. Collective: every rank must call this."""
        self.maximum([0])

    def broadcast_text(self, text: str) -> str:
        """Return rank 0's text on every rank, as bytes: no pickle. Collective."""
        data = text.encode()
        (length,) = self.maximum([len(data) if self.placement.is_main else 0])
        payload = torch.zeros(length, dtype=torch.uint8)
        if self.placement.is_main and length:
            payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self.control_group)
        return bytes(payload.tolist()).decode()

    def close(self) -> None:
        dist.destroy_process_group()


def _loopback_store(placement: Placement, port: int, timeout: timedelta) -> Any:
    """Return the store through which ranks find each other; rank 0 holds it. Collective."""
    listener = None
    if placement.is_main:
        listener = socket.create_server((LOOPBACK, port), backlog=placement.world_size)
    return dist.TCPStore(  # type: ignore[attr-defined]  # as HashStore above
        LOOPBACK,
        port,
        placement.world_size,
        is_master=placement.is_main,
        timeout=timeout,
        master_listen_fd=listener.detach() if listener else None,
    )


def _set_default_timeout(timeout: timedelta) -> None:
    """Let groups that others make (meshes, DeepSpeed) wait no longer: torch gives them 30 minutes.

    torch has no setting for it. What changes a group afterwards (`_set_pg_timeout`) leaves gloo's
    sends and receives as they were: measured with torch 2.13.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
