"""GPT-BigCode (SantaCoder, StarCoder): spec, model and its parallel layout.

Source: Ben Allal et al. 2023; Li et al. 2023; multi-query attention: Shazeer 2019. Module and
config names are those of Hugging Face.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models import heads
from models.hf_config import drop_own, read_config
from models.layout import Layout
from models.nn import backends
from models.nn.activation import check_activation
from models.nn.bigcode import BigCodeBlock
from models.nn.cache import Cache, segments_for
from models.nn.checks import check_positive, check_probabilities
from models.nn.head import LMHead
from models.nn.init import Init
from models.nn.model import DecoderModel
from models.nn.segments import Segments

# Keys by other names that files may use, and keys of an old inference server.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_SERVER = ("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length",
           "pre_allocate_kv_cache", "validate_runner_input", "num_key_value_heads")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GPTBigCodeSpec:
    """Size and switches of a GPT-BigCode; field names as in Hugging Face's GPTBigCodeConfig."""

    model_type: ClassVar[str] = "gpt_bigcode"
    trunk_name: ClassVar[str] = "transformer"
    token_head_name: ClassVar[str] = "classifier"
    architectures: ClassVar[dict[str, str]] = {
        heads.CAUSAL_LM: "GPTBigCodeForCausalLM",
        heads.SEQUENCE: "GPTBigCodeForSequenceClassification",
        heads.TOKEN: "GPTBigCodeForTokenClassification",
    }
    ignored_weights: ClassVar[tuple[str, ...]] = ("*.attn.bias", "*.attn.masked_bias")
    """Buffers that old files hold and that are computed here."""

    vocab_size: int
    """Rows of the embedding and of the head."""
    n_positions: int
    """Longest row, in tokens: rows of the learned position table."""
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    """Width of the feed-forward layer; None: 4 * n_embd."""
    activation_function: str = "gelu_pytorch_tanh"
    resid_pdrop: float = 0.1
    """Probability of dropping an output of attention or feed-forward layer in training."""
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of initial weights; c_proj: divided by sqrt(2 * n_layer)."""
    scale_attn_weights: bool = True
    """Divide scores by sqrt(head size)."""
    attention_softmax_in_fp32: bool = True
    """False needs attn_implementation=eager: fused kernels always compute softmax in fp32."""
    scale_attention_softmax_in_fp32: bool = True
    """In half precision, eager: keep scores small by the layer's number until they are in fp32."""
    multi_query: bool = True
    """One key/value head for all query heads; False: one for each."""
    add_cross_attention: bool = False
    """A second attention in each block, over an encoder's states; needs multi_query=false."""
    tie_word_embeddings: bool = True
    additional_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer gets, with rows of their own behind those of vocab_size."""
    attn_implementation: str = "auto"
    """Attention back-end: auto, eager (the reference), sdpa, flex, varlen or flash."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        check_probabilities(self, "resid_pdrop", "embd_pdrop", "attn_pdrop")
        check_activation("activation_function", self.activation_function)
        if self.n_inner is not None:
            check_positive(self, "n_inner")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}; change one of them"
            )
        if self.add_cross_attention and self.multi_query:
            raise ValueError(
                "add_cross_attention=true is defined for multi_query=false only; set one of them"
            )
        if not self.attention_softmax_in_fp32 and self.attn_implementation != "eager":
            raise ValueError(
                f"attention_softmax_in_fp32=false has no effect with attn_implementation="
                f"{self.attn_implementation!r}; set that to eager, or the flag to true"
            )
        backends.check_name(self.attn_implementation)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "GPTBigCodeSpec":
        """Read a config.json of transformers 4 or 5; ValueError for what the family has not."""
        config = {_ALIASES.get(key, key): value for key, value in config.items()}
        defaults = {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
        }
        return cls(**read_config(cls, config, defaults, neutral=_SERVER))

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @property
    def layout(self) -> Layout:
        """Learned positions lie beside the embedding; `c_attn` holds queries, keys and values."""
        crossed = ("crossattention.q_attn", "crossattention.c_attn", "crossattention.c_proj")
        cross = crossed if self.add_cross_attention else ()
        return Layout(
            blocks=("transformer.h.*",),
            colwise=("attn.c_attn", "mlp.c_fc", *cross[:2]),
            rowwise=("attn.c_proj", "mlp.c_proj", *cross[2:]),
            positions=("transformer.wpe",),
            embedding="transformer.wte",
            norm="transformer.ln_f",
        )

    def build_trunk(self) -> "GPTBigCode":
        return GPTBigCode(self)

    def build_lm_head(self, trunk: nn.Module, *, chunk_tokens: int) -> LMHead:
        head = LMHead(self.n_embd, self.vocab_size, chunk_tokens=chunk_tokens)
        if self.tie_word_embeddings:
            head.weight = trunk.get_submodule("wte").get_parameter("weight")
        return head

    def build_causal_lm(self, *, chunk_tokens: int) -> DecoderModel:
        """Build the model on torch's current default device (`torch.device("meta")` to plan)."""
        return heads.causal_lm(self, chunk_tokens=chunk_tokens)

    @property
    def attention_width(self) -> int:
        return self.n_layer * self.n_embd

    def hf_config(self, head: str = heads.CAUSAL_LM) -> dict[str, Any]:
        """Return the keys of a Hugging Face (v5-style) config.json of the model with this head."""
        config = asdict(self)
        drop_own(config)
        architecture = self.architectures[head]
        return {"architectures": [architecture], "model_type": self.model_type, **config}


