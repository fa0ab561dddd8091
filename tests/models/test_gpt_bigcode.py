"""GPT-BigCode: drawn configs, softmax flags, cross-attention against loops, initial values."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.parity.oracle import built, inputs, relative, their_inputs, theirs
from models.gpt_bigcode import GPTBigCodeSpec
from models.heads import CAUSAL_LM, SEQUENCE, TOKEN
from models.nn.dense import Eager
from models.nn.init import Init, initializers


def tiny(**changes: Any) -> GPTBigCodeSpec:
    values: dict[str, Any] = {
        "vocab_size": 131, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    return GPTBigCodeSpec(**values | changes)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n_head=st.sampled_from([1, 2, 4]),
    multi_query=st.booleans(),
    n_inner=st.sampled_from([None, 20]),
    activation=st.sampled_from(["gelu_pytorch_tanh", "gelu", "relu"]),
    scale=st.booleans(),
    tied=st.booleans(),
    vocab_size=st.sampled_from([131, 200]),
)
def test_logits_and_gradients_equal_those_of_transformers(
    n_head: int, multi_query: bool, n_inner: int | None, activation: str, scale: bool,
    tied: bool, vocab_size: int,
) -> None:  # fmt: skip
    spec = tiny(
        n_head=n_head, multi_query=multi_query, n_inner=n_inner, activation_function=activation,
        scale_attn_weights=scale, tie_word_embeddings=tied, vocab_size=vocab_size,
    )  # fmt: skip
    model, batch = built(spec), inputs(spec)
    other = theirs(spec, model)
    found, expected = model(**batch), other(**their_inputs(batch)).logits
    assert relative(found, expected) < 1e-5
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name].grad) < 1e-4, name


def slow_cross_attention(model: Any, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Loop over rows, heads and positions: what the definition says."""
    rows = []
    for row in range(x.shape[0]):
        heads = []
        queries = x[row] @ model.q_attn.weight.T + model.q_attn.bias
        pairs = states[row] @ model.c_attn.weight.T + model.c_attn.bias
        size = model.head_dim
        for head in range(queries.shape[1] // size):
            query = queries[:, head * size : (head + 1) * size]
            key, value = pairs[:, 2 * head * size : 2 * (head + 1) * size].split(size, dim=1)
            seen = [s for s in range(states.shape[1]) if mask[row, s]]
            outputs = []
            for position in range(x.shape[1]):
                if not seen:
                    outputs.append(torch.zeros(size, dtype=x.dtype))
                    continue
                scores = torch.stack([query[position] @ key[s] for s in seen]) / math.sqrt(size)
                weights = scores.exp() / scores.exp().sum()
                outputs.append(
                    torch.stack([w * value[s] for w, s in zip(weights, seen, strict=True)]).sum(0)
                )
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, dim=1) @ model.c_proj.weight.T + model.c_proj.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("n_head", [1, 4])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_attention_equals_its_definition(n_head: int, implementation: str) -> None:
    spec = tiny(n_head=n_head, multi_query=False, add_cross_attention=True)
    model = built(spec).double()
    attention = model.trunk.h[0].crossattention
    if implementation == "sdpa":
        from models.nn.dense import Sdpa

        attention.backend = Sdpa()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 32, generator=generator, dtype=torch.float64).requires_grad_()
    states = torch.randn(3, 7, 32, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:], mask[1] = 0, 0
    from models.gpt_bigcode import _encoder_segments

    prepared = attention.backend.prepare(
        _encoder_segments(torch.zeros(3, 5, dtype=torch.int64), states, mask)
    )
    found, expected = (
        attention(x, states, prepared),
        slow_cross_attention(attention, x, states, mask),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = (x, states, *attention.parameters())
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    one = torch.autograd.grad((found * weights).sum(), wanted)
    other = torch.autograd.grad((expected * weights).sum(), wanted)
    for mine, reference in zip(one, other, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


def test_a_masked_encoder_row_changes_nothing_but_what_its_output_bias_adds() -> None:
    spec = tiny(multi_query=False, add_cross_attention=True)
    model, batch = built(spec), inputs(spec)
    states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 6, dtype=torch.int64)
    results = [
        model(**batch, encoder_hidden_states=factor * states, encoder_attention_mask=mask)
        for factor in (1.0, -3.0)
    ]
    assert torch.equal(results[0], results[1])
    assert results[0].isfinite().all()
    with pytest.raises(ValueError, match="the model has no cross-attention"):
        built(tiny())(**batch, encoder_hidden_states=states)


@pytest.mark.parametrize("head", [CAUSAL_LM, SEQUENCE, TOKEN])
@pytest.mark.parametrize("cross", [False, True])
def test_weights_have_the_names_and_shapes_of_transformers(head: str, cross: bool) -> None:
    spec = tiny(multi_query=False, add_cross_attention=cross)
    model = built(spec, head)
    other = theirs(spec, model, head).state_dict()
    found = model.state_dict()
    assert found.keys() == other.keys()
    assert all(found[name].shape == other[name].shape for name in found)


@pytest.mark.parametrize("shrink", [1, 5])
def test_scores_are_kept_small_until_they_are_in_fp32(shrink: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8, generator=generator).bfloat16() for _ in range(3))
    found = Eager(shrink=shrink).attend(query, key, value, None, dropout=0.0, scale=0.5)
    scores = (query @ key.transpose(-1, -2) * (0.5 / shrink)).float() * shrink
    assert torch.equal(found, scores.softmax(-1).bfloat16() @ value)
    narrow = Eager(is_wide=False).attend(query, key, value, None, dropout=0.0, scale=0.5)
    scores = query @ key.transpose(-1, -2) * 0.5
    assert torch.equal(narrow, scores.softmax(-1) @ value)


def test_what_is_added_to_the_residual_starts_smaller() -> None:
    inits = initializers(tiny(n_layer=2).build_causal_lm(chunk_tokens=8), 0.02)
    assert inits["transformer.h.0.attn.c_proj.weight"] == Init(std=0.01)
    assert inits["transformer.h.1.mlp.c_proj.weight"] == Init(std=0.01)
    assert inits["transformer.h.1.mlp.c_fc.weight"] == Init(std=0.02)
    assert inits["transformer.wpe.weight"] == Init(std=0.02)
    assert inits["transformer.ln_f.weight"] == Init(mean=1.0)
    assert inits["transformer.ln_f.bias"] == Init()


def test_a_config_is_read_back_by_names_and_by_aliases() -> None:
    spec = tiny(multi_query=False, n_inner=50)
    assert GPTBigCodeSpec.from_hf_config(spec.hf_config()) == spec
    old = {"hidden_size": 64, "num_attention_heads": 4, "inference_runner": 0, "n_layer": 3}
    read = GPTBigCodeSpec.from_hf_config(old | {"max_position_embeddings": 99})
    assert (read.n_embd, read.n_head, read.n_layer, read.n_positions) == (64, 4, 3, 99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_head=5 does not divide n_embd=32"),
        ({"add_cross_attention": True}, "defined for multi_query=false only"),
        ({"attention_softmax_in_fp32": False}, "set that to eager"),
        ({"activation_function": "magic"}, "activation_function='magic' is unknown"),
        ({"resid_pdrop": 1.0}, "less than 1"),
        ({"n_inner": 0}, "n_inner=0 is not positive"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
