"""Llama: spec, model and its parallel layout.

Source: Touvron et al. 2023; Llama 3 (Dubey et al. 2024). Module and config names are those of
Hugging Face.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import nn

from models import heads
from models.hf_config import drop_own, read_config, read_rope
from models.layout import Layout
from models.nn import backends
from models.nn.attention import Attention
from models.nn.checks import check_heads, check_positive, check_probabilities
from models.nn.decoder import LAYOUT, DecoderBlock, DecoderTrunk
from models.nn.head import LMHead
from models.nn.mlp import GatedMLP
from models.nn.model import DecoderModel
from models.nn.norm import RMSNorm
from models.nn.rope import RopeParameters
from models.nn.rotary import RotaryEmbedding
from models.nn.sliced import check_slices


@dataclass(frozen=True, kw_only=True)
class LlamaSpec:
    """Size and switches of a Llama; field names as in Hugging Face's LlamaConfig."""

    model_type: ClassVar[str] = "llama"
    trunk_name: ClassVar[str] = "model"
    token_head_name: ClassVar[str] = "score"
    architectures: ClassVar[dict[str, str]] = {
        heads.CAUSAL_LM: "LlamaForCausalLM",
        heads.SEQUENCE: "LlamaForSequenceClassification",
        heads.TOKEN: "LlamaForTokenClassification",
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
    head_dim: int | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""
    max_position_embeddings: int
    """Longest row, in tokens."""
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q, k, v and o."""
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight in training."""
    hidden_act: str = "silu"
    pretraining_tp: int = 1
    """Compute linears in this many slices, as that many tensor-parallel ranks do: an oracle."""
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
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} is not Llama's; set it to 'silu'")
        names = (
            "vocab_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
        )
        check_slices(self.pretraining_tp, {name: getattr(self, name) for name in names})
        backends.check_name(self.attn_implementation)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "LlamaSpec":
        """Read a config.json of transformers 4 or 5; ValueError for what Llama has not."""
        defaults = {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
        }
        fields = read_config(cls, config, defaults)
        if fields.get("num_key_value_heads") is None:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        return cls(**fields, rope_parameters=read_rope(config))

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def layout(self) -> Layout:
        return LAYOUT

    def build_trunk(self) -> "Llama":
        return Llama(self)

    def build_lm_head(self, trunk: nn.Module, *, chunk_tokens: int) -> LMHead:
        head = LMHead(
            self.hidden_size,
            self.vocab_size,
            chunk_tokens=chunk_tokens,
            tp_slices=self.pretraining_tp,
        )
        if self.tie_word_embeddings:
            head.weight = trunk.get_submodule("embed_tokens").get_parameter("weight")
        return head

    def build_causal_lm(self, *, chunk_tokens: int) -> DecoderModel:
        """Build the model on torch's current default device (`torch.device("meta")` to plan)."""
        return heads.causal_lm(self, chunk_tokens=chunk_tokens)

    @property
    def attention_width(self) -> int:
        return self.num_hidden_layers * self.num_attention_heads * self.head_size

    def hf_config(self, head: str = heads.CAUSAL_LM) -> dict[str, Any]:
        """Return the keys of a Hugging Face (v5-style) config.json of the model with this head."""
        config = {key: value for key, value in asdict(self).items() if value is not None}
        drop_own(config)
        return {
            "architectures": [self.architectures[head]],
            "model_type": self.model_type,
            **config,
            "head_dim": self.head_size,
            "rope_parameters": self.rope_parameters.given(),
        }


class Llama(DecoderTrunk):
    """The trunk: token ids to hidden states after the final norm."""

    def __init__(self, spec: LlamaSpec) -> None:
        backend = backends.backend(spec.attn_implementation, dropout=spec.attention_dropout)
        super().__init__(
            embed_tokens=nn.Embedding(spec.vocab_size, spec.hidden_size),
            layers=[_block(spec, backend) for _ in range(spec.num_hidden_layers)],
            norm=RMSNorm(spec.hidden_size, spec.rms_norm_eps),
            rotary_emb=RotaryEmbedding(
                spec.rope_parameters, spec.head_size, spec.max_position_embeddings
            ),
            backend=backend,
        )


def _block(spec: LlamaSpec, backend: backends.Backend) -> DecoderBlock:
    return DecoderBlock(
        self_attn=Attention(
            spec.hidden_size,
            spec.num_attention_heads,
            spec.num_key_value_heads,
            spec.head_size,
            bias=spec.attention_bias,
            dropout=spec.attention_dropout,
            backend=backend,
            tp_slices=spec.pretraining_tp,
        ),
        mlp=GatedMLP(
            spec.hidden_size,
            spec.intermediate_size,
            bias=spec.mlp_bias,
            activation=spec.hidden_act,
            tp_slices=spec.pretraining_tp,
        ),
        input_layernorm=RMSNorm(spec.hidden_size, spec.rms_norm_eps),
        post_attention_layernorm=RMSNorm(spec.hidden_size, spec.rms_norm_eps),
    )
