"""The stated FLOPs against those that torch counts in a step, with and without frozen parts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.parity.oracle import specs
from models.heads import causal_lm
from models.nn.model import DecoderModel
from tests.conftest import tiny_spec
from trainer.adapters.lora import LoRA
from trainer.flops import flops_per_token
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
    return flops_per_token(model, SPEC.layout, SPEC.attention_width, LENGTH)


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
    found = flops_per_token(model, spec.layout, spec.attention_width, LENGTH)
    assert found == 6 * matrices + 6 * 2 * WIDTH * LENGTH


def test_towers_that_see_images_are_left_out() -> None:
    spec = specs()["Idefics"]
    model = causal_lm(spec, chunk_tokens=8)
    embeddings = size(model, f"{spec.layout.embedding}.weight")
    towers = tuple(f"{name}." for name in spec.layout.replicated)
    tokens = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(towers)
    )
    model.requires_grad_(True)
    extra = size(model, f"{spec.layout.embedding}.additional_embedding.weight")
    found = flops_per_token(model, spec.layout, spec.attention_width, LENGTH)
    assert found == 6 * (tokens - embeddings - extra) + 6 * spec.attention_width * LENGTH
