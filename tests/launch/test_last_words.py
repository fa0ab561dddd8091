"""What stands last in a terminal: what a person on call reads first."""

import errno
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.exit_codes import BAD_CONFIG, INTERNAL, NO_PROGRESS, PREEMPTED, STORAGE
from launch.last_words import describe, leave_record, report, report_first, stopped
from launch.restarts import Failure, Restarts, failure_of
from launch.verdict import Witness
from launch.worker import _leave
from trainer.callbacks.console import ConsoleCallback
from trainer.checkpoint.commit import step_folder
from trainer.directory import CHECKPOINTS
from trainer.distributed import Placement
from trainer.errors import NumericError, StorageError
from trainer.progress import Progress
from trainer.whereabouts import Whereabouts

TWO = [Placement(rank=rank, world_size=2, is_distributed=True) for rank in range(2)]


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """The first start of a run that has saved step 3."""
    folder = tmp_path / "attempts" / "001"
    folder.mkdir(parents=True)
    step = step_folder(tmp_path / CHECKPOINTS, 3)
    step.mkdir(parents=True)
    (step / "MANIFEST.json").write_text("{}")
    return folder


def record_of(error: Exception, placement: Placement) -> dict[str, Any]:
    """Return the record of an error in step 5, raised and caught as in a run."""
    where = Whereabouts()
    where.enter("train_step", 5, [(8, 10)], ["web[3:5]"])
    try:
        raise error
    except Exception as raised:
        return describe(raised, where, placement)


def failure(**changes: Any) -> Failure:
    values: dict[str, Any] = {
        "code": INTERNAL, "sentence": "rank 1 of 2 failed first", "is_final": False,
        "is_own": False, "oom_step": None, "executed": 5, "committed": 3,
    }  # fmt: skip
    return Failure(**values | changes)


def last_words(restarts: Restarts, *failures: Failure) -> tuple[int, str]:
    ends = [restarts.end(each) for each in failures]
    assert ends[-1] is not None
    assert set(ends[:-1]) <= {None}
    return ends[-1]


