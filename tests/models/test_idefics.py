"""Idefics: drawn configs, what transformers crashes on, freezing tables, initial values."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from benchmarks.parity.oracle import built, inputs, relative, specs, their_inputs, theirs
from models.idefics import IdeficsSpec
from models.nn.cache import GrowingCache
from models.nn.decoupled import DecoupledEmbedding, DecoupledLMHead
from models.nn.init import Init, initializers
from models.nn.vision_text import trains_on_images

SPEC: IdeficsSpec = specs()["Idefics"]


def trained(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    use_resampler=st.booleans(),
    qk_norms=st.booleans(),
    perceiver_norms=st.booleans(),
    interval=st.sampled_from([1, 2]),
    additional=st.sampled_from([0, 2]),
    tied=st.booleans(),
    alpha=st.sampled_from([("ones", "float"), ("ones", "vector"), ("normal", "vector")]),
    masked_row=st.booleans(),
)
def test_logits_and_gradients_equal_those_of_transformers(
    use_resampler: bool, qk_norms: bool, perceiver_norms: bool, interval: int, additional: int,
    tied: bool, alpha: tuple[str, str], masked_row: bool,
) -> None:  # fmt: skip
    perceiver = replace(SPEC.perceiver_config, qk_layer_norms_perceiver=perceiver_norms)
    spec = replace(
        SPEC, use_resampler=use_resampler, qk_layer_norms=qk_norms, perceiver_config=perceiver,
        cross_layer_interval=interval, additional_vocab_size=additional, tie_word_embeddings=tied,
        alpha_initializer=alpha[0], alpha_type=alpha[1], alphas_initializer_range=0.3,
    )  # fmt: skip
    model, batch = built(spec), inputs(spec)
    if additional:
        batch["input_ids"][:, 4:6] = spec.vocab_size + 1
    if masked_row:
        batch["image_attention_mask"][1] = 0
    other = theirs(spec, model)
    found, expected = model(**batch), other(**their_inputs(batch)).logits
    assert found.shape[-1] == spec.vocab_size + additional
    assert relative(found, expected) < 1e-5
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(other.named_parameters())
    for name in trained(model):
        if name.endswith(
            ("k_proj.bias", "k_layer_norm.bias")
        ):  # zero but for rounding: softmax does not see it
            continue
        mine, reference = model.get_parameter(name).grad, gradients.get(name)
        if reference is not None:
            assert relative(mine, reference.grad) < 1e-4, name


def test_text_alone_equals_an_image_that_nobody_looks_at() -> None:
    model, batch = built(SPEC), inputs(SPEC)
    text = {k: v for k, v in batch.items() if k not in ("pixel_values", "image_attention_mask")}
    blind = {**batch, "image_attention_mask": torch.zeros_like(batch["image_attention_mask"])}
    assert torch.equal(model(**text), model(**blind))
    assert relative(model(**text), theirs(SPEC, model)(**their_inputs(blind)).logits) < 1e-5
    assert not torch.equal(model(**text), model(**batch))


def test_positions_before_the_first_image_do_not_depend_on_it() -> None:
    model, batch = built(SPEC), inputs(SPEC)
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    first, second = model(**batch), model(**other)
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.equal(first[:, 3:], second[:, 3:])


def test_layers_need_not_divide_by_the_interval() -> None:
    spec = replace(SPEC, num_hidden_layers=5, cross_layer_interval=2)
    model, batch = built(spec), inputs(spec)
    assert len(model.trunk.gated_cross_attn_layers) == 3
    assert model(**batch).isfinite().all()


def test_images_are_encoded_once_and_reused_with_a_cache() -> None:
    model, batch = built(SPEC), inputs(SPEC)
    full = model(**batch)
    pixels, mask = batch.pop("pixel_values"), batch.pop("image_attention_mask")
    states = model.trunk.encode_images(pixels)
    cache = GrowingCache(model.trunk.num_cached_layers)
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 18)):
        piece = {key: value[:, start:stop] for key, value in batch.items()}
        parts.append(
            model(
                **piece, cache=cache, image_states=states, image_attention_mask=mask[:, start:stop]
            )
        )
    assert relative(torch.cat(parts, dim=1), full) < 1e-5


def test_other_image_sizes_need_interpolated_positions_and_agree_with_transformers() -> None:
    model, batch = built(SPEC), inputs(SPEC)
    batch["pixel_values"] = torch.randn(2, 2, 3, 30, 24, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="images are 30 x 24 pixels, the model takes 12 x 12"):
        model(**batch)
    expected = theirs(SPEC, model)(**their_inputs(batch), interpolate_pos_encoding=True).logits
    assert relative(model(**batch, interpolate_pos_encoding=True), expected) < 1e-5


def test_closed_gates_let_gradients_reach_the_gates_alone() -> None:
    spec = replace(SPEC, alpha_initializer="zeros")
    model, batch = built(spec), inputs(spec)
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.data.zero_()
    model(**batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        behind_gate = "gated" in name or "vision" in name or "perceiver" in name
        if "alpha" in name:
            assert parameter.grad.abs().max() > 0, name
        elif behind_gate:
            assert parameter.grad.abs().max() == 0, name


def test_the_default_freezing_trains_what_it_should() -> None:
    frozen = replace(SPEC, freeze_text_layers=True, freeze_vision_layers=True)
    plain = replace(frozen, use_resampler=False, qk_layer_norms=False)
    model = plain.build_causal_lm(chunk_tokens=8)
    assert len(trained(model)) == 3 + 2 * 11
    parts = {name.split(".")[1] for name in trained(model) if name.startswith("model.")}
    assert parts == {"embed_tokens", "gated_cross_attn_layers"}
    assert "model.embed_tokens.additional_embedding.weight" in trained(model)
    assert "model.embed_tokens.weight" not in trained(model)
    assert {"lm_head.weight", "lm_head.additional_fc.weight"} <= set(trained(model))
    perceiver = replace(SPEC.perceiver_config, qk_layer_norms_perceiver=True)
    rich = replace(frozen, cross_layer_interval=2, perceiver_config=perceiver)
    assert len(trained(rich.build_causal_lm(chunk_tokens=8))) == 3 + 13 + 3 + 16


@pytest.mark.parametrize(
    ("changes", "trains", "is_frozen"),
    [
        ({"freeze_lm_head": True}, "lm_head.additional_fc.weight", "lm_head.weight"),
        (
            {"freeze_text_layers": True, "tie_word_embeddings": True},
            "lm_head.additional_fc.weight",
            "lm_head.weight",
        ),
        (
            {"freeze_text_layers": True, "freeze_text_module_exceptions": ("Linear",)},
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.input_layernorm.weight",
        ),
        (
            {"freeze_vision_layers": True, "freeze_vision_module_exceptions": ("Embedding",)},
            "model.vision_model.embeddings.position_embedding.weight",
            "model.vision_model.embeddings.class_embedding",
        ),
        (
            {"freeze_vision_layers": True, "freeze_vision_module_exceptions": ("LayerNorm",)},
            "model.vision_model.encoder.layers.0.layer_norm1.weight",
            "model.vision_model.post_layernorm.weight",
        ),
        (
            {},
            "model.vision_model.embeddings.class_embedding",
            "model.vision_model.post_layernorm.bias",
        ),
    ],
)
def test_every_flag_freezes_what_it_names(
    changes: dict[str, Any], trains: str, is_frozen: str
) -> None:
    model = replace(SPEC, **changes).build_causal_lm(chunk_tokens=8)
    assert trains in trained(model)
    assert is_frozen not in trained(model)


def test_an_exception_that_matches_nothing_is_refused() -> None:
    spec = replace(
        SPEC, freeze_text_layers=True, freeze_text_module_exceptions=("LayerNorm",)
    )  # the text has RMSNorms only
    with pytest.raises(ValueError, match="matches no module, so nothing of it trains"):
        spec.build_causal_lm(chunk_tokens=8)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("additional", [0, 3])
def test_the_decoupled_heads_loss_equals_plain_cross_entropy(frozen: bool, additional: int) -> None:
    head = DecoupledLMHead(6, 11, additional, chunk_tokens=4).double()
    for number, parameter in enumerate(head.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    head.weight.requires_grad_(not frozen)
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 11 + additional, (2, 7), generator=generator)
    labels[0, :3] = -100
    scale = torch.tensor(0.3, dtype=torch.float64)
    loss = head(hidden, None, labels, scale)
    logits = hidden @ torch.cat([*head.weights()]).T
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    for one, other in zip(
        torch.autograd.grad(loss.objective, wanted),
        torch.autograd.grad(scale * expected, wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_decoupled_embedding_looks_up_both_tables_and_keeps_the_ids() -> None:
    table = DecoupledEmbedding(5, 2, 3, padding_idx=0)
    ids = torch.tensor([[0, 4, 5, 6]])
    whole = torch.cat((table.weight, table.additional_embedding.weight))
    assert torch.equal(table(ids), whole[ids])
    assert ids.tolist() == [[0, 4, 5, 6]]
    with pytest.raises(ValueError, match="pad_token_id=5 lies outside vocab_size=5"):
        DecoupledEmbedding(5, 2, 3, padding_idx=5)


def m4_inits(spec: IdeficsSpec) -> dict[str, Init]:
    """Return how m4 starts each kind of weight, by a pattern of names; the first that fits counts.

    m4 takes its text and its tower from folders: what is in neither of its own blocks starts here
    as in transformers, normal of `initializer_range`.
    """
    width, vision, layers = spec.hidden_size, spec.vision_config.embed_dim, spec.num_hidden_layers
    gated, resampler = r"model\.gated_cross_attn_layers\.\d\.", r"model\.perceiver_resampler\."
    of_fan_in = {
        name: Init(std=math.sqrt(0.4 / size))
        for name, size in [
            (gated + r"cross_attn\.[qo]_proj\.weight", width),
            (gated + r"cross_attn\.[kv]_proj\.weight", vision),
            (gated + r"mlp\.(gate|up)_proj\.weight", width),
            (gated + r"mlp\.down_proj\.weight", spec.intermediate_size * 2 * layers),
            (resampler + r"blocks\.\d\.0\.(q|k|v|output)_proj\.weight", vision),
            (resampler + r"blocks\.\d\.1\.fc\.weight", vision),
            (resampler + r"blocks\.\d\.1\.c_proj\.weight", vision * 2 * layers),
        ]
    }
    return of_fan_in | {
        gated + "alpha_(cross_attn|dense)": Init(),
        resampler + "latents": Init(std=vision**-0.5),
        r"model\.embed_tokens\.weight": Init(std=width**-0.5, zeros=(0, width)),
        r"model\.embed_tokens\.additional_embedding\.weight": Init(std=width**-0.5),
        r"lm_head\.additional_fc\.weight": Init(std=width**-0.5),
        r"model\.vision_model\.embeddings\.class_embedding": Init(std=vision**-0.5),
        r".*\.bias": Init(),
        r".*(norm\d?|ln)\.weight": Init(mean=1.0),
        r"lm_head\.weight": Init(std=0.02),
        r"model\.layers\..*_proj\.weight": Init(std=0.02),
        r"model\.vision_model\..*(_proj|fc\d|_embedding)\.weight": Init(std=0.02),
    }


@pytest.mark.parametrize("alpha_type", ["float", "vector"])
def test_every_weight_starts_as_in_the_original_training_code(alpha_type: str) -> None:
    perceiver = replace(SPEC.perceiver_config, qk_layer_norms_perceiver=True)
    spec = replace(
        SPEC, alpha_initializer="zeros", alpha_type=alpha_type, perceiver_config=perceiver
    )
    model = spec.build_causal_lm(chunk_tokens=8)
    inits, expected, met = initializers(model, 0.02), m4_inits(spec), set()
    for name, _ in model.named_parameters():
        pattern = next(pattern for pattern in expected if re.fullmatch(pattern, name))
        assert inits[name] == expected[pattern], name
        met.add(pattern)
    assert met == set(expected)  # no kind of weight was left out


@pytest.mark.parametrize(
    ("initializer", "expected"),
    [("ones", Init(mean=1.0)), ("normal", Init(std=0.7)), ("random", Init(std=0.7))],
)
def test_gates_start_open_where_that_was_asked_for(initializer: str, expected: Init) -> None:
    spec = replace(SPEC, alpha_initializer=initializer, alphas_initializer_range=0.7)
    inits = initializers(spec.build_causal_lm(chunk_tokens=8), 0.02)
    gates = {name: init for name, init in inits.items() if "alpha_" in name}
    assert len(gates) == 4
    assert set(gates.values()) == {expected}


def test_a_config_is_read_back_whole_and_from_what_a_version_4_file_keeps() -> None:
    assert IdeficsSpec.from_hf_config(SPEC.hf_config()) == replace(SPEC, attn_implementation="auto")
    read = IdeficsSpec.from_hf_config({"vision_config": {"embed_dim": 1280}, "dropout": 0.1})
    assert (read.vision_config.embed_dim, read.vision_config.patch_size) == (1280, 14)
    assert (read.dropout, read.freeze_vision_layers, read.cross_layer_interval) == (0.1, True, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_type": "matrix"}, "alpha_type='matrix' is unknown; set it to one of float"),
        ({"alpha_initializer": "twos"}, "alpha_initializer='twos' is unknown"),
        ({"freeze_text_module_exceptions": ("Conv",)}, "a freeze exception='Conv' is unknown"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"additional_vocab_size": -1}, "is negative"),
        ({"cross_layer_interval": 0}, "is not positive"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **changes)


@pytest.mark.parametrize("num_shared", [1, 2])
def test_shared_key_heads_compute_what_repeated_ones_compute(num_shared: int) -> None:
    spec = replace(SPEC, num_key_value_heads=num_shared)
    model, whole, batch = built(spec), built(SPEC), inputs(SPEC)
    times, head_size = SPEC.num_attention_heads // num_shared, spec.head_size
    repeated = {
        name: weight.unflatten(0, (-1, head_size)).repeat_interleave(times, dim=0).flatten(0, 1)
        for name, weight in model.state_dict().items()
        if name.endswith(("self_attn.k_proj.weight", "self_attn.v_proj.weight"))
        and ".layers." in name
        and "vision" not in name
    }
    assert len(repeated) == 2 * SPEC.num_hidden_layers
    whole.load_state_dict(model.state_dict() | repeated)
    assert relative(model(**batch), whole(**batch)) < 1e-6
    assert relative(model(**batch), theirs(SPEC, whole)(**their_inputs(batch)).logits) < 1e-5
    assert IdeficsSpec.from_hf_config(spec.hf_config()) == replace(spec, attn_implementation="auto")


def test_images_without_a_fitting_mask_are_refused() -> None:
    model, batch = built(SPEC), inputs(SPEC)
    mask = batch.pop("image_attention_mask")
    with pytest.raises(ValueError, match=r"shape None; needed .* = \(2, 18, 2\)"):
        model(**batch)
    with pytest.raises(ValueError, match=r"shape \(2, 18, 1\)"):
        model(**batch, image_attention_mask=mask[:, :, :1])


def test_a_blank_image_changes_no_bit_and_gives_every_weight_a_gradient() -> None:
    """Also under dropout: what is drawn for it leaves the other numbers as they are."""
    vision = replace(SPEC.vision_config, attention_dropout=0.3)
    model = built(replace(SPEC, dropout=0.3, vision_config=vision)).train()
    batch = inputs(SPEC)
    text = {key: batch[key] for key in ("input_ids", "position_ids", "segment_ids")}
    found = []
    for images in ({}, {"blank_image": True}):
        torch.manual_seed(0)
        logits = model(**text, **images)
        model.zero_grad()
        logits.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((logits, gradients, torch.rand(3)))
    (logits, plain, drawn), (others, blank, after) = found
    assert logits.equal(others)
    assert drawn.equal(after)
    of_images = {id(weight) for weight in model.trunk.image_weights()}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_of_images = id(weight) in of_images
            assert (plain[name] is None) == is_of_images, name
            expected = torch.zeros_like(weight) if is_of_images else plain[name]
            assert blank[name].equal(expected), name


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ((), True),
        (("cross_attn.", "alpha_cross_attn", "0.input_layernorm", "1.input_layernorm"), True),
        (("vision_model.", "perceiver_resampler."), True),
        (("vision_model.", "perceiver_resampler.", "gated_cross_attn_layers."), False),
    ],
)
def test_what_trains_on_images_is_known(frozen: tuple[str, ...], expected: bool) -> None:
    model = built(SPEC)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not any(part in name for part in frozen))
    assert trains_on_images(model) == expected
    assert not trains_on_images(built(specs()["Llama"]))
