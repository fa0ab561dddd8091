"""NF4: frozen weights in 4 bits each, with a scale per block of 64 (QLoRA).

Source: Dettmers et al. 2023, section 3 and appendix E. The home of the package bitsandbytes,
imported when the first weight is packed.
"""

import logging
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.lora import packed_linears

NONE, NF4 = CHOICES = ("none", "nf4")
BLOCK, OUTER_BLOCK = 64, 256
_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One weight as bitsandbytes keeps it; called, it is a plain tensor of `shape` and `dtype`."""

    codes: Tensor
    state: Any
    shape: torch.Size
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        blocks: Tensor = dequantize_4bit(self.codes, self.state)
        return blocks.flatten()[: self.shape.numel()].view(self.shape).to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How weights are packed: the field names are those of base.json and of `LoRA`."""

    quantize: str
    use_double_quant: bool

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> PackedWeight:
        """Pack a weight on its device. It is read in fp32, so codes do not depend on `dtype`."""
        # The import warns of a kernel for inference on CPUs, which is not used here.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from bitsandbytes.functional import quantize_4bit

        flat = weight.to(torch.float32).flatten()
        if rest := -len(flat) % BLOCK:
            flat = F.pad(flat, (0, rest))  # zeros change no scale
        # One block per row: the CPU kernel of 0.50 reads wrong scales where rows cut blocks.
        codes, state = quantize_4bit(
            flat.view(-1, BLOCK), blocksize=BLOCK, quant_type=self.quantize,
            compress_statistics=self.use_double_quant,
        )  # fmt: skip
        state.dtype = dtype if dtype in _NATIVE else torch.float32
        return PackedWeight(codes=codes, state=state, shape=weight.shape, dtype=dtype)

    def num_bytes(self, numel: int) -> int:
        """Return what a weight of so many numbers takes; tables of a few hundred bytes aside."""
        blocks = -(-numel // BLOCK)
        scales = blocks + 4 * -(-blocks // OUTER_BLOCK) + 4 if self.use_double_quant else 4 * blocks
        return blocks * BLOCK // 2 + scales

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers, for base.json."""
        return asdict(self)


def check_quantize(quantize: str, *, use_double_quant: bool, use_dora: bool) -> None:
    """Raise ValueError for settings that are unknown, without effect or at odds."""
    if quantize not in CHOICES:
        raise ValueError(
            f"adapter.quantize={quantize!r} is unknown; set it to one of {', '.join(CHOICES)}"
        )
    if quantize == NONE and not use_double_quant:
        raise ValueError(
            "adapter.use_double_quant=false has no effect without adapter.quantize=nf4; set that, "
            "or take it out"
        )
    if quantize != NONE and use_dora:
        raise ValueError(
            f"adapter.quantize={quantize} with adapter.use_dora=true: DoRA would start from the "
            "lengths of rows that were not rounded; take adapter=lora, or adapter.quantize=none"
        )


def packing(quantize: str, *, use_double_quant: bool) -> Packing:
    """Return how to pack; ValueError where that needs a package that is not here."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"adapter.quantize={quantize} needs the package bitsandbytes, which is not installed; "
            "run pip install 'tessera-train[qlora]'"
        )
    return Packing(quantize=quantize, use_double_quant=use_double_quant)


def packing_of(model: nn.Module) -> Packing | None:
    """Return how the model's base is packed; None: it is not."""
    for linear in packed_linears(model).values():
        assert isinstance(linear.pack, Packing)
        return linear.pack
    return None


def describe_packed(model: nn.Module) -> str:
    """Return how much of a planned model is kept in few bits, in words; nothing where none is."""
    kept = packing_of(model)
    if kept is None:
        return ""
    sizes = [linear.weight.numel() for linear in packed_linears(model).values()]
    gib = sum(map(kept.num_bytes, sizes)) / 2**30
    return f", {sum(sizes) / 1e6:.2f} M of them in 4 bits ({kept.quantize}, {gib:.3g} GiB)"
