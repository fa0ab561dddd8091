"""Gemma: drawn configs against transformers, the scale of embeddings, the norm, the activation."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.parity.oracle import built, inputs, relative, their_inputs, theirs
from models.gemma import GemmaSpec
from models.nn.init import Init, initializers
from models.nn.norm import GemmaRMSNorm


def tiny(**changes: Any) -> GemmaSpec:
    values: dict[str, Any] = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return GemmaSpec(**values | changes)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(4, 1), (4, 2), (2, 2)]),
    head_dim=st.sampled_from([8, 16]),
    tied=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(["gelu_pytorch_tanh", "silu"]),
    vocab_size=st.sampled_from([131, 200]),
)
def test_logits_and_gradients_equal_those_of_transformers(
    heads: tuple[int, int], head_dim: int, tied: bool, bias: bool, activation: str, vocab_size: int
) -> None:
    spec = tiny(
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
        tie_word_embeddings=tied, attention_bias=bias, hidden_act=activation,
        vocab_size=vocab_size,
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


def test_bf16_logits_equal_those_of_transformers_where_the_scale_is_rounded_first() -> None:
    spec = tiny(hidden_size=48, num_attention_heads=2)  # sqrt(48) = 6.93 is no bf16 number
    model, batch = built(spec).bfloat16(), inputs(spec)
    other = theirs(spec, model).bfloat16()
    assert torch.equal(model(**batch), other(**their_inputs(batch)).logits)


def test_the_norm_multiplies_in_fp32_and_rounds_last() -> None:
    norm = GemmaRMSNorm(8, 1e-6).bfloat16()
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(8, generator=generator).bfloat16()
    x = torch.randn(4, 8, generator=generator).bfloat16()
    wide = x.float()
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normal * (1 + norm.weight.float())
    assert (norm(x).float() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_norms_start_at_zero_which_is_their_identity() -> None:
    inits = initializers(tiny().build_causal_lm(chunk_tokens=8), 0.02)
    assert inits["model.norm.weight"] == Init()
    assert inits["model.layers.1.input_layernorm.weight"] == Init()
    assert inits["model.layers.1.mlp.gate_proj.weight"] == Init(std=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "set it to 'gelu_pytorch_tanh'"),
        ({"hidden_act": "magic"}, "hidden_act='magic' is unknown"),
        ({"num_key_value_heads": 3}, "does not divide num_attention_heads=4"),
        ({"head_dim": 5}, "odd"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
