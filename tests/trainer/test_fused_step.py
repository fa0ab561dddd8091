"""The fused update over lists that are made once, against torch's own AdamW."""

import copy

import pytest
import torch
from torch import Tensor

from trainer.optimizers.fused_step import FusedStep
from trainer.optimizers.states import make_state
from trainer.pieces import Piece

SHAPES = ((5, 7), (3,), (), (2, 9), (4, 4))
DTYPES = (torch.float32, torch.float64, torch.float32, torch.float32, torch.float64)
STEPS = (  # which weights have a gradient, and whether the update is skipped
    ((0, 1, 2, 3, 4), False),
    ((0, 1, 2, 3, 4), True),
    ((1, 2, 4), False),
    ((0, 3), True),
    ((), False),
    ((0, 1, 2, 3, 4), False),
)


def adamw(weights: list[Tensor]) -> torch.optim.AdamW:
    groups = [
        {"params": weights[:3], "lr": 0.1, "weight_decay": 0.3},
        {"params": weights[3:], "lr": 0.02, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
    make_state(optimizer)
    return optimizer


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_the_bits_are_those_of_torch_whatever_has_a_gradient(is_reloaded: bool) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
    expected, found = (copy.deepcopy(start) for _ in range(2))
    reference, ours = adamw(expected), adamw(found)
    fused = FusedStep(ours, {str(n): Piece.of(weight) for n, weight in enumerate(found)})
    for number, (present, is_skipped) in enumerate(STEPS):
        if is_reloaded:  # a checkpoint is written through what `state` holds
            for state in (*reference.state.values(), *ours.state.values()):
                state["step"].fill_(10 * number)
        for group in (*reference.param_groups, *ours.param_groups):
            group["lr"] *= 0.9
        gradients = {str(n): torch.randn_like(start[n]) for n in present}
        for n, weight in enumerate(expected):
            weight.grad = gradients.get(str(n))
        reference.found_inf = torch.full((), float(is_skipped))  # type: ignore[attr-defined]
        reference.step()
        fused.step(gradients, torch.full((), float(is_skipped)))
        for one, other in zip(expected, found, strict=True):
            assert one.equal(other)
            for kind, value in reference.state[one].items():
                assert value.equal(ours.state[other][kind]), kind
