"""Trunks that compute no padding against the same models that compute all of their rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.parity.oracle import specs
from models import heads
from models.lora import LoRALinear, adapt
from models.nn import unpadded
from models.nn.head import IGNORED, Loss
from models.nn.unpadded import goes_by_document
from tests.models.test_documents import rows

# Relative, of norms. In fp64 sums over tokens have another order. In bf16 each token's numbers are
# the same, and sums over tokens are rounded once (0.4 %).
TOLERANCES = {torch.float64: 1e-12, torch.bfloat16: 4e-3}
HEADS = ("causal_lm", "classes", "labels", "tokens", "reward", "dpo")
LABELS = 3


@pytest.fixture(autouse=True, params=[1, 8])
def _counted_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with MKL, and as with kernels for each number of tokens: few of them."""
    by = request.param
    monkeypatch.setattr(unpadded, "counted", lambda number, _: -(-number // by) * by)


def model_of(spec: Any, head: str) -> Any:
    torch.manual_seed(0)
    spec = replace(spec, attn_implementation="sdpa")
    if head == "causal_lm":
        model: Any = spec.build_causal_lm(chunk_tokens=16)
    elif head == "tokens":
        model = heads.token_classifier(spec, num_labels=LABELS, dropout=0.0)
    elif head == "reward":
        model = heads.reward_model(spec)
    elif head == "dpo":
        model = heads.preference_model(spec, chunk_tokens=16, beta=0.3, label_smoothing=0.1)
        names = [name for name, m in model.named_modules() if name.endswith(("v_proj", "c_fc"))]
        adapt(model, names, lambda linear: LoRALinear(linear, rank=2, scale=1.5, dropout=0.0))
    else:
        kind = "single_label" if head == "classes" else "multi_label"
        model = heads.sequence_classifier(
            spec, num_labels=LABELS, problem_type=f"{kind}_classification"
        )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double()


def batch_of(segment_ids: Tensor, head: str, vocab_size: int) -> tuple[list[Tensor], Tensor]:
    """Return ids, positions and segments, and labels of the head, some of them missing."""
    shape, most = segment_ids.shape, max(1, int(segment_ids.max()))
    starts = torch.ones(shape, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    places = torch.arange(shape[1]).expand(shape)
    positions = (places - torch.where(starts, places, 0).cummax(1).values) * (segment_ids > 0)
    ids = torch.randint(0, vocab_size, shape) * (segment_ids > 0)
    if head in ("causal_lm", "tokens"):
        count = vocab_size if head == "causal_lm" else LABELS
        labels = torch.randint(0, count, shape)
        labels[(segment_ids == 0) | (torch.rand(shape) < 0.2)] = IGNORED
    elif head == "labels":
        labels = torch.rand(shape[0], most, LABELS, dtype=torch.float64).round()
        labels[segment_ids.amax(1)[:, None] <= torch.arange(most)] = torch.nan
    else:
        per_label = 1 if head == "classes" else 2
        groups = -(-most // per_label)
        labels = torch.randint(0, LABELS, (shape[0], groups))
        whole = segment_ids.amax(1, keepdim=True) // per_label
        labels[whole <= torch.arange(groups)] = IGNORED
    return [ids, positions, segment_ids], labels


def computed(
    model: Any, text: list[Tensor], labels: Tensor, *, skips_padding: bool
) -> tuple[Loss, dict[str, Tensor], list[tuple[int, ...]]]:
    """Return the loss, every gradient, and the shapes that the trunk was called with."""
    shapes = []
    handle = model.trunk.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    model.skips_padding = skips_padding
    model.zero_grad()
    loss = model(*text, labels, torch.tensor(0.7, dtype=torch.float64))
    loss.objective.backward()
    handle.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, shapes


def assert_same(model: Any, text: list[Tensor], labels: Tensor, tolerance: float) -> None:
    expected, gradients, _ = computed(model, text, labels, skips_padding=False)
    found, ours, shapes = computed(model, text, labels, skips_padding=True)
    count = int((text[2] > 0).sum())
    size = unpadded.counted(max(1, count), torch.float64)
    one_row = (1, size) if size < text[0].numel() else tuple(text[0].shape)
    assert set(shapes) == {one_row}
    assert int(found.num_targets) == int(expected.num_targets)
    assert found.sum.item() == pytest.approx(expected.sum.item(), rel=tolerance)
    assert (found.each is None) == (expected.each is None)
    if found.each is not None and expected.each is not None:
        torch.testing.assert_close(found.each, expected.each, rtol=tolerance, atol=1e-12)
    assert ours.keys() == gradients.keys()
    whole = torch.stack([x.norm() for x in gradients.values()]).norm()
    for name, gradient in gradients.items():
        difference = (ours[name] - gradient).norm()
        assert difference <= tolerance * max(gradient.norm(), 1e-3 * whole), name


@st.composite
def padded_rows(draw: st.DrawFn) -> Tensor:
    """Rows of documents with padding before, between and behind them, or of padding alone."""
    sizes = st.lists(st.one_of(st.integers(1, 9), st.integers(-9, -1)), max_size=5)
    found = draw(st.lists(sizes, min_size=1, max_size=4))
    return numbered(rows(*found, length=draw(st.integers(20, 48))))


def numbered(segment_ids: Tensor) -> Tensor:
    """Number the documents of each row 1, 2, ..: in `rows` padding takes numbers too."""
    return torch.stack([(row[:, None] >= row[row > 0].unique()).sum(1) for row in segment_ids])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", list(specs()))
def test_loss_and_gradients_are_those_of_whole_rows(family: str, head: str) -> None:
    spec = specs()[family]
    model = model_of(spec, head)
    for segments in (
        rows([20, 3, 4, 5], [7], [1, 1], [], length=48),  # rows of padding, and of much of it
        numbered(rows([-3, 10, -2, 5, 4], [-30, 2, 2], length=40)),  # in front, and between
        rows([24, 24], [48], length=48),  # none
        torch.zeros(3, 24, dtype=torch.int64),
    ):
        text, labels = batch_of(segments, head, spec.vocab_size)
        assert_same(model, text, labels, TOLERANCES[torch.float64])


@settings(max_examples=60)
@given(segments=padded_rows(), head=st.sampled_from(HEADS), seed=st.integers(0, 9))
def test_random_batches_cost_the_same(segments: Tensor, head: str, seed: int) -> None:
    spec = specs()["Llama"]
    model = model_of(spec, head)
    torch.manual_seed(seed)
    text, labels = batch_of(segments, head, spec.vocab_size)
    assert_same(model, text, labels, TOLERANCES[torch.float64])


@pytest.mark.parametrize("head", ["causal_lm", "classes"])
def test_bf16_is_near_whole_rows(head: str) -> None:
    spec = specs()["Llama"]
    model = model_of(spec, head).bfloat16()
    text, labels = batch_of(rows([20, 3, 4, 5], [7], [], length=48), head, spec.vocab_size)
    assert_same(model, text, labels, TOLERANCES[torch.bfloat16])


def test_logits_stand_where_their_tokens_stand_and_padding_has_those_of_zeros() -> None:
    spec = specs()["Llama"]
    model = model_of(spec, "causal_lm").eval()
    length = 32
    text, _ = batch_of(numbered(rows([-4, 9, 2], [1], length=length)), "causal_lm", 131)
    expected = model(*text)
    model.skips_padding = True
    found, is_real = model(*text), text[2] > 0
    assert found.shape == (2, length, spec.vocab_size)
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=1e-12, atol=1e-12)
    assert not found[~is_real].any()


def test_a_cache_and_images_take_whole_rows() -> None:
    spec = specs()["Idefics"]
    model = model_of(spec, "causal_lm").eval()
    text, _ = batch_of(rows([3], [2], length=32), "causal_lm", 131)
    images = {
        "pixel_values": torch.randn(2, 1, 3, 12, 12, dtype=torch.float64),
        "image_attention_mask": torch.ones(2, 32, 1, dtype=torch.int64),
    }
    expected = model(*text, **images)
    model.skips_padding = True
    assert torch.equal(model(*text, **images), expected)


def test_only_attention_by_document_makes_long_rows_cheap() -> None:
    spec = specs()["Llama"]
    of = {
        (name, dropout): goes_by_document(
            replace(spec, attn_implementation=name, attention_dropout=dropout).build_trunk()
        )
        for name in ("eager", "sdpa", "flex")
        for dropout in (0.0, 0.1)
        if not (name == "flex" and dropout)
    }
    assert [settings for settings, by_document in of.items() if by_document] == [("sdpa", 0.0)]
    assert not goes_by_document(nn.Linear(1, 1))
