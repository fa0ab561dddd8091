"""When a run ends by itself: before its limit, with room for a save."""

from datetime import datetime, timedelta

import pytest

from launch.deadline import END, SLURM_END, end_time, seconds_left
from trainer.time_limit import LEAVING_SECONDS, UNKNOWN_SAVE_SECONDS, TimeLimit, end_of

NOW = datetime.fromisoformat("2030-01-01T12:00:00+00:00")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("+20s", 20), ("+1.5h", 5400), ("+30m", 1800), ("+2d", 172_800),
     ("2030-01-01T12:00:30+00:00", 30), ("2030-01-01T13:00:30+01:00", 30)],
)  # fmt: skip
def test_limit_is_a_time_from_the_start_or_a_moment(text: str, seconds: float) -> None:
    assert end_of(text, NOW) - NOW == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        "20s",
        "+20",
        "+2w",
        "tomorrow",
        "",
        "+9999999d",
        f"+{400 * '9'}s",
        "9999-12-31T23:59:00-05:00",
    ],
)
def test_what_is_no_time_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no time; set it to \+90s, \+30m, \+12h"):
        end_of(text, NOW)


def test_earlier_one_of_limit_and_end_of_the_slurm_job_counts() -> None:
    now = datetime.now().timestamp()
    job = {SLURM_END: str(int(now) + 50)}
    assert end_time(None, {}) is None
    assert end_time(None, job) == int(now) + 50
    assert now + 19 < float(end_time("+20s", job) or 0) < now + 30
    assert 40 < seconds_left(job, "+1h") <= 51
    assert seconds_left({}, None) == float("inf")


def test_restarted_worker_has_the_end_of_the_first_start() -> None:
    now = datetime.now().timestamp()
    assert 20 < seconds_left({END: str(now + 30)}, "+1h") <= 30


def test_run_stops_when_two_steps_and_a_slow_save_would_no_longer_fit() -> None:
    clock = Clock()
    limit = TimeLimit(100.0 + LEAVING_SECONDS, clock)
    for _ in range(20):
        limit.took(step=2.0)
        limit.took(save=10.0)
    clock.now += 100.0 - (2 * 2.0 + 1.5 * 10.0) - 0.1
    assert not limit.is_near
    clock.now += 0.2
    assert limit.is_near
    assert not limit.is_too_late


def test_a_short_limit_is_not_spent_on_leaving() -> None:
    clock = Clock()
    limit = TimeLimit(10.0, clock)
    clock.now += 9.0 - UNKNOWN_SAVE_SECONDS - 0.1
    assert not limit.is_near
    clock.now += 0.2
    assert limit.is_near


def test_save_that_was_never_measured_is_given_some_seconds() -> None:
    clock = Clock()
    limit = TimeLimit(UNKNOWN_SAVE_SECONDS + 1, clock)
    assert not limit.is_near
    clock.now += 1.1
    assert limit.is_near


def test_one_slow_save_in_many_is_not_what_is_expected() -> None:
    limit = TimeLimit(100.0, Clock())
    for seconds in [1.0] * 39 + [90.0]:
        limit.took(save=seconds)
    assert limit.save_seconds == 1.5


def test_save_that_cannot_end_in_time_is_not_begun() -> None:
    clock = Clock()
    limit = TimeLimit(100.0 + LEAVING_SECONDS, clock)
    limit.took(save=10.0)
    limit.took(step=2.0)
    clock.now += 87.9
    assert not limit.is_too_late
    clock.now += 0.2
    assert limit.is_too_late


def test_run_without_a_limit_never_stops_by_itself() -> None:
    limit = TimeLimit()
    limit.took(step=1e9)
    assert not limit.is_near
    assert not limit.is_too_late
