"""The stated FLOPs against those that torch counts in a step, with and without frozen parts."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.parity import oracle
from models.heads import causal_lm, preference_model
from models.idefics import IdeficsSpec
from models.nn.model import DecoderModel
from tests.conftest import tiny_spec
from trainer.adapters.lora import LoRA
from trainer.flops import Flops, training_flops
from trainer.freeze import FreezeSpec

LENGTH, LAYERS, WIDTH, HEAD = 24, 4, 32, 258 * 32
# Eager: the counter sees nothing of the fused CPU kernel.
SPEC = tiny_spec(
    attn_implementation="eager", hidden_size=WIDTH, head_dim=8, num_hidden_layers=LAYERS,
    tie_word_embeddings=False,
)  # fmt: skip


def counted(model: DecoderModel) -> float:
    """Return what torch counts per token of one row."""
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        scale = torch.ones((), requires_grad=False)
        model(ids, ids, torch.ones_like(ids), ids, scale).objective.backward()
    return counter.get_total_flops() / LENGTH


def stated(model: DecoderModel) -> int:
    found = training_flops(model, SPEC.layout, SPEC.attention_width, LENGTH)
    assert found == Flops(per_token=found.per_token)  # no images, no reference
    return found.per_token


def full_attention(layers_with_gradients: int) -> int:
    """Torch knows no causal discount: half of this is in the formula, the other half is not."""
    return (2 * LAYERS + 4 * layers_with_gradients) * WIDTH * LENGTH


def size(model: DecoderModel, *names: str) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


def test_all_that_trains_counts_six_times() -> None:
    model = causal_lm(SPEC, chunk_tokens=8)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - HEAD  # no embedding
    attention = full_attention(LAYERS)
    assert stated(model) == 6 * matrices + attention
    # It knows no addmm_ either, which adds up the head's weight gradient.
    assert stated(model) == counted(model) - attention + 2 * HEAD


def test_blocks_in_front_of_the_first_adapter_only_compute_forward() -> None:
    model = causal_lm(SPEC, chunk_tokens=8)
    LoRA(rank=2, targets=("model.layers.2.*_proj", "model.layers.3.*_proj")).apply(
        model, SPEC.layout
    )
    # What reads the input of the first adapted block hands no gradient on: the formula counts it.
    first = [f"model.layers.2.self_attn.{name}_proj" for name in "qkv"]
    unneeded = 2 * size(model, *(f"{n}.{end}weight" for n in first for end in ("", "lora_A.")))
    assert stated(model) == counted(model) - full_attention(2) + unneeded


@pytest.mark.parametrize(
    ("frozen", "uncounted"),
    [
        (("model.*",), 2 * HEAD),  # the head alone trains: addmm_, as above
        (("model.embed_tokens.*", "model.layers.*", "lm_head.*"), 0),  # the last norm alone
    ],
)
def test_a_frozen_trunk_computes_forward_and_what_is_behind_it_both_ways(
    frozen: tuple[str, ...], uncounted: int
) -> None:
    model = causal_lm(SPEC, chunk_tokens=8)
    FreezeSpec(frozen=frozen).apply(model)
    trunk = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n)
    assert stated(model) == 2 * trunk + 4 * HEAD + full_attention(0)
    assert stated(model) == counted(model) - full_attention(0) + uncounted


def test_a_tied_head_is_a_matrix() -> None:
    spec = tiny_spec(hidden_size=WIDTH, head_dim=8)
    model = causal_lm(spec, chunk_tokens=8)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    found = training_flops(model, spec.layout, spec.attention_width, LENGTH)
    assert found.per_token == 6 * matrices + 6 * 2 * WIDTH * LENGTH


VISUAL = replace(
    oracle.specs()["Idefics"], attn_implementation="eager", num_hidden_layers=4,
    cross_layer_interval=2,
)  # fmt: skip


def stated_and_counted(model: DecoderModel, spec: IdeficsSpec) -> tuple[float, float]:
    """Return the formula's FLOPs and torch's of one row of tokens that all look at its one image,
    but for half of the text's scores and the head's weight gradient, as above."""
    inputs = oracle.inputs(spec, batch=1, length=LENGTH)
    texts = [inputs[name] for name in ("input_ids", "position_ids", "segment_ids")]
    with FlopCounterMode(display=False) as counter:
        model(
            *texts, inputs["input_ids"], torch.ones(()),
            pixel_values=inputs["pixel_values"][:, :1],
            image_attention_mask=torch.ones(1, LENGTH, 1, dtype=torch.int64),
        ).objective.backward()  # fmt: skip
    uncounted = sum(w.numel() for n, w in model.head.named_parameters() if w.requires_grad)
    found = training_flops(model, spec.layout, spec.attention_width, LENGTH)
    stated = found.of(tokens=LENGTH, onlookers=LENGTH, images=1)
    return stated, counter.get_total_flops() + 2 * LENGTH * uncounted


def text_scores(layers_with_gradients: int) -> int:
    layers = 2 * VISUAL.num_hidden_layers + 4 * layers_with_gradients
    return layers * VISUAL.hidden_size * LENGTH**2


BEGINNING = ("embeddings.*", "pre_layrnorm.*", "encoder.layers.0.*")


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        ({}, ()),
        ({"freeze_vision_layers": True}, ()),
        ({"freeze_text_layers": True, "freeze_vision_layers": True}, ()),
        ({"freeze_text_layers": True}, ("lm_head.*",)),
        ({}, tuple(f"model.vision_model.{name}" for name in BEGINNING)),
        ({"freeze_vision_layers": True}, ("model.gated_cross_attn_layers.*",)),
    ],
)
@pytest.mark.parametrize("use_resampler", [True, False])
def test_an_image_costs_what_torch_counts_whatever_is_frozen(
    flags: dict[str, bool], frozen: tuple[str, ...], use_resampler: bool
) -> None:
    spec = replace(VISUAL, use_resampler=use_resampler, **flags)
    model = causal_lm(spec, chunk_tokens=8)
    FreezeSpec(frozen=frozen).apply(model)
    stated, counted = stated_and_counted(model, spec)
    assert stated == counted - text_scores(VISUAL.num_hidden_layers)


def test_gated_blocks_in_front_of_the_first_adapter_only_compute_forward() -> None:
    model = causal_lm(VISUAL, chunk_tokens=8)
    LoRA(rank=2, targets=("model.layers.2.*_proj", "model.layers.3.*_proj")).apply(
        model, VISUAL.layout
    )
    stated, counted = stated_and_counted(model, VISUAL)
    first = [f"model.layers.2.self_attn.{name}_proj" for name in "qkv"]
    unneeded = 2 * size(model, *(f"{n}.{end}weight" for n in first for end in ("", "lora_A.")))
    assert stated == counted - text_scores(2) + unneeded * LENGTH


def test_a_frozen_tower_costs_two_for_a_weight_and_a_training_one_six() -> None:
    spec = replace(VISUAL, use_resampler=False)
    patches, context = 4, 5  # of 12 x 12 pixels in squares of 6, and the class token
    model = causal_lm(spec, chunk_tokens=8)
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 2}
    tower = sum(count for name, count in matrices.items() if ".encoder." in name)
    keys = sum(n for name, n in matrices.items() if ".k_proj" in name and "cross" in name)
    conv = size(model, "model.vision_model.embeddings.patch_embedding.weight") * patches
    scores = 2 * 24 * context**2  # two layers of width 24
    trained, frozen = (
        training_flops(m, spec.layout, spec.attention_width, LENGTH).per_image
        for m in (model, causal_lm(replace(spec, freeze_vision_layers=True), chunk_tokens=8))
    )
    assert trained == 6 * context * (tower + 2 * keys) + 4 * conv + 12 * scores
    assert frozen == context * (2 * tower + 4 * 2 * keys) + 2 * conv + 4 * scores


def test_the_reference_of_dpo_is_one_more_forward_pass_without_adapters() -> None:
    models = []
    for make in (causal_lm, partial(preference_model, beta=0.1, label_smoothing=0.0)):
        model = make(SPEC, chunk_tokens=8)
        LoRA(rank=2, targets=("all-linear",)).apply(model, SPEC.layout)
        models.append(model)
    plain, both = (
        training_flops(model, SPEC.layout, SPEC.attention_width, LENGTH) for model in models
    )
    base = size(models[0], *(n for n, p in models[0].named_parameters() if "_proj.weight" in n))
    forward = 2 * (base + HEAD) + 2 * LAYERS * WIDTH * LENGTH
    assert both.per_token == plain.per_token + forward
    assert (plain.has_reference, both.has_reference) == (False, True)

    ids = torch.arange(LENGTH)[None]
    position_ids, segments = ids % (LENGTH // 2), 1 + ids // (LENGTH // 2)
    with FlopCounterMode(display=False) as counter:
        loss = models[1](ids, position_ids, segments, torch.tensor([[3]]), torch.ones(()))
        loss.objective.backward()
    scores = full_attention(LAYERS) + 2 * LAYERS * WIDTH * LENGTH  # halves, of both passes
    first = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    unneeded = 2 * size(models[1], *(f"{n}.{end}weight" for n in first for end in ("", "lora_A.")))
    again = 2 * HEAD  # logits are computed once more in the backward pass
    # In each of its four products a CPU's head leaves out 3 of 12 tokens, which have no target.
    left_out = 4 * 2 * HEAD * 3 / 12
    counted = counter.get_total_flops() / LENGTH
    assert both.per_token == counted - scores + unneeded - again + left_out
