"""`launch=slurm` without a cluster: the script, what is refused, and what is left behind."""

import json
import os
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import BAD_CONFIG, FINISHED, NO_PROGRESS, PREEMPTED
from launch.handover import note_outcome, read_handover
from launch.protocol import RESTARTS
from launch.sbatch import Batch, places_of, render
from launch.slurm import SlurmSpec
from launch.train import main

PLACE = Path("/runs/demo/jobs/001")
TINY = [
    "experiment=demo", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=1", "data.row_tokens=32", "launch=slurm", "launch.nodes=2",
]  # fmt: skip
SBATCH = """#!/bin/bash
{ printf '%s\\n' "$@"; cat "${@: -1}"; } >"$ASKED"
"""


@pytest.fixture(autouse=True)
def _no_slurm_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def script(place: Path = PLACE, name: str = "demo", **settings: Any) -> str:
    """Return a rendered script, after bash has read it."""
    text = render(SlurmSpec(**settings), Batch(name=name, folder=place, places=[place]))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return text


def asked(text: str) -> dict[str, str]:
    """Return the options of the #SBATCH lines, as a shell reads them."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines]
    assert all(len(each) == 1 for each in words), words
    return {each.partition("=")[0]: each.partition("=")[2] for (each,) in words}


def command(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def test_script_asks_for_what_the_settings_say_and_for_nothing_else() -> None:
    text = script(
        nodes=4, gpus=8, cpus=64, memory="500G", time="1-12:00:00", partition="a,b",
        account="lab:x", qos="high", constraint="[h100|h200]", exclusive=True, signal_seconds=300,
        options=["--mail-type=END", "--comment=it's mine; rm -rf /"],
    )  # fmt: skip
    assert asked(text) == {
        "--job-name": "demo", "--nodes": "4", "--ntasks-per-node": "1", "--gpus-per-node": "8",
        "--cpus-per-task": "64", "--mem": "500G", "--time": "1-12:00:00", "--partition": "a,b",
        "--account": "lab:x", "--qos": "high", "--constraint": "[h100|h200]", "--exclusive": "",
        "--chdir": os.getcwd(), "--output": "/runs/demo/jobs/001/%j.log", "--open-mode": "append",
        "--signal": "B:USR1@300", "--requeue": "", "--mail-type": "END",
        "--comment": "it's mine; rm -rf /",
    }  # fmt: skip
    assert "--cpus-per-task=64" in command(text)
    assert set(asked(script())) == {
        "--job-name", "--nodes", "--ntasks-per-node", "--chdir", "--output", "--open-mode",
        "--signal", "--requeue",
    }  # fmt: skip
    assert "scontrol requeue" not in script(requeue=False)


def test_one_launcher_per_node_starts_a_process_for_each_gpu() -> None:
    spec = SlurmSpec(nodes=4, gpus=8)
    assert (spec.node_processes, spec.world_size) == (8, 32)
    assert (SlurmSpec(nodes=2).world_size, SlurmSpec(processes=3).world_size) == (2, 3)
    words = command(script(nodes=4, gpus=8))
    assert words[:4] == ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1"]
    assert words[-4:] == ["-m", "launch.node", "$job", "&"]


def test_shell_that_submits_lends_the_job_neither_node_number_nor_port(tmp_path: Path) -> None:
    for name, line in {"srun": 'env >"$SEEN"', "scontrol": "echo n1"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script(tmp_path, setup="export MASTER_PORT=7"))
    around = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SEEN": str(tmp_path / "seen")}
    around |= {"NODE_RANK": "0", "MASTER_PORT": "5", "SLURM_JOB_NODELIST": "n1"}
    subprocess.run(["bash", str(tmp_path / "job.sh")], env=around, check=True)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert "NODE_RANK" not in seen
    assert (seen["MASTER_PORT"], seen["MASTER_ADDR"]) == ("7", "n1")


@pytest.mark.parametrize("folder", ["/a b/it's", "/$HOME/`id`", '/"; touch x #'])
def test_folder_of_any_name_stays_one_word(folder: str) -> None:
    place = Path(folder) / "jobs" / "001"
    text = script(place)
    assert asked(text)["--output"] == f"{place}/%j.log"
    (line,) = [line for line in text.splitlines() if line.startswith("job=")]
    shown = subprocess.run(
        ["bash", "-c", f'{line}; printf %s "$job"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout == str(place)
    assert places_of(text) == [place]


def test_several_runs_are_an_array_with_a_folder_for_each() -> None:
    places = [Path(f"/runs/{name}/jobs/001") for name in ("lr 1", "lr 2", "lr 3")]
    batch = Batch(name="s", folder=Path("/runs/jobs/001"), places=places, is_array=True, at_once=2)
    text = render(SlurmSpec(), batch)
    assert asked(text)["--array"] == "0-2%2"
    assert asked(text)["--output"] == "/runs/jobs/001/%A_%a.log"
    assert asked(render(SlurmSpec(), replace(batch, at_once=None)))["--array"] == "0-2"
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in text
    assert places_of(text) == places
    lines = text[text.index("jobs=(") : text.index("export ")].splitlines()
    for number, place in enumerate(places):
        shown = subprocess.run(
            ["bash", "-c", "\n".join([*lines, 'printf %s "$job"'])],
            env={"SLURM_ARRAY_TASK_ID": str(number)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert shown.stdout == str(place)


def test_container_sees_the_run_the_working_folder_and_the_mounts() -> None:
    text = script(nodes=2, gpus=1, container="ghcr.io#me/x:1", mounts=["/data:/data"])
    assert "--container-image=ghcr.io#me/x:1" in command(text)
    assert "--container-mounts=${job%/*/*}:${job%/*/*},$PWD:$PWD,/data:/data" in command(text)
    assert "PYTHONPATH=" not in text  # the image has its own
    words = command(script(gpus=1, container="x.sif", container_runtime="apptainer"))
    start = words.index("apptainer")
    assert words[start : start + 4] == [
        "apptainer", "exec", "--nv", "--bind",
    ]  # fmt: skip
    assert words[start + 5 :] == [
        "--pwd",
        "$PWD",
        "x.sif",
        "python",
        "-m",
        "launch.node",
        "$job",
        "&",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0}, "launch.nodes=0 is too few"),
        ({"gpus": 0}, "launch.gpus=0 is too few"),
        ({"gpus": 2, "processes": 4}, "launch.processes=4 is more than launch.gpus=2 on a node"),
        ({"time": "30"}, "launch.time='30' is no time; set it to hours:minutes:seconds"),
        ({"time": 3600}, "launch.time=3600 is no time"),
        ({"time": "1:99:00"}, "launch.time='1:99:00' is no time"),
        ({"time": "00:02:00"}, "launch.time='00:02:00' leaves nothing before the signal"),
        ({"account": "a\n#SBATCH --uid=0"}, "has characters that no account of Slurm has"),
        ({"partition": "a b"}, "has characters that no partition of Slurm has"),
        ({"options": ["-p x"]}, "launch.options has '-p x', which is no long option"),
        ({"options": ["--x=a\nrm"]}, "which is no long option of sbatch"),
        ({"mounts": ["/a:/a"]}, "launch.mounts has no effect without a container"),
        ({"container": "a\nb"}, "is no path or address"),
        ({"restarts": -1}, "launch.restarts=-1 is negative"),
    ],
)
def test_setting_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="launch") as refused:
        SlurmSpec(**settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["/a%j/jobs/001", "/a\\b/jobs/001", "/a\nb/jobs/001"])
def test_path_that_slurm_would_not_take_literally_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="set runs= to another folder"):
        script(Path(path))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster that takes every job as number 17; the file says what it was asked."""
    file, found = tmp_path / "bin" / "sbatch", tmp_path / "asked"
    file.parent.mkdir()
    file.write_text(SBATCH + "echo '17;cluster'\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")
    monkeypatch.setenv("ASKED", str(found))
    return found


