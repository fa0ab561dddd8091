"""Products of linears in float8 (`precision=fp8`). The home of the package torchao.

Source: Micikevicius et al. 2022; scales are taken anew for each product (torchao.float8).
"""

import logging
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec

import torch
from torch import nn

from models.layout import Layout
from trainer.precision import Precision

log = logging.getLogger(__name__)
ROWWISE, TENSORWISE = "rowwise", "tensorwise"
RECIPES = {ROWWISE: (9, 0), TENSORWISE: (8, 9)}
"""The oldest GPUs with kernels for a recipe, by CUDA compute capability."""
MULTIPLE = 16
"""What every size of a product in float8 must divide by."""


@dataclass(frozen=True, kw_only=True)
class Float8:
    """How products of linears are taken where `precision=fp8`.

    Weights stay fp32 masters that are cast to bf16, as in `precision=bf16`; what enters a product
    is rounded to 8 bits under scales of its own, and the result is bf16.
    """

    recipe: str = ROWWISE
    """rowwise: a scale for each row, nearer to bf16; tensorwise: one scale, faster."""
    emulate: bool = False
    """Round as a GPU does and multiply in bf16: for tests without such a GPU, and slow."""

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(
                f"engine.float8.recipe={self.recipe!r} is unknown; "
                f"set it to one of {', '.join(RECIPES)}"
            )

    def check(
        self,
        model: nn.Module,
        layout: Layout,
        axes: dict[str, int],
        *,
        row_tokens: int,
        precision: Precision,
        is_compiled: bool,
    ) -> None:
        """Raise ValueError for what this machine, or this model on this mesh, cannot do."""
        if not precision.is_float8:
            for each in fields(self):
                if (value := getattr(self, each.name)) != each.default:
                    raise ValueError(
                        f"engine.float8.{each.name}={value} has no effect; set precision=fp8, "
                        "or leave it out"
                    )
            return
        if axes["tp"] > 1:
            raise ValueError(
                f"precision=fp8 with mesh.tp={axes['tp']}: sums of products over ranks stay in "
                "bf16; set mesh.tp=1, and mesh.dp_shard instead"
            )
        if not linears(model, layout):
            raise ValueError(
                f"precision=fp8 found no linear in a layer that trains and has sizes that "
                f"{MULTIPLE} divides; set precision=bf16"
            )
        if (tokens := row_tokens // axes["cp"]) % MULTIPLE:
            raise ValueError(
                f"precision=fp8 needs rows of a multiple of {MULTIPLE} tokens per rank, found "
                f"{tokens}; set data.row_tokens to {-(-tokens // MULTIPLE) * MULTIPLE * axes['cp']}"
            )
        self._check_machine(is_compiled=is_compiled)

    def _check_machine(self, *, is_compiled: bool) -> None:
        if find_spec("torchao") is None:
            raise ValueError(
                "precision=fp8 needs the package torchao, which is not installed; "
                "run pip install 'tessera-train[quant]'"
            )
        if self.emulate:
            return
        needed, found = RECIPES[self.recipe], _capability()
        if found is None or found < needed:
            has = "no such GPU" if found is None else f"one of {found[0]}.{found[1]}"
            raise ValueError(
                f"engine.float8.recipe={self.recipe} needs an NVIDIA GPU of compute capability "
                f"{needed[0]}.{needed[1]} or more, found {has}; set precision=bf16"
            )
        if not is_compiled:
            raise ValueError(
                "precision=fp8 with engine.compile=false is slower than bf16, since rounding is "
                "not fused; set engine.compile=true"
            )

    def convert(self, model: nn.Module, layout: Layout) -> None:
        """Let the linears of `linears` take their products in float8, in place; names stay."""
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=self.emulate)
        chosen = {id(linear) for linear in linears(model, layout)}
        convert_to_float8_training(
            model, config=config, module_filter_fn=lambda module, _: id(module) in chosen
        )
        log.info("precision=fp8: %d linears, scaled %s", len(chosen), self.recipe)


def linears(model: nn.Module, layout: Layout) -> list[nn.Linear]:
    """Return what of a planned model float8 pays for: linears of its layers that train.

    Not the head, whose rounding a loss feels most, nor what images meet: their number of patches
    rarely divides. torchao forms the gradient of a frozen weight too, so those stay in bf16.
    """
    layers = model.get_submodule(layout.blocks[0].removesuffix(".*"))
    return [
        module
        for module in layers.modules()
        if type(module) is nn.Linear
        and module.weight.requires_grad
        and not any(size % MULTIPLE for size in module.weight.shape)
    ]


def _capability() -> tuple[int, int] | None:
    """Return the compute capability of this machine's NVIDIA GPU; None: there is none."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability()
