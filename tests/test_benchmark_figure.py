"""A benchmark's figure is judged on the right side of its limit."""

import pytest

from benchmarks.figure import Figure


@pytest.mark.parametrize(
    ("value", "is_upper", "is_met"),
    [(8.0, True, True), (8.1, True, False), (1.5, False, True), (1.4, False, False)],
)
def test_a_figure_is_met_on_its_side_of_the_limit(
    value: float, is_upper: bool, is_met: bool
) -> None:
    figure = Figure(
        name="start, s", ours={"median": value}, theirs=None, target="in time",
        limit=8.0 if is_upper else 1.5, value=value, is_upper=is_upper,
    )  # fmt: skip
    assert figure.is_met is is_met