def test_submission_hands_the_config_over_and_says_what_comes_next(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, f"runs={tmp_path}/runs"]) == FINISHED
    place = tmp_path / "runs" / "demo" / "jobs" / "001"
    option, path, *lines = sbatch.read_text().splitlines()
    assert (option, path) == ("--parsable", str(place / "job.sh"))
    assert "\n".join(lines) + "\n" == (place / "job.sh").read_text()
    plan = read_handover(place)
    assert (plan.folder, plan.nodes, plan.processes, plan.restarts) == (
        str(tmp_path / "runs" / "demo"), 2, 1, 3,
    )  # fmt: skip
    assert stat.S_IMODE((place / "launch.json").stat().st_mode) == 0o600
    told = capsys.readouterr().out
    for text in ("submitted job 17: 2 node(s) x 1", f"tail -F {place}/17.log", "scancel 17"):
        assert text in told
    assert not (tmp_path / "runs" / "demo" / "attempts").exists()


def test_dry_run_shows_the_script_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, f"runs={tmp_path}/runs", "dry_run=true"]) == FINISHED
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_what_slurm_refuses_leaves_nothing_behind(tmp_path: Path, sbatch: Path) -> None:
    file = tmp_path / "bin" / "sbatch"
    file.write_text(
        "#!/bin/bash\necho 'sbatch: error: Batch job submission failed: no' >&2; exit 1"
    )
    with pytest.raises(ValueError, match="Slurm did not take the job: Batch job submission failed"):
        main([*TINY, f"runs={tmp_path}/runs"])
    assert not (tmp_path / "runs" / "demo").exists()


def test_machine_without_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs the command sbatch, which is not on the path"):
        main([*TINY, f"runs={tmp_path}/runs"])
    assert not (tmp_path / "runs").exists()


def test_allocation_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(
        ValueError, match=r"launch.nodes=2, but this is inside of job 5 with 1 node"
    ):
        SlurmSpec(nodes=2).check()
    SlurmSpec(nodes=1).check()


def test_job_that_is_stopped_again_and_again_without_progress_is_not_queued_once_more(
    tmp_path: Path,
) -> None:
    codes = [note_outcome(tmp_path, PREEMPTED, 20) for _ in range(RESTARTS + 1)]
    assert codes == [PREEMPTED] * RESTARTS + [NO_PROGRESS]
    assert (tmp_path / "outcome").read_text() == f"{NO_PROGRESS}\n"
    assert note_outcome(tmp_path, PREEMPTED, 40) == PREEMPTED
    assert note_outcome(tmp_path, BAD_CONFIG, 40) == BAD_CONFIG


def test_stored_plan_is_plain_json(tmp_path: Path, sbatch: Path) -> None:
    main([*TINY, f"runs={tmp_path}/runs"])
    plan = json.loads((tmp_path / "runs" / "demo" / "jobs" / "001" / "launch.json").read_text())
    assert len(plan["key"]) == 32
