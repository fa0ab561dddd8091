"""torch's own kernels for sequences of different lengths, on CUDA."""

from torch import Tensor

from models.nn.runs import Runs, check_half, pack, runs_of, unpack
from models.nn.segments import Segments


class Varlen:
    """torch.nn.attention.varlen: flash-attention as torch brings it."""

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
        """Raise ValueError for fp32, and for dropout."""
        from torch.nn.attention.varlen import varlen_attn

        check_half("varlen", query_BNTH.dtype)
        if dropout > 0:
            raise ValueError(
                f"attn_implementation='varlen' has no attention dropout, and attention_dropout="
                f"{dropout}; set it to 0, or attn_implementation to sdpa"
            )
        mixed_XNH = varlen_attn(
            pack(query_BNTH),
            pack(key_BKSH),
            pack(value_BKSH),
            mask.cu_query,
            mask.cu_key,
            mask.max_query,
            mask.max_key,
            scale=scale,
            window_size=(-1, 0 if mask.causal else -1),
            enable_gqa=query_BNTH.shape[1] != key_BKSH.shape[1],
        )
        assert isinstance(mixed_XNH, Tensor)  # a tuple only where return_aux is given
        return unpack(mixed_XNH, len(query_BNTH))
