"""What every rank has to say, on all of them."""

import json
import socket
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import Ranks


def gather(ranks: Ranks, value: Any) -> list[tuple[str, Any]]:
    """Return each rank's host and value, plain JSON, in their order. Collective."""
    data = json.dumps([socket.gethostname(), value]).encode()
    (length,) = ranks.maximum([len(data)])
    mine = torch.frombuffer(bytearray(data.ljust(length)), dtype=torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(ranks.placement.world_size)]
    dist.all_gather(parts, mine, group=ranks.control_group)
    return [(host, said) for host, said in (json.loads(bytes(part.tolist())) for part in parts)]
