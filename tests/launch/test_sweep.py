"""`tessera sweep`: commas as Hydra reads them, every job checked first, one table at the end."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cli import main
from launch.compose import combinations
from launch.exit_codes import BAD_CONFIG, CHECK_FAILED, FINISHED
from launch.local import LocalSpec
from launch.protocol import Job
from launch.sweep_plan import SweepJob, name_of, plan, quoted
from launch.sweep_runner import SweepRunner
from launch.sweep_table import results, table
from trainer.best import BestSpec

TINY = [
    "experiment=demo", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=1", "data.row_tokens=32", "callbacks.ngrams=null",
    "callbacks.closing.sample_tokens=0", "max_steps=2", "eval_every=2", "data.max_documents=10",
    "data.eval_fraction=0.2", "schedule.warmup_steps=1", "log_every=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


def test_commas_vary_and_lists_and_quotes_do_not() -> None:
    words = ["optim.lr=1e-3,3e-4", "seed=0,1", "optim.betas=[0.9,0.95]", 'name="a,b"']
    found = combinations(words, command="sweep")
    assert [each.varied for each in found] == [
        {"optim.lr": "0.001", "seed": "0"}, {"optim.lr": "0.001", "seed": "1"},
        {"optim.lr": "0.0003", "seed": "0"}, {"optim.lr": "0.0003", "seed": "1"},
    ]  # fmt: skip
    assert all({"optim.betas=[0.9,0.95]", 'name="a,b"'} <= set(each.words) for each in found)


def test_ranges_choices_and_globs_vary_too() -> None:
    found = combinations(["seed=range(1,4)", "schedule=glob(*)"], command="sweep")
    assert [tuple(each.varied.values()) for each in found] == [
        (seed, schedule) for seed in "123" for schedule in ("constant", "cosine", "wsd")
    ]


def test_names_are_fit_for_folders_the_same_each_time_and_never_equal() -> None:
    assert name_of("demo", {"optim.lr": "0.001", "seed": "0"}) == "demo-optim.lr_0.001-seed_0"
    odd = [name_of("demo", {"data.path": path}) for path in ("a/b", "a b", "x" * 200, "x" * 201)]
    assert len(set(odd)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name) for name in odd)
    assert odd[0] == name_of("demo", {"data.path": "a/b"})


@pytest.mark.parametrize("text", ["runs", "a b", 'with "quotes"', "back\\slash", "a,b", "[x]"])
def test_a_quoted_text_is_read_back_as_it_was(text: str) -> None:
    from launch.compose import parsed

    assert parsed(f"runs={quoted(text)}") == ("runs", text)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optim.lr=1,bad"], ["demo-optim.lr_bad: ", "needed a number"]),
        (["optim.lr=1", "data.micro_rows=1,3"], ["micro_rows=3 does not divide"]),
        (["sed=0,1"], ["unknown key sed; did you mean seed?"]),
        (["sweep=a/b"], ["sweep='a/b' is no folder name"]),
        (["jobs=0"], ["jobs=0 is no number of jobs"]),
        (["stop_on_failure=yes"], ["stop_on_failure=yes is neither true nor false"]),
        (["optim.lr=interval(0,1)"], ["optim.lr=interval(0,1): ", "does not support sweep type"]),
        (["resume=never"], ["set resume=auto"]),
    ],
)
def test_a_sweep_with_one_wrong_job_is_refused_in_one_line_before_any_starts(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *TINY, *words]) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_lists_the_jobs_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *TINY, "seed=0,1", "dry_run=true"]) == FINISHED
    assert capsys.readouterr().out.splitlines() == [
        "to run    demo-seed_0", "to run    demo-seed_1",
        "# 2 jobs checked, 2 to run; nothing was started",
    ]  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_jobs_are_a_group_on_a_wandb_server_unless_they_have_one(tmp_path: Path) -> None:
    def words(*more: str) -> list[str]:
        (job,) = plan([*TINY, *more], "demo", tmp_path / "s")
        return [word for word in job.job.words if "wandb.group" in word]

    assert words() == []
    assert words("tracker=wandb") == ['tracker.wandb.group="s"']
    assert words("tracker=wandb", "tracker.wandb.group=mine") == ["tracker.wandb.group=mine"]


def job_with(folder: Path, name: str, best: BestSpec, *numbers: float | str) -> SweepJob:
    """Return a job that has evaluated these numbers, one at each step."""
    (folder / name).mkdir()
    points = [
        {"step": step, "split": split, "loss": value, "accuracy": value, "tokens_per_second": 5.0}
        for step, value in enumerate(numbers, 1)
        for split in ("train", "eval")
    ]
    text = "".join(json.dumps(point) + "\n" for point in points)
    (folder / name / "metrics.jsonl").write_text(text)
    return SweepJob(name=name, varied={"seed": name}, is_finished=False, launch=LocalSpec(),
               job=Job(run=None, tree={}, folder=folder / name, end=None), best=best)  # fmt: skip


@pytest.mark.parametrize(
    ("best", "order"),
    [(BestSpec(), ["b", "a", "c", "d"]), (BestSpec(metric="accuracy"), ["a", "b", "c", "d"])],
)
def test_the_table_begins_with_the_best_and_ends_with_those_that_have_nothing(
    best: BestSpec, order: list[str], tmp_path: Path
) -> None:
    jobs = [
        job_with(tmp_path, "c", best, "NaN"), job_with(tmp_path, "a", best, 3.0, 4.0),
        job_with(tmp_path, "d", best), job_with(tmp_path, "b", best, 2.0, 3.5),
    ]  # fmt: skip
    rows = results(jobs, {"a": 0, "b": 70})
    assert [row["name"] for row in rows] == order
    of = {row["name"]: row for row in rows}
    assert (of["b"]["exit_code"], of["d"]["exit_code"]) == (70, None)
    assert (of["a"]["best"], of["a"]["best_step"]) == (
        (3.0, 1) if best.metric is None else (4.0, 2)
    )
    lines = table(rows)
    assert len(lines) == 5
    assert len({line.index(row["name"]) for line, row in zip(lines[1:], rows, strict=True)}) == 1


def test_jobs_at_a_time_share_out_the_cores_that_the_sweep_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = replace(job_with(tmp_path, "a", BestSpec()), launch=LocalSpec(processes=2))
    assert SweepRunner(3, tmp_path, [])._environment(job, 0)["OMP_NUM_THREADS"] == "2"


def sweep(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launch", "sweep", *TINY, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.slow
def test_the_same_command_skips_what_has_finished_and_a_failed_job_ends_nothing(
    tmp_path: Path,
) -> None:
    """The second job's folder cannot be made: a file is in its place."""
    runs = tmp_path / "runs" / "demo-sweep"
    (runs / "demo-seed_1").mkdir(parents=True)
    (runs / "demo-seed_1" / "attempts").touch()  # where the starts should be
    first = sweep("seed=1,0")
    assert first.returncode == CHECK_FAILED, first.stderr
    rows = {row["name"]: row for row in json.loads((runs / "sweep.json").read_text())["jobs"]}
    assert rows["demo-seed_0"]["exit_code"] == FINISHED
    assert rows["demo-seed_0"]["steps"] == 2
    assert rows["demo-seed_1"]["exit_code"] not in (FINISHED, None)
    (runs / "demo-seed_1" / "attempts").unlink()
    second = sweep("seed=1,0", "jobs=2")
    assert second.returncode == FINISHED, second.stderr
    assert "1 of 2 jobs have finished before" in second.stderr
    assert len(list((runs / "demo-seed_0" / "attempts").iterdir())) == 1
    assert (runs / "logs" / "demo-seed_1.txt").read_text().count("step 2/2 | loss") == 1
    table = [line.split() for line in second.stdout.splitlines() if line]
    assert sorted(line[0] for line in table[1:3]) == ["0", "1"]
    changed = sweep("seed=1,0", "optim.weight_decay=0.3")
    assert changed.returncode == BAD_CONFIG
    assert "has finished with optim.weight_decay" in changed.stderr
