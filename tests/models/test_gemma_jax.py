"""Gemma in JAX against the torch model: logits, loss, gradients, padding, packing, decoding."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.parity.oracle import built, relative
from models.gemma import GemmaSpec
from models.gemma_trees import from_flax, to_flax
from models.nn.head import IGNORED
from models.nn.rope import RopeParameters
from tests.models.test_gemma import tiny
from trainer.decoding import GenerationSpec, generate

jax = pytest.importorskip("jax")
gemma_jax = pytest.importorskip("models.gemma_jax")

LIMIT = 1e-4  # of the largest value; fp32
PADDINGS = ("none", "left", "right", "packed")


@pytest.fixture(autouse=True, scope="module")
def _quick_compiler() -> Iterator[None]:
    """XLA spends most of these tests on making faster what runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def batch_of(padding: str, vocab_size: int, length: int = 12) -> dict[str, Tensor]:
    """Return ids, positions and segments of two rows, the second with padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab_size, (2, length), generator=generator)
    segments = torch.ones_like(ids)
    if padding == "left":
        segments[1, :5] = 0
    elif padding == "right":
        segments[1, -5:] = 0
    elif padding == "packed":
        segments[0, 5:], segments[1, 3:], segments[1, -2:] = 2, 2, 0
    is_new = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    steps = torch.arange(length).expand(2, -1)
    starts = torch.where(is_new, steps, 0).cummax(dim=1).values
    return {"input_ids": ids, "position_ids": steps - starts, "segment_ids": segments}


def arrays(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {key: jax.numpy.asarray(value.numpy().astype(np.int32)) for key, value in batch.items()}


def tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def params_of(model: Any) -> Any:
    return gemma_jax.to_jax(to_flax(dict(model.named_parameters())))


@pytest.mark.parametrize(
    ("heads", "head_dim", "tied", "bias", "activation", "theta", "padding"),
    [  # Every choice at least once; the slow command draws others.
        ((4, 1), 8, True, False, "gelu_pytorch_tanh", 10_000.0, "none"),
        ((4, 2), 16, False, True, "silu", 500_000.0, "left"),
        ((2, 2), 8, False, False, "gelu_pytorch_tanh", 500_000.0, "right"),
        ((4, 1), 16, True, True, "silu", 10_000.0, "packed"),
    ],
)
def test_logits_loss_and_gradients_equal_those_of_torch(
    heads: tuple[int, int], head_dim: int, tied: bool, bias: bool, activation: str, theta: float,
    padding: str,
) -> None:  # fmt: skip
    check_against_torch(heads, head_dim, tied, bias, activation, theta, padding)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(4, 1), (4, 2), (2, 2)]),
    head_dim=st.sampled_from([8, 16]),
    tied=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(["gelu_pytorch_tanh", "silu"]),
    theta=st.sampled_from([10_000.0, 500_000.0]),
    padding=st.sampled_from(PADDINGS),
)
def test_any_choices_together_equal_those_of_torch(
    heads: tuple[int, int], head_dim: int, tied: bool, bias: bool, activation: str, theta: float,
    padding: str,
) -> None:  # fmt: skip
    check_against_torch(heads, head_dim, tied, bias, activation, theta, padding)


def check_against_torch(
    heads: tuple[int, int], head_dim: int, tied: bool, bias: bool, activation: str, theta: float,
    padding: str,
) -> None:  # fmt: skip
    spec = tiny(
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
        tie_word_embeddings=tied, attention_bias=bias, hidden_act=activation,
        rope_parameters=RopeParameters(rope_theta=theta),
    )  # fmt: skip
    model, batch = built(spec), batch_of(padding, spec.vocab_size)
    params, inputs = params_of(model), arrays(batch)
    is_real = batch["segment_ids"] > 0
    logits, _ = jax.jit(gemma_jax.forward, static_argnums=1)(params, spec, **inputs)
    assert relative(tensor(logits)[is_real], model(**batch)[is_real]) < LIMIT

    labels = torch.where(is_real, batch["input_ids"].roll(-1, 1), IGNORED)
    labels[0, 2] = IGNORED
    scale = torch.tensor(1.0) / (labels != IGNORED).sum()
    found = model(**batch, labels=labels, scale=scale)
    found.objective.backward()
    inputs |= arrays({"labels": labels})
    loss_and_gradients = jax.jit(jax.value_and_grad(gemma_jax.loss), static_argnums=1)
    value, gradients = loss_and_gradients(params, spec, **inputs)
    assert abs(value.item() - found.objective.item()) < LIMIT
    others = from_flax(gemma_jax.to_torch(gradients), spec)
    for name, parameter in model.named_parameters():
        assert relative(others[name], parameter.grad) < LIMIT, name


@pytest.mark.parametrize("padding", ["none", "left"])
def test_decoding_with_a_cache_equals_decoding_without(padding: str) -> None:
    spec = tiny(num_key_value_heads=2)
    params = params_of(built(spec))
    inputs = arrays(batch_of(padding, spec.vocab_size))
    expected, _ = gemma_jax.forward(params, spec, **inputs)
    cache = gemma_jax.init_cache(spec, batch=2, max_length=15)
    found = []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 12)):
        part = {key: value[:, start:stop] for key, value in inputs.items()}
        logits, cache = gemma_jax.forward(params, spec, **part, cache=cache)
        found.append(logits)
    assert cache.length == 12
    assert relative(tensor(jax.numpy.concatenate(found, 1)), tensor(expected)) < 1e-5


def test_greedy_tokens_equal_those_of_torch() -> None:
    spec = tiny()
    model = built(spec)
    prompts = [[5, 9, 2, 77, 30, 8], [4, 100, 11]]
    expected = generate(model, prompts, GenerationSpec(max_new_tokens=8), None)
    ids = [[0] * (6 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    found = gemma_jax.greedy(
        params_of(model), spec, jax.numpy.asarray(ids), jax.numpy.asarray(mask), 8
    )
    assert found.tolist() == expected


def test_jit_changes_nothing_beyond_rounding() -> None:
    spec = tiny()
    params, inputs = params_of(built(spec)), arrays(batch_of("left", spec.vocab_size))
    plain, _ = gemma_jax.forward(params, spec, **inputs)
    compiled, _ = jax.jit(gemma_jax.forward, static_argnames="spec")(params, spec, **inputs)
    assert relative(tensor(compiled), tensor(plain)) < 1e-5


def test_bf16_weights_travel_bit_for_bit_and_softmax_stays_in_fp32() -> None:
    spec = tiny()
    model = built(spec).bfloat16()
    tree = to_flax(dict(model.named_parameters()))
    params = gemma_jax.to_jax(tree)
    back = from_flax(gemma_jax.to_torch(params), spec)
    assert all(torch.equal(back[name], p) for name, p in model.named_parameters())
    inputs = arrays(batch_of("none", spec.vocab_size))
    logits, _ = gemma_jax.forward(params, spec, **inputs)
    assert logits.dtype == jax.numpy.bfloat16
    program = str(jax.make_jaxpr(lambda p: gemma_jax.forward(p, spec, **inputs)[0])(params))
    exponentials = [line for line in program.splitlines() if "= exp " in line]
    assert len(exponentials) == spec.num_hidden_layers
    assert all(":f32[" in line for line in exponentials)


def test_the_flag_brings_back_what_hugging_face_s_flax_did() -> None:
    spec = tiny(rope_parameters=RopeParameters(rope_theta=500_000.0))
    params, inputs = params_of(built(spec)), arrays(batch_of("none", spec.vocab_size))
    flagged, _ = gemma_jax.forward(params, spec, **inputs, as_hf_flax=True)
    ordinary, _ = gemma_jax.forward(params, spec, **inputs)
    expected, _ = gemma_jax.forward(params, tiny(), **inputs)  # theta 10000
    assert jax.numpy.array_equal(flagged, expected)
    assert relative(tensor(flagged), tensor(ordinary)) > 1e-3


@pytest.mark.parametrize("as_hf_flax", [False, True])
def test_initial_parameters_fill_the_tree(as_hf_flax: bool) -> None:
    spec = tiny(attention_bias=True, tie_word_embeddings=False, initializer_range=0.5)
    key = jax.random.key(0)
    params = gemma_jax.init_params(spec, key, as_hf_flax=as_hf_flax)
    weights = from_flax(gemma_jax.to_torch(params), spec)  # checks names and shapes
    assert weights["model.norm.weight"].unique().tolist() == [float(as_hf_flax)]
    assert weights["model.layers.0.self_attn.q_proj.bias"].abs().max() == 0
    assert abs(weights["lm_head.weight"].std() - 0.5) < 0.05
    assert not torch.equal(
        weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    )


def test_other_rotary_kinds_are_refused() -> None:
    spec: GemmaSpec = tiny(rope_parameters=RopeParameters(rope_type="linear", factor=2.0))
    params, inputs = params_of(built(spec)), arrays(batch_of("none", spec.vocab_size))
    with pytest.raises(ValueError, match="rope_type=default only, found linear"):
        gemma_jax.forward(params, spec, **inputs)
