"""Curves elsewhere: each point once, whatever happens to the tracker, and nothing to the run."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.binding import bind
from launch.cli import main
from launch.compose import compose
from launch.exit_codes import BAD_CONFIG
from tests.tracked_runs import run_folder, steps_of, sync, write_points
from tests.wandb_server import WandbServer, wandb_server
from trainer.points import METRICS
from trainer.trackers.delivery import Delivery, read_settings, write_settings
from trainer.trackers.protocol import Row
from trainer.trackers.spool import Spool
from trainer.trackers.tensorboard import TensorBoardTracker
from trainer.trackers.wandb import WandbTracker


def rows(spool: Spool, *, is_complete: bool = False) -> dict[int, dict[str, float]]:
    return {row.step: row.values for row in spool.rows(is_complete=is_complete)}


def test_the_numbers_of_a_step_are_one_row_once_a_later_step_has_begun(tmp_path: Path) -> None:
    spool = Spool(tmp_path / METRICS)
    assert rows(spool) == {}
    write_points(tmp_path, 1, 2)
    assert rows(spool) == {1: {"train/loss": 1.0}}
    assert rows(spool) == {}
    with open(tmp_path / METRICS, "a") as file:
        file.write(json.dumps({"step": 3, "split": "train", "time": 1.5, "loss": "NaN"}))
        file.flush()
        assert rows(spool) == {}  # the line has no end yet
        file.write("\n")
    assert rows(spool) == {2: {"train/loss": 0.5, "eval/loss": 1.0}}
    (last,) = spool.rows(is_complete=True)
    assert last.step == 3
    assert last.time == 1.5
    assert math.isnan(last.values["train/loss"])
    spool.close()


def test_a_run_that_went_back_is_read_from_its_start(tmp_path: Path) -> None:
    write_points(tmp_path, 1, 2, 3)
    spool = Spool(tmp_path / METRICS)
    assert list(rows(spool)) == [1, 2]
    assert not spool.is_replaced()
    write_points(tmp_path, 2, 3, 4, resumed_step=1)
    assert spool.is_replaced()
    assert list(rows(spool, is_complete=True)) == [1, 2, 3, 4]
    spool.close()


def test_torn_lines_and_texts_are_no_points(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "split": "train", "time": 1, "loss": 2, "note": "x"})
    (tmp_path / METRICS).write_text(f'{{"step": 1, "spl\n{whole}\n[]\n{{"step": "x"}}\n')
    spool = Spool(tmp_path / METRICS)
    assert rows(spool, is_complete=True) == {1: {"train/loss": 2}}
    spool.close()


class Lists:
    """A tracker in memory: `missing` says from which step on it lacks the curves."""

    def __init__(self, missing: int = 0) -> None:
        self.next_step, self.steps, self.num_opened = missing, [], 0  # type: ignore[var-annotated]

    def open(self, _: Path) -> "Lists":
        self.num_opened += 1
        return self

    def push(self, row: Row) -> None:
        self.steps.append(row.step)

    def close(self) -> None:
        self.steps.append(-1)


def test_what_a_tracker_has_is_not_sent_again(tmp_path: Path) -> None:
    write_points(tmp_path, 1, 2, 3, 4)
    tracker: Any = Lists(missing=3)
    Delivery(tracker, tmp_path).run(lambda: True, lambda: True)
    assert tracker.steps == [3, 4, -1]


def test_the_last_step_of_a_run_that_broke_off_waits_for_the_rest_of_its_numbers(
    tmp_path: Path,
) -> None:
    write_points(tmp_path, 1, 2)
    tracker: Any = Lists()
    Delivery(tracker, tmp_path).run(lambda: True, lambda: False)
    assert tracker.steps == [1, -1]


def test_a_run_that_goes_back_while_it_is_followed_opens_the_tracker_anew(tmp_path: Path) -> None:
    write_points(tmp_path, 1, 2, 3)
    tracker: Any = Lists()
    turns = iter([False, True])

    def is_over() -> bool:
        over = next(turns)
        if over:
            write_points(tmp_path, 2, resumed_step=1)
        return over

    Delivery(tracker, tmp_path).run(is_over, lambda: True)
    assert tracker.num_opened == 2
    assert tracker.steps == [1, 2, -1, 1, 2, -1]


@dataclass(frozen=True, kw_only=True)
class Synced:
    """A run that was sent, killed, continued and sent again."""

    run: Path
    server: WandbServer
    said: list[str]


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synced]:
    tracker = WandbTracker(project="p", name="n", group="g", tags=("a", "b"))
    run = run_folder(tmp_path_factory.mktemp("synced"), 1, 2, 3, tracker=tracker)
    with wandb_server() as server:
        environment = server.environment | {"CANARY": "canary-bird"}
        first = sync(run, environment)
        write_points(run, 3, 4, 5, resumed_step=2, factor=6.0)  # step 3 runs twice
        again = sync(run, environment)
        for done in (first, again):
            assert done.returncode == 0, done.stderr
        yield Synced(run=run, server=server, said=[first.stdout, again.stdout])


def test_sync_sends_each_point_once_to_a_wandb_server(synced: Synced) -> None:
    assert steps_of(synced.server) == [[1, 2, 3, 4, 5]]
    assert ["sent 3 steps" in synced.said[0], "sent 2 steps" in synced.said[1]] == [True, True]


def test_a_wandb_server_is_told_name_group_and_tags(synced: Synced) -> None:
    sent = next(text for text in synced.server.received if "mutation UpsertBucket" in text)
    told = json.loads(sent)["variables"]
    assert (told["displayName"], told["groupName"], told["tags"]) == ("n", "g", ["a", "b"])


def test_wandbs_own_command_reads_the_files_that_were_left(synced: Synced, tmp_path: Path) -> None:
    """Sent from these files alone, another server has the same points."""
    files = sorted(map(str, (synced.run / "tracker").rglob("*.wandb")))
    assert len(files) == len(synced.said)
    command = [str(Path(sys.executable).parent / "wandb"), "beta", "sync"]
    with wandb_server() as other:
        for file in files:
            subprocess.run(
                [*command, "--no-skip-online", "--yes", file],
                env=os.environ | other.environment, cwd=tmp_path, check=True, capture_output=True,
            )  # fmt: skip
        assert other.histories == synced.server.histories


def test_the_numbers_of_training_and_evaluation_stand_in_one_row(synced: Synced) -> None:
    (points,) = synced.server.histories.values()
    assert points[1] | {"train/loss": 0.5, "eval/loss": 1.0} == points[1]
    assert "mfu" not in str(points)


def test_wandb_keeps_the_first_numbers_of_a_step_that_ran_twice(synced: Synced) -> None:
    """A server takes no step twice: docs/reliability.md says so, and which file has the second."""
    (points,) = synced.server.histories.values()
    assert [point["train/loss"] for point in points[2:4]] == [1 / 3, 6 / 4]
    assert '"step": 3, "split": "train", "loss": 2.0' in (synced.run / METRICS).read_text()


def test_wandb_is_sent_the_redacted_config_and_nothing_of_the_machine(synced: Synced) -> None:
    sent = "\n".join(synced.server.received)
    assert '\\"seed\\":{\\"value\\":3}' in sent
    for private in ("abcd", "canary-bird", "requirements", "wandb-metadata", os.uname().nodename):
        assert private not in sent


def test_wandb_writes_neither_its_key_nor_a_secret_of_the_config(synced: Synced) -> None:
    key = synced.server.environment["WANDB_API_KEY"].encode()
    written = [path for path in (synced.run / "tracker").rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not [path for path in written if key in path.read_bytes()]
    assert not [path for path in written if b"abcd" in path.read_bytes()]


def test_without_tensorboard_the_run_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.trackers.tensorboard.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'tessera-train\[tensorboard\]'"):
        TensorBoardTracker().check()


def test_several_trackers_are_chosen_at_once() -> None:
    words = ["experiment=demo", "tracker=[wandb,tensorboard]", "tracker.wandb.tags=[a]"]
    tree = compose(words).tree
    found = {name: bind(values) for name, values in tree["tracker"].items()}
    assert found == {"wandb": WandbTracker(tags=("a",)), "tensorboard": TensorBoardTracker()}


def test_settings_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    trackers = {"a": WandbTracker(tags=("x", "y"), mode="offline"), "b": TensorBoardTracker()}
    write_settings(tmp_path, trackers)
    assert read_settings(tmp_path) == trackers


@pytest.mark.parametrize("text", ['{"a": {"kind": "other"}}', '{"a": 1}', "[]", "{"])
def test_a_broken_settings_file_is_refused_in_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_settings(tmp_path, {})
    (tmp_path / "tracker" / "settings.json").write_text(text)
    assert main(["sync", f"run={tmp_path}"]) == BAD_CONFIG
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_tensorboard_shows_each_point_once_after_any_number_of_starts(tmp_path: Path) -> None:
    if find_spec("tensorboard") is None:
        assert "CI" not in os.environ
        pytest.skip("tensorboard is not installed; it is part of tessera-train[test]")
    from tensorboard.backend.event_processing import event_file_loader as loader
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_folder(tmp_path, 1, 2, 3, tracker=TensorBoardTracker())
    assert main(["sync", f"run={run}"]) == 0
    write_points(run, 3, 4, resumed_step=2, factor=6.0)  # step 3 runs twice
    assert main(["sync", f"run={run}"]) == 0
    (file,) = (run / "tracker" / "tensorboard").iterdir()
    found = [
        (event.step, value.tag, value.tensor.float_val[0])
        for event in loader.EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    train = [(step, "train/loss", loss) for step, loss in ((1, 1.0), (2, 0.5), (3, 2.0), (4, 1.5))]
    assert sorted(found) == sorted([*train, (2, "eval/loss", 1.0), (4, "eval/loss", 3.0)])
    curves = EventAccumulator(str(run / "tracker" / "tensorboard"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("train/loss")] == [1, 2, 3, 4]
