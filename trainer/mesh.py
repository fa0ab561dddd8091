"""The shape of the ranks: which axes there are and how long each is."""

from dataclasses import dataclass, fields
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.distributed import Ranks

REST = -1


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Lengths of the axes, from the slowest links to the fastest; their product is all ranks."""

    pp: int = 1
    """Pipeline stages: ranks that hold consecutive layers."""
    dp_replicate: int = 1
    """Copies of the model. -1: all ranks that the other axes leave."""
    dp_shard: int = 1
    """Ranks that share one copy of the weights. -1: all ranks that the other axes leave."""
    cp: int = 1
    """Context parallelism: ranks that share the tokens of each row."""
    tp: int = 1
    """Tensor parallelism: ranks that share heads, feed-forward width and vocabulary."""

    def __post_init__(self) -> None:
        for name, length in self.lengths.items():
            may_take_rest = name.startswith("dp_")
            if length < 1 and not (may_take_rest and length == REST):
                rest = ", or -1 for the rest" if may_take_rest else ""
                raise ValueError(f"mesh.{name}={length} is no length; set it to 1 or more{rest}")
        if list(self.lengths.values()).count(REST) > 1:
            raise ValueError(
                "mesh.dp_replicate=-1 and mesh.dp_shard=-1 cannot both take the rest; "
                "fix one of them"
            )

    @property
    def lengths(self) -> dict[str, int]:
        """The axis lengths as set, by name, in the order of the mesh."""
        return {field.name: getattr(self, field.name) for field in fields(MeshSpec)}

    def axes(self, world_size: int) -> dict[str, int]:
        """Return the axis lengths for `world_size` processes; ValueError when they do not fit."""
        axes = self.lengths
        fixed = prod(length for length in axes.values() if length != REST)
        has_rest = REST in axes.values()
        if world_size % fixed or (not has_rest and world_size != fixed):
            shown = " x ".join(f"{name}={length}" for name, length in axes.items() if length != 1)
            raise ValueError(
                f"mesh {shown or 'single'} does not fit {world_size} processes; "
                f"start {'a multiple of ' if has_rest else ''}{fixed}, or choose another mesh "
                "(mesh=ddp and mesh=fsdp fit any number)"
            )
        return {
            name: world_size // fixed if length == REST else length for name, length in axes.items()
        }

    def chosen(
        self, *, num_parameters: int, world_size: int, shards_itself: bool
    ) -> tuple["MeshSpec", str]:
        """Return the mesh to use, and why it was chosen or nothing."""
        return self, ""

    def build(self, *, ranks: Ranks) -> "Mesh":
        return Mesh(ranks.device.type, self.axes(ranks.placement.world_size))


class Mesh:
    """The built mesh, and the groups of ranks that its axes form together."""

    def __init__(self, device_type: str, axes: dict[str, int]) -> None:
        """`axes` are the lengths that MeshSpec.axes gives; their product is all ranks."""
        self.lengths = axes
        names = ("pp", "dp_replicate", "shard", "tp")
        shape = (
            axes["pp"], axes["dp_replicate"], axes["dp_shard"] * axes["cp"], axes["tp"],
        )  # fmt: skip
        self.root = init_device_mesh(device_type, shape, mesh_dim_names=names)
        self.shard = self.root["shard"]
        """Ranks that share one copy of the weights where dp_shard > 1."""
        inner = self.shard._unflatten(0, (axes["dp_shard"], axes["cp"]), ("dp_shard", "cp"))
        self._axes = {name: self.root[name] for name in ("pp", "dp_replicate", "tp")}
        self._axes |= {name: inner[name] for name in ("dp_shard", "cp")}
        # Once: torch takes 20 us to say it, and every step asks.
        self._ranks = {name: mesh.get_local_rank() for name, mesh in self._axes.items()}
        self._tp_copies: dict[int, dist.ProcessGroup] = {}
        self.dp_size = axes["dp_replicate"] * axes["dp_shard"]
        self.dp_rank = self.rank("dp_replicate") * axes["dp_shard"] + self.rank("dp_shard")
        """Which share of the rows, of dp_size."""
        self.token_size = self.dp_size * axes["cp"]
        self.token_group = self.root["dp_replicate", "shard"]._flatten("tokens").get_group()
        """Ranks that see different tokens: sums of losses and gradients run over them."""
        self.token_rank = dist.get_rank(self.token_group)

    def size(self, axis: str) -> int:
        return self.lengths[axis]

    def rank(self, axis: str) -> int:
        return self._ranks[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        return self._axes[axis].get_group()

    @property
    def row_multiple(self) -> int:
        """What the length of a row must divide by."""
        return 2 * self.size("cp") * self.size("tp")

    @property
    def is_sharded(self) -> bool:
        return self.size("dp_shard") > 1

    @property
    def shard_mesh(self) -> DeviceMesh:
        """What FSDP2 works on: the ranks of one copy, and the copies if there are several."""
        several = self.size("dp_replicate") > 1
        return self.root["dp_replicate", "shard"] if several else self.shard

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank's copy of the model, of all equal ones, is the one that writes."""
        return self.rank("dp_replicate") == 0 and (self.is_sharded or self.rank("cp") == 0)

    @property
    def is_first_holder(self) -> bool:
        """Whether this rank, of those of its copy that hold one layer, answers for scalars."""
        return self.rank("tp") == 0 and (not self.is_sharded or self.shard.get_local_rank() == 0)

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks that see different tokens, in place. Collective."""
        if self.token_size > 1:
            dist.all_reduce(tensor, group=self.token_group)
        return tensor

    def in_order(self, values: Tensor) -> Tensor:
        """Return (T * ranks, ..) values of all ranks that see different tokens.

        Those of each rank's t-th micro-batch stand before those of the next ones. Collective.
        """
        if self.token_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.token_size)]
        dist.all_gather(parts, values.contiguous(), group=self.token_group)
        return torch.stack(parts, dim=1).flatten(0, 1)

    def of_any_length(self, rows: Tensor) -> list[Tensor]:
        """Return the (n, ..) rows of each rank that sees different tokens; n may differ.

        Collective.
        """
        if self.token_size == 1:
            return [rows]
        length = torch.tensor([len(rows)], device=rows.device)
        lengths = [torch.empty_like(length) for _ in range(self.token_size)]
        dist.all_gather(lengths, length, group=self.token_group)
        sizes = [int(one) for one in lengths]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.token_group)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def tp_copies(self, copies: int) -> dist.ProcessGroup:
        """Return the `copies` tensor-parallel ranks in a row that this rank is among.

        Collective over all ranks.
        """
        shape = (self.size("tp") // copies, copies)
        return (
            self.root["tp"]._unflatten(0, shape, ("tp_heads", "tp_copies"))["tp_copies"].get_group()
        )

    def pp_ends(self) -> dist.ProcessGroup:
        """Return the first and the last stage of this rank's pipeline. Collective over all ranks.

        On a stage in between it is a group without this rank.
        """
        columns = self.root.mesh.flatten(1).T.tolist()
        groups = [(column, dist.new_group([column[0], column[-1]])) for column in columns]
        return next(group for column, group in groups if dist.get_rank() in column)

    def stage_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that hold the same layers, cut or copied; None: this rank alone."""
        return self._group_of(("dp_replicate", "shard", "tp"))

    def copy_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that hold one copy of the model together; None: this rank alone."""
        return self._group_of(("pp", "shard", "tp") if self.is_sharded else ("pp", "tp"))

    def _group_of(self, names: tuple[str, ...]) -> dist.ProcessGroup | None:
        axes = tuple(name for name in names if self.root[name].size() > 1)
        if len(axes) < 2:
            return self.root[axes[0]].get_group() if axes else None
        return self.root[axes]._flatten("_".join(axes)).get_group()

    def describe(self) -> str:
        used = [f"{name} {length}" for name, length in self.lengths.items() if length > 1]
        return " x ".join(used) or "one process"
