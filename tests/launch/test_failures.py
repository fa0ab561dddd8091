"""Real processes: a rank that fails or is stopped ends the run, and is named.

Both runs go on at once: nearly all of their time is importing torch.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import INTERNAL
from tests.faults.injected import WORKER, Fault, prepare
from tests.launch.test_supervisor import ENDLESS, command_line, started

pytestmark = pytest.mark.timeout(400)

LIMIT_SECONDS = 120.0  # a loaded machine imports torch for a minute
TIMEOUT_SECONDS = 5.0
NEVER_SECONDS = 600.0  # a limit that the tests do not wait for


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that one rank ended."""

    code: int
    last_line: str
    records: list[dict[str, Any]]
    """Of the ranks that left one."""
    left: list[int]
    """Workers that outlived it."""


def ended(process: subprocess.Popen[bytes], output: Path, attempt: Path) -> Ended:
    code = process.wait(LIMIT_SECONDS)
    records = [json.loads(path.read_text()) for path in sorted(attempt.glob("exit.*.json"))]
    places = [path.read_text().partition("\n")[0] for path in attempt.glob("place.*.json")]
    return Ended(
        code=code,
        last_line=output.read_text().splitlines()[-1],
        records=records,
        left=[place["pid"] for place in map(json.loads, places) if command_line(place["pid"])],
    )


def start_fault(folder: Path, cache: Path, fault: Fault) -> tuple[subprocess.Popen[bytes], Path]:
    """Start two ranks under the supervisor, one with the fault; return the folder of the start."""
    attempt = folder / "runs" / "tiny" / "attempts" / "001"
    prepare(attempt, cache, fault, NEVER_SECONDS)
    with open(folder / "output", "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, "2", str(attempt)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, attempt


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[dict[str, Ended]]:
    """The ends of all runs, by what was wrong with rank 1."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("error", "stopped")}
    words = (
        ENDLESS,
        "launch.processes=2",
        "launch.restarts=0",
        f"launch.watchdog.stopped_seconds={NEVER_SECONDS}",  # here the collectives shall notice
        f"timeout_seconds={TIMEOUT_SECONDS}",
    )
    with ExitStack() as stack:
        command = stack.enter_context(started(folders["stopped"], cache, *words))
        fault = Fault(kind="error", phase="train_step")
        process, attempt = start_fault(folders["error"], cache, fault)
        stack.callback(process.kill)  # its workers die with it
        command.wait_for_steps(3)
        os.kill(command.workers()[1], signal.SIGSTOP)
        error = ended(process, folders["error"] / "output", attempt)
        stopped = ended(command.process, command.output, command.run / "attempts" / "001")
        yield {"error": error, "stopped": stopped}


def test_error_of_one_rank_ends_all_before_any_limit_and_the_last_line_says_it_all(
    runs: dict[str, Ended],
) -> None:
    run = runs["error"]
    assert (run.code, run.left) == (INTERNAL, [])
    assert run.last_line.startswith(
        "tessera: rank 1 of 2 failed first in step 3 (train_step), samples [17:18] [19:20] "
        "[21:22] [23:24] from train["
    )
    assert ": ArithmeticError: broken on purpose; last committed step: none" in run.last_line
    assert [record["is_consequence"] for record in run.records] == [True, False]
    assert run.records[1]["samples"] == [[17, 18], [19, 20], [21, 22], [23, 24]]


def test_stopped_rank_of_the_real_command_is_named_and_killed(runs: dict[str, Ended]) -> None:
    run = runs["stopped"]
    assert (run.code, run.left) == (INTERNAL, [])
    assert len(run.records) == 1
    waited = run.records[0]["time"] - run.records[0]["since"]
    assert TIMEOUT_SECONDS <= waited < NEVER_SECONDS
    assert run.last_line.startswith(
        "tessera: rank 1 of 2 did not arrive: it is stopped (SIGSTOP) in step "
    )
    assert re.search(r"; rank 0 waited \d+ s in step ", run.last_line)
