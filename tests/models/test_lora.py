"""Adapters on every family against peft: logits and gradients; merged, and taken apart again."""

from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parity.oracle import built, inputs, relative, specs, their_inputs, theirs
from models.lora import (
    AdaptedLinear,
    DoRALinear,
    IA3InputLinear,
    IA3Linear,
    LoRALinear,
    adapt,
    merge,
    unmerge,
)
from models.nn.init import initial_values, initializers
from tests.adapters import peft_package

TARGETS = {
    "Llama": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "Gemma": ("k_proj", "o_proj", "down_proj"),
    "GPT-BigCode (MQA)": ("c_attn", "c_proj", "c_fc"),
    "GPT-BigCode (MHA)": ("c_attn", "c_proj"),
    "Idefics": ("q_proj", "o_proj", "down_proj"),
}
RANK, ALPHA = 4, 6
SETTINGS = {"rank": RANK, "scale": ALPHA / RANK}
KINDS: dict[str, Any] = {
    "lora": partial(LoRALinear, **SETTINGS),
    "rslora": partial(LoRALinear, rank=RANK, scale=ALPHA / RANK**0.5),
    "dora": partial(DoRALinear, **SETTINGS),
    "ia3": IA3Linear,
    "ia3 feed-forward": IA3InputLinear,
}
PREFIX = "base_model.model."


@cache
def drawn(family: str) -> nn.Module:
    model: nn.Module = built(specs()[family])
    return model


def base(family: str) -> nn.Module:
    return deepcopy(drawn(family))


def targets(model: nn.Module, family: str) -> list[str]:
    found = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in TARGETS[family]]
    assert found
    return found


def filled(model: nn.Module) -> dict[str, Tensor]:
    """Give every adapter random numbers, freeze the rest; return them by the names of a file."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_own := "lora_" in name or "ia3_" in name)
        if is_own:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            # Where they multiply, around one: away from the point where a factor has no effect.
            center = 1.0 if "magnitude" in name or "ia3" in name else 0.0
            # Small: what rounding does grows from layer to layer with the size of the adapters.
            parameter.data.copy_(center + 0.1 * noise)
            found[PREFIX + name] = parameter
    return found


def adapted(family: str, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = base(family).to(dtype)
    adapt(model, targets(model, family), KINDS[kind])
    filled(model)
    return model


def peft_of(peft: Any, family: str, kind: str) -> Any:
    """Return peft's model over the same base, with its adapter still as it starts."""
    model = base(family)
    names = targets(model, family)
    if kind.startswith("ia3"):
        forward = names if "feed" in kind else []
        config = peft.IA3Config(target_modules=names, feedforward_modules=forward)
    else:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=names,
            use_rslora=kind == "rslora", use_dora=kind == "dora",
        )  # fmt: skip
    return peft.get_peft_model(theirs(specs()[family], model), config).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_logits_and_gradients_are_those_of_peft(family: str, kind: str) -> None:
    """In fp32 to 1e-5 of the largest, names as in peft's file."""
    model = base(family)
    adapt(model, targets(model, family), KINDS[kind])
    own = filled(model)
    with peft_package() as peft:
        other = peft_of(peft, family, kind)
        assert own.keys() == peft.get_peft_model_state_dict(other).keys()
        values = {name: value.detach() for name, value in own.items()}
        peft.set_peft_model_state_dict(other, values)
    batch = inputs(specs()[family])
    found, expected = model(**batch), other(**their_inputs(batch)).logits
    assert relative(found, expected) <= 1e-5
    for result in (found, expected):
        (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    gradients = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in other.named_parameters()
        if parameter.requires_grad
    }
    assert len(gradients) == len(own)
    top = max(float(parameter.grad.abs().max()) for parameter in own.values())
    for name, parameter in own.items():
        expected = gradients[name.removesuffix(".weight")]
        assert parameter.grad is not None
        # Gradients far below the largest are nothing but rounding: a key that softmax cancels.
        scale = max(float(expected.abs().max()), 1e-2 * top)
        assert float((parameter.grad - expected).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Llama", "GPT-BigCode (MQA)"])
def test_merged_weights_compute_the_same_and_come_apart_again(
    family: str, kind: str, dtype: torch.dtype, limit: float
) -> None:
    model, batch = adapted(family, kind, dtype), inputs(specs()[family])
    before = model(**batch)
    kept = merge(model)
    assert not [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "ia3" in name]
    assert relative(model(**batch), before) <= limit
    unmerge(model, kept)
    assert torch.equal(model(**batch), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_has_an_effect_on_every_family(kind: str) -> None:
    """Else all of the above would hold for adapters that nothing reads."""
    for family in TARGETS:
        batch = inputs(specs()[family])
        assert relative(adapted(family, kind)(**batch), base(family)(**batch)) > 1e-2


def test_an_adapter_starts_as_in_peft_and_changes_nothing() -> None:
    model = base("Llama")
    names = targets(model, "Llama")
    adapt(model, names, KINDS["lora"])
    inits = initializers(model, 0.1)
    for name in names:
        a = initial_values(f"{name}.lora_A.weight", inits[f"{name}.lora_A.weight"], 0, 0, 4096)
        bound = model.get_submodule(name).in_features ** -0.5
        assert a.min() >= -bound
        assert a.max() <= bound
        assert abs(float(a.std()) - bound / 3**0.5) < 0.05 * bound  # spread evenly
        b = initial_values(f"{name}.lora_B.weight", inits[f"{name}.lora_B.weight"], 0, 0, 64)
        assert not b.any()


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    linear = nn.Linear(64, 32)
    lora = LoRALinear(linear, rank=RANK, scale=1.0, dropout=0.5)
    filled(lora)
    x = torch.randn(5, 64)
    assert torch.equal(lora.eval()(x), lora(x))
    torch.manual_seed(0)
    trained = lora.train()(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    expected = linear(x) + lora.lora_B(lora.lora_A(dropped))
    assert relative(trained, expected) <= 1e-6
    dora = DoRALinear(linear, rank=RANK, scale=1.0, dropout=0.5)
    dora.load_state_dict(lora.state_dict() | {"lora_magnitude_vector": torch.rand(32)})
    torch.manual_seed(0)
    factor = dora.lora_magnitude_vector / dora._sum().norm(dim=1)
    expected = (
        linear(x) + (factor - 1) * (dropped @ linear.weight.T)
        + factor * dora.lora_B(dora.lora_A(dropped))
    )  # fmt: skip
    assert relative(dora.train()(x), expected) <= 1e-5
