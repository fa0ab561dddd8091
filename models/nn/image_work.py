"""How much an Idefics computes for each image, from the sizes in its spec."""

from typing import Any

from models.layout import ImageWork

VISION, RESAMPLER = "model.vision_model", "model.perceiver_resampler"
CROSS = "model.gated_cross_attn_layers.*.cross_attn"


def image_work(spec: Any) -> ImageWork:
    """Return the work of `spec`, an IdeficsSpec, without dropout, norms and activations."""
    vision, perceiver = spec.vision_config, spec.perceiver_config
    patches = vision.grid_size**2
    states = context = patches + 1  # and the class token
    rows = {f"{VISION}.embeddings.patch_embedding.*": patches, f"{VISION}.encoder.*": context}
    scores = {f"{VISION}.encoder.layers.*.self_attn": vision.embed_dim * context**2}
    if spec.use_resampler:
        states = perceiver.resampler_n_latents
        both, width = context + states, perceiver.resampler_n_heads * perceiver.resampler_head_dim
        rows |= {f"{RESAMPLER}.*.{name}_proj.*": both for name in "kv"}
        rows[f"{RESAMPLER}.blocks.*"] = states
        scores[f"{RESAMPLER}.blocks.*.0"] = width * states * both
    return ImageWork(
        rows=rows | {f"{CROSS}.{name}_proj.*": states for name in "kv"},
        scores=scores,
        onlooker_weights=tuple(f"{CROSS}.{name}_proj.*" for name in "qo"),
        # A token looks at one image.
        onlooker_scores={CROSS: spec.hidden_size * states},
    )
