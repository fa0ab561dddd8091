"""The heads that every decoder family can carry: what a spec must offer, and how they are built."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import nn

from models.layout import Layout
from models.nn.classifiers import PLAIN, Emphasis, SequenceClassifier, TokenClassifier
from models.nn.model import DecoderModel
from models.nn.preferences import PreferenceModel, RewardHead

CAUSAL_LM = "causal_lm"
SEQUENCE = "sequence_classification"
TOKEN = "token_classification"


class CausalLMSpec(Protocol):
    """What training a language model asks of a model: a family's spec, or a folder's."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def additional_tokens(self) -> tuple[str, ...]:
        """Tokens with rows behind those of `vocab_size`."""
        ...

    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def trunk_name(self) -> str:
        """The trunk's attribute in every model of the family, as in Hugging Face."""
        ...

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        """Patterns of tensor names that old weight files hold and no model needs."""
        ...

    def build_causal_lm(self, *, chunk_tokens: int) -> DecoderModel: ...
    @property
    def attention_width(self) -> int:
        """Features of all heads of all layers that see text: layers x heads x head_dim."""
        ...

    def hf_config(self, head: str = CAUSAL_LM) -> dict[str, Any]:
        """Return the keys of a Hugging Face (v5-style) config.json of the model with this head."""
        ...


class DecoderSpec(CausalLMSpec, Protocol):
    """Size and switches of one decoder family, which can carry any head."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def token_head_name(self) -> str: ...
    @property
    def architectures(self) -> dict[str, str]:
        """Hugging Face's class by head."""
        ...

    def build_trunk(self) -> nn.Module:
        """Build token ids -> hidden states on torch's current default device."""
        ...

    def build_lm_head(self, trunk: nn.Module, *, chunk_tokens: int) -> nn.Module:
        """Build the language-model head, tied to the trunk where the spec says so."""
        ...


def causal_lm(spec: DecoderSpec, *, chunk_tokens: int) -> DecoderModel:
    """Build trunk and language-model head, whose logits exist for `chunk_tokens` at a time."""
    trunk = spec.build_trunk()
    head = spec.build_lm_head(trunk, chunk_tokens=chunk_tokens)
    return _model(spec, trunk, head, "lm_head")


def sequence_classifier(
    spec: DecoderSpec, *, num_labels: int, problem_type: str, emphasis: Emphasis = PLAIN
) -> DecoderModel:
    """Build trunk and `score` head: one answer per segment."""
    head = SequenceClassifier(
        spec.hidden_size, num_labels, problem_type=problem_type, emphasis=emphasis
    )
    return _model(spec, spec.build_trunk(), head, "score")


def token_classifier(
    spec: DecoderSpec,
    *,
    num_labels: int,
    dropout: float | None = None,
    emphasis: Emphasis = PLAIN,
) -> DecoderModel:
    """Build trunk and token head; dropout None: the spec's `hidden_dropout`, else 0.1."""
    if dropout is None:
        dropout = getattr(spec, "hidden_dropout", 0.1)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is no probability below 1; set it to 0.1")
    head = TokenClassifier(spec.hidden_size, num_labels, dropout=dropout, emphasis=emphasis)
    return _model(spec, spec.build_trunk(), head, spec.token_head_name)


def reward_model(spec: DecoderSpec) -> DecoderModel:
    """Build trunk and `score` head: one number per segment, learnt from pairs."""
    return _model(spec, spec.build_trunk(), RewardHead(spec.hidden_size), "score")


def preference_model(
    spec: DecoderSpec, *, chunk_tokens: int, beta: float, label_smoothing: float
) -> DecoderModel:
    """Build trunk and language-model head, which learn by DPO once they have adapters."""
    trunk = spec.build_trunk()
    head = spec.build_lm_head(trunk, chunk_tokens=chunk_tokens)
    make = partial(PreferenceModel, beta=beta, label_smoothing=label_smoothing)
    return _model(spec, trunk, head, "lm_head", make)


def _model(
    spec: DecoderSpec,
    trunk: nn.Module,
    head: nn.Module,
    head_name: str,
    make: Callable[..., DecoderModel] = DecoderModel,
) -> DecoderModel:
    model = make(trunk, head, trunk_name=spec.trunk_name, head_name=head_name)
    freeze = getattr(spec, "freeze", None)  # of a family that trains parts of itself
    if freeze is not None:
        freeze(model)
    return model
