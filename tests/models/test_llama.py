"""Llama against transformers, back-ends against eager, packed rows against single ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models.llama import LlamaSpec
from models.nn.init import Init, initial_values, initializers
from models.nn.mlp import GatedMLP
from models.nn.rope import RopeParameters, inverse_frequencies
from tests.conftest import tiny_spec
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from trainer.distributed import Placement, Ranks

LLAMA3 = RopeParameters(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = RopeParameters(rope_type="linear", factor=4.0)
DYNAMIC = RopeParameters(rope_type="dynamic", factor=2.0)
YARN = RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
YARN_SET = RopeParameters(
    rope_type="yarn",
    rope_theta=1000.0,
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=0.7,
    mscale_all_dim=0.9,
    truncate=False,
)


def built(spec: LlamaSpec, std: float = 0.2) -> nn.Module:
    """Return the model with weights large enough that every part matters."""
    model = spec.build_causal_lm(chunk_tokens=7)
    stds = initializers(model, std)
    for name, parameter in model.named_parameters():
        values = initial_values(name, stds[name], 1, 0, parameter.numel())
        noise = initial_values(name + "+", Init(std=0.1), 1, 0, parameter.numel())
        parameter.data.copy_((values + noise).view(parameter.shape))
    return model


def oracle(spec: LlamaSpec, model: nn.Module) -> Any:
    """Return transformers' model with the same config and weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**spec.hf_config(), attn_implementation="eager")
    theirs = LlamaForCausalLM(config)
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not missing
    return theirs.eval()


def row(length: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (2, length), generator=generator)
    return ids, torch.arange(length).expand(2, -1), torch.ones_like(ids)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 8]),
    tied=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    rope=st.sampled_from([RopeParameters(), LINEAR, LLAMA3, DYNAMIC, YARN, YARN_SET]),
    vocab_size=st.sampled_from([67, 258]),
)
def test_logits_and_gradients_equal_those_of_transformers(
    kv_heads: int,
    head_dim: int | None,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
    rope: RopeParameters,
    vocab_size: int,
) -> None:
    spec = tiny_spec(
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        rope_parameters=rope,
        vocab_size=vocab_size,
    )
    model = built(spec)
    theirs = oracle(spec, model)
    ids, positions, segments = row(24, vocab_size)
    expected = theirs(ids, position_ids=positions, use_cache=False).logits
    found = model(ids, positions, segments)
    assert relative(found, expected) < 1e-5
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name].grad) < 1e-4, name