def test_one_traceback_is_printed_of_all_ranks_and_each_keeps_its_own(
    attempt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for placement in TWO:
        error = ArithmeticError(f"broken on rank {placement.rank}")
        record = record_of(error, placement)
        report_first(error, record, placement.rank, attempt)
        leave_record(attempt, placement.rank, record)
    told = capsys.readouterr().err
    assert told.startswith("tessera: rank 0 fails:\nTraceback (most recent call last):\n")
    assert told.endswith("ArithmeticError: broken on rank 0\n")
    kept = json.loads((attempt / "exit.00001.json").read_text())["traceback"]
    assert "broken on rank 1" in kept[-1]


@pytest.mark.parametrize("error", [StorageError("full"), RuntimeError("[gloo/x.cc:1] gone")])
def test_what_has_a_remedy_or_follows_from_another_rank_is_left_to_the_supervisor(
    attempt: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    report_first(error, record_of(error, TWO[0]), 0, attempt)
    assert capsys.readouterr().err == ""


def test_last_line_of_a_single_process_says_what_is_left_what_is_next_and_the_code(
    attempt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = StorageError("3 saves in a row failed")
    report(error, record_of(error, Placement()), Placement(), attempt)
    assert capsys.readouterr().err == (
        "tessera: rank 0 of 1 failed in step 5 (train_step): 3 saves in a row failed; last "
        "committed step: 3; once the cause is mended, the same command goes on after step 3; exit "
        "code 74 (no good checkpoint could be written or read)\n"
    )


def test_stop_says_where_the_same_command_goes_on(attempt: Path, tmp_path: Path) -> None:
    assert stopped("stopped by SIGTERM", attempt, PREEMPTED) == (
        "stopped by SIGTERM; last committed step: 3; the same command goes on after step 3 "
        "(exit code 75)"
    )
    nothing = stopped("stopped by SIGTERM", tmp_path / "other" / "attempts" / "001", PREEMPTED)
    assert nothing.endswith(
        "; last committed step: none; the same command starts anew (exit code 75)"
    )


def test_samples_are_named_where_they_may_be_to_blame() -> None:
    of_samples = Witness(rank=0, record=record_of(KeyError("x"), Placement()))
    assert of_samples.work == ", samples [8:10] from web[3:5]"
    for error in (NumericError("steps 2 to 4: .."), StorageError("full")):
        assert Witness(rank=0, record=record_of(error, Placement())).work == ""


def test_full_disk_that_takes_no_record_is_a_storage_failure_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not _leave(tmp_path / "nowhere", 1, {"code": STORAGE})
    assert capsys.readouterr().err == (
        f"tessera: rank 1 could leave no record in {tmp_path}/nowhere: No such file or directory\n"
    )
    witness = Witness(rank=0, return_code=STORAGE)
    assert witness.code == STORAGE
    assert Witness(rank=0, return_code=0).code is None
    found = failure_of([witness], [STORAGE], committed=3)
    assert (found.code, found.is_final) == (STORAGE, True)
    assert "exit code 74 (no good checkpoint could be written or read), and no re" in found.sentence


@pytest.mark.parametrize(
    ("changes", "limit", "why"),
    [
        ({"is_final": True}, 3, "since the same would happen"),
        ({"is_own": True, "executed": 3}, 3, "since no step was done: the same would happen"),
        ({}, 0, "since launch.restarts=0"),
    ],
)
def test_run_that_is_not_started_again_says_why(
    changes: dict[str, Any], limit: int, why: str
) -> None:
    code, said = last_words(Restarts(limit, committed=3), failure(**changes))
    assert code == INTERNAL
    assert (
        f"; last committed step: 3; steps lost: {2 if changes.get('is_own') is None else 0}" in said
    )
    assert f"; not started again, {why}; once the cause is mended, the same command goes " in said
    assert said.endswith(
        "; exit code 70 (internal error, out of memory, or too many non-finite steps)"
    )


def test_node_that_only_a_scheduler_replaces_needs_no_mending() -> None:
    code, said = last_words(Restarts(3, committed=3), failure(code=PREEMPTED, is_final=True))
    assert code == PREEMPTED
    assert (
        "since only a scheduler can replace a node; the same command goes on after step 3" in said
    )


def test_run_that_gives_up_names_the_first_failure_first_and_the_last_one_too() -> None:
    first, last = failure(sentence="the first"), failure(sentence="the last")
    code, said = last_words(Restarts(1, committed=3), first, last)
    assert code == NO_PROGRESS
    assert said.startswith(
        "the first; last committed step: 3; steps lost: 2; gave up after 1 restart "
    )
    assert "the last failure: the last; " in said


def test_defect_in_a_command_ends_with_its_code_behind_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", ("tests.launch.test_last_words", ""))
    for error, code in (
        (KeyError("x"), 70),
        (KeyboardInterrupt(), 130),
        (OSError(errno.EIO, "x"), 74),
    ):
        monkeypatch.setattr("tests.launch.test_last_words.RAISED", error)
        assert cli.main(["doctor"]) == code
        told = capsys.readouterr().err
        assert ("Traceback" in told) == (code == INTERNAL)
        last = told.splitlines()[-1]
        assert last.startswith("tessera: ")
        assert f"exit code {code}" in last


def test_path_that_cannot_be_used_is_said_in_one_line_and_is_no_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", ("tests.launch.test_last_words", ""))
    for number, text in ((errno.EACCES, "Permission denied"), (errno.ENOENT, "No such file")):
        monkeypatch.setattr("tests.launch.test_last_words.RAISED", OSError(number, text, "/no/x"))
        assert cli.main(["doctor"]) == BAD_CONFIG
        assert capsys.readouterr().err == (
            f"tessera: /no/x: {text}; make that path usable, or give another one\n"
        )
    monkeypatch.setattr("tests.launch.test_last_words.RAISED", OSError(errno.ENOENT, "no path"))
    assert cli.main(["doctor"]) == INTERNAL


RAISED: BaseException = KeyError()


def main(_: list[str]) -> int:
    """Be a command with a defect."""
    raise RAISED


@pytest.mark.parametrize(
    ("step", "saved", "said"),
    [
        (0, 0, "before its first step; the same command starts anew"),
        (7, 7, "and saved; the same command goes on from here"),
        (7, 5, "without a save; the same command goes on after step 5"),
    ],
)
def test_run_says_that_it_was_saved_only_where_it_was(
    step: int, saved: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    console = ConsoleCallback(progress_bar=False)
    console.max_steps, console.started, console.last_saved = 9, 0.0, saved
    progress = Progress.__new__(Progress)
    progress.step = step
    with caplog.at_level(logging.INFO):
        console.on_end(progress, finished=False)
    assert caplog.messages[0].endswith(said)


LOOP = """
import types
from launch.signals import handle_signals
request = types.SimpleNamespace(is_set=False, is_polled=True, reason="")
handle_signals(request, says=True)
print("ready", flush=True)
while True:
    sum(range(100))
"""


def test_signals_to_a_single_process_are_answered_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == (
            "tessera: SIGTERM: the run ends after this step, with a save; a second signal ends it "
            "at once\n"
        )
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == (
            "tessera: SIGINT: stopped at once by a second signal, without a save (exit code 130)\n"
        )
        assert process.wait(150.0) == 130
