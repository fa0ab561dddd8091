"""Gemma 1: spec, model and its parallel layout.

Source: Gemma Team 2024. Module and config names are those of Hugging Face. Beside Llama: norms
scale by (1 + weight) in fp32, embeddings are multiplied by sqrt(hidden_size), heads have a size of
their own, and the feed-forward gate is a tanh GELU.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import nn

from models import heads
from models.hf_config import drop_own, read_config, read_rope
from models.layout import Layout
from models.nn import backends
from models.nn.activation import check_activation
from models.nn.attention import Attention
from models.nn.checks import check_heads, check_positive, check_probabilities
from models.nn.decoder import LAYOUT, DecoderBlock, DecoderTrunk, ScaledEmbedding
from models.nn.head import LMHead
from models.nn.mlp import GatedMLP
from models.nn.model import DecoderModel
from models.nn.norm import GemmaRMSNorm
from models.nn.rope import RopeParameters
from models.nn.rotary import RotaryEmbedding


@dataclass(frozen=True, kw_only=True)
class GemmaSpec:
    """Size and switches of a Gemma; field names as in Hugging Face's GemmaConfig."""

    model_type: ClassVar[str] = "gemma"
    trunk_name: ClassVar[str] = "model"
    token_head_name: ClassVar[str] = "score"
    architectures: ClassVar[dict[str, str]] = {
        heads.CAUSAL_LM: "GemmaForCausalLM",
        heads.SEQUENCE: "GemmaForSequenceClassification",
        heads.TOKEN: "GemmaForTokenClassification",
    }
    ignored_weights: ClassVar[tuple[str, ...]] = ("*.rotary_emb.inv_freq",)
    """Buffers that old files hold and that are computed here."""

    vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Must divide num_attention_heads."""
    head_dim: int = 256
    """Width of one head; heads * head_dim may differ from hidden_size."""
    max_position_embeddings: int = 8192
    """Longest row, in tokens."""
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    """Biases on q, k, v and o."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight in training."""
    hidden_act: str = "gelu_pytorch_tanh"
    additional_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer gets, with rows of their own behind those of vocab_size."""
    attn_implementation: str = "auto"
    """Attention back-end: auto, eager (the reference), sdpa, flex, varlen or flash."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        )
        check_heads(self)
        check_probabilities(self, "attention_dropout")
        check_activation("hidden_act", self.hidden_act)
        if self.hidden_act == "gelu":
            raise ValueError(
                "hidden_act='gelu' means the tanh form to transformers 5 and the exact one "
                "elsewhere; set it to 'gelu_pytorch_tanh'"
            )
        backends.check_name(self.attn_implementation)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "GemmaSpec":
        """Read a config.json of transformers 4 or 5; ValueError for what Gemma 1 has not."""
        defaults = {
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        }
        values = read_config(cls, config, defaults, neutral=("hidden_activation",))
        values["hidden_act"] = _activation(config)
        return cls(**values, rope_parameters=read_rope(config))

    @property
    def layout(self) -> Layout:
        return LAYOUT

    def build_trunk(self) -> "Gemma":
        return Gemma(self)

    def build_lm_head(self, trunk: nn.Module, *, chunk_tokens: int) -> LMHead:
        head = LMHead(self.hidden_size, self.vocab_size, chunk_tokens=chunk_tokens)
        if self.tie_word_embeddings:
            head.weight = trunk.get_submodule("embed_tokens").get_parameter("weight")
        return head

    def build_causal_lm(self, *, chunk_tokens: int) -> DecoderModel:
        """Build the model on torch's current default device (`torch.device("meta")` to plan)."""
        return heads.causal_lm(self, chunk_tokens=chunk_tokens)

    @property
    def attention_width(self) -> int:
        return self.num_hidden_layers * self.num_attention_heads * self.head_dim

    def hf_config(self, head: str = heads.CAUSAL_LM) -> dict[str, Any]:
        """Return the keys of a Hugging Face (v5-style) config.json of the model with this head."""
        config = asdict(self)
        drop_own(config)
        return {
            "architectures": [self.architectures[head]],
            "model_type": self.model_type,
            **config,
            "hidden_activation": self.hidden_act,  # transformers 4 reads this key alone
            "rope_parameters": self.rope_parameters.given(),
        }


def _activation(config: dict[str, Any]) -> str:
    """Return which activation a config.json means.

    `hidden_activation` governs where it is set. Without it, v4 files mean the tanh GELU whatever
    `hidden_act` says, and v5 files (those with rope_parameters) mean `hidden_act`, where "gelu" is
    the tanh GELU too.
    """
    name = config.get("hidden_activation")
    if name is None and "rope_parameters" in config:
        name = config.get("hidden_act")
        name = "gelu_pytorch_tanh" if name == "gelu" else name
    return name or "gelu_pytorch_tanh"


class Gemma(DecoderTrunk):
    """The trunk: token ids to hidden states after the final norm."""

    def __init__(self, spec: GemmaSpec) -> None:
        backend = backends.backend(spec.attn_implementation, dropout=spec.attention_dropout)
        super().__init__(
            embed_tokens=ScaledEmbedding(
                spec.vocab_size, spec.hidden_size, scale=spec.hidden_size**0.5
            ),
            layers=[_block(spec, backend) for _ in range(spec.num_hidden_layers)],
            norm=GemmaRMSNorm(spec.hidden_size, spec.rms_norm_eps),
            rotary_emb=RotaryEmbedding(
                spec.rope_parameters, spec.head_dim, spec.max_position_embeddings
            ),
            backend=backend,
        )


def _block(spec: GemmaSpec, backend: backends.Backend) -> DecoderBlock:
    return DecoderBlock(
        self_attn=Attention(
            spec.hidden_size,
            spec.num_attention_heads,
            spec.num_key_value_heads,
            spec.head_dim,
            bias=spec.attention_bias,
            dropout=spec.attention_dropout,
            backend=backend,
        ),
        mlp=GatedMLP(
            spec.hidden_size, spec.intermediate_size, bias=False, activation=spec.hidden_act
        ),
        input_layernorm=GemmaRMSNorm(spec.hidden_size, spec.rms_norm_eps),
        post_attention_layernorm=GemmaRMSNorm(spec.hidden_size, spec.rms_norm_eps),
    )
