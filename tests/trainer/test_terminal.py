"""What a person sees of a run: on a terminal lines that fit, a live line and a card; else lines."""

import io
import logging
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole
from torch import _dynamo  # noqa: F401  once for all children, which would each take seconds for it

from launch.binding import bind_run
from launch.compose import compose
from launch.terminal import configure_logging
from tests.runs import start_in, tiny_run, train
from tests.terminals import Seen, seen
from trainer.best import BestSpec
from trainer.callbacks.card import card, next_commands
from trainer.callbacks.closing import Closing
from trainer.callbacks.console import Console
from trainer.callbacks.protocol import Callback
from trainer.callbacks.status import Pace
from trainer.construct import fit
from trainer.distributed import Placement
from trainer.points import Points
from trainer.progress import Progress
from trainer.screen import clean, columns_of, labelled, rows_of, width

COLUMNS = 80
COLOUR = re.compile(rb"\x1b\[[0-9;]*(3|4|9|10)[0-9][;m]")


class Breaks(Callback):
    """Fails at a log point: its own spec and callback."""

    def build(self) -> "Breaks":
        return self

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step == 2:
            raise RuntimeError("broken by the test")


def watched(folder: Path, cache: Path, environment: dict[str, str], **callbacks: Any) -> Seen:
    """Train on a terminal of its own."""
    callbacks = {"console": Console(), "closing": Closing(), **callbacks}

    def work() -> None:
        configure_logging(rank=0)
        run = tiny_run(cache, callbacks=callbacks, max_steps=4, eval_every=2, save_every=2)
        train(Placement(), folder, run)

    return seen(work, COLUMNS, environment)


def test_a_terminal_shows_a_live_line_then_a_card_and_is_left_clean(
    tmp_path: Path, cache: Path
) -> None:
    screen, written, code = watched(tmp_path / "tiny", cache, {"TERM": "xterm"})
    assert code == 0
    lines = screen.text.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    found = [line.split(" |")[0] for line in steps[:4]]
    assert found == [f"step {n}/4" for n in range(1, 5)], written
    assert len({line.index("tok/s") for line in steps[:4]}) == 1
    assert all(len(line) <= COLUMNS for line in lines)
    assert "GiB" not in screen.text  # no room for it
    live = [part for part in written.decode().split("\r") if "ETA" in part]
    assert " 0/4 " in live[0]  # at once, not by its thread
    assert "ETA" not in screen.text  # the live line has gone
    assert screen.has_cursor
    assert "run     tiny finished: 4 of 4 steps, " in screen.text
    assert "next:\n  tessera generate checkpoint=" in screen.text
    assert COLOUR.search(written)


@pytest.mark.parametrize("is_again", [False, True])
def test_what_is_trained_is_told_once_and_a_restart_says_where_it_goes_on(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, is_again: bool
) -> None:
    callbacks = {"console": Console()}
    run = tiny_run(cache, callbacks=callbacks, max_steps=2, save_every=2, log_every=9)
    train(Placement(), tmp_path, run)
    caplog.clear()
    start = replace(start_in(tmp_path, Placement()), is_again=is_again)
    with caplog.at_level(logging.INFO, "trainer"):
        fit(replace(run, max_steps=3), start)
    told = [record.getMessage() for record in caplog.records]
    assert "start   2 goes on after step 2" in told
    assert (told[0] == "start   2 goes on after step 2") is is_again
    assert any(line.startswith("model ") for line in told) is not is_again


def test_a_failure_leaves_no_live_line_and_a_cursor(tmp_path: Path, cache: Path) -> None:
    screen, written, code = watched(tmp_path, cache, {"TERM": "xterm"}, breaks=Breaks())
    assert code == 1
    assert "broken by the test" in screen.text
    assert b"ETA" in written
    assert "ETA" not in screen.text
    assert screen.has_cursor


def test_a_dumb_terminal_gets_no_codes(tmp_path: Path, cache: Path) -> None:
    screen, written, code = watched(tmp_path, cache, {"TERM": "dumb"})
    assert code == 0
    assert b"\x1b" not in written
    assert "ETA 0:00:00" in screen.text


def test_no_color_leaves_the_live_line_without_colours(tmp_path: Path, cache: Path) -> None:
    environment = {"TERM": "xterm", "NO_COLOR": "1"}
    written = watched(tmp_path, cache, environment).written
    assert b"ETA" in written
    assert not COLOUR.search(written)


