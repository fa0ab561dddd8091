"""The page of a run: says what happened, survives any folder, and lets nothing in."""

import json
import math
import random
import re
from array import array
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.report.axes import linear_ticks, log_ticks, short
from launch.report.charts import charts_of, marks_of
from launch.report.history import read_history
from launch.report.thin import thinned
from launch.report.words import outcome, summary
from launch.report.write import report_page, try_report, write_report
from tests.made_runs import add_start, append_steps, made_run, train_point
from tests.secrets import SECRETS, shown
from trainer.files import write_json
from trainer.notes import ANSWERS, SAMPLE, write_note
from trainer.points import Points, read_points

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


class Seen(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_a_page_says_in_words_what_a_run_did(tmp_path: Path) -> None:
    history = read_history(made_run(tmp_path / "made"))
    said = summary(history)
    assert said["Trained"].startswith("Llama; 606,912 parameters, 606,912 of them trained")
    assert "199 documents" in said["On"]
    assert said["How far"].startswith("step 40 of 40; 0.5 epochs; no checkpoint")
    assert "training loss 4.71451 at step 1 -> 2.05495 at step 40" in said["How well"]
    assert "evaluation: best loss 2.15495 at step 40, of 2; bits per byte" in said["How well"]
    assert "bits per byte 1.02747, against unigram 7" in said["How well"]
    assert said["How fast"].startswith("1,000 tokens/s (median of log points), 4,000 tokens in all")
    assert said["What went wrong"] == "nothing that the run knows of"
    assert outcome(history) == ("good", "finished")


def test_a_page_has_its_parts_and_every_curve_without_a_script(tmp_path: Path) -> None:
    assert main(["report", f"run={made_run(tmp_path / 'made')}"]) == 0
    page = (tmp_path / "made/report.html").read_text()
    drawn = page.partition('<script type="application/json"')[0]
    for part in ("In words", "Curves", "Evaluations", "Samples", "Data", "Config", "Environment"):
        assert f"<h2>{part}</h2>" in drawn
    for title in ("Loss", "Training loss by source", "Gradient norm", "Learning rate", "Memory"):
        assert f"<h3>{title}" in drawn
    pictures = re.findall(r'<svg viewBox="0 0 600 230".*?</svg>', drawn)
    assert len(pictures) == len(re.findall("<figure", drawn)) == 8
    assert all('class="line ' in each and "aria-label=" in each for each in pictures)
    assert "tessera train experiment=demo" not in text_of(drawn)  # it has finished
    assert "Set on the command line" in drawn


def test_starts_skips_rewinds_and_failed_saves_are_told_and_marked(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "made")
    (folder / "attempts/001/exit.00000.json").unlink()
    verdict = {"code": 70, "sentence": "rank 1 of 2 failed first in step 40: killed by SIGKILL"}
    write_json(folder / "attempts/001/verdict.json", verdict)
    add_start(folder, 2, exit={"code": 75, "reason": "stopped by SIGTERM", "time": 2.0})
    append_steps(folder, range(31, 46), attempt=2, skipped=(35,))
    write_json(folder / "rewinds.json", {"20": {"first": 1, "last": 2, "spikes": [33]}})
    with open(folder / "metrics.jsonl", "a") as file:
        failed = {"step": 38, "split": "checkpoint", "ckpt_failed": 1, "in_a_row": 1, "time": 1.0}
        file.write(json.dumps(failed) + "\n")
    history = read_history(folder)
    assert {(mark.kind, mark.step) for mark in marks_of(history)} == {
        ("restart", 31), ("skipped", 35), ("rewind", 33), ("failed", 38),
    }  # fmt: skip
    said = summary(history)["What went wrong"].split("\n")
    assert said[0].startswith("start 001 ended with exit code 70: rank 1 of 2 failed first")
    assert "step 35 was skipped (gradient not finite)" in said
    assert outcome(history) == ("open", "stopped by SIGTERM")
    page = text_of(report_page(history))
    assert "31 to 45" in page
    assert "tessera train experiment=demo optim.lr=0.003 goes on" in page.replace("  ", " ")


def test_torn_lines_and_numbers_that_are_none_cost_nothing_but_themselves(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "made")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "split": "train", "lo\n')
        file.write(json.dumps(train_point(42, "NaN")) + "\n")
        file.write('[1]\n{"step": "x", "split": "train"}\n{"step": 43}\n\n')
        file.write(json.dumps(train_point(44, 1.5)) + "\n" + '{"step": 45, "spl')
    points = read_points(folder)
    steps, losses = points.train.series("loss")
    assert (list(steps)[-2:], losses[-1]) == ([40, 44], 1.5)
    assert len(points.train.steps) == 42
    assert points.not_finite == [42]
    assert points.num_torn == 5
    assert "5 lines of metrics.jsonl cannot be read" in report_page(read_history(folder))


def test_points_that_lack_a_number_keep_the_columns_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.points.BLOCK", 64)  # a block for each line
    lines = [{"step": step, "split": "train", "loss": 1.0 * step} for step in range(1, 30)]
    for line in lines[10:20]:
        line["images"] = line["step"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = read_points(tmp_path).train
    assert list(train.series("loss")[0]) == list(range(1, 30))
    assert list(zip(*train.series("images"), strict=True)) == [(s, s) for s in range(11, 21)]


LINE = '{"step": 7, "split": "train", "loss": 1.5, "lr": 2e-05, "mfu": null, "time": 9.25}'


@pytest.mark.parametrize(
    "line",
    [
        LINE.replace("7", "8"),
        LINE.replace("1.5", "-0.25E+2").replace("9.25", "12"),
        LINE.replace("1.5", '"NaN"'),
        LINE.replace("1.5", "NaN"),
        LINE.replace("null", "0.5"),
        LINE.replace("null", "true"),
        LINE.replace("2e-05", "[1, 2]"),
        LINE.replace("2e-05", '{"a": 1}'),
        LINE.replace("lr", "loss"),
        LINE.replace("lr", "l r"),
        LINE.replace('"lr"', "lr"),
        LINE.replace("7", "-7"),
        LINE.replace("7", "7.0"),
        LINE.replace("7", str(1 << 80)),
        LINE.replace(", ", " ", 1),
        LINE.replace("}", ""),
        LINE.replace("{", ""),
        LINE[:40] + LINE,
        LINE.replace('"loss": 1.5, ', ""),
        LINE.replace("train", "eval"),
        LINE.replace('"time"', '"note": "split", "time"'),
    ],
)
@pytest.mark.parametrize("around", [0, 3])
def test_lines_that_are_read_at_once_give_what_each_gives_alone(
    line: str, around: int, tmp_path: Path
) -> None:
    lines = [LINE] * around + [line] + [LINE.replace("7", "9")] * around
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    points = read_points(tmp_path)
    slow = Points()
    for each in lines:
        try:
            slow.add([json.loads(each)])
        except ValueError:
            slow.num_torn += 1
    assert (points.num_torn, points.not_finite) == (slow.num_torn, slow.not_finite)
    for columns, expected in ((points.train, slow.train), (points.evals, slow.evals)):
        assert list(columns.steps) == list(expected.steps)
        assert sorted(columns.names) == sorted(expected.names)
        ends = [(name, columns.first(name), columns.last(name)) for name in columns.names]
        for name, first, last in ends:
            values = list(map(str, columns.column(name)))
            assert values == list(map(str, expected.column(name)))
            assert [str(first), str(last)] == [values[0], values[-1]]


def test_a_word_that_is_no_number_costs_nothing_but_itself(tmp_path: Path) -> None:
    lines = [
        LINE.replace("7", str(n)).replace("1.5", text)
        for n, text in enumerate(("1.5", "1.5.5", "2.5"))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert list(map(str, read_points(tmp_path).train.column("loss"))) == ["1.5", "nan", "2.5"]


PLAN: dict[str, Any] = {
    "bytes": {"weights": 300_000_000, "activations": 100_000_000, "buffers": 0},
    "peak_bytes": 400_000_000, "flops_per_token": 4e6, "tokens": 4000, "steps": 40,
    "tokens_per_second": 800.0, "device": "cpu", "by": "plan",
}  # fmt: skip


def test_a_plan_stands_beside_what_was_measured(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "made")
    assert "Predicted and measured" not in report_page(read_history(folder))
    write_note(folder, "plan", PLAN)
    about = json.loads((folder / "notes/about.json").read_text())
    write_json(folder / "notes/about.json", about | {"host_bytes_before": 2**28})
    page = text_of(report_page(read_history(folder)))
    for row in (
        "memory of a rank at its peak 381.5 MiB 256.0 MiB -32.9%",
        "steps 40 40 none",
        "tokens 4,000 4,000 none",
        "tokens/s 800 1,000 +25.0%",
        "work 4 MFLOPs per token 4 GFLOPs/s, all ranks",
        "Predicted memory: weights 286.1 MiB, activations 95.4 MiB.",
        "what the process of rank 0 grew by",
    ):
        assert row in page, row
    write_json(folder / "notes/about.json", about)
    (folder / "metrics.jsonl").write_text(
        (folder / "metrics.jsonl").read_text().replace('"mfu": null', '"mfu": 0.4')
    )
    page = text_of(report_page(read_history(folder)))
    assert "381.5 MiB 512.0 MiB +34.2%" in page
    assert "GFLOPs/s, all ranks, MFU 40.0%" in page
    assert "the most that the GPU's allocator gave" in page.replace("&#x27;", "'")


@pytest.mark.parametrize(
    ("text", "is_shown"),
    [
        ("{", False),
        ("[]", False),
        ('{"peak_bytes": "much", "steps": true, "tokens": null, "bytes": 3}', False),
        ('{"peak_bytes": -1, "tokens_per_second": 1e999, "steps": 40, "bytes": {"a": "b"}}', True),
    ],
)
def test_a_plan_that_is_damaged_is_said_or_left_out(
    text: str, is_shown: bool, tmp_path: Path
) -> None:
    folder = made_run(tmp_path / "made")
    (folder / "notes/plan.json").write_text(text)
    page = text_of(report_page(read_history(folder)))
    assert ("Predicted and measured" in page) == is_shown
    assert ("notes/plan.json cannot be read" in page) == (text in ("{", "[]"))
    assert ("steps 40 40 none" in page) == is_shown


@pytest.mark.parametrize("kept", ["metrics.jsonl", "config.yaml", "attempts"])
def test_a_folder_with_one_part_of_a_run_has_a_page(kept: str, tmp_path: Path) -> None:
    whole = made_run(tmp_path / "made")
    (tmp_path / "part").mkdir()
    (whole / kept).rename(tmp_path / "part" / kept)
    page = write_report(tmp_path / "part").read_text()
    assert "is missing" in page
    assert "</html>" in page


def test_damaged_files_are_said_and_left_out(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "made")
    for name in ("config.yaml", "environment.json", "rewinds.json", "notes/about.json",
                 "attempts/001/exit.00000.json", "ledger/rank00000.jsonl"):  # fmt: skip
        (folder / name).write_bytes(b"\xff\x00{[")
    (folder / "notes/sample.json").write_text('{"text": ["no text"], "step": {}}')
    (folder / "notes/answers.json").write_text('{"shown": [1, {"pictures": 3}]}')
    said = summary(read_history(folder))["What went wrong"]
    assert "config.yaml cannot be read" in said
    write_report(folder)


def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, what in (
        ([f"run={tmp_path}"], "holds neither metrics.jsonl nor config.yaml; give the folder"),
        ([], "run is missing; set run=DIR, see tessera report --help"),
        (["folder=x"], "unknown key folder; see tessera report --help"),
    ):
        assert main(["report", *words]) == 64
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert what in error


def test_a_run_that_has_ended_never_fails_for_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_run(tmp_path / "made")
    (folder / "report.html").mkdir()
    try_report(folder)
    try_report(tmp_path / "nowhere")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("tessera: no report was written (")
    assert "nowhere" in second


def test_hostile_texts_are_shown_and_never_run(tmp_path: Path) -> None:
    config = {HOSTILE: HOSTILE, "data": {"path": HOSTILE, "sources": {HOSTILE: {"weight": 1}}}}
    folder = made_run(tmp_path / "made", config=config)
    harmless = Seen(write_report(folder).read_text())
    point = train_point(41, 1.0) | {f"loss/{HOSTILE}": 1.0, HOSTILE: 2.0}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(point) + "\n")
    record = {"code": 70, "reason": HOSTILE, "time": 2.0}
    add_start(folder, 2, exit=record, command={"words": [HOSTILE, f"a={HOSTILE}"]})
    write_note(folder, SAMPLE, {"text": HOSTILE, "prompt": HOSTILE, "step": HOSTILE})
    card = {name: HOSTILE for name in ("source", "question", "reference", "answer")}
    card["pictures"] = [HOSTILE, "https://example.org/x.png", "data:image/svg+xml,<svg>"]
    write_note(folder, ANSWERS, {"title": HOSTILE, "shown": [card]})
    page = write_report(folder).read_text()
    seen = Seen(page)
    assert set(seen.tags) <= set(harmless.tags) | {"td", "mark"}
    assert seen.tags.count("script") == 2
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert not [value for name, value in seen.attributes if name in ("src", "srcset", "action")]
    assert all(str(v).startswith("#") for n, v in seen.attributes if n == "href")
    policy = dict(seen.attributes)["content"]
    assert "default-src 'none'" in page
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", page), policy
    assert "&lt;/script&gt;" in page


def test_no_secret_reaches_a_page(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "made")
    secrets = [shown(name) for name in SECRETS]
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"told": secrets}))
    write_json(folder / "environment.json", {"told": secrets})
    reason = " ".join(secrets)
    add_start(folder, 2, exit={"code": 70, "reason": reason, "time": 2.0})
    write_json(folder / "notes/sample.json", {"text": "x", "step": 1})
    page = write_report(folder).read_text()
    assert "[redacted]" in page
    for secret in SECRETS.values():
        assert secret not in page


