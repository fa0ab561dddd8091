"""What a run asks of a model that is read from folders, answered by its family's spec."""

from dataclasses import dataclass
from typing import Any

from models.heads import CAUSAL_LM
from models.layout import Layout
from models.nn.model import DecoderModel


@dataclass(frozen=True, kw_only=True)
class FolderModel:
    """A model whose `spec` follows from files."""

    @property
    def spec(self) -> Any:
        """The family's spec; ValueError in one line for files that do not serve."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        return int(self.spec.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        return int(self.spec.max_position_embeddings)

    @property
    def initializer_range(self) -> float:
        return float(self.spec.initializer_range)

    @property
    def layout(self) -> Layout:
        layout: Layout = self.spec.layout
        return layout

    @property
    def trunk_name(self) -> str:
        return str(self.spec.trunk_name)

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        return tuple(self.spec.ignored_weights)

    def build_causal_lm(self, *, chunk_tokens: int) -> DecoderModel:
        model: DecoderModel = self.spec.build_causal_lm(chunk_tokens=chunk_tokens)
        return model

    @property
    def attention_width(self) -> int:
        return int(self.spec.attention_width)

    def hf_config(self, head: str = CAUSAL_LM) -> dict[str, Any]:
        config: dict[str, Any] = self.spec.hf_config(head)
        return config
