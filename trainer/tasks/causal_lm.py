"""Causal language modelling: predict the next token of the same document."""

import math
from dataclasses import dataclass
from typing import Any

from models.heads import CAUSAL_LM, CausalLMSpec
from models.nn.model import DecoderModel
from trainer.batch import Batch
from trainer.data.examples import PREFERENCE, Labels
from trainer.protocols import Engine
from trainer.tasks.protocol import Judged, Totals


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
            if labels.problem_type == PREFERENCE:
                raise ValueError(
                    "task=causal_lm learns to write text, and the data has pairs of texts; "
                    "set task=dpo or task=reward"
                )
            kind = "token" if labels.problem_type is None else "sequence"
            raise ValueError(
                "task=causal_lm learns to write text, and the data has labels "
                f"({', '.join(labels.names[:3])}, ..); set task={kind}_classification"
            )

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        return spec.build_causal_lm(chunk_tokens=self.chunk_tokens)

    def judge(self, engine: Engine, batch: Batch, number: int, labels: Labels | None) -> Judged:
        loss = engine.eval_step(batch)
        return Judged(loss.sum, loss.num_targets)

    def metric_names(self, labels: Labels | None) -> tuple[str, ...]:
        return ("perplexity", "bits_per_byte")

    def eval_metrics(self, totals: Totals) -> dict[str, Any]:
        """Return perplexity and bits per byte of UTF-8 text, which tokenizers do not change."""
        bits = totals.nll_sum / math.log(2)
        return {
            "perplexity": math.exp(totals.loss) if totals.loss < 700 else math.inf,
            "bits_per_byte": bits / totals.num_bytes if totals.num_bytes else math.nan,
        }
