"""Classification heads: pooling, every loss against the plain formula, gaps in labels."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import heads
from models.nn.classifiers import (
    Emphasis,
    SequenceClassifier,
    TokenClassifier,
    classification_loss,
    last_tokens,
)
from models.nn.head import IGNORED
from tests.conftest import tiny_spec

ONE = torch.ones((), dtype=torch.float64)


def classifier(problem_type: str, num_labels: int = 3) -> SequenceClassifier:
    head = SequenceClassifier(4, num_labels, problem_type=problem_type).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    return head


def hidden(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, length, 4, generator=generator, dtype=torch.float64).requires_grad_()


def test_the_last_token_of_every_segment_is_found_wherever_padding_stands() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1], [2, 1, 1, 0, 3, 3]])
    assert last_tokens(segments, 3).tolist() == [[1, 4, 0], [5, 0, 0], [2, 0, 5]]


def test_packed_sequences_score_as_they_do_alone() -> None:
    model = heads.sequence_classifier(
        tiny_spec(), num_labels=3, problem_type="single_label_classification"
    ).double()
    ids = torch.randint(0, 258, (1, 12), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 5 + [2] * 7])
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    labels = torch.tensor([[2, 0]])
    packed = model(ids, positions, segments, labels, ONE)
    total = torch.zeros((), dtype=torch.float64)
    for part, label in ((slice(0, 5), 2), (slice(5, 12), 0)):
        alone = model(ids[:, part], positions[:, part], torch.ones_like(ids[:, part]))
        assert alone.shape == (1, 1, 3)
        total += F.cross_entropy(alone[0], torch.tensor([label])).detach()
    assert packed.sum.item() == pytest.approx(total.item(), rel=1e-12)
    assert packed.num_targets.item() == 2


def test_single_label_loss_is_cross_entropy_over_the_labels_that_are_there() -> None:
    head, x = classifier("single_label_classification"), hidden(2, 3)
    segments = torch.tensor([[1, 2, 2], [1, 1, 1]])
    labels = torch.tensor([[2, 0], [1, -100]])
    loss = head(x, segments, labels, 0.5 * ONE)
    rows = torch.stack([x[0, 0], x[0, 2], x[1, 2]]) @ head.weight.T
    expected = F.cross_entropy(rows, torch.tensor([2, 0, 1]), reduction="sum")
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.num_targets.item() == 3
    each = F.cross_entropy(rows, torch.tensor([2, 0, 1]), reduction="none")
    assert loss.each.flatten().tolist() == pytest.approx([*each.tolist(), 0.0], rel=1e-12, abs=0)
    found = torch.autograd.grad(loss.objective, (x, head.weight))
    wanted = torch.autograd.grad(0.5 * expected, (x, head.weight))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("problem_type", "formula"),
    [
        ("multi_label_classification", F.binary_cross_entropy_with_logits),
        ("regression", F.mse_loss),
    ],
)
def test_other_losses_sum_over_entries_and_leave_gaps_out(problem_type: str, formula) -> None:  # type: ignore[no-untyped-def]
    head, x = classifier(problem_type), hidden(2, 3)
    segments = torch.ones(2, 3, dtype=torch.int64)
    labels = torch.tensor([[[1.0, 0.0, math.nan]], [[math.nan, 1.0, 0.0]]])
    loss = head(x, segments, labels, ONE)
    logits = x[:, -1] @ head.weight.T
    there = ~labels[:, 0].isnan()
    expected = formula(logits[there], labels[:, 0][there].double(), reduction="sum")
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.num_targets.item() == 4
    each = formula(logits[there], labels[:, 0][there].double(), reduction="none")
    torch.testing.assert_close(loss.each[:, 0][there], each.detach(), rtol=1e-12, atol=0)
    assert loss.each[:, 0][~there].tolist() == [0.0, 0.0]
    found = torch.autograd.grad(loss.objective, (x, head.weight))
    wanted = torch.autograd.grad(expected, (x, head.weight))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_token_loss_is_cross_entropy_and_dropout_acts_in_training_only() -> None:
    head = TokenClassifier(4, 3, dropout=0.5).double()
    x, segments = hidden(2, 50), torch.ones(2, 50, dtype=torch.int64)
    labels = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(2))
    labels[0, :10] = -100
    loss = head.eval()(x, segments, labels, ONE)
    logits = F.linear(x, head.weight, head.bias)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.num_targets.item() == 90
    assert torch.equal(head(x, segments), head(x, segments))
    head.train()
    assert not torch.equal(head(x, segments), head(x, segments))


def test_the_token_heads_dropout_is_a_tenth_unless_it_is_set() -> None:
    assert heads.token_classifier(tiny_spec(), num_labels=2).head.dropout == 0.1
    assert heads.token_classifier(tiny_spec(), num_labels=2, dropout=0.0).head.dropout == 0.0


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "message"),
    [
        (1, "single_label_classification", "num_labels=1 is too few"),
        (0, "regression", "num_labels=0 is too few"),
        (2, "ranking", "problem_type='ranking' is unknown"),
    ],
)
def test_impossible_heads_are_refused(num_labels: int, problem_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(4, num_labels, problem_type=problem_type)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5)])
def test_weights_and_smoothing_act_on_the_objective_and_not_on_what_is_logged(
    weights: tuple[float, ...], smoothing: float
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (4, 5))
    labels[0, :3] = IGNORED
    scale = torch.tensor(0.25, dtype=torch.float64)
    emphasis = Emphasis(weights=weights, smoothing=smoothing)
    loss = classification_loss(logits, labels, scale, "single_label_classification", emphasis)
    expected = plain = 0.0
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label == IGNORED:
            continue
        log_p = row.log_softmax(-1)
        w = torch.tensor(weights or (1.0, 1.0, 1.0), dtype=torch.float64)
        spread = -(w * log_p).sum() / 3
        expected = expected - (1 - smoothing) * w[label] * log_p[label] + smoothing * spread
        plain -= log_p[label].item()
    assert loss.sum.item() == pytest.approx(plain, rel=1e-12)
    assert int(loss.num_targets) == 17
    (found,) = torch.autograd.grad(loss.objective, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected * scale, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_of_several_labels_weights_count_the_ones() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[1.0, 0.0]] * 3, [[torch.nan, 1.0]] * 3], dtype=torch.float64)
    emphasis = Emphasis(weights=(3.0, 0.5), smoothing=0.1)
    scale = torch.ones((), dtype=torch.float64)
    loss = classification_loss(logits, labels, scale, "multi_label_classification", emphasis)
    y = labels.nan_to_num() * 0.9 + 0.05
    w = torch.tensor([3.0, 0.5], dtype=torch.float64)
    each = -(w * y * logits.sigmoid().log() + (1 - y) * (1 - logits.sigmoid()).log())
    wanted = each[~labels.isnan()].sum()
    torch.testing.assert_close(loss.objective, wanted, rtol=1e-12, atol=0)
