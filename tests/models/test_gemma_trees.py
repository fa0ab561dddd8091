"""Flax's and DeepMind's trees of Gemma: bit for bit there and back, and what they mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.gemma import GemmaSpec
from models.gemma_trees import (
    flatten,
    from_deepmind,
    from_flax,
    nest,
    to_deepmind,
    to_flax,
    weight_shapes,
)
from tests.models.test_gemma import tiny


def weights_of(spec: GemmaSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(spec)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(4, 1), (4, 2), (2, 2), (1, 1)]),
    head_dim=st.sampled_from([8, 16]),
    tied=st.booleans(),
    bias=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_both_trees_give_back_every_bit(
    heads: tuple[int, int], head_dim: int, tied: bool, bias: bool, transposed: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    spec = tiny(**sizes, head_dim=head_dim, tie_word_embeddings=tied, attention_bias=bias)
    weights = weights_of(spec, dtype)
    assert same(from_flax(to_flax(weights), spec), weights)
    assert same(from_flax({"params": to_flax(weights)}, spec), weights)
    spec = tiny(**sizes, head_dim=head_dim)
    weights = weights_of(spec, dtype)
    tree = to_deepmind(weights, spec, transpose_gating=transposed)
    assert same(from_deepmind(tree, spec), weights)
    bare = {path.removesuffix("/w"): leaf for path, leaf in flatten(tree).items()}
    assert same(from_deepmind({"transformer": nest(bare)}, spec), weights)


def test_paths_and_shapes_are_the_published_ones() -> None:
    spec = tiny(tie_word_embeddings=False, num_hidden_layers=1)  # V131 D32 F48 N4 K1 H16
    found = {path: tuple(leaf.shape) for path, leaf in flatten(to_flax(weights_of(spec))).items()}
    layer = "model/layers/0/"
    assert found == {
        "model/embed_tokens/embedding": (131, 32),
        f"{layer}self_attn/q_proj/kernel": (32, 64),
        f"{layer}self_attn/k_proj/kernel": (32, 16),
        f"{layer}self_attn/v_proj/kernel": (32, 16),
        f"{layer}self_attn/o_proj/kernel": (64, 32),
        f"{layer}mlp/gate_proj/kernel": (32, 48),
        f"{layer}mlp/up_proj/kernel": (32, 48),
        f"{layer}mlp/down_proj/kernel": (48, 32),
        f"{layer}input_layernorm/weight": (32,),
        f"{layer}post_attention_layernorm/weight": (32,),
        "model/norm/weight": (32,),
        "lm_head/kernel": (32, 131),
    }
    spec = tiny(num_hidden_layers=1)
    tree = to_deepmind(weights_of(spec), spec)
    assert {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()} == {
        "embedder/input_embedding": (131, 32),
        "final_norm/scale": (32,),
        "layer_0/attn/q_einsum/w": (4, 32, 16),
        "layer_0/attn/kv_einsum/w": (2, 1, 32, 16),
        "layer_0/attn/attn_vec_einsum/w": (4, 16, 32),
        "layer_0/mlp/gating_einsum": (2, 32, 48),
        "layer_0/mlp/linear": (48, 32),
        "layer_0/pre_attention_norm/scale": (32,),
        "layer_0/pre_ffw_norm/scale": (32,),
    }


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_einsums_of_deepmind_s_library_give_what_the_linears_give(kv_heads: int) -> None:
    spec = tiny(num_key_value_heads=kv_heads)
    weights = weights_of(spec, torch.float64)
    layer = flatten(to_deepmind(weights, spec)["layer_1"])
    x_BTD = torch.randn(2, 3, 32, dtype=torch.float64)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"model.layers.1.{name}.weight"].T

    if kv_heads == 4:
        query, key, value = torch.einsum("btd,sndh->sbtnh", x_BTD, layer["attn/qkv_einsum/w"])
    else:
        query = torch.einsum("btd,ndh->btnh", x_BTD, layer["attn/q_einsum/w"])
        key, value = torch.einsum("bsd,ckdh->cbskh", x_BTD, layer["attn/kv_einsum/w"])
    mixed = torch.einsum("btnh,nhd->btd", query, layer["attn/attn_vec_einsum/w"])
    gate, up = torch.einsum("btd,cdf->cbtf", x_BTD, layer["mlp/gating_einsum"])
    down = gate @ layer["mlp/linear"]
    for found, expected in (
        (query.flatten(2), linear(x_BTD, "self_attn.q_proj")),
        (key.flatten(2), linear(x_BTD, "self_attn.k_proj")),
        (value.flatten(2), linear(x_BTD, "self_attn.v_proj")),
        (mixed, linear(query.flatten(2), "self_attn.o_proj")),
        (gate, linear(x_BTD, "mlp.gate_proj")),
        (up, linear(x_BTD, "mlp.up_proj")),
        (down, linear(gate, "mlp.down_proj")),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_trees_that_do_not_fit_are_refused_in_one_line() -> None:
    spec = tiny()
    weights = weights_of(spec)
    flat = flatten(to_flax(weights))
    short = {path: leaf for path, leaf in flat.items() if "norm" not in path}
    with pytest.raises(ValueError, match=r"input_layernorm/weight is missing \(5 missing, 0 unkno"):
        from_flax(nest(short), spec)
    with pytest.raises(ValueError, match="extra/kernel is unknown to the model"):
        from_flax(nest(flat | {"extra/kernel": torch.ones(2)}), spec)
    with pytest.raises(ValueError, match=r"embedding has shape \[131, 32\].*needs \[200, 32\]"):
        from_flax(to_flax(weights), tiny(vocab_size=200))
    tree = to_deepmind(weights, spec)
    with pytest.raises(ValueError, match=r"q_einsum has shape \[4, 32, 16\].*needs \[8, 32, 16\]"):
        from_deepmind(tree, tiny(num_attention_heads=8))
    with pytest.raises(ValueError, match="qkv_einsum is missing"):
        from_deepmind(tree, tiny(num_key_value_heads=4))


def test_what_deepmind_s_tree_cannot_hold_or_tell_is_refused() -> None:
    for change in ({"tie_word_embeddings": False}, {"attention_bias": True}):
        spec = tiny(**change)
        with pytest.raises(ValueError, match=f"no place for a Gemma with {next(iter(change))}"):
            to_deepmind(weights_of(spec), spec)
    square = tiny(intermediate_size=32)
    weights = weights_of(square)
    for transposed in (False, True):
        tree = to_deepmind(weights, square, transpose_gating=transposed)
        with pytest.raises(ValueError, match="set transpose_gating"):
            from_deepmind(tree, square)
        assert same(from_deepmind(tree, square, transpose_gating=transposed), weights)
