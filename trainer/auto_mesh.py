"""`mesh=auto`: the mesh with the fewest messages whose memory fits, and the reason for it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.mesh import MeshSpec

MASTER_BYTES = 16  # of fp32 weight, gradient and Adam's two moments, for each parameter
SHARE = 0.6  # of the memory, for weights and what belongs to them: the rest is for activations
NODE = 8  # ranks with fast links between them, where the launcher does not say


@dataclass(frozen=True, kw_only=True)
class AutoMesh(MeshSpec):
    """Chooses dp_replicate and dp_shard; pp, cp and tp stay as they are set."""

    memory_gib: float | None = None
    """Memory of one rank; None: what this machine has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dp_replicate, self.dp_shard) != (1, 1):
            raise ValueError(
                "mesh=auto chooses mesh.dp_replicate and mesh.dp_shard; leave them out, or take "
                "another mesh"
            )
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ValueError(f"mesh.memory_gib={self.memory_gib} is not positive; set it above 0")

    def chosen(
        self, *, num_parameters: int, world_size: int, shards_itself: bool
    ) -> tuple[MeshSpec, str]:
        """Return a mesh for `world_size` processes, and why; ValueError where none fits.

        `shards_itself`: the engine does, over plain copies (DeepSpeed).
        """
        rest, odd = divmod(world_size, self.pp * self.cp * self.tp)
        if odd:
            raise ValueError(
                f"mesh.pp={self.pp}, cp={self.cp} and tp={self.tp} need a multiple of "
                f"{self.pp * self.cp * self.tp} processes, found {world_size}"
            )
        memory = self.memory_gib or local_memory_gib(world_size)
        needed = num_parameters * MASTER_BYTES / 2**30 / (self.pp * self.tp)
        budget = SHARE * memory
        facts = f"{needed:.2f} GiB of weights and optimizer, {memory:.1f} GiB per rank"
        if rest == 1 or shards_itself or needed <= budget:
            return self._spec(rest, 1), f"copies: {facts}"
        fitting = [n for n in range(2, rest + 1) if rest % n == 0 and needed / n <= budget]
        if not fitting:
            raise ValueError(
                f"mesh=auto: {facts}; even shared by {rest} ranks that is more than {SHARE:.0%} of "
                "it; start more processes, set mesh.tp, or offload with engine=deepspeed"
            )
        # As many as have fast links between them: fewer bytes each, no slow messages per block.
        shard = max([n for n in fitting if n * self.cp * self.tp <= NODE] or [min(fitting)])
        return self._spec(rest // shard, shard), f"shared by {shard} ranks: {facts}"

    def _spec(self, dp_replicate: int, dp_shard: int) -> MeshSpec:
        return MeshSpec(
            pp=self.pp, dp_replicate=dp_replicate, dp_shard=dp_shard, cp=self.cp, tp=self.tp
        )


def local_memory_gib(world_size: int) -> float:
    """Return the memory of this rank's GPU, or its share of this machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    # In total, not what is free: every rank must come to the same choice.
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemTotal:")[2].split()[0]) / 2**20 / world_size  # Linux counts KiB
