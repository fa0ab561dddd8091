"""Losses of pairs against padded rows, one text each, by their formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import heads
from models.lora import LoRALinear, adapt, adapter_names
from models.nn.head import IGNORED, LMHead, Loss
from tests.conftest import tiny_spec

BETA, SMOOTHING = 0.3, 0.1
# A prompt, and what is preferred to what.
PAIRS = [([5, 6, 7], [8], [9]), ([1, 2], [3, 4, 5, 6], [7, 8]), ([4], [9, 9, 2], [9, 1, 3, 4, 6])]


def model_of(task: str, smoothing: float = 0.0) -> Any:
    """Return a model in fp64, of DPO with adapters that act already."""
    torch.manual_seed(0)
    spec = tiny_spec()
    if task == "reward":
        model: Any = heads.reward_model(spec)
    else:
        model = heads.preference_model(spec, chunk_tokens=5, beta=BETA, label_smoothing=smoothing)
        names = [n for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))]
        adapt(model, names, lambda linear: LoRALinear(linear, rank=2, scale=1.5, dropout=0.5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if task == "dpo":
        model.requires_grad_(False)
        for name in adapter_names(model):
            model.get_parameter(name).requires_grad_(True)
    return model.double()


def packed(rows: list[list[int]], width: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return rows of pairs, by their numbers, with their prompts' lengths."""
    ids, positions, segments = torch.zeros(3, len(rows), width, dtype=torch.int64)
    most = max(map(len, rows))
    prompts = torch.full((len(rows), most), IGNORED)
    for row, numbers in enumerate(rows):
        start, segment = 0, 0
        for place, number in enumerate(numbers):
            prompt, *answers = PAIRS[number]
            prompts[row, place] = len(prompt)
            for answer in answers:
                text = torch.tensor(prompt + answer)
                run, segment = slice(start, start + len(text)), segment + 1
                ids[row, run], positions[row, run] = text, torch.arange(len(text))
                segments[row, run] = segment
                start = run.stop
    return {"input_ids": ids, "position_ids": positions, "segment_ids": segments}, prompts


def text_alone(trunk: Any, text: list[int]) -> Tensor:
    """Return the hidden states of one text in a row of its own, padded."""
    ids = torch.tensor([text + [0] * (9 - len(text))])
    is_text = (torch.arange(9) < len(text)).long()[None]
    return trunk(ids, torch.arange(9)[None] * is_text, is_text)[0, : len(text)]


def by_formula(model: Any, task: str, smoothing: float) -> Tensor:
    """Return the losses of all pairs: equation 1 of Ouyang et al., 7 of Rafailov et al."""
    losses = []
    base = heads.causal_lm(tiny_spec(), chunk_tokens=5).double()
    if task == "dpo":
        base.load_state_dict({n: model.state_dict()[n] for n in base.state_dict()})
    for prompt, *answers in PAIRS:
        rewards = []
        for answer in answers:
            text = prompt + answer
            hidden = text_alone(model.trunk, text)
            if task == "reward":
                rewards.append(hidden[-1] @ model.head.weight[0])
                continue
            log_probs = []
            for states in (hidden, text_alone(base.trunk, text)):
                log_p = (states @ model.head.weight.T).log_softmax(-1)
                own = [log_p[n - 1, text[n]] for n in range(len(prompt), len(text))]
                log_probs.append(torch.stack(own).sum())
            rewards.append(BETA * (log_probs[0] - log_probs[1]))
        chosen, rejected = rewards
        right, wrong = (F.softplus(-sign * (chosen - rejected)) for sign in (1, -1))
        losses.append((1 - smoothing) * right + smoothing * wrong)
    return torch.stack(losses)


def gradients(model: Any, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("task", "smoothing"), [("reward", 0), ("dpo", 0), ("dpo", SMOOTHING)])
def test_loss_and_gradients_are_those_of_texts_alone_packed_or_not(
    task: str, smoothing: float
) -> None:
    model = model_of(task, smoothing).eval()  # no dropout, which has its own numbers
    plain, wanted = by_formula(model, task, 0), by_formula(model, task, smoothing)
    expected = gradients(model, wanted.sum() * 0.7)
    scale = torch.tensor(0.7, dtype=torch.float64)
    assert len(expected) >= 4
    for rows, width in (([[0], [1], [2]], 16), ([[0, 2, 1]], 40), ([[1, 0], [2]], 24)):
        inputs, prompts = packed(rows, width)
        loss: Loss = model(**inputs, labels=prompts, scale=scale)
        assert int(loss.num_targets) == len(PAIRS)
        assert float(loss.sum) == pytest.approx(plain.sum().item(), rel=1e-12)
        assert loss.objective.item() == pytest.approx(wanted.sum().item() * 0.7, rel=1e-12)
        assert loss.each is not None
        for row, numbers in enumerate(rows):
            own = loss.each[row, : len(numbers)].tolist()
            assert own == pytest.approx(plain[numbers].tolist(), rel=1e-12)
        found = gradients(model, loss.objective)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-13)


def test_the_reference_is_the_base_without_dropout_and_the_model_is_as_before() -> None:
    model = model_of("dpo").train()
    inputs, prompts = packed([[0, 1]], 20)
    before = model(**inputs)
    first, second = (model(**inputs, labels=prompts) for _ in range(2))
    assert torch.equal(first[..., 1], second[..., 1])
    assert not torch.equal(first[..., 0], second[..., 0])  # dropout acts on the adapters
    assert model.training
    assert model.trunk.training
    assert not torch.equal(before, model(**inputs))
    for name in adapter_names(model):
        model.get_parameter(name).data.zero_()
    loss = model(**inputs, labels=prompts, scale=torch.ones((), dtype=torch.float64))
    assert loss.sum.item() == pytest.approx(2 * torch.log(torch.tensor(2.0)).item(), rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_nll_of_tokens_and_any_gradient_of_it_are_those_of_plain_logits(chunk_tokens: int) -> None:
    torch.manual_seed(1)
    head = LMHead(6, 11, chunk_tokens=chunk_tokens).double()
    hidden = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 10))
    labels[0, 3:6] = IGNORED
    weights = torch.randn(2, 10, dtype=torch.float64)
    found = head(hidden, None, labels)
    logits = hidden @ head.weight.T
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    own, plain = (
        torch.autograd.grad((nll.square() * weights).sum(), (hidden, head.weight))
        for nll in (found, expected)
    )
    torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-13)
