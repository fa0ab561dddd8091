"""Idefics 1: a Llama-like decoder with gated cross-attention to images, its spec and its layout.

Source: Laurencon et al. 2023; Flamingo (Alayrac et al. 2022). Module and config names are those of
Hugging Face.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import nn

from models import heads
from models.hf_config import drop_own, read_config, read_nested, read_rope
from models.layout import Layout
from models.nn import backends
from models.nn.activation import check_activation
from models.nn.checks import check_heads, check_positive, check_probabilities
from models.nn.decoder import LAYOUT as DECODER
from models.nn.decoupled import DecoupledEmbedding, DecoupledLMHead
from models.nn.gated import ALPHA_INITIALIZERS, ALPHA_TYPES
from models.nn.image_work import image_work
from models.nn.model import DecoderModel
from models.nn.resampler import PerceiverSpec
from models.nn.rope import RopeParameters
from models.nn.vision import VisionSpec
from models.nn.vision_text import FREEZABLE, VisionTextTrunk, freeze

BEYOND_HUGGING_FACE = ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")
"""Of Llama's decoders: in a config.json where they are set, which transformers then cannot read."""


@dataclass(frozen=True, kw_only=True)
class IdeficsSpec:
    """Size and switches of an Idefics; field names as in Hugging Face's IdeficsConfig."""

    model_type: ClassVar[str] = "idefics"
    trunk_name: ClassVar[str] = "model"
    token_head_name: ClassVar[str] = "score"
    architectures: ClassVar[dict[str, str]] = {heads.CAUSAL_LM: "IdeficsForVisionText2Text"}
    ignored_weights: ClassVar[tuple[str, ...]] = (
        "*.rotary_emb.inv_freq",
        "*.embeddings.position_ids",
    )
    """Buffers that old files hold and that are computed here."""

    vocab_size: int
    """Rows of the main embedding and head."""
    additional_vocab_size: int = 0
    """Rows for ids from vocab_size on; they always train."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    """Of the text; None: num_attention_heads, which is all that Hugging Face's Idefics can have."""
    head_dim: int | None = None
    """Of the text; None: hidden_size / num_attention_heads, as in Hugging Face."""
    attention_bias: bool = False
    mlp_bias: bool = False
    """Biases in the layers of the text; Hugging Face has none."""
    max_position_embeddings: int = 2048
    """Longest row, in tokens."""
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of initial weights, where the original training code names no other."""
    dropout: float = 0.0
    """On attention weights and on what each layer adds, in training."""
    hidden_act: str = "silu"
    alpha_initializer: str = "zeros"
    """zeros, ones, or normal of standard deviation alphas_initializer_range."""
    alphas_initializer_range: float = 0.0
    alpha_type: str = "float"
    """`float`: one gate per block; `vector`: one per feature."""
    tie_word_embeddings: bool = False
    """Ties the main and the additional rows."""
    pad_token_id: int | None = 0
    """Row of the main embedding that is zero and stays so."""
    cross_layer_interval: int = 1
    """A gated block stands before every such many decoder layers."""
    qk_layer_norms: bool = False
    """Norms on queries and keys of the cross-attention."""
    freeze_text_layers: bool = True
    freeze_text_module_exceptions: tuple[str, ...] = ()
    """Kinds of modules that train all the same: LayerNorm, Linear, Embedding."""
    freeze_lm_head: bool = False
    freeze_vision_layers: bool = True
    freeze_vision_module_exceptions: tuple[str, ...] = ()
    use_resampler: bool = False
    vision_config: VisionSpec = field(default_factory=VisionSpec)
    perceiver_config: PerceiverSpec = field(default_factory=PerceiverSpec)
    additional_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer gets, with rows of their own behind those of vocab_size."""
    attn_implementation: str = "auto"
    """Back-end of attention in the text: auto, eager (the reference), sdpa, flex, varlen, flash."""

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        more = ("num_attention_heads", "max_position_embeddings", "cross_layer_interval")
        check_positive(self, *names, *more)
        check_heads(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}, as cross-attention needs; change one of them"
            )
        check_probabilities(self, "dropout")
        check_activation("hidden_act", self.hidden_act)
        backends.check_name(self.attn_implementation)
        if self.additional_vocab_size < 0:
            raise ValueError(
                f"additional_vocab_size={self.additional_vocab_size} is negative; set it to 0"
            )
        exceptions = self.freeze_text_module_exceptions + self.freeze_vision_module_exceptions
        choices = [
            ("alpha_initializer", self.alpha_initializer, ALPHA_INITIALIZERS),
            ("alpha_type", self.alpha_type, ALPHA_TYPES),
            *(("a freeze exception", name, tuple(FREEZABLE)) for name in exceptions),
        ]
        for key, value, known in choices:
            if value not in known:
                raise ValueError(f"{key}={value!r} is unknown; set it to one of {', '.join(known)}")

    @property
    def head_size(self) -> int:
        """Width of one head of the text."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "IdeficsSpec":
        """Read a config.json of transformers 4 or 5; ValueError for what Idefics 1 has not."""
        defaults = {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        }
        values = read_config(cls, config, defaults, neutral=("cross_layer_activation_function",))
        values["vision_config"] = read_nested(VisionSpec, config, "vision_config")
        values["perceiver_config"] = read_nested(PerceiverSpec, config, "perceiver_config")
        for part in ("text", "vision"):
            key = f"freeze_{part}_module_exceptions"
            values[key] = tuple(values.get(key) or ())
        return cls(**values, rope_parameters=read_rope(config))

    @property
    def layout(self) -> Layout:
        blocks = (
            *DECODER.blocks,
            "model.gated_cross_attn_layers.*",
            "model.vision_model.encoder.layers.*",
        )
        cross = tuple(f"cross_attn.{name}_proj" for name in "qkv")
        return Layout(
            blocks=blocks,
            colwise=DECODER.colwise + cross,
            rowwise=(*DECODER.rowwise, "cross_attn.o_proj"),
            replicated=("model.vision_model", "model.perceiver_resampler"),
            embedding=DECODER.embedding,
            norm=DECODER.norm,
            image_work=image_work(self),
        )

    def build_trunk(self) -> VisionTextTrunk:
        return VisionTextTrunk(self)

    def build_lm_head(self, trunk: nn.Module, *, chunk_tokens: int) -> DecoupledLMHead:
        head = DecoupledLMHead(
            self.hidden_size, self.vocab_size, self.additional_vocab_size, chunk_tokens=chunk_tokens
        )
        if self.tie_word_embeddings:
            table = trunk.get_submodule("embed_tokens")
            assert isinstance(table, DecoupledEmbedding)
            head.weight = table.weight
            if head.has_additional:
                head.additional_fc.weight = table.additional_embedding.weight
        return head

    def build_causal_lm(self, *, chunk_tokens: int) -> DecoderModel:
        """Build the model on torch's current default device, frozen as the spec says."""
        return heads.causal_lm(self, chunk_tokens=chunk_tokens)

    def freeze(self, model: DecoderModel) -> None:
        """Freeze what the flags say, under any head."""
        freeze(model, self)

    @property
    def attention_width(self) -> int:
        return self.num_hidden_layers * self.num_attention_heads * self.head_size

    def hf_config(self, head: str = heads.CAUSAL_LM) -> dict[str, Any]:
        """Return the keys of a Hugging Face (v5-style) config.json of the model with this head."""
        if head not in self.architectures:
            raise ValueError(f"Hugging Face has no Idefics with a head for {head}; use causal_lm")
        config = asdict(self)
        drop_own(config)
        for key in BEYOND_HUGGING_FACE:
            if not config[key]:
                del config[key]
        for part in ("text", "vision"):
            key = f"freeze_{part}_module_exceptions"
            config[key] = list(config[key])
        return {
            "architectures": [self.architectures[head]],
            "model_type": self.model_type,
            **config,
            "rope_parameters": self.rope_parameters.given(),
        }
