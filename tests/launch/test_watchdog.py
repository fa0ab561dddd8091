"""When a rank counts as hanging: from its places alone, looked at again and again."""

import os
from typing import Any

import pytest

from launch.traces import STOPPED, cpu_seconds
from launch.watchdog import ENOUGH, FACTOR, Watchdog, WatchdogSpec

SPEC = WatchdogSpec(
    setup_seconds=60, step_seconds=20, save_seconds=40, floor_seconds=5, stopped_seconds=3
)
GAP = 0.5
FIRST = 1


class Looked:
    """A watchdog over one rank, and the time that passes between its looks."""

    def __init__(self, spec: WatchdogSpec = SPEC) -> None:
        self.watchdog, self.beats = Watchdog(spec, 1, FIRST), 0

    def trips_after(self, place: dict[str, Any], limit: float = 1000.0) -> float:
        """Return the seconds after which a rank that stays at `place` counts as hanging."""
        self.beats += 1
        seconds = 0.0
        while seconds < limit:
            found = self.watchdog.look([place | {"beats": self.beats}], GAP)
            if found:
                return seconds
            seconds += GAP
        return limit

    def goes_on(self, place: dict[str, Any], seconds: float, times: int = 1) -> None:
        """Let the rank be at `place` so long, so often, with a sign of life in between."""
        for _ in range(times):
            assert self.trips_after(place, seconds) == seconds


STEP = {"phase": "train_step", "step": 7}
EVALUATE, SAVE, BUILD = ({"phase": phase, "step": 7} for phase in ("evaluate", "save", "build"))


@pytest.mark.parametrize(
    ("place", "limit"), [(STEP, 20), (SAVE, 40), (EVALUATE, 60), (BUILD, 60),
                         (STEP | {"step": FIRST}, 60)]
)  # fmt: skip
def test_each_kind_of_work_has_its_limit_at_the_start(place: dict[str, Any], limit: float) -> None:
    assert limit <= Looked().trips_after(place) <= limit + 3 * GAP


def test_limit_of_a_step_is_learnt_from_the_slowest_ones_and_has_a_floor() -> None:
    short, long = Looked(), Looked()
    short.goes_on(STEP, 0.5, times=ENOUGH + 2)
    assert SPEC.floor_seconds <= short.trips_after(STEP) <= SPEC.floor_seconds + 3 * GAP
    long.goes_on(STEP, 10.0, times=ENOUGH + 2)
    assert FACTOR * 9 <= long.trips_after(STEP) <= FACTOR * 10 + 3 * GAP


def test_save_and_evaluation_keep_time_for_what_was_not_seen_yet() -> None:
    for place, least in ((SAVE, SPEC.save_seconds), (EVALUATE, SPEC.step_seconds)):
        looked = Looked()
        looked.goes_on(place, 0.5, times=ENOUGH + 2)
        assert least <= looked.trips_after(place) <= least + 3 * GAP


def test_slow_steps_raise_their_limit_before_many_are_known() -> None:
    looked = Looked()
    looked.goes_on(STEP, 19.0)
    looked.goes_on(STEP | {"step": 8}, 0.5)
    assert looked.trips_after(STEP | {"step": 9}) >= FACTOR * 18


def test_stopped_process_is_found_whatever_it_was_at() -> None:
    for place in (BUILD, STEP, SAVE, EVALUATE):
        seconds = Looked().trips_after(place | {"state": STOPPED})
        assert SPEC.stopped_seconds <= seconds <= SPEC.stopped_seconds + 3 * GAP


def test_process_that_uses_its_core_while_it_is_set_up_is_at_work() -> None:
    watchdog = Watchdog(WatchdogSpec(setup_seconds=2), 1, FIRST)
    for _ in range(12):
        before = os.times()
        while sum(os.times()[:2]) - sum(before[:2]) < 0.04:  # more than its share of a look
            pass
        place = BUILD | {"beats": 1, "cpu_seconds": cpu_seconds(os.getpid())}
        assert watchdog.look([place], GAP) is None


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """The supervisor may be stopped too, with its whole machine."""
    watchdog = Watchdog(SPEC, 1, FIRST)
    place = STEP | {"beats": 1}
    assert [watchdog.look([place], gap) for gap in (0.5, 0.5, 1e6, 0.5)] == [None] * 4


def test_limit_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"launch.watchdog.floor_seconds=0 is not positive"):
        WatchdogSpec(floor_seconds=0)
