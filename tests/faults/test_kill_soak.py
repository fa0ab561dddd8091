"""A run that is killed again and again is the run that nobody killed (A1).

All of it: `bash tests/faults/run.sh -k soak`; with other numbers: `python -m tests.faults.chaos`.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Figure
from tests.faults.chaos import experiment


def check(found: dict[str, Any], kills: int, steps: int, beyond: int) -> None:
    assert found["findings"] == []
    assert (found["lost"], found["doubled"], found["mismatched"]) == (0, 0, 0)
    assert (found["kills"], found["codes"]) == (kills, [0, 0])
    assert found["last_step"] == found["points"] == steps
    assert found["reexecuted"] == found["compared"] > 0
    assert found["last_start_at"] > beyond  # not from step 0 again and again
    assert found["is_curve_equal"]
    assert found["are_weights_equal"]
    assert found["holds"]


@pytest.mark.timeout(300)  # a busy machine needs more than the usual limit
def test_run_killed_five_times_is_the_run_that_nobody_killed(tmp_path: Path) -> None:
    found = experiment(
        tmp_path, ["max_steps=200", "save_every=1"], kills=5, seed=42, ranks=2, is_forked=True
    )  # fmt: skip
    check(found, kills=5, steps=200, beyond=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_run_killed_a_hundred_times_under_its_supervisor_is_the_run_that_nobody_killed(
    tmp_path: Path, figure: Figure
) -> None:
    found = experiment(
        tmp_path, ["max_steps=6000"], kills=100, seed=42, ranks=2, is_forked=False
    )  # fmt: skip
    check(found, kills=100, steps=6000, beyond=200)
    figure("A1 kills", found["kills"], "")
    figure("A1 step at which the last of these was over", found["last_start_at"], "")
    for name in ("lost", "doubled", "mismatched", "reexecuted"):
        figure(
            f"A1 {name}",
            found[name],
            "steps" if name in ("mismatched", "reexecuted") else "samples",
        )
    figure("A1 curve of 6,000 steps and last weights bitwise equal", "yes", "")
    figure("A1 recovery, median", found["recovery_median"], "s")
    figure("A1 recovery, 95th percentile", found["recovery_p95"], "s")
    figure("A1 duration", found["seconds"], "s")
