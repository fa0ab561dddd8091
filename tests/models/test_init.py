"""Initial weights: a function of seed and name, whoever computes which part."""

import pytest
import torch

from models.nn import init
from models.nn.init import Init, initial_values, initializers
from tests.conftest import tiny_spec


@pytest.mark.parametrize("how", [Init(std=0.02), Init(bound=0.3)], ids=["normal", "even"])
def test_any_range_equals_the_same_range_of_the_whole(how: Init) -> None:
    count = 2 * init.BLOCK + 1000
    whole = initial_values("a", how, 7, 0, count)
    for start, stop in (
        (0, 1), (0, 10), (0, 16), (0, 17), (3, 250), (5, 100_003), (init.BLOCK - 5, init.BLOCK),
        (init.BLOCK - 5, init.BLOCK + 5), (init.BLOCK, 2 * init.BLOCK), (13, count),
        (count - 1, count),
    ):  # fmt: skip
        assert torch.equal(initial_values("a", how, 7, start, stop), whole[start:stop])
    assert initial_values("a", how, 7, 5, 5).numel() == 0


def test_values_depend_on_seed_and_name_and_have_the_stated_spread() -> None:
    values = initial_values("a", Init(std=0.02), 0, 0, 100_000)
    assert abs(float(values.std()) - 0.02) < 3e-4
    assert abs(float(values.mean())) < 3e-4
    assert not torch.equal(values, initial_values("b", Init(std=0.02), 0, 0, 100_000))
    assert not torch.equal(values, initial_values("a", Init(std=0.02), 1, 0, 100_000))


def test_norms_start_at_one_biases_at_zero_and_matrices_random() -> None:
    with torch.device("meta"):
        model = tiny_spec(attention_bias=True).build_causal_lm(chunk_tokens=8)
    inits = initializers(model, 0.02)
    assert inits["model.norm.weight"] == Init(mean=1.0)
    assert inits["model.layers.0.self_attn.q_proj.bias"] == Init()
    assert inits["model.layers.0.self_attn.q_proj.weight"] == Init(std=0.02)
    assert inits["model.embed_tokens.weight"] == Init(std=0.02)
    assert set(inits) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
