"""What a token costs to train, by a stated formula that knows what is frozen."""

from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction

from torch import nn

from models.layout import Layout
from trainer.parallel.data_parallel import named_blocks
from trainer.parallel.pieces import unique_parameters

FORMULA = (
    "per matmul weight 2 forward, 2 behind the first trained block, 2 if it trains; "
    "per layer 2 or (behind) 6 x heads x head_dim x row_tokens"
)


def flops_per_token(model: nn.Module, layout: Layout, attention_width: int, row_tokens: int) -> int:
    """Return training FLOPs per token of a planned model, frozen as it is trained.

    A matrix costs 2 per weight in the forward pass, 2 more where a gradient passes through it, and
    2 more where it trains: 6N in full training, about 4N with adapters everywhere. Towers that see
    images are left out: they see no tokens. `attention_width` is heads x head_dim over all layers.
    Recomputed activations do not count.
    """
    parameters = dict(unique_parameters(model))
    depths = _depths(model, layout, parameters)
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    head = model.get_submodule(str(model.head_name)).get_parameter("weight")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    first = min((depths[name] for name in trained), default=1)
    has_trained_below = any(parameters[name] is not head or id(head) in tables for name in trained)
    total = 0
    for name, weight in parameters.items():
        is_head = weight is head
        if weight.ndim < 2 or (id(weight) in tables and not is_head) or _sees_images(name, layout):
            continue
        has_gradient = has_trained_below if is_head else depths[name] >= first
        total += (2 + 2 * has_gradient + 2 * weight.requires_grad) * weight.numel()
    return total + int((2 + 4 * (1 - first)) * attention_width * row_tokens)


def _depths(model: nn.Module, layout: Layout, names: Iterable[str]) -> dict[str, Fraction]:
    """Return how far behind the input each parameter stands: blocks at their share of all blocks of
    their kind, norm and head at 1, all else at 0."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, _ in named_blocks(model, layout):
        kinds[name.rpartition(".")[0]].append(name)
    blocks = {
        f"{name}.": Fraction(number, len(names))
        for names in kinds.values()
        for number, name in enumerate(names)
    }
    ends = tuple(f"{name}." for name in (str(model.head_name), layout.norm) if name)

    def depth(name: str) -> Fraction:
        if name.startswith(ends):
            return Fraction(1)
        return next((at for prefix, at in blocks.items() if name.startswith(prefix)), Fraction(0))

    return {name: depth(name) for name in names}


def _sees_images(name: str, layout: Layout) -> bool:
    return name.startswith(tuple(f"{tower}." for tower in layout.replicated))
