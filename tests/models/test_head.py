"""The fused head against plain logits and cross-entropy: value, gradients, chunks, masks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.nn import head as head_module
from models.nn.head import IGNORED, LMHead, WholeVocabulary
from models.nn.kernel_counts import counted

HIDDEN, VOCAB, TOKENS = 12, 37, 20


def head_and_inputs(
    dtype: torch.dtype, chunk_tokens: int, labels: str
) -> tuple[LMHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    head = LMHead(HIDDEN, VOCAB, chunk_tokens=chunk_tokens).to(dtype)
    head.weight.data = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    hidden = torch.randn(2, TOKENS // 2, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (2, TOKENS // 2), generator=generator)
    if labels == "one masked chunk":
        targets[0, :8] = IGNORED
    if labels == "all masked":
        targets[:] = IGNORED
    return head, hidden, targets


@pytest.mark.parametrize("labels", ["all", "one masked chunk", "all masked"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 20, 1000])
def test_value_and_gradients_equal_plain_cross_entropy(chunk_tokens: int, labels: str) -> None:
    head, hidden, targets = head_and_inputs(torch.float64, chunk_tokens, labels)
    scale = torch.tensor(0.37, dtype=torch.float64)
    logits = hidden @ head.weight.T
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    expected_gradients = torch.autograd.grad(expected * scale, (hidden, head.weight))
    loss = head.loss(hidden, targets, scale)
    gradients = torch.autograd.grad(loss.objective, (hidden, head.weight))
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-12)
    each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(loss.each, each.detach(), rtol=1e-12, atol=1e-14)
    assert int(loss.num_targets) == int((targets != IGNORED).sum())
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_gradient_check_in_fp64() -> None:
    head, hidden, targets = head_and_inputs(torch.float64, 6, "one masked chunk")

    def objective(hidden: Tensor, weight: Tensor) -> Tensor:
        head.weight.data = weight.data
        from models.nn.chunked import ChunkedCrossEntropy
        from models.nn.head import WholeVocabulary

        scale = torch.tensor(2.0, dtype=torch.float64)
        return ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), targets.flatten(), scale, 6, WholeVocabulary(), weight
        )[0]

    assert torch.autograd.gradcheck(objective, (hidden, head.weight))


def test_a_later_factor_on_the_objective_reaches_the_gradients() -> None:
    head, hidden, targets = head_and_inputs(torch.float64, 6, "all")
    scale = torch.ones((), dtype=torch.float64)
    (single,) = torch.autograd.grad(head.loss(hidden, targets, scale).objective, hidden)
    (triple,) = torch.autograd.grad(3 * head.loss(hidden, targets, scale).objective, hidden)
    torch.testing.assert_close(triple, 3 * single)


def test_the_scale_of_bf16_gradients_is_not_rounded_itself() -> None:
    head, hidden, targets = head_and_inputs(torch.bfloat16, 7, "all")
    third = torch.tensor(1 / 3)
    inputs = (hidden, head.weight)
    whole = torch.autograd.grad(head.loss(hidden, targets, torch.ones(())).objective, inputs)
    parts = torch.autograd.grad(head.loss(hidden, targets, third).objective, inputs)
    assert torch.equal(parts[0], (whole[0].float() * third).bfloat16())
    share = (parts[1].double().norm() / whole[1].double().norm()).item()
    assert share == pytest.approx(1 / 3, rel=1e-3)  # third.bfloat16() is off by 2e-3


def test_without_gradients_the_value_is_the_same() -> None:
    head, hidden, targets = head_and_inputs(torch.float64, 7, "one masked chunk")
    scale = torch.ones((), dtype=torch.float64)
    with torch.no_grad():
        found = head.loss(hidden, targets, scale)
    assert float(found.sum) == pytest.approx(
        float(head.loss(hidden, targets, scale).sum), rel=1e-12
    )


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_side_gets_no_gradient_and_the_other_stays_exact(frozen: str) -> None:
    head, hidden, targets = head_and_inputs(torch.float64, 7, "all")
    scale = torch.ones((), dtype=torch.float64)
    whole = torch.autograd.grad(head.loss(hidden, targets, scale).objective, (hidden, head.weight))
    (head.weight if frozen == "weight" else hidden).requires_grad_(False)
    head.loss(hidden, targets, scale).objective.backward()
    side, number = (hidden, 0) if frozen == "weight" else (head.weight, 1)
    torch.testing.assert_close(side.grad, whole[number], rtol=1e-12, atol=0)
    assert (head.weight if frozen == "weight" else hidden).grad is None


def test_bf16_keeps_the_loss_in_fp32() -> None:
    head, hidden, targets = head_and_inputs(torch.bfloat16, 7, "all")
    loss = head.loss(hidden, targets, torch.ones(()))
    assert loss.sum.dtype == torch.float32
    exact = F.cross_entropy(
        (hidden.float() @ head.weight.float().T).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    # bf16 keeps 8 bits of a logit: 2^-8 relative each, which averages out over 20 tokens.
    assert float(loss.sum) == pytest.approx(exact.item(), rel=2e-3)


@pytest.mark.parametrize("rows", [1, 3, 20, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_few_rows_of_logits_at_a_time_give_the_same(dtype: torch.dtype, rows: int) -> None:
    head, hidden, targets = head_and_inputs(dtype, 1000, "one masked chunk")
    logits_XV = (hidden @ head.weight.T).detach().flatten(0, 1) * 30
    labels_X, is_target_X1 = targets.flatten(), (targets.flatten() != IGNORED)[:, None]
    log_p_XV = logits_XV.double().log_softmax(-1)
    one_hot_XV = F.one_hot(labels_X.clamp(min=0), VOCAB)
    wanted = (log_p_XV.exp() - one_hot_XV) * is_target_X1
    vocabulary = WholeVocabulary(cached_logits=rows * VOCAB + 1)
    nll_X, grad_XV = vocabulary.gradient(logits_XV.clone(), labels_X, None)
    each = F.nll_loss(log_p_XV, labels_X, ignore_index=IGNORED, reduction="none")
    limit = 1e-12 if dtype == torch.float64 else 1e-6  # of fp32; logits have what bf16 left them
    torch.testing.assert_close(nll_X.double(), each, rtol=limit, atol=limit)
    torch.testing.assert_close(grad_XV, wanted.to(dtype), rtol=0, atol=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize(
    ("by", "count", "computed"),
    [(1, 1, 1), (1, 290, 290), (64, 1, 64), (64, 64, 64), (64, 100, 128), (64, 290, 300)],
)
def test_tokens_without_a_target_cost_no_product(
    by: int, count: int, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for some that fill the others up: a number of tokens that was seen before."""
    monkeypatch.setattr(head_module, "counted", lambda number, _: -(-number // by) * by)
    torch.manual_seed(0)
    head = LMHead(HIDDEN, VOCAB, chunk_tokens=1000)
    hidden = torch.randn(2, 150, HIDDEN, requires_grad=True)
    targets = torch.randint(0, VOCAB, (300,))
    targets[torch.randperm(300)[count:]] = IGNORED
    with FlopCounterMode(display=False) as counter:
        loss = head.loss(hidden, targets.view(2, 150), torch.ones(()))
        loss.objective.backward()
    # Logits and the gradient of the hidden states; that of the weight is an addmm_, not counted.
    assert counter.get_total_flops() == 2 * 2 * computed * HIDDEN * VOCAB
    wanted = F.cross_entropy(head(hidden).flatten(0, 1), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(loss.sum, wanted.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-5, atol=1e-6)
    assert loss.each is not None
    assert not loss.each.flatten()[targets == IGNORED].any()


def test_tokens_are_counted_by_many_where_kernels_are_compiled_for_each_number() -> None:
    has_mkl = torch.backends.mkl.is_available()
    for dtype in (torch.float32, torch.float64):
        assert [counted(n, dtype) for n in (0, 1, 130)] == [0, 1, 130] if has_mkl else [0, 128, 256]
    assert [counted(n, torch.bfloat16) for n in (0, 1, 128, 130)] == [0, 128, 128, 256]


def test_no_target_at_all_leaves_gradients_of_zero() -> None:
    head, hidden, targets = head_and_inputs(torch.float64, 7, "all masked")
    head.loss(hidden, targets, torch.ones(()).double()).objective.backward()
    for gradient in (hidden.grad, head.weight.grad):
        assert gradient is not None
        assert not gradient.any()


def test_an_ignored_row_with_infinite_logits_does_not_make_nan() -> None:
    head, hidden, targets = head_and_inputs(torch.float32, 7, "all")
    targets[0, 0] = IGNORED
    hidden.data[0, 0] = torch.inf
    loss = head.loss(hidden, targets, torch.ones(()))
    assert loss.sum.isfinite()
