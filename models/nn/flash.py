"""flash-attn, 2.x or 4, and nothing else that knows of it."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from models.nn.runs import Runs, check_half, pack, runs_of, unpack
from models.nn.segments import Segments

REPEATABLE = (10, 11)  # compute capabilities where flash-attn-4 has a deterministic backward pass
MINIMUM = (2, 8)  # what the extra `flash` asks for; < 2.1 aligned causal masks top-left


class Flash:
    """flash-attn's kernels for sequences of different lengths. Source: Dao 2023.

    flash-attn 2.x is taken where it is installed, else flash-attn-4, which has no dropout.
    """

    def __init__(self) -> None:
        """Raise ValueError where the run has to be deterministic, and the kernel cannot be."""
        self.major = 4 if installed("flash-attn") is None else 2
        if self.major == 4 and torch.are_deterministic_algorithms_enabled():
            _check_repeatable(torch.cuda.get_device_capability())
        self.kernel = _kernel(self.major)

    def prepare(self, segments: Segments) -> Runs:
        return runs_of(segments)

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: Runs,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """Raise ValueError for fp32, and for dropout under flash-attn-4."""
        check_half("flash", query_BNTH.dtype)
        mixed_XNH = self.kernel(
            pack(query_BNTH),
            pack(key_BKSH),
            pack(value_BKSH),
            cu_seqlens_q=mask.cu_query,
            cu_seqlens_k=mask.cu_key,
            max_seqlen_q=mask.max_query,
            max_seqlen_k=mask.max_key,
            softmax_scale=scale,
            causal=mask.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **self._dropout(dropout),
        )
        # flash-attn-4 returns the softmax's normalizer, too.
        mixed_XNH = mixed_XNH[0] if isinstance(mixed_XNH, tuple) else mixed_XNH
        return unpack(mixed_XNH, len(query_BNTH))

    def _dropout(self, dropout: float) -> dict[str, float]:
        if self.major == 2:
            return {"dropout_p": dropout}
        if dropout > 0:
            raise ValueError(
                f"flash-attn-4 has no attention dropout, and attention_dropout={dropout}; set it "
                "to 0, or install flash-attn 2.x, or set attn_implementation to sdpa"
            )
        return {}


def installed(distribution: str) -> str | None:
    """Return the version of `distribution`, None where it is not installed; imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def flash_problem() -> str | None:
    """Return what keeps flash-attn from being used: what was found, needed, and the remedy."""
    found, newer = installed("flash-attn"), installed("flash-attn-4")
    if found is None and newer is None:
        return (
            "attn_implementation='flash' needs the package flash-attn, which is not installed; "
            "run pip install 'tessera-train[flash]', or set it to auto"
        )
    if found is not None and tuple(int(part) for part in found.split(".")[:2]) < MINIMUM:
        needed = ".".join(map(str, MINIMUM))
        return (
            f"attn_implementation='flash' needs flash-attn >= {needed}, and {found} is installed; "
            "run pip install -U 'tessera-train[flash]', or set it to auto"
        )
    return None


def _check_repeatable(capability: tuple[int, int]) -> None:
    if capability[0] not in REPEATABLE:
        found = ".".join(map(str, capability))
        raise ValueError(
            "deterministic=run with flash-attn-4 needs a GPU of compute capability 10 or 11, found "
            f"{found}; install flash-attn 2.x, or set model.attn_implementation=auto"
        )


def _kernel(major: int) -> Any:
    module = import_module("flash_attn" if major == 2 else "flash_attn.cute")
    return module.flash_attn_varlen_func
