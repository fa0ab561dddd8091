"""A decoder that looks at images through gated cross-attention, and which parts of it train."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.nn import backends
from models.nn.attention import Attention
from models.nn.backends import Backend
from models.nn.cache import Cache, segments_for
from models.nn.decoder import DecoderBlock
from models.nn.decoupled import DecoupledEmbedding
from models.nn.dense import Eager, Sdpa
from models.nn.gated import CrossAttention, GatedCrossBlock, ImageMask
from models.nn.head import LMHead
from models.nn.image_memory import ImageMemory
from models.nn.init import Init
from models.nn.mlp import GatedMLP
from models.nn.model import DecoderModel
from models.nn.norm import RMSNorm
from models.nn.resampler import PerceiverResampler
from models.nn.rotary import RotaryEmbedding
from models.nn.vision import VisionTower

FREEZABLE = {"LayerNorm": nn.LayerNorm, "Linear": nn.Linear, "Embedding": nn.Embedding}
"""Kinds of modules that an exception from freezing may name."""


class VisionTextTrunk(nn.Module):
    """Token ids, and images or none, to hidden states after the final norm."""

    def __init__(self, spec: Any) -> None:
        """`spec` is an IdeficsSpec."""
        super().__init__()
        self.interval = spec.cross_layer_interval
        self.backend = backends.backend(spec.attn_implementation, dropout=spec.dropout)
        # An image mask is any pattern, no segments: only a dense mask can say it.
        dense = Eager() if spec.attn_implementation == "eager" else Sdpa()
        self.embed_tokens = DecoupledEmbedding(
            spec.vocab_size, spec.additional_vocab_size, spec.hidden_size, spec.pad_token_id,
            std=spec.hidden_size**-0.5,
        )  # fmt: skip
        self.vision_model = VisionTower(spec.vision_config, dense)
        if spec.use_resampler:
            self.perceiver_resampler = PerceiverResampler(
                spec.perceiver_config, spec.vision_config.embed_dim, spec.num_hidden_layers, dense
            )
        self.has_resampler = spec.use_resampler
        self.image_memory: ImageMemory | None = None
        """Of a frozen tower, where it is asked for."""
        vision = spec.vision_config
        self.image_shape = (vision.num_channels, vision.image_size, vision.image_size)
        self.layers = nn.ModuleList(
            _decoder_block(spec, self.backend) for _ in range(spec.num_hidden_layers)
        )
        num_gated = -(-spec.num_hidden_layers // spec.cross_layer_interval)
        self.gated_cross_attn_layers = nn.ModuleList(
            _gated_block(spec, dense) for _ in range(num_gated)
        )
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(
            spec.rope_parameters, spec.head_size, spec.max_position_embeddings
        )

    @property
    def num_cached_layers(self) -> int:
        return len(self.layers)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        cache: Cache | None = None,
        pixel_values: Tensor | None = None,
        image_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        image_keys: Tensor | None = None,
        blank_image: bool = False,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Return the (B, T, D) hidden states of (B, T) ids.

        Images come as `pixel_values` (B, I, C, height, width) or as `image_states`, what
        `encode_images` returned for them, with `image_attention_mask` (B, T, I), which image each
        position may look at, and `image_keys` (B, I, 2), hashes by which an image memory knows
        them. A cache keeps what was encoded: later passes bring the mask alone. Without images the
        cross-attention adds nothing; with `blank_image` it runs all the same, and adds zeros: every
        weight then has a gradient, if only zero. ValueError where these do not fit together.
        """
        if pixel_values is not None and image_states is not None:
            raise ValueError("both pixel_values and image_states were given; leave one of them out")
        if pixel_values is not None:
            image_states = self.encode_images(pixel_values, interpolate_pos_encoding, image_keys)
        if cache is not None:
            image_states = cache.image_states if image_states is None else image_states
            cache.image_states = image_states
        mask, states_BSE = None, None
        if image_states is not None:
            mask = _image_mask(image_states, image_attention_mask, segment_ids)
            states_BSE = image_states.flatten(1, 2)
        elif blank_image:
            states_BSE = self._blank_states(segment_ids.device).expand(len(segment_ids), -1, -1)
            mask = ImageMask.blank(segment_ids, states_BSE.shape[1])
        x_BTD = self.embed_tokens(input_ids)
        cos_BTH, sin_BTH = self.rotary_emb(position_ids, x_BTD.dtype)
        text_mask = self.backend.prepare(segments_for(segment_ids, cache))
        for index, layer in enumerate(self.layers):
            if index % self.interval == 0:
                gated = self.gated_cross_attn_layers[index // self.interval]
                x_BTD = gated(x_BTD, states_BSE, mask)
            own = None if cache is None else cache.layer(index)
            x_BTD = layer(x_BTD, cos_BTH, sin_BTH, text_mask, own)
        result: Tensor = self.norm(x_BTD)
        return result

    def encode_images(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        image_keys: Tensor | None = None,
    ) -> Tensor:
        """Return (B, I, states, E): what the text looks at, of (B, I, C, height, width) pixels."""

        def seen(pixels_XCHW: Tensor) -> Tensor:
            states_XSE: Tensor = self.vision_model(pixels_XCHW, interpolate_pos_encoding)
            return states_XSE

        def resampled(states_XSE: Tensor) -> Tensor:
            return self.perceiver_resampler(states_XSE) if self.has_resampler else states_XSE

        pixels_XCHW, memory = pixel_values.flatten(0, 1), self.image_memory
        if memory is None or image_keys is None:
            states_XSE = resampled(seen(pixels_XCHW))
        elif memory.is_resampled:
            keys_X2 = image_keys.flatten(0, 1)
            states_XSE = memory.states(pixels_XCHW, keys_X2, lambda pixels: resampled(seen(pixels)))
        else:
            states_XSE = resampled(memory.states(pixels_XCHW, image_keys.flatten(0, 1), seen))
        return states_XSE.unflatten(0, pixel_values.shape[:2])

    def _blank_states(self, device: torch.device) -> Tensor:
        """Return the (1, states, E) of one blank image; what is drawn for it is not missed after.

        So the dropout of a micro-batch does not depend on what other ranks look at beside it.
        """
        pixels = torch.zeros((1, 1, *self.image_shape), device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self.encode_images(pixels).flatten(1, 2)

    def image_weights(self) -> Iterator[nn.Parameter]:
        """Yield the weights that act on images alone."""
        yield from self.vision_model.parameters()
        if self.has_resampler:
            yield from self.perceiver_resampler.parameters()
        for gated in self.gated_cross_attn_layers:
            if isinstance(gated, GatedCrossBlock):  # not: of another pipeline stage
                yield from gated.image_weights()


def _image_mask(states_BISE: Tensor, mask_BTI: Tensor | None, segments_BT: Tensor) -> ImageMask:
    needed = (*segments_BT.shape, states_BISE.shape[1])
    if mask_BTI is None or tuple(mask_BTI.shape) != needed:
        found = None if mask_BTI is None else tuple(mask_BTI.shape)
        raise ValueError(
            f"image_attention_mask has shape {found}; needed (rows, tokens, images) = {needed}"
        )
    return ImageMask(mask_BTI, states_BISE.shape[2])


def _decoder_block(spec: Any, backend: Backend) -> DecoderBlock:
    heads = spec.num_attention_heads
    return DecoderBlock(
        self_attn=Attention(
            spec.hidden_size, heads, spec.num_key_value_heads or heads, spec.head_size,
            bias=spec.attention_bias, dropout=spec.dropout, backend=backend,
        ),
        mlp=GatedMLP(
            spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias,
            activation=spec.hidden_act,
        ),
        input_layernorm=RMSNorm(spec.hidden_size, spec.rms_norm_eps),
        post_attention_layernorm=RMSNorm(spec.hidden_size, spec.rms_norm_eps),
        dropout=spec.dropout,
    )  # fmt: skip


def _gated_block(spec: Any, backend: Backend) -> GatedCrossBlock:
    known = {"zeros": Init(), "ones": Init(mean=1.0)}
    return GatedCrossBlock(
        spec.hidden_size,
        spec.intermediate_size,
        CrossAttention(
            spec.hidden_size,
            spec.num_attention_heads,
            spec.vision_config.embed_dim,
            qk_layer_norms=spec.qk_layer_norms,
            eps=spec.rms_norm_eps,
            dropout=spec.dropout,
            backend=backend,
        ),
        hidden_act=spec.hidden_act,
        eps=spec.rms_norm_eps,
        dropout=spec.dropout,
        alpha_type=spec.alpha_type,
        alpha=known.get(spec.alpha_initializer, Init(std=spec.alphas_initializer_range)),
        num_decoder_layers=spec.num_hidden_layers,
    )


def freeze(model: DecoderModel, spec: Any) -> None:
    """Freeze in place what the spec's flags say; ValueError for an exception without effect.

    The additional rows, the resampler and the gated blocks always train. A tied head is frozen with
    the text.
    """
    trunk = model.trunk
    assert isinstance(trunk, VisionTextTrunk)
    if spec.freeze_text_layers:
        text = nn.ModuleList([trunk.layers, trunk.norm])
        _freeze_but(text, spec.freeze_text_module_exceptions, "freeze_text_module_exceptions")
        trunk.embed_tokens.weight.requires_grad_(False)
    if spec.freeze_vision_layers:
        exceptions = spec.freeze_vision_module_exceptions
        _freeze_but(trunk.vision_model, exceptions, "freeze_vision_module_exceptions")
        trunk.vision_model.post_layernorm.requires_grad_(False)  # as the tower has it
    if spec.freeze_lm_head and isinstance(model.head, LMHead):
        model.head.get_parameter("weight").requires_grad_(False)


def _freeze_but(part: nn.Module, exceptions: tuple[str, ...], key: str) -> None:
    kinds = tuple(FREEZABLE[name] for name in exceptions)
    for name, kind in zip(exceptions, kinds, strict=True):
        if not any(isinstance(module, kind) for module in part.modules()):
            raise ValueError(
                f"{key}={name!r} matches no module, so nothing of it trains; remove it"
            )
    part.requires_grad_(False)
    for module in part.modules():
        if isinstance(module, kinds):
            module.requires_grad_(True)


def trains_on_images(model: nn.Module) -> bool:
    """Whether a weight trains that acts on images alone."""
    trunks = [module for module in model.modules() if isinstance(module, VisionTextTrunk)]
    return any(weight.requires_grad for trunk in trunks for weight in trunk.image_weights())