class GPTBigCode(nn.Module):
    """The trunk: token ids to hidden states after the final norm."""

    def __init__(self, spec: GPTBigCodeSpec) -> None:
        super().__init__()
        self.num_layers = spec.n_layer
        self.backend = backends.backend(spec.attn_implementation, dropout=spec.attn_pdrop)
        self.wte = nn.Embedding(spec.vocab_size, spec.n_embd)
        self.wpe = nn.Embedding(spec.n_positions, spec.n_embd)
        self.drop = nn.Dropout(spec.embd_pdrop)
        self.h = nn.ModuleList(
            BigCodeBlock(spec, self.backend, index) for index in range(spec.n_layer)
        )
        self.ln_f = nn.LayerNorm(spec.n_embd, eps=spec.layer_norm_epsilon)

    def initial(self, std: float) -> dict[str, Init]:
        """Start what is added to the residual smaller, by its depth. Source: Radford 2019."""
        scaled = Init(std=std / (2 * self.num_layers) ** 0.5)
        names = [name for name, _ in self.named_parameters()]
        return {name: scaled for name in names if name.endswith("c_proj.weight")}

    @property
    def num_cached_layers(self) -> int:
        return len(self.h)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        cache: Cache | None = None,
        token_type_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the (B, T, D) hidden states of (B, T) ids; attention stays within segments.

        With cross-attention, every token looks at the encoder's (B, S, D) states, where their
        (B, S) mask is not 0; a row whose mask is 0 throughout gets nothing from them.
        """
        x_BTD = self.wte(input_ids) + self.wpe(position_ids)
        if token_type_ids is not None:
            x_BTD = x_BTD + self.wte(token_type_ids)
        x_BTD = self.drop(x_BTD)
        mask = self.backend.prepare(segments_for(segment_ids, cache))
        cross = None
        if encoder_hidden_states is not None:
            cross = self.backend.prepare(
                _encoder_segments(input_ids, encoder_hidden_states, encoder_attention_mask)
            )
        for index, block in enumerate(self.h):
            own = None if cache is None else cache.layer(index)
            x_BTD = block(x_BTD, mask, own, encoder_hidden_states, cross)
        result: Tensor = self.ln_f(x_BTD)
        return result


def _encoder_segments(ids_BT: Tensor, states_BSD: Tensor, mask_BS: Tensor | None) -> Segments:
    if mask_BS is None:
        mask_BS = torch.ones(states_BSD.shape[:2], dtype=torch.int64, device=states_BSD.device)
    slots_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    key_BS = (mask_BS != 0).long()
    return Segments(query=torch.ones_like(ids_BT), key=key_BS, causal=False, slots=slots_T)
