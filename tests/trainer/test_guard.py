"""What is found out about a step before its update, against a slow reference in plain Python."""

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.numerics.guard import Guard, Verdict
from trainer.numerics.spike import Flag, SpikeSpec, names_of

Z, ALPHA, WARMUP = 2.5, 0.9, 5
CLIP = SpikeSpec(policy="clip", z=Z, alpha=ALPHA, warmup_steps=WARMUP)
NUM_TARGETS = 7


def judge(guard: Guard, loss: float, norm: float) -> Verdict:
    loss_sum = torch.tensor(loss * NUM_TARGETS, dtype=torch.float64)
    return guard.judge(loss_sum, torch.tensor(NUM_TARGETS), torch.tensor(norm, dtype=torch.float64))


def zclip(norms: list[float]) -> list[float]:
    """Return what ZClip clips each norm to; inf: to nothing. As in the paper, with a list."""
    seen: list[float] = []
    mean = variance = 0.0
    limits = []
    for norm in norms:
        limit = math.inf
        if len(seen) < WARMUP:
            seen.append(norm)
            mean = sum(seen) / len(seen)
            variance = sum((one - mean) ** 2 for one in seen) / len(seen)
        else:
            deviation = math.sqrt(variance)
            z = (norm - mean) / (deviation + 1e-6)
            if z > Z:
                limit = mean + Z * deviation / (z / Z)
            used = min(norm, limit)
            mean = ALPHA * mean + (1 - ALPHA) * used
            variance = ALPHA * variance + (1 - ALPHA) * (used - mean) ** 2
        limits.append(limit)
    return limits


def some_norms(count: int) -> list[float]:
    generator = random.Random(0)
    return [
        generator.uniform(0.8, 1.2) * (generator.choice([3, 50]) if n % 9 == 8 else 1)
        for n in range(count)
    ]


def test_clip_is_zclip() -> None:
    guard, norms = Guard(CLIP), some_norms(60)
    expected = zclip(norms)
    assert sum(map(math.isfinite, expected)) >= 5
    limits = [float(judge(guard, 1.0, norm).limit) for norm in norms]  # type: ignore[arg-type]
    assert limits == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("policy", ["clip", "skip", "stop"])
def test_a_spike_of_the_loss_is_found_as_one_of_the_norm_is(policy: str) -> None:
    guard = Guard(replace(CLIP, policy=policy))
    for number in range(20):
        judge(guard, 2 + 0.1 * (number % 3), 1 + 0.1 * (number % 3))
    by_loss, by_norm = judge(guard, 9.0, 1.1), judge(guard, 2.1, 9.0)
    assert names_of(int(by_loss.flags)) == ["loss_spike"]
    assert names_of(int(by_norm.flags)) == ["gradient_spike"]
    is_left_out = policy != "clip"
    assert bool(by_loss.skipped) is bool(by_norm.skipped) is is_left_out


def test_no_step_of_the_warmup_is_a_spike() -> None:
    guard = Guard(CLIP)
    found = [judge(guard, 1.0, norm) for norm in (1.0, 1.1, 0.9, 1.0, 99.0)]
    assert not any(int(verdict.flags) for verdict in found)


@pytest.mark.parametrize("spec", [SpikeSpec(), CLIP], ids=["off", "clip"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_named_and_leaves_no_trace(
    spec: SpikeSpec, bad: float
) -> None:
    guard = Guard(spec)
    for norm in some_norms(12):
        judge(guard, norm, norm)
    before = guard.moments.clone()
    for loss, norm, flag in (
        (bad, 1.0, Flag.LOSS_NOT_FINITE),
        (1.0, bad, Flag.GRADIENT_NOT_FINITE),
        (bad, bad, Flag.LOSS_NOT_FINITE | Flag.GRADIENT_NOT_FINITE),
    ):
        verdict = judge(guard, loss, norm)
        assert bool(verdict.skipped)
        assert int(verdict.flags) == flag
    assert torch.equal(guard.moments, before)


def test_a_level_that_has_changed_for_good_becomes_the_usual_one() -> None:
    guard = Guard(replace(CLIP, policy="skip"))
    for norm in some_norms(8):
        judge(guard, 1.0, norm)
    found = [bool(judge(guard, 1.0, 2.0 + 0.1 * (n % 3)).skipped) for n in range(200)]
    assert found[0]
    assert not any(found[-50:])


def test_a_saved_guard_goes_on_bit_by_bit() -> None:
    one, norms = Guard(CLIP), some_norms(40)
    for place, norm in enumerate(norms):
        other = Guard(CLIP)
        other.load(json.loads(json.dumps(one.state())))
        assert torch.equal(other.moments, one.moments), place
        judge(one, norm, norm)


def test_off_looks_at_nothing_but_whether_numbers_are_finite() -> None:
    guard = Guard(SpikeSpec())
    for norm in (*some_norms(20), 1e9):
        verdict = judge(guard, norm, norm)
        assert verdict.limit is None
        assert not bool(verdict.skipped)
    assert not guard.moments.any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "ignore"}, "spike.policy='ignore' is unknown; set it to one of off, clip"),
        ({"z": 3.0}, "spike.z=3.0 has no effect with spike.policy=off"),
        ({"policy": "clip", "z": 3.0}, "spike.policy=clip needs spike.alpha"),
        ({"policy": "skip", "z": 0.0, "alpha": 0.9, "warmup_steps": 9}, "spike.z=0.0 is not posi"),
        ({"policy": "skip", "z": 3.0, "alpha": 1.0, "warmup_steps": 9}, "set it below 1"),
        ({"policy": "skip", "z": 3.0, "alpha": 0.9, "warmup_steps": 1}, "set it to 2 or more"),
        (
            {"policy": "skip", "z": 3.0, "alpha": 0.9, "warmup_steps": 9, "steps_back": 5},
            "spike.steps_back=5 has no effect with spike.policy=skip",
        ),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        SpikeSpec(**settings)


REWIND = SpikeSpec(policy="rewind", z=6.0, alpha=0.9, warmup_steps=9, steps_back=100, max_rewinds=3)


@pytest.mark.parametrize(
    ("save_every", "keep", "is_legal"),
    [(100, 2, True), (50, 3, True), (50, 2, False), (None, 9, False)],
)
def test_a_rewind_needs_a_checkpoint_so_far_back(
    save_every: int | None, keep: int, is_legal: bool
) -> None:
    if is_legal:
        REWIND.check(save_every, keep)
    else:
        with pytest.raises(ValueError, match=r"spike\.steps_back=100 lies before the"):
            REWIND.check(save_every, keep)


@pytest.mark.parametrize("policy", ["off", "clip", "skip"])
def test_nothing_is_read_back_from_the_device(policy: str) -> None:
    """Tensors without values: whoever asks for one gets an error."""
    guard = Guard(SpikeSpec() if policy == "off" else replace(CLIP, policy=policy))
    loss_sum, norm = (torch.empty((), dtype=torch.float64, device="meta") for _ in range(2))
    verdict = guard.judge(loss_sum, torch.empty((), dtype=torch.int64, device="meta"), norm)
    assert verdict.skipped.device.type == verdict.flags.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        bool(verdict.skipped)
