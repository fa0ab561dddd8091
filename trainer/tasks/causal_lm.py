"""Causal language modelling: predict the next token of the same document."""

import math
from dataclasses import dataclass

from models.heads import CAUSAL_LM, CausalLMSpec
from models.nn.model import DecoderModel
from trainer.data.examples import Labels


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

    @property
    def head(self) -> str:
        return CAUSAL_LM

    def check(self, spec: CausalLMSpec, labels: Labels | None) -> None:
        """Raise ValueError for data whose labels are no tokens."""
        if labels is not None:
            kind = "token" if labels.problem_type is None else "sequence"
            raise ValueError(
                "task=causal_lm learns to write text, and the data has labels "
                f"({', '.join(labels.names[:3])}, ..); set task={kind}_classification"
            )

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        return spec.build_causal_lm(chunk_tokens=self.chunk_tokens)

    def eval_metrics(self, nll_sum: float, num_targets: int, num_bytes: int) -> dict[str, float]:
        """Return perplexity and bits per byte of UTF-8 text, which tokenizers do not change."""
        loss = nll_sum / num_targets if num_targets else math.nan
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": nll_sum / math.log(2) / num_bytes if num_bytes else math.nan,
        }