@pytest.mark.parametrize("rope", [RopeParameters(rope_theta=5e5), LINEAR, LLAMA3, YARN, YARN_SET])
def test_frequencies_equal_those_of_transformers_bit_for_bit(rope: RopeParameters) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**tiny_spec(rope_parameters=rope, head_dim=64).hf_config())
    assert torch.equal(inverse_frequencies(rope, 64), LlamaRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sdpa_equals_eager_on_packed_and_padded_rows(dtype: torch.dtype) -> None:
    ids, _, _ = row(24, 258)
    segments = torch.tensor([[1] * 9 + [2] * 10 + [3] * 5, [1] * 12 + [2] * 4 + [0] * 8])
    positions = restarting(segments)
    fast = built(tiny_spec()).to(dtype)
    slow = built(tiny_spec(attn_implementation="eager")).to(dtype)
    found, expected = fast(ids, positions, segments), slow(ids, positions, segments)
    assert found.isfinite().all()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative(found[segments > 0], expected[segments > 0]) < tolerance


def restarting(segments: Tensor) -> Tensor:
    positions = torch.zeros_like(segments)
    for row_number, values in enumerate(segments.tolist()):
        for place in range(1, len(values)):
            if values[place] == values[place - 1]:
                positions[row_number, place] = positions[row_number, place - 1] + 1
    return positions


def test_a_packed_document_has_the_logits_it_has_alone() -> None:
    model = built(tiny_spec()).double()
    ids, _, _ = row(24, 258)
    segments = torch.tensor([[1] * 9 + [2] * 15, [1] * 20 + [2] * 4])
    packed = model(ids, restarting(segments), segments)
    for number, border in enumerate((9, 20)):
        for first, last in ((0, border), (border, 24)):
            alone = ids[number : number + 1, first:last]
            positions = torch.arange(last - first)[None]
            expected = model(alone, positions, torch.ones_like(alone))
            assert relative(packed[number : number + 1, first:last], expected) < 1e-12


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_changing_one_document_leaves_the_next_ones_logits_and_gradients_bit_equal(
    backend: str,
) -> None:
    spec = tiny_spec(attn_implementation=backend, vocab_size=258)
    segments = torch.tensor([[1] * 9 + [2] * 15])
    ids, _, _ = row(24, 258)
    ids = ids[:1]
    changed = ids.clone()
    changed[:, :9] = (changed[:, :9] + 1) % 258
    logits = []
    for tokens in (ids, changed):
        model = built(spec)
        embedded: list[Tensor] = []
        model.get_submodule("model.embed_tokens").register_forward_hook(
            lambda _, __, out, kept=embedded: (out.retain_grad(), kept.append(out))[0]
        )
        found = model(tokens, restarting(segments), segments)[:, 9:]
        found.square().sum().backward()
        logits.append((found.detach(), embedded[0].grad))
    (first, first_grad), (second, second_grad) = logits
    assert torch.equal(first, second)
    assert torch.equal(first_grad[:, 9:], second_grad[:, 9:])
    assert not first_grad[:, :9].any()


def test_dropout_acts_in_training_only() -> None:
    model = built(tiny_spec(attention_dropout=0.5))
    ids, positions, segments = row(24, 258)
    model.train()
    assert not torch.equal(model(ids, positions, segments), model(ids, positions, segments))
    model.eval()
    assert torch.equal(model(ids, positions, segments), model(ids, positions, segments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "set it to one of [1, 2, 4]"),
        ({"hidden_size": 18}, "does not divide hidden_size=18"),
        ({"head_dim": 3}, "odd"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"attn_implementation": "fast"}, "auto, eager, sdpa"),
        ({"pretraining_tp": 7}, "pretraining_tp=7 does not divide vocab_size"),
        ({"vocab_size": 0}, "1 or more"),
        ({"attention_dropout": 1.0}, "less than 1"),
    ],
)
def test_impossible_sizes_are_refused_with_the_remedy(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        tiny_spec(**changes)


def test_rope_parameters_that_do_not_belong_are_refused() -> None:
    with pytest.raises(ValueError, match="needs factor"):
        RopeParameters(rope_type="linear")
    with pytest.raises(ValueError, match="has no factor"):
        RopeParameters(factor=2.0)
    with pytest.raises(ValueError, match="default, linear, dynamic, llama3, yarn"):
        RopeParameters(rope_type="magic")


def test_dynamic_positions_stretch_long_rows_as_transformers_does_on_a_fresh_model() -> None:
    spec = tiny_spec(rope_parameters=DYNAMIC, max_position_embeddings=16)
    model = built(spec)
    ids, positions, segments = row(24, 258)
    short = (ids[:, :10], positions[:, :10], segments[:, :10])
    before = model(*short)
    expected = oracle(spec, model)(ids, position_ids=positions, use_cache=False).logits
    assert relative(model(ids, positions, segments), expected) < 1e-5
    assert torch.equal(model(*short), before), "a long row changed a later short one"


def test_a_dynamic_row_does_not_depend_on_a_longer_neighbour() -> None:
    model = built(tiny_spec(rope_parameters=DYNAMIC, max_position_embeddings=16))
    ids, positions, segments = row(24, 258)
    segments[0, 12:] = 2
    positions = positions.clone()
    positions[0, 12:] -= 12
    together = model(ids, positions, segments)[:1]
    assert relative(together, model(ids[:1], positions[:1], segments[:1])) < 1e-6


@pytest.mark.parametrize("slices", [2, 4])
def test_slices_compute_the_dense_model(slices: int) -> None:
    changes: dict[str, object] = {
        "vocab_size": 256, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": False,
    }  # fmt: skip
    dense = built(tiny_spec(**changes)).double()
    sliced = built(tiny_spec(**changes, pretraining_tp=slices)).double()
    inputs = row(24, 256)
    found, expected = sliced(*inputs), dense(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(sliced.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def _parallel_mlp(placement: Placement) -> bool:
    """Compute this rank's half of a gated MLP, add up, and compare bit for bit with slices."""
    import torch.distributed as dist

    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    generator = torch.Generator().manual_seed(0)
    mlp = GatedMLP(16, 24, bias=False, tp_slices=2)
    for parameter in mlp.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(3, 5, 16, generator=generator)
    gate, up, down = (p.weight.data for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    rows = slice(12 * placement.rank, 12 * placement.rank + 12)
    inner = F.silu(F.linear(x, gate[rows])) * F.linear(x, up[rows])
    total = F.linear(inner, down[:, rows])
    dist.all_reduce(total)
    with torch.no_grad():
        is_equal = torch.equal(total, mlp(x))
    ranks.close()
    return is_equal


def test_two_slices_are_bit_for_bit_what_two_tensor_parallel_ranks_compute() -> None:
    assert run_ranks(2, _parallel_mlp) == [True, True]
