"""The arithmetic of `benchmarks.scaling`, and its pieces in small: nothing here is timed."""

import pytest

from benchmarks.scaling import checkpoints, host
from benchmarks.scaling.host import LOG_EVERY, Seconds, typical
from trainer.planning.apart import apart


def test_a_typical_row_of_steps_holds_one_log_point_in_ten() -> None:
    plain, logged = [1.0] * (LOG_EVERY - 1), [11.0]
    seconds = [*plain, *logged] * 3
    seconds[4] = 500.0  # another job came between
    assert sum(typical(seconds)) / LOG_EVERY == pytest.approx(2.0)


def test_own_python_is_what_the_lean_loop_does_not_take() -> None:
    assert Seconds(ours=[5.0, 7.0], lean=[4.0, 4.5], usual=[9.0, 9.0]).own == [1.0, 2.5]


def test_every_loop_steps_as_often_on_pretended_ranks() -> None:
    """The true loop of training, with 64 ranks of which 63 are none."""
    found = apart(host.measure, 64, 1)
    assert len(found.ours) == len(found.lean) == len(found.usual) == LOG_EVERY
    assert min(found.ours) > 0.0


def test_every_rank_plans_a_checkpoint_of_the_same_length() -> None:
    """Of 291 weights and two moments each, 512 ranks write a range; the last rank has fewer."""
    two, many = (apart(checkpoints.measure, ranks, 0) for ranks in (2, 512))
    assert two.num_ranges == many.num_ranges == 3 * 291
    assert two.header_bytes == many.header_bytes
