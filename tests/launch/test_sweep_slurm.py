"""`tessera sweep .. launch=slurm` without a cluster: what is submitted, said, and left behind."""

import json
import shlex
import stat
from pathlib import Path

import pytest

from launch.cli import main
from launch.exit_codes import BAD_CONFIG, FINISHED
from launch.handover import read_handover
from launch.queue import read_queue
from launch.sbatch import places_of
from tests.launch.test_sweep import TINY

SWEEP = ["sweep", *TINY, "launch=slurm", "launch.nodes=2", "seed=0,1,2"]


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster whose squeue prints the file `queue`, and whose sbatch counts its jobs up there.

    Each job that it takes has three tasks in the queue, which stay pending.
    """
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "sbatch": 'echo x >>"$0.jobs"; n=$(wc -l <"$0.jobs")\n'
        'for i in 0 1 2; do echo "${n}_$i PENDING $2" >>"${0%/*}/queue"; done; echo $n',
        "squeue": 'cat "${0%/*}/queue"',
    }
    for name, text in scripts.items():
        write_command(folder / name, text)
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def write_command(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_all_runs_are_one_array_and_each_knows_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SWEEP, "jobs=2"]) == FINISHED
    runs = tmp_path / "runs" / "demo-sweep"
    script = (runs / "jobs" / "001" / "job.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in script
    places = places_of(script)
    assert places == [runs / f"demo-seed_{seed}" / "jobs" / "001" for seed in range(3)]
    for seed, place in enumerate(places):
        plan = read_handover(place)
        assert (plan.folder, plan.nodes) == (str(place.parents[1]), 2)
        assert {f"seed={seed}", f"name=demo-seed_{seed}", "launch=slurm"} <= set(plan.words)
        assert f"\nseed: {seed}\n" in (place / "config.yaml").read_text()
    told = capsys.readouterr().out
    for text in ("submitted job 1: 3 run(s) of 2 node(s) x 1", "1_2  demo-seed_2", "scancel 1_0"):
        assert text in told


def test_the_same_command_submits_only_what_slurm_has_not(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SWEEP) == FINISHED
    script = tmp_path / "runs" / "demo-sweep" / "jobs" / "001" / "job.sh"
    (slurm / "queue").write_text(f"1_0 RUNNING {script}\n1_2 PENDING {script}\n")
    capsys.readouterr()
    assert main([*SWEEP, "dry_run=true"]) == FINISHED
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "running as 1_0  demo-seed_0", "to run          demo-seed_1", "pending as 1_2  demo-seed_2",
        "# 3 jobs checked, 1 to run; nothing was started",
    ]  # fmt: skip
    assert main(SWEEP) == FINISHED
    told = capsys.readouterr().out
    assert "submitted job 2: 1 run(s)" in told
    assert told.splitlines()[-2:] == ["running as 1_0  demo-seed_0", "pending as 1_2  demo-seed_2"]
    newer = script.parents[1] / "002" / "job.sh"
    assert [place.parts[-3] for place in places_of(newer.read_text())] == ["demo-seed_1"]
    assert "--array=0-0\n" in newer.read_text()


def test_queued_run_of_another_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SWEEP) == FINISHED
    assert main([*SWEEP, "max_steps=3"]) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "demo-seed_0 is pending as 1_0 with max_steps=2, and it is 3 now; scancel it" in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["launch.time=01:00:00,02:00:00"], ["launch.time varies", "with a sweep=NAME for each"]),
        (["launch=slurm,local"], ["varies, and all jobs of a sweep on Slurm"]),
        (["launch=torchrun"], ["set launch=local or launch=slurm"]),
        (["stop_on_failure=true"], ["stop_on_failure=true has no effect on Slurm"]),
        (["optim.lr=1,bad"], ["demo-seed_0-optim.lr_bad: "]),
        (["launch.gpus=0"], ["launch.gpus=0 is too few"]),
    ],
)
def test_what_cannot_be_an_array_is_refused_in_one_line_before_anything_is_submitted(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = [] if words[0].startswith("launch=") else ["launch=slurm"]
    assert main(["sweep", *TINY, "seed=0,1,2", *launch, *words]) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sbatch", "Slurm did not take the job: Invalid job array specification"),
        ("squeue", "squeue does not say what is queued (Invalid job array specification)"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_leaves_no_run(
    command: str, reason: str, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_command(slurm / command, "echo Invalid job array specification >&2; exit 1")
    assert main(SWEEP) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not list(tmp_path.glob("runs/*"))


def test_sweep_inside_of_an_allocation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert main(SWEEP) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "this is inside of job 5, and a sweep is a job of its own; unset SLURM_JOB_ID" in line
    assert not (tmp_path / "runs").exists()


def test_queue_is_read_by_scripts_and_strangers_are_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "a b" / "it's" / "jobs" / "001"
    place.mkdir(parents=True)
    (place / "job.sh").write_text(f"#!/bin/bash\njob={shlex.quote(str(place))}\n")
    (place / "launch.json").touch()
    text = f"7 RUNNING {place}/job.sh\n8 PENDING (null)\n9_1 RUNNING /home/me/train.sh\n"
    found = read_queue(text, tmp_path)
    assert {run: each.words for run, each in found.items()} == {place.parents[1]: "running as 7"}
    assert read_queue(text, tmp_path / "other") == {}
    for line in (f"10_4 PENDING {place}/job.sh", f"10_4 PENDING {tmp_path}/gone/job.sh"):
        with pytest.raises(
            ValueError, match=r"job 10_4 is pending, and .* is gone.*; scancel 10_4"
        ):
            read_queue(text + line, tmp_path)


def test_table_comes_where_there_is_something_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SWEEP) == FINISHED
    folder = tmp_path / "runs" / "demo-sweep"
    point = {"step": 1, "split": "train", "loss": 3.5, "tokens_per_second": 5.0}
    (folder / "demo-seed_1" / "metrics.jsonl").write_text(json.dumps(point) + "\n")
    capsys.readouterr()
    assert main(SWEEP) == FINISHED
    said = capsys.readouterr().out
    assert "submitted" not in said
    assert said.splitlines()[5].split() == ["1", "1", "3.5000", "3.5000", "-", "5", "-"]
    assert json.loads((folder / "sweep.json").read_text())["jobs"][0]["best"] == 3.5
