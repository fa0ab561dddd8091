"""What a token and an image cost to train, by a stated formula that knows what is frozen."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

from torch import nn

from models.layout import Layout
from models.lora import adapter_names
from models.nn.preferences import PreferenceModel
from trainer.parallel.data_parallel import named_blocks
from trainer.parallel.pieces import unique_parameters
from trainer.pieces import is_vector

FORMULA = (
    "per matmul weight 2 forward, 2 behind the first trained block, 2 if it trains; "
    "per layer 2 or (behind) 6 x heads x head_dim x row_tokens"
)
IMAGE_FORMULA = "; of images 4 or (behind) 12 x heads x head_dim x queries x keys"
REFERENCE_FORMULA = "; for the reference 2 more without adapters"

Depth = tuple[Fraction, int]
START, END = (Fraction(0), 0), (Fraction(1), 0)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Training FLOPs by what they are spent on; padding and blank images cost nothing."""

    per_token: int
    per_onlooker: int = 0
    """On top, of a token that looks at an image."""
    per_image: int = 0
    has_reference: bool = False

    def of(self, *, tokens: float, onlookers: float, images: float) -> float:
        """Return the FLOPs of so many tokens, of those that look at an image, and of images."""
        return tokens * self.per_token + onlookers * self.per_onlooker + images * self.per_image

    def describe(self) -> str:
        """Return a line with the numbers and their formula."""
        images = (
            f", {self.per_onlooker / 1e6:.1f} M more if it looks at an image, "
            f"{self.per_image / 1e6:.1f} M per image"
            if self.per_image
            else ""
        )
        more = IMAGE_FORMULA * bool(images) + REFERENCE_FORMULA * self.has_reference
        return f"{self.per_token / 1e6:.1f} M per token{images} = {FORMULA}{more}"


def training_flops(
    model: nn.Module, layout: Layout, attention_width: int, row_tokens: int
) -> Flops:
    """Return the training FLOPs of a planned model, frozen as it is trained.

    A matrix costs 2 per weight and vector in the forward pass, 2 more where a gradient passes
    through it, and 2 more where it trains: 6N in full training, about 4N with adapters everywhere,
    2N in a frozen tower. `attention_width` is heads x head_dim over all layers that read text.
    DPO's reference is one more forward pass, without adapters. Recomputed activations do not count.
    """
    work, gradients = layout.image_work, _Gradients(model, layout)
    again = 2 * isinstance(model, PreferenceModel)  # in the forward pass of the reference
    added = set(adapter_names(model))
    text = (2 + again + 4 * (1 - gradients.first[0])) * attention_width * row_tokens
    per_token, per_onlooker, per_image = int(text), 0, 0
    for name, weight in gradients.weights.items():
        if not gradients.multiplies(name):
            continue
        once = (
            2 + again * (name not in added) + 2 * gradients.reach(name) + 2 * weight.requires_grad
        )
        flops = once * weight.numel()
        if any(fnmatchcase(name, pattern) for pattern in work.onlooker_weights):
            per_onlooker += flops
        elif is_of_image(name, layout):
            per_image += flops * _first(work.rows, name)
        else:
            per_token += flops
    for name, _ in model.named_modules():
        if scores := _first(work.scores, name):
            per_image += (4 + 2 * again + 8 * gradients.reach(name)) * scores
        if scores := _first(work.onlooker_scores, name):
            per_onlooker += (4 + 2 * again + gradients.of_crossed_score(name)) * scores
    return Flops(
        per_token=per_token, per_onlooker=per_onlooker, per_image=per_image,
        has_reference=bool(again),
    )  # fmt: skip


def is_of_image(name: str, layout: Layout) -> bool:
    """Whether a weight meets what stands for images: in a tower, or as keys and values."""
    return _tower(name, layout) is not None or _first(layout.image_work.rows, name) > 0


class _Gradients:
    """Says which products of a planned model a gradient passes through."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout, self.weights = layout, dict(unique_parameters(model))
        self._blocks = _block_depths(model, layout)
        self._ends = tuple(f"{name}." for name in (str(model.head_name), layout.norm) if name)
        self.head = model.get_submodule(str(model.head_name)).get_parameter("weight")
        modules = list(model.modules())
        self.tables = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
        self.pixels = {id(m.weight) for m in modules if isinstance(m, nn.Conv2d)}
        trained = [name for name, weight in self.weights.items() if weight.requires_grad]
        self.below_head = any(
            self.weights[name] is not self.head or id(self.head) in self.tables for name in trained
        )
        in_towers = [self._depth(n) for n in trained if _tower(n, layout) is not None]
        self.first_of_towers = min(in_towers, default=None)
        of_text = [self._depth(n) for n in trained if _tower(n, layout) is None]
        # All text that comes behind the first look at images is behind what trains in a tower.
        self.first = START if in_towers else min(of_text, default=END)

    def multiplies(self, name: str) -> bool:
        """Whether a weight is a matrix of products; a table is one where it is the head."""
        weight = self.weights[name]
        is_product = not is_vector(tuple(weight.shape))
        return is_product and (id(weight) not in self.tables or weight is self.head)

    def reach(self, name: str) -> bool:
        """Whether a gradient passes through a weight, or a module with attention, to its input."""
        weight = self.weights.get(name)
        if weight is not None and weight is self.head:
            return self.below_head
        if id(weight) in self.pixels:
            return False  # nothing is in front of it
        if is_of_image(name, self.layout):
            return self._reaches_images(name)
        return self._depth(name) >= self.first

    def _reaches_images(self, name: str) -> bool:
        if self.first_of_towers is None:
            return False
        return _tower(name, self.layout) is None or self._depth(name) >= self.first_of_towers

    def of_crossed_score(self, name: str) -> int:
        """Return the FLOPs behind one score between text and images: each side's, and its own."""
        trained = [n for n, weight in self.weights.items() if weight.requires_grad]
        own = any(n.startswith(f"{name}.") and is_of_image(n, self.layout) for n in trained)
        of_images, of_text = own or self.first_of_towers is not None, self.reach(name)
        return 4 * of_images + 2 * of_text + 2 * (of_images or of_text)

    def _depth(self, name: str) -> Depth:
        """Return how far behind the input something stands: blocks as `_block_depths` says, norm
        and head at the end, all else at the start; 1 more in each further tower."""
        if name.startswith(self._ends):
            return END
        of_block = (at for block, at in self._blocks.items() if f"{name}.".startswith(block))
        share, order = next(of_block, START)
        return share + (_tower(name, self.layout) or 0), order


def _block_depths(model: nn.Module, layout: Layout) -> dict[str, Depth]:
    """Return the depth of each block: its share of all blocks of its kind. At the same share those
    of the layout's first kind, the layers, come behind the others."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, _ in named_blocks(model, layout):
        kinds[name.rpartition(".")[0]].append(name)
    return {
        f"{name}.": (Fraction(number, len(names)), int(order == 0))
        for order, names in enumerate(kinds.values())
        for number, name in enumerate(names)
    }


def _tower(name: str, layout: Layout) -> int | None:
    """Return the number of the tower that something is in; None: it is in none."""
    inside = (n for n, tower in enumerate(layout.replicated) if name.startswith(f"{tower}."))
    return next(inside, None)


def _first(by_pattern: Mapping[str, int], name: str) -> int:
    """Return what the first pattern that fits says; 0: none fits."""
    return next((n for pattern, n in by_pattern.items() if fnmatchcase(name, pattern)), 0)