def test_a_long_curve_is_thinned_to_means_and_keeps_its_extremes() -> None:
    generator = random.Random(0)
    steps = array("q", sorted(generator.sample(range(100_000), 5000)))
    values = array("d", [generator.gauss(0, 1) for _ in steps])
    values[1234], values[4321] = 99.0, -99.0
    curve = thinned(steps, values, most=100)
    assert (max(curve.highs), min(curve.lows)) == (99.0, -99.0)
    width = (steps[-1] - steps[0]) / 100
    pieces: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):  # the slow way
        pieces.setdefault(min(99, int((step - steps[0]) / width)), []).append(value)
    assert len(curve.means) == len(pieces)
    for mean, low, high, piece in zip(
        curve.means, curve.lows, curve.highs, pieces.values(), strict=True
    ):
        assert mean == pytest.approx(sum(piece) / len(piece))
        assert (low, high) == (min(piece), max(piece))


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "made", steps=20_000)
    charts = charts_of(read_history(folder))
    assert max(len(line.curve.steps) for chart in charts for line in chart.lines) == 1200
    assert write_report(folder).stat().st_size < 1_500_000


def test_ticks_are_round_and_lie_within() -> None:
    assert linear_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert linear_ticks(5, 5) == [5]
    for low, high in ((0.013, 0.9), (-3.0, 17.0), (1e-9, 2e-9), (1, 1e6)):
        ticks = linear_ticks(low, high)
        assert 2 <= len(ticks) <= 7
        assert all(low * 0.999 - 1e-12 <= tick <= high * 1.001 for tick in ticks)
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert [short(value) for value in (1500.0, 48_000.0, 1.2e6, 3e-5, 0.0)] == [
        "1500", "48k", "1.2M", "3e-05", "0",
    ]  # fmt: skip
    assert math.isclose(log_ticks(2.1, 2.9)[0], 2.2)
