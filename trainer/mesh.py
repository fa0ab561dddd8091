"""The shape of the ranks: which axes there are and how long each is."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.distributed import Ranks

REST = -1


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Lengths of the data-parallel axes; their product is the number of processes."""

    dp_replicate: int = 1
    """Copies of the model. -1: all ranks that the other axes leave."""
    dp_shard: int = 1
    """Ranks that share one copy of the weights. -1: all ranks that the other axes leave."""

    def __post_init__(self) -> None:
        axes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard}
        for name, length in axes.items():
            if length < 1 and length != REST:
                raise ValueError(
                    f"mesh.{name}={length} is no length; set it to 1 or more, or -1 for the rest"
                )
        if list(axes.values()).count(REST) > 1:
            raise ValueError(
                "mesh.dp_replicate=-1 and mesh.dp_shard=-1 cannot both take the rest; "
                "fix one of them"
            )

    def axes(self, world_size: int) -> dict[str, int]:
        """Return the axis lengths for `world_size` processes; ValueError when they do not fit."""
        axes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard}
        fixed = 1
        for length in axes.values():
            fixed *= length if length != REST else 1
        has_rest = REST in axes.values()
        if world_size % fixed or (not has_rest and world_size != fixed):
            shown = " x ".join(f"{name}={length}" for name, length in axes.items())
            raise ValueError(
                f"mesh {shown} does not fit {world_size} processes; "
                f"start {'a multiple of ' if has_rest else ''}{fixed}, or choose another mesh "
                "(mesh=ddp and mesh=fsdp fit any number)"
            )
        return {
            name: world_size // fixed if length == REST else length for name, length in axes.items()
        }

    def build(self, *, ranks: Ranks) -> "Mesh":
        axes = self.axes(ranks.placement.world_size)
        device_mesh = init_device_mesh(
            ranks.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes)
        )
        return Mesh(device_mesh)


class Mesh:
    """The built mesh, and the flat data-parallel axis that gradients are averaged over."""

    def __init__(self, device_mesh: DeviceMesh) -> None:
        self.device_mesh = device_mesh
        flat = device_mesh["dp_replicate", "dp_shard"]._flatten("dp")
        self.dp_group: dist.ProcessGroup = flat.get_group()
        self.dp_rank, self.dp_size = flat.get_local_rank(), flat.size()
        self.dp_replicate, self.dp_shard = (
            device_mesh["dp_replicate"].size(),
            device_mesh["dp_shard"].size(),
        )

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank writes for its copies: one of each set of equal pieces says yes."""
        return self.device_mesh["dp_replicate"].get_local_rank() == 0

    def describe(self) -> str:
        names = ("dp_replicate", "dp_shard")
        parts = [f"{name} {self.device_mesh[name].size()}" for name in names]
        return " x ".join(parts)
