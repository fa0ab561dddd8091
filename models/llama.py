"""Llama: spec, block, model and its parallel layout.

Source: Touvron et al. 2023; Llama 3 (Dubey et al. 2024). Module and config names are those of
Hugging Face.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from models.layout import Layout
from models.nn.attention import BACKENDS, Attention, segment_mask
from models.nn.causal_lm import CausalLM
from models.nn.head import LMHead
from models.nn.mlp import GatedMLP
from models.nn.norm import RMSNorm
from models.nn.rotary import RopeParameters, RotaryEmbedding

LAYOUT = Layout(
    blocks="model.layers.*",
    colwise=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ),
    rowwise=("self_attn.o_proj", "mlp.down_proj"),
    embedding="model.embed_tokens",
    head="lm_head",
)


@dataclass(frozen=True, kw_only=True)
class LlamaSpec:
    """Size and switches of a Llama; field names as in Hugging Face's LlamaConfig."""

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
    attn_implementation: str = "sdpa"
    """Attention back-end: `sdpa`, or `eager` (the reference)."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not positive; set it to 1 or more"
                )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; "
                f"set it to one of {[n for n in range(1, heads + 1) if heads % n == 0]}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}; "
                "change one of them or set head_dim"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim} is not positive; set it to 2 or more")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd; rotary positions need an even one")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is no probability below 1; "
                "set it to 0 or more and less than 1"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} is not Llama's; set it to 'silu'")
        if self.attn_implementation not in BACKENDS:
            raise ValueError(
                f"attn_implementation={self.attn_implementation!r} is unknown; "
                f"set it to one of {', '.join(BACKENDS)}"
            )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def layout(self) -> Layout:
        return LAYOUT

    def build_causal_lm(self, *, chunk_tokens: int) -> CausalLM:
        """Build the model on torch's current default device (`torch.device("meta")` to plan)."""
        head = LMHead(self.hidden_size, self.vocab_size, chunk_tokens=chunk_tokens)
        trunk = Llama(self)
        if self.tie_word_embeddings:
            head.weight = trunk.embed_tokens.weight
        return CausalLM("model", trunk, head)

    def flops_per_token(self, num_matmul_weights: int, row_tokens: int) -> int:
        """Return training FLOPs per token: 6N + 6 * layers * heads * head_dim * T (causal)."""
        width = self.num_attention_heads * self.head_size
        return 6 * num_matmul_weights + 6 * self.num_hidden_layers * width * row_tokens

    def hf_config(self) -> dict[str, Any]:
        """Return the keys of a Hugging Face (v5-style) config.json."""
        config = {key: value for key, value in asdict(self).items() if value is not None}
        rope = config.pop("rope_parameters")
        config.pop("attn_implementation")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **config,
            "head_dim": self.head_size,
            "rope_parameters": {key: value for key, value in rope.items() if value is not None},
        }


class LlamaBlock(nn.Module):
    """One pre-norm decoder layer: attention, then the gated MLP, each added to the residual."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(
            spec.hidden_size,
            spec.num_attention_heads,
            spec.num_key_value_heads,
            spec.head_size,
            bias=spec.attention_bias,
            dropout=spec.attention_dropout,
            backend=spec.attn_implementation,
        )
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = GatedMLP(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)

    def forward(self, x_BTD: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, mask_B1TS: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BTH, sin_BTH, mask_B1TS)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """The trunk: token ids to hidden states after the final norm."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(spec) for _ in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(spec.rope_parameters, spec.head_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Return the (B, T, D) hidden states of (B, T) ids; attention stays within segments."""
        x_BTD = self.embed_tokens(input_ids)
        cos_BTH, sin_BTH = self.rotary_emb(position_ids, x_BTD.dtype)
        mask_B1TT = segment_mask(segment_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_BTH, sin_BTH, mask_B1TT)
        return self.norm(x_BTD)
