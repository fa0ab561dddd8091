"""The command itself: fast help, a whole menu, a dry run that starts nothing, and exit codes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import exit_codes
from launch.binding import bind
from launch.cli import COMMANDS, main
from launch.menu import config_folder
from trainer.run import Run

HELP_SECONDS = 0.5  # of CPU time: other tests may have the cores
DEMO = ["train", "experiment=demo"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


def imported_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `code`."""
    listing = (
        "import json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    command = [sys.executable, "-c", f"{code}\n{listing}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command that succeeds prints; it must have no complaint."""
    assert main(words) == exit_codes.FINISHED
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def best_cpu_seconds(words: list[str], said: str) -> float:
    """Return the least CPU time of a command in five tries; `said` is in what each prints."""
    seconds = []
    for _ in range(5):
        before = os.times()
        command = [sys.executable, "-m", "launch", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert said in done.stdout
    return min(seconds)


def test_help_comes_within_half_a_second() -> None:
    assert best_cpu_seconds(["--help"], "usage: tessera") < HELP_SECONDS


@pytest.mark.parametrize(
    "code",
    [
        "import launch.cli",
        "import launch.supervisor",
        "import launch.menu",
        "import launch.cli as cli; cli.main(['--help'])",
        "import launch.cli as cli; cli.main(['list'])",
        "import launch.cli as cli; cli.main(['train', '--help'])",
    ],
)
def test_command_line_alone_imports_nothing_heavy(code: str) -> None:
    assert not imported_by(code) & {"torch", "hydra", "omegaconf", "numpy", "trainer", "yaml"}


@pytest.mark.parametrize("module", ["trainer", "trainer.run", "trainer.construct", "models.llama"])
def test_library_costs_torch_at_most(module: str) -> None:
    heavy = {
        "transformers", "datasets", "wandb", "deepspeed", "accelerate", "hydra", "omegaconf",
        "tokenizers", "safetensors", "pandas", "pyarrow", "rich", "PIL", "launch",
    }  # fmt: skip
    assert not imported_by(f"import {module}") & heavy


def test_configs_are_composed_without_torch() -> None:
    """So that a run folder in use, or a name that is none, is refused at once."""
    code = "from launch.compose import compose; compose(['experiment=demo'])"
    assert not imported_by(code) & {"torch", "numpy", "models"}


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_and_every_code_on_a_line_of_its_own(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(words, capsys).splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == [*COMMANDS, *map(str, exit_codes.MEANINGS)]
    assert all(len(line) <= 100 for line in lines)
    assert all(len(line.split()) > 1 for line in lines if line.startswith("  "))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_more_on_request(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said([command, "--help"], capsys)
    assert text.count("\n") > 3
    assert "Traceback" not in text


def test_help_of_train_shows_every_experiment_and_every_group_with_its_choices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_menu(said(["train", "--help"], capsys))


def test_list_shows_every_experiment_and_every_group_with_its_choices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_menu(said(["list"], capsys))


def check_menu(text: str) -> None:
    """Look for every file of configs/ in `text`, without the code that prints the menu."""
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    files = [file for file in config_folder().rglob("*.yaml") if file.parent != config_folder()]
    assert len(files) > 20
    for file in files:
        group, choice = file.parent.name, file.stem
        if group == "experiment":
            headline = next(line for line in file.read_text().splitlines() if "# @" not in line)
            assert headline.removeprefix("# ") in rows[choice]
        else:
            assert choice in rows[group].replace(",", "").split()[1:]


def test_command_without_words_prints_its_help_as_a_refusal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == exit_codes.BAD_CONFIG
    assert "usage: tessera" in capsys.readouterr().out


def test_installed_command_and_module_say_the_same() -> None:
    installed = Path(sys.executable).parent / "tessera"
    outputs = [
        subprocess.run(command, capture_output=True, text=True, timeout=150, check=True).stdout
        for command in ([installed, "list"], [sys.executable, "-m", "launch", "list"])
    ]
    assert outputs[0] == outputs[1] != ""


def test_exit_codes_are_those_that_schedulers_rely_on() -> None:
    codes = {
        name: value
        for name, value in vars(exit_codes).items()
        if name.isupper() and isinstance(value, int)
    }
    expected = {
        "FINISHED": 0, "BAD_CONFIG": 64, "DATA": 65, "INTERNAL": 70, "STORAGE": 74, "PREEMPTED": 75,
    }  # fmt: skip
    assert expected.items() <= codes.items()
    assert set(codes.values()) == set(exit_codes.MEANINGS)


def test_dry_run_prints_the_config_that_a_run_would_store(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*DEMO, "dry_run=true", "launch.processes=2", "optim.lr=1", "seed=7", "name=mine"]
    tree = yaml.safe_load(said(words, capsys))
    run, launcher = bound(tree)
    assert (run.seed, run.optim.lr, run.name) == (7, 1.0, "mine")
    assert launcher.processes == 2
    assert run.data.path == "stdlib"


def test_dry_run_names_the_experiment_as_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    output = said([*DEMO, "dry_run=true"], capsys)
    assert yaml.safe_load(output)["name"] == "demo"
    assert "runs/demo" in output.splitlines()[-1]


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", *DEMO, "dry_run=true", f"data.cache={tmp_path}/c"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, done.stderr) == (exit_codes.FINISHED, "")
    assert "nothing was started" in done.stdout.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["dry_run=false", "dry_run=False"])
def test_dry_run_said_twice_starts_nothing(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, "dry_run=true", word]) == exit_codes.BAD_CONFIG
    assert "tessera train has dry_run twice" in capsys.readouterr().err


def test_dry_run_checks_as_a_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DEMO, "dry_run=true", "data.micro_rows=3"]
    assert main(words) == exit_codes.BAD_CONFIG
    assert "data.micro_rows=3" in capsys.readouterr().err


def test_dry_run_of_a_run_with_changes_prints_a_config_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What changed is told beside the config, never inside it."""
    words = [*DEMO, "dry_run=true"]
    store_run(tmp_path / "runs" / "demo", yaml.safe_load(said(words, capsys)))
    assert main([*words, "optim.lr=1"]) == exit_codes.FINISHED
    output = capsys.readouterr()
    run, _ = bound(yaml.safe_load(output.out))
    assert run.optim.lr == 1.0
    assert "optim.lr: 0.003 -> 1" in output.out + output.err


def test_dry_run_of_another_run_under_the_same_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*DEMO, "dry_run=true"]
    store_run(tmp_path / "runs" / "demo", yaml.safe_load(said(words, capsys)))
    assert main([*words, "seed=1"]) == exit_codes.BAD_CONFIG
    assert "seed was 0 when this run was saved and is 1 now" in capsys.readouterr().err
    assert main([*words, "data.global_rows=8"]) == exit_codes.BAD_CONFIG
    assert "resume_allow=[data.global_rows]" in capsys.readouterr().err
    words += ["data.global_rows=8", "resume_allow=[data.global_rows]"]
    assert main(words) == exit_codes.FINISHED


def store_run(folder: Path, tree: dict[str, Any]) -> None:
    """Leave what a run that saved step 1 leaves, as far as a start looks at it."""
    step = folder / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "MANIFEST.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def bound(tree: dict[str, Any]) -> tuple[Run, Any]:
    launcher = bind(tree.pop("launch"), "launch")
    run = bind(tree)
    assert isinstance(run, Run)
    return run, launcher


def test_a_full_disk_is_a_storage_failure_wherever_it_is_met() -> None:
    assert exit_codes.code_of(OSError(errno.ENOSPC, "No space left on device")) == 74
    assert exit_codes.code_of(OSError(errno.ENOENT, "No such file")) == 70


def test_dry_run_under_torchruns_variables_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "experiment=demo", f"runs={tmp_path}", "dry_run=true"]) == 0
    assert "nothing was started" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["--help", "list"])
def test_reader_that_leaves_is_no_error_of_ours(words: str) -> None:
    # `true` reads nothing and is gone long before Python has started.
    command = f"{sys.executable} -m launch {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