def test_what_is_no_terminal_gets_whole_lines_and_no_codes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("rich._console", RichConsole(file=out, width=40))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure_logging(rank=0)
    callbacks = {"console": Console(), "closing": Closing()}
    train(Placement(), tmp_path / "tiny", tiny_run(cache, callbacks=callbacks, max_steps=2))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    (last,) = [line for line in text.splitlines() if line.startswith("step 2/2 | loss")]
    cells = ("grad norm", "lr", "tok/s", "GiB", "epochs", "ETA 0:00:00")
    assert [cell for cell in cells if cell in last] == list(cells)


CELLS = ["step 1/9", "loss 1.0", "a" * 20, "b" * 20]


def test_cells_that_do_not_fit_are_left_out_from_the_end_but_notes_stay() -> None:
    def work() -> None:
        print(width(), columns_of(CELLS, "note"), sep="\n")
        print(rows_of("eval", CELLS[1:]), labelled("data", "word " * 12), sep="\n")

    assert columns_of(CELLS, "note") == f"step 1/9 | loss 1.0 | {'a' * 20} | {'b' * 20} | note"
    assert seen(work, 40, {"TERM": "xterm"}).screen.text.splitlines() == [
        "40",
        "step 1/9 | loss 1.0 | note",
        f"eval | loss 1.0 | {'a' * 20}",
        f"     | {'b' * 20}",
        "data    " + " ".join(["word"] * 6),
        "        " + " ".join(["word"] * 6),
    ]


def test_the_time_left_is_that_of_the_steps_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("trainer.callbacks.status.time.monotonic", lambda: now)
    pace = Pace(step=0, max_steps=110, time=0.0)
    assert pace.left(0) == "-:--:--"
    now = 60.0  # the first step compiles
    pace.note(1)
    now = 80.0
    pace.note(11)
    assert pace.left(11) == "0:03:18"  # 99 steps of 2 s
    now = 81.0
    assert pace.left(11) == "0:03:17"
    now = 200.0  # an evaluation
    assert pace.left(11) == "0:03:16"
    pace.rewind(1)
    assert pace.left(1) == "0:03:38"


def test_another_process_cleans_the_line_without_codes() -> None:
    def work() -> None:
        os.write(1, b"a live line")
        clean(1)
        os.write(1, b"said")

    screen, written, _ = seen(work, 20, {"TERM": "dumb"})
    assert screen.text == "said"
    assert b"\x1b" not in written


POINTS = [
    {"step": 1, "split": "train", "loss": 4.0, "tokens": 100, "tokens_per_second": 10.0},
    {"step": 5, "split": "eval", "loss": 3.0, "accuracy": 0.25, "num_targets": 7},
    {"step": 10, "split": "train", "loss": "NaN", "tokens": 1000, "tokens_per_second": 1000.0},
    {"step": 10, "split": "eval", "loss": "NaN", "accuracy": 0.5, "num_targets": 7},
]


@pytest.mark.parametrize(
    ("data", "words"),
    [("chat", 'chat="..."'), ("vision_text", 'image=FILE prompt="..."'), ("text", 'prompt="..."')],
)
def test_the_next_command_asks_as_the_data_does(data: str, words: str) -> None:
    asks = bind_run(compose([f"data={data}", "data.path=none", "name=x"]).tree).asks
    assert asks == words
    [generate, *_] = next_commands(Path("runs/a"), asks)
    assert generate == f"tessera generate checkpoint=runs/a {words}"
    assert not any("generate" in command for command in next_commands(Path("runs/a"), ""))


def test_the_card_tells_first_and_last_loss_the_median_speed_and_the_best_evaluation() -> None:
    def lines(best: BestSpec, **changes: Any) -> dict[str, str]:
        given: dict[str, Any] = {
            "name": "tiny", "step": 10, "max_steps": 10, "seconds": 61.0, "first_step": 0,
            "finished": True,
        }  # fmt: skip
        points = Points()
        points.add(POINTS)
        return card(points, best, **given | changes)

    assert lines(BestSpec()) == {
        "run": "tiny finished: 10 of 10 steps, 0:01:01",
        "loss": "4 at step 1 -> not finite at step 10",
        "speed": "505 tokens/s (median of log points), 1,000 tokens in all",
        "eval": "best loss 3 at step 5, last not finite, of 2; accuracy 0.25",
    }
    assert lines(BestSpec(metric="accuracy"))["eval"] == ("best accuracy 0.5 at step 10, of 2")
    stopped = lines(BestSpec(), finished=False, step=7, first_step=3)["run"]
    assert stopped == "tiny stopped and saved: 7 of 10 steps, 0:01:01 since step 3"
