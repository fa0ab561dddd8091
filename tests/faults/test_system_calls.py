"""A save, with its retention, dies or fails at real system calls: strace injects what a disk does.

`test_kill_sweep.py` meets every call of Python into the operating system, in seconds; here are the
calls that the kernel sees, of the real interpreter. A bare one makes some hundred of them before
the save begins, which are counted and passed over. Every fifth call is met with each commit, all
with `bash tests/faults/run.sh -k system_calls`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Figure
from tests.faults.test_kill_sweep import (
    GAVE_UP,
    PACKAGES,
    ROOT,
    UNHARMED,
    check_aftermath,
    start_and_save,
)
from tests.faults.victim import MARK, RECOVERED

NAMES = (
    "mkdir", "openat", "write", "pwrite64", "ftruncate", "fsync", "rename", "unlink", "unlinkat",
    "rmdir", "close",
)  # fmt: skip
KILLED = -9
SHARE = 5  # of the calls, one in so many is met with each commit


def command(run: Path) -> list[str]:
    """Return what starts a bare interpreter that saves."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(PACKAGES)!r}]; "
        f"from tests.faults.victim import victim; victim({str(run)!r})"
    )
    return [sys.executable, "-S", "-I", "-B", "-c", code]


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A run with two steps, in memory: only processes die here, so no disk is waited for."""
    if shutil.which("strace") is None:
        assert "CI" not in os.environ, "CI must have strace: .ci/apt.txt"
        pytest.skip("strace is not installed")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for _ in range(2):
            start_and_save(Path(folder) / "base")
        yield Path(folder) / "base"


@pytest.fixture(scope="module")
def calls(base: Path) -> list[tuple[str, int]]:
    """The calls of a save as (name, how many of the name there are up to it)."""
    work = fresh(base)
    log = base.with_name("log")
    words = ["strace", "-qq", "-o", str(log), "-e", f"trace={','.join(f'?{n}' for n in NAMES)}"]
    subprocess.run([*words, *command(work)], check=True)
    counts: Counter[str] = Counter()
    found = None
    for line in log.read_text().splitlines():
        if name := re.match(r"(\w+)\(", line):
            counts[name[1]] += 1
            if MARK in line:
                found = []
            elif found is not None:
                found.append((name[1], counts[name[1]]))
    assert found is not None
    return found


def fresh(base: Path) -> Path:
    work = base.with_name("work")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    return work


def harmed(base: Path, name: str, what: str) -> tuple[int, str]:
    """Return the exit code and the messages of a save in which calls of one name are harmed."""
    words = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e"]
    found = subprocess.run(
        [*words, f"inject={name}:{what}", *command(fresh(base))],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return found.returncode, found.stderr


def check_kills(base: Path, points: list[tuple[str, int]]) -> set[int]:
    """Kill at each point; return the steps that were the newest after it."""
    survivors = set()
    for name, number in points:
        code, _ = harmed(base, name, f"signal=SIGKILL:when={number}")
        assert code == KILLED, (name, number)
        survivors.add(check_aftermath(base.with_name("work")))
    return survivors


def check_errors(base: Path, points: list[tuple[str, int]], reason: str, when: str) -> set[int]:
    """Let the calls at each point fail; return the exit codes."""
    text = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}[reason]
    codes = set()
    for name, number in points:
        code, said = harmed(base, name, f"error={reason}:when={number}{when}")
        assert code in (UNHARMED, RECOVERED, GAVE_UP), (name, number, said)
        is_mute = name == "write" and when  # every write fails, that of the message too
        assert code == UNHARMED or is_mute or text in said, (name, number, said)
        check_aftermath(base.with_name("work"))
        codes.add(code)
    return codes


def test_a_save_makes_system_calls_of_every_kind(calls: list[tuple[str, int]]) -> None:
    assert {name for name, _ in calls} == set(NAMES)
    assert len(calls) >= 60


def test_save_killed_at_a_system_call_leaves_the_old_or_the_new_step(
    base: Path, calls: list[tuple[str, int]]
) -> None:
    assert check_kills(base, calls[::SHARE]) == {2, 3}


def test_save_whose_system_call_fails_is_told_and_the_next_one_is_good(
    base: Path, calls: list[tuple[str, int]]
) -> None:
    assert RECOVERED in check_errors(base, calls[1 :: 2 * SHARE], "EIO", "")
    assert GAVE_UP in check_errors(base, calls[2 :: 2 * SHARE], "ENOSPC", "+")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_save_killed_at_every_system_call_leaves_the_old_or_the_new_step(
    base: Path, calls: list[tuple[str, int]], figure: Figure
) -> None:
    assert check_kills(base, calls) == {2, 3}
    figure("A2 system calls at each of which a save was killed; no step lost", len(calls), "")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", ["", "+"])
@pytest.mark.parametrize("reason", ["ENOSPC", "EIO"])
def test_save_at_which_every_system_call_fails_in_turn_loses_no_step(
    base: Path, calls: list[tuple[str, int]], reason: str, when: str, figure: Figure
) -> None:
    assert {RECOVERED, GAVE_UP} & check_errors(base, calls, reason, when)
    how = "from each of which all failed" if when else "each of which failed once"
    figure(f"A3 system calls {how} with {reason}; no step lost", len(calls), "")
