"""FSDP2: which modules are units, and how long gathered weights and whole gradients stay."""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

from models.layout import Layout
from trainer.mesh import Mesh
from trainer.precision import Precision

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

LM_HEAD = "lm_head"
FORWARD, BACKWARD, MICRO_BATCH, STEP = "forward", "backward", "micro_batch", "step"
_KNOWN = {"reshard_after": (FORWARD, BACKWARD, STEP), "gradient_sync": (STEP, MICRO_BATCH)}


@dataclass(frozen=True, kw_only=True)
class FullySharded:
    """Memory against messages, where mesh.dp_shard shards weights. The numbers do not change."""

    reshard_after: str = FORWARD
    """When a unit's gathered weights are let go: forward (each pass gathers twice), backward (once;
    all weights in the compute dtype are there in between), step (once for all micro-batches)."""
    gradient_sync: str = STEP
    """When gradients are reduced: step (one message, but each rank holds all gradients whole, in
    the master dtype, between micro-batches), micro_batch (a message each, nothing whole stays)."""
    prefetch: int = 0
    """How many blocks ahead weights are gathered; 0: FSDP2's own order, the next one."""

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"engine.fsdp.{name}={value!r} is unknown; set it to one of {', '.join(known)}"
                )
        if self.prefetch < 0:
            raise ValueError(f"engine.fsdp.prefetch={self.prefetch} is negative; set it to 0")

    def check(self, layout: Layout, axes: dict[str, int]) -> None:
        """Raise ValueError for a setting that has no effect on a mesh of these `axes`."""
        changed = [n for n in ("reshard_after", "gradient_sync", "prefetch") if self._is_set(n)]
        if changed and axes["dp_shard"] == 1:
            raise ValueError(
                f"engine.fsdp.{changed[0]}={getattr(self, changed[0])} has no effect on "
                "mesh.dp_shard=1; set mesh=fsdp, or leave it out"
            )
        if changed and changed[0] in _KNOWN and axes["pp"] > 1:
            raise ValueError(
                f"engine.fsdp.{changed[0]}={getattr(self, changed[0])} is for torch's pipeline "
                f"schedule to say on mesh.pp={axes['pp']}; set mesh.pp=1, or leave it out"
            )
        if self.prefetch and len(layout.blocks) > 1:
            raise ValueError(
                f"engine.fsdp.prefetch={self.prefetch} needs blocks of one kind, which follow each "
                f"other; found {len(layout.blocks)} kinds: set it to 0"
            )

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(FullySharded, name))

    def shard(
        self,
        model: nn.Module,
        layout: Layout,
        blocks: list[nn.Module],
        mesh: Mesh,
        precision: Precision,
    ) -> None:
        """Apply `fully_shard` to the units of `model`, in place, while it is on meta.

        Units are the blocks, embedding and head where they share no weight, and all the rest.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(
            param_dtype=precision.compute,
            reduce_dtype=precision.master,
            # The only float input is the loss scale: casting it to bf16 would change the gradient.
            cast_forward_inputs=False,
        )
        given: dict[str, Any] = {"mesh": mesh.shard_mesh, "mp_policy": policy}
        reshards = self.reshard_after == FORWARD
        last = _last_layer(model, layout)
        for block in blocks:
            # The backward pass begins with the last one: it would be gathered again at once.
            fully_shard(block, reshard_after_forward=reshards and block is not last, **given)
        # Stages of a pipeline are called for many micro-batches in turn, and keep what is gathered.
        embedding, head = _apart(model, layout) if mesh.size("pp") == 1 else (None, None)
        if embedding is not None:
            unit = fully_shard(embedding, reshard_after_forward=self.reshard_after != STEP, **given)
            unit.set_unshard_in_backward(False)  # the gradient of a look-up needs no weight
        if head is not None:
            fully_shard(head, reshard_after_forward=False, **given)
        fully_shard(model, **given)
        if self.prefetch:
            _prefetch(blocks, self.prefetch)

    def begin_pass(self, model: nn.Module, *, is_last: bool) -> None:
        """Say what becomes of gathered weights and of gradients behind the next backward pass.

        `is_last`: of the step."""
        self.keep_gathered(model, is_last=is_last)
        if is_fsdp(model):
            model.set_requires_gradient_sync(is_last or self.gradient_sync == MICRO_BATCH)
            model.set_requires_all_reduce(is_last)  # over copies of the shards

    def keep_gathered(self, model: nn.Module, *, is_last: bool) -> None:
        """Say whether weights stay gathered behind the next backward pass."""
        if is_fsdp(model):
            model.set_reshard_after_backward(is_last or self.reshard_after != STEP)


def _last_layer(model: nn.Module, layout: Layout) -> nn.Module | None:
    """Return the last block of the layout's first kind, the layers."""
    layers = list(model.get_submodule(layout.blocks[0].removesuffix(".*")).children())
    return layers[-1] if layers else None


def _apart(model: nn.Module, layout: Layout) -> list[nn.Module | None]:
    """Return embedding and language-model head, each where it is here and shares no weight.

    Tied weights must share one unit, or FSDP2 unties them without a word. Apart, the one is let go
    when it was looked up, and the other's gradient is on its way before the blocks' are formed.
    """
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    found = []
    for name in (layout.embedding, LM_HEAD):
        weights = list(modules[name].parameters()) if name in modules else []
        is_own = weights and all(counts[id(weight)] == 1 for weight in weights)
        found.append(modules[name] if is_own else None)
    return found


def _prefetch(blocks: list[Any], depth: int) -> None:
    """Gather the weights of the next `depth` blocks beside the work of each, in both directions."""
    for number, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + depth])
        earlier = blocks[max(0, number - depth) : number]
        block.set_modules_to_backward_prefetch(earlier[::-1])


def gather_once(model: nn.Module) -> None:
    """Gather each unit of FSDP2 once, and let it go again. Collective.

    A unit that no forward pass has run yet ends the first backward pass that keeps its gradients in
    another dtype: FSDP2 looks there for weights that it has never gathered (torch 2.11 to 2.13). So
    it is with tower and gated blocks where a run begins with text.
    """
    for module in model.modules():
        if is_fsdp(module):
            module.unshard()
            module.reshard()


def let_go(model: nn.Module) -> None:
    """Let gathered weights go: what an evaluation left there is old once others are loaded."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


def is_fsdp(module: nn.Module) -> TypeGuard["FSDPModule"]:
    """Whether it is a unit of FSDP2. None is before something imported the class: over a second."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
