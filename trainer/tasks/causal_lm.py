"""Causal language modelling: predict the next token of the same document."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from models.heads import CAUSAL_LM
from models.layout import Layout
from models.nn.model import DecoderModel


class CausalLMSpec(Protocol):
    """What this task asks of a model family."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def trunk_name(self) -> str: ...
    @property
    def ignored_weights(self) -> tuple[str, ...]:
        """Patterns of tensor names that old weight files hold and no model needs."""
        ...

    def build_causal_lm(self, *, chunk_tokens: int) -> DecoderModel: ...
    def flops_per_token(self, num_matmul_weights: int, row_tokens: int) -> int: ...
    def hf_config(self, head: str = CAUSAL_LM) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class CausalLMTask:
    """Train trunk and language-model head on shifted labels."""

    chunk_tokens: int = 1024
    """Tokens whose logits exist at the same time in the loss."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(
                f"task.chunk_tokens={self.chunk_tokens} is not positive; set it to 1024"
            )

    def build_model(self, spec: CausalLMSpec) -> DecoderModel:
        return spec.build_causal_lm(chunk_tokens=self.chunk_tokens)

    def eval_metrics(self, nll_sum: float, num_targets: int, num_bytes: int) -> dict[str, float]:
        """Return perplexity and bits per byte of UTF-8 text, which tokenizers do not change."""
        loss = nll_sum / num_targets if num_targets else math.nan
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": nll_sum / math.log(2) / num_bytes if num_bytes else math.nan,
        }
