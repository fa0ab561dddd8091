"""How often a run saves by the clock."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.interval import FIRST_SECONDS, Clock, best_interval
from trainer.checkpoint.spec import CheckpointSpec


class Time:
    """A clock that a test sets."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_best_interval_loses_less_than_any_other() -> None:
    """Of each interval T: cost / T of the time for saves, T / (2 MTBF) for what is done again."""
    cost, mtbf = 60.0, 49 * 3600.0  # 1,024 GPUs
    best = best_interval(cost, mtbf)
    assert best == pytest.approx(77 * 60, rel=0.01)

    def lost(interval: float) -> float:
        return cost / interval + interval / (2 * mtbf)

    assert lost(best) == pytest.approx(0.026, abs=0.0005)
    assert all(lost(best) < lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_auto_begins_early_and_then_follows_what_a_save_costs() -> None:
    clock = Clock(CheckpointSpec(interval="auto"), num_ranks=8)
    assert clock.seconds == FIRST_SECONDS
    clock.took(paused=0.5, written=2.0)
    assert clock.seconds == pytest.approx(best_interval(0.5, 50_700 / 8 * 3600))
    clock.took(paused=0.1, written=2.0)  # the dearest of a few
    assert clock.seconds == pytest.approx(best_interval(0.45, 50_700 / 8 * 3600))


def test_auto_leaves_the_disk_as_much_time_as_a_save_takes() -> None:
    clock = Clock(CheckpointSpec(interval="auto", mtbf_hours=0.01), num_ranks=1)
    clock.took(paused=0.001, written=40.0)
    assert clock.seconds == 80.0


def test_clock_counts_from_the_start_of_the_save_before() -> None:
    time = Time()
    clock = Clock(CheckpointSpec(interval=30), num_ranks=1, now=time)
    for seconds, is_due in ((29.9, False), (30.0, True), (45.0, True)):
        time.seconds = seconds
        assert clock.is_due is is_due
    clock.start()
    time.seconds = 74.9
    assert not clock.is_due


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"interval": "soon"}, "set it to seconds above 0, auto or null"),
        ({"interval": 0}, "set it to seconds above 0, auto or null"),
        ({"interval": 60, "mtbf_hours": 5}, "has no effect without checkpoint.interval=auto"),
        ({"interval": "auto", "mtbf_hours": 0}, "set it above 0"),
    ],
)
def test_interval_that_means_nothing_is_refused(
    settings: dict[str, float | str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        CheckpointSpec(**settings)  # type: ignore[arg-type]


def test_interval_and_save_every_together_are_refused(cache: Path) -> None:
    run = tiny_run(cache, save_every=3, checkpoint=CheckpointSpec(interval=60))
    with pytest.raises(ValueError, match=r"save_every=3 and checkpoint.interval=60 both"):
        run.check(1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_save_together_whenever_rank_0_finds_it_time(
    tmp_path: Path, cache: Path, world_size: int
) -> None:
    """Each step takes longer than the interval: no two saves may overlap, nor be of one step."""
    spec = CheckpointSpec(interval=1e-6, keep=99, background=False)
    run_ranks(world_size, train, tmp_path, tiny_run(cache, checkpoint=spec))
    late = world_size - 1  # what rank 0 says is read a step later
    expected = range(10, 0, -1) if not late else [10, 8, 6, 4, 2]
    assert committed_steps(tmp_path / "checkpoints") == list(expected)
