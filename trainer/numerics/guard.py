"""Judges the numbers of a step before its update: on the device, alike on every rank."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.numerics.spike import CLIP, Flag, SpikeSpec

EPSILON = 1e-6  # ZClip's, beside a standard deviation that may be zero
MEASURES = ("loss", "grad_norm")


class Verdict(NamedTuple):
    """What is to be done with a step. Tensors are 0-dim, on the device, and equal on every rank."""

    skipped: Tensor
    """True: nothing may change."""
    limit: Tensor | None
    """The norm to clip the gradient to, beside optim.max_grad_norm; None: no other."""
    flags: Tensor
    """What was found, as `Flag`."""


class Guard:
    """Running mean and variance of loss and gradient norm, and what lies far above them.

    Source: ZClip (Kumar et al. 2025, arXiv 2504.02507), there of the norm alone. With x the loss or
    the norm, mean m and variance v of the steps before:

        z  = (x - m) / (sqrt(v) + 1e-6);  a spike where z > z*
        x' = m + z* sqrt(v) z* / z of a spike, else x;  clip: the gradient's norm becomes x'
        m <- a m + (1 - a) x';  v <- a v + (1 - a) (x' - m)^2 with the new m

    The first `warmup_steps` steps give mean and (population) variance. Under the other policies
    a spike counts as x' = m + z* sqrt(v): by ZClip's x' the variance would go to zero where the
    level has changed for good, and every step would be a spike ever after. A step that is not
    finite changes nothing.
    """

    def __init__(self, spec: SpikeSpec) -> None:
        self.spec = spec
        # Rows: steps taken in, mean, variance.
        self.moments = torch.zeros(3, len(MEASURES), dtype=torch.float64)

    def judge(self, loss_sum: Tensor, num_targets: Tensor, grad_norm: Tensor) -> Verdict:
        """Return what is to be done with a step of these numbers, which are equal on every rank.

        No host sync: but for the first step's, nothing is copied to the device.
        """
        loss = loss_sum.double() / num_targets.clamp(min=1)
        values = torch.stack([loss, grad_norm.double()])
        finite = values.isfinite()
        flags = ~finite[0] * int(Flag.LOSS_NOT_FINITE)
        flags = flags + ~finite[1] * int(Flag.GRADIENT_NOT_FINITE)
        skipped = ~finite.all()
        if not self.spec.detects:
            return Verdict(skipped, None, flags)
        is_spike, held = self._take_in(values, ~skipped)
        flags = flags + is_spike[0] * int(Flag.LOSS_SPIKE)
        flags = flags + is_spike[1] * int(Flag.GRADIENT_SPIKE)
        if self.spec.policy == CLIP:
            return Verdict(skipped, torch.where(is_spike[1], held[1], torch.inf), flags)
        return Verdict(skipped | is_spike.any(), None, flags)

    def _take_in(self, values: Tensor, is_finite: Tensor) -> tuple[Tensor, Tensor]:
        """Return which values are spikes, and what counts of each."""
        spec = self.spec
        assert spec.z is not None
        assert spec.alpha is not None
        assert spec.warmup_steps is not None
        self.moments = self.moments.to(values.device)
        count, mean, variance = self.moments
        deviation = variance.sqrt()
        z = (values - mean) / (deviation + EPSILON)
        is_warm = count >= spec.warmup_steps
        is_spike = is_finite & is_warm & (z > spec.z)
        shrink = spec.z / z if spec.policy == CLIP else 1.0
        held = torch.where(is_spike, mean + spec.z * deviation * shrink, values)
        weight = torch.where(is_warm, 1 - spec.alpha, 1 / (count + 1))
        # ZClip's variance is about the new mean; the warm-up's is that of its steps (Welford).
        square = (held - mean).square() * torch.where(is_warm, 1 - weight, 1.0)
        new = (
            count + 1,
            mean + weight * (held - mean),
            (1 - weight) * (variance + weight * square),
        )
        self.moments = torch.where(is_finite, torch.stack(new), self.moments)
        return is_spike, held

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: hexadecimal, to lose no bit."""
        columns = zip(MEASURES, self.moments.T.tolist(), strict=True)
        return {name: [value.hex() for value in column] for name, column in columns}

    def load(self, state: dict[str, Any]) -> None:
        columns = [[float.fromhex(value) for value in state[name]] for name in MEASURES]
        self.moments = torch.tensor(columns, dtype=torch.float64).T.contiguous()
