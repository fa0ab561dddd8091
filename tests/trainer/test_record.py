"""What a run writes down: metrics without double points, and a ledger that is exact."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ledgers import ledger
from tests.ranks import run_ranks
from tests.runs import DieAt, tiny_run, train
from trainer.callbacks.protocol import Callback
from trainer.control import HostResult
from trainer.files import read_lines
from trainer.points import METRICS
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.record import RunRecord, cut_back
from trainer.verify.forked import RankFailedError


class DieAfterSave(Callback):
    """Ends every rank right after a checkpoint was committed."""

    def build(self) -> "DieAfterSave":
        return self

    def on_save(self, progress: Progress, saved: Saved) -> None:
        os._exit(9)


def result_of(step: int, loss_sum: float = 1.5) -> HostResult:
    return HostResult(step=step, loss_sum=loss_sum, num_targets=7, grad_norm=1.0, skipped=False)


def strict(line: str) -> Any:
    """Parse JSON as other languages do: without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_numbers_that_json_lacks_are_written_as_strings(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, rank=0, data_rank=0, attempt=1, resumed_step=0)
    values = {"loss": float("nan"), "grad_norm": float("inf"), "low": float("-inf"), "lr": 0.1}
    record.metrics(3, "train", values)
    record.close()
    line = strict((tmp_path / METRICS).read_text())
    assert line["step"] == 3
    assert line["split"] == "train"
    assert [line[key] for key in values] == ["NaN", "Infinity", "-Infinity", 0.1]


def test_metrics_come_back_bit_by_bit_and_keep_none(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, rank=0, data_rank=0, attempt=1, resumed_step=0)
    record.metrics(1, "train", {"loss": 0.1 + 0.2, "mfu": None, "tokens": 2**53})
    record.close()
    (line,) = read_lines(tmp_path / METRICS)
    assert line["loss"].hex() == (0.1 + 0.2).hex()
    assert line["mfu"] is None
    assert line["tokens"] == 2**53


def test_only_rank_0_writes_metrics_and_every_rank_a_ledger(tmp_path: Path) -> None:
    for rank in (0, 1):
        record = RunRecord(tmp_path, rank=rank, data_rank=rank, attempt=1, resumed_step=0)
        record.metrics(1, "train", {"loss": 1.0})
        record.consumes(1, [(rank, rank + 1)])
        record.result(result_of(1))
        assert all(path.is_file() for path in record.files)
        record.close()
    assert len(read_lines(tmp_path / METRICS)) == 1
    assert [ledger(tmp_path, rank)[0]["samples"] for rank in (0, 1)] == [[[0, 1]], [[1, 2]]]


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, rank=0, data_rank=0, attempt=1, resumed_step=0)
    for step in range(1, 7):
        record.metrics(step, "train", {"loss": float(step)})
        record.metrics(step, "eval", {"loss": float("nan")})
    record.close()
    kept = (tmp_path / METRICS).read_text().splitlines()[:8]
    record = RunRecord(tmp_path, rank=0, data_rank=0, attempt=2, resumed_step=4)
    record.metrics(5, "train", {"loss": 5.0})
    record.close()
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert lines[:8] == kept  # both splits of steps 1 to 4, untouched
    assert [strict(line)["step"] for line in lines[8:]] == [5]


def test_metrics_of_a_run_that_begins_anew_are_emptied(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n')
    RunRecord(tmp_path, rank=0, data_rank=0, attempt=2, resumed_step=0).close()
    assert (tmp_path / METRICS).read_text() == ""


def test_torn_last_line_is_left_out_by_readers_and_removed_by_a_cut(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    cut_back(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_absent_file_has_no_lines_and_is_not_made(tmp_path: Path) -> None:
    cut_back(tmp_path / METRICS, 3)
    assert read_lines(tmp_path / METRICS) == []
    assert list(tmp_path.iterdir()) == []


def test_ledger_line_says_what_was_consumed_and_what_came_out(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, rank=2, data_rank=1, attempt=5, resumed_step=0)
    record.consumes(8, [(64, 66), (70, 72)])
    record.consumes(9, [(72, 74), (78, 80)])  # under way while step 8 is read back
    record.result(None)
    record.result(replace(result_of(8, loss_sum=1 / 3), skipped=True))
    record.close()
    (line,) = ledger(tmp_path, 2)
    assert float.fromhex(line.pop("loss_sum")) == 1 / 3
    assert line == {
        "attempt": 5, "step": 8, "data_rank": 1, "samples": [[64, 66], [70, 72]], "num_targets": 7,
        "skipped": True,
    }  # fmt: skip


def test_ledger_is_never_cut_back(tmp_path: Path) -> None:
    for attempt in (1, 2):
        record = RunRecord(tmp_path, rank=0, data_rank=0, attempt=attempt, resumed_step=0)
        for step in (1, 2):
            record.consumes(step, [(step, step + 1)])
            record.result(result_of(step))
        record.close()
    assert [(line["attempt"], line["step"]) for line in ledger(tmp_path)] == [
        (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip


def test_ledger_torn_by_a_crash_loses_no_line_of_the_next_attempt(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/rank00000.jsonl").write_text(
        '{"attempt": 1, "step": 1}\n{"attempt": 1, "st'
    )
    record = RunRecord(tmp_path, rank=0, data_rank=0, attempt=2, resumed_step=1)
    record.consumes(2, [(8, 16)])
    record.result(result_of(2))
    record.close()
    assert [(line["attempt"], line["step"]) for line in ledger(tmp_path)] == [(1, 1), (2, 2)]


def test_ledger_holds_every_step_that_a_checkpoint_holds(tmp_path: Path, cache: Path) -> None:
    """Results are read back one step late, but not later than the save of their step."""
    run = tiny_run(cache, save_every=3, max_steps=4)
    with pytest.raises(RankFailedError, match="died without a result"):
        run_ranks(1, train, tmp_path, replace(run, callbacks={"die": DieAfterSave()}))
    run_ranks(1, train, tmp_path, run)
    assert [(line["attempt"], line["step"]) for line in ledger(tmp_path)] == [
        (1, 1), (1, 2), (1, 3), (2, 4),
    ]  # fmt: skip


def test_steps_executed_again_after_a_crash_consume_and_yield_the_same(
    tmp_path: Path, cache: Path
) -> None:
    run = tiny_run(cache, save_every=2, max_steps=6)
    with pytest.raises(RankFailedError, match="died without a result"):
        run_ranks(1, train, tmp_path, replace(run, callbacks={"die": DieAt(6)}))
    lost = [line for line in ledger(tmp_path) if line["step"] > 4]
    assert [line["step"] for line in lost] == [5]  # the result of step 6 was never read back
    run_ranks(1, train, tmp_path, run)
    again = [line for line in ledger(tmp_path) if line["attempt"] == 2]
    assert [line["step"] for line in again] == [5, 6]
    assert again[0] == lost[0] | {"attempt": 2}
