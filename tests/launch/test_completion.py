"""Completion: what may follow, said fast, and by a real bash."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch.candidates import candidates
from launch.cli import COMMANDS, main
from launch.completion import SCRIPTS
from launch.exit_codes import BAD_CONFIG
from launch.menu import groups
from tests.launch.test_cli import best_cpu_seconds, imported_by

SECONDS = 0.3


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tr", ["train"]),
        ("train exper", ["experiment="]),
        ("train experiment=de", ["experiment=demo"]),
        ("train opt", ["optim=", "optim."]),
        ("train optim=sgd optim.", ["optim.lr=", "optim.weight_decay=", "optim.max_grad_norm="]),
        ("train data.global", ["data.global_rows="]),
        ("train experiment=sft data.global", ["data.global_documents="]),
        ("train best.goal=", ["best.goal=auto", "best.goal=min", "best.goal=max"]),
        ("train resume_strict=", ["resume_strict=true", "resume_strict=false"]),
        ("train data.path=do", [":files"]),
        ("train dry_run=", ["dry_run=true"]),
        ("sweep stop_on", ["stop_on_failure="]),
        ("generate checkpoint=", [":files"]),
        ("explain optim.l", ["optim.lr"]),
        ("list sch", ["schedule"]),
        ("completion z", ["zsh"]),
        ("nonsense a", []),
    ],
)
def test_the_last_word_is_completed_by_what_stands_before_it(line: str, found: list[str]) -> None:
    answer = candidates(line.split(" "))
    assert set(found) <= set(answer)
    if not line.endswith("="):
        assert answer == found


def test_every_command_and_every_choice_is_a_candidate() -> None:
    assert candidates([""]) == [*COMMANDS, "--help"]
    for group, choices in groups().items():
        answer = candidates(["train", f"{group}="])
        assert answer == [f"{group}={choice}" for choice in choices]


def test_candidates_come_fast_and_without_hydra_or_torch() -> None:
    code = "from launch.candidates import candidates; candidates(['train', 'data.'])"
    assert not imported_by(code) & {"torch", "hydra", "omegaconf", "numpy"}
    words = ["completion", "candidates", "train", "data."]
    assert best_cpu_seconds(words, "data.path=") < SECONDS


@pytest.mark.parametrize("shell", SCRIPTS)
def test_each_shell_reads_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=150)


def test_an_unknown_shell_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "bash, fish, zsh" in line


class Bash:
    """An interactive bash on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = os.environ | {"PATH": path, "PS1": "$ ", "TERM": "dumb"}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self.say('bind "set bell-style none"; eval "$(tessera completion bash)"; echo rea""dy\n')
        self.until("ready")

    def say(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def until(self, wanted: str, seconds: float = 60.0) -> str:
        """Return what it has written until the text came."""
        text, deadline = "", time.monotonic() + seconds
        while wanted not in text and time.monotonic() < deadline:
            if select.select([self.terminal], [], [], 0.1)[0]:
                text += os.read(self.terminal, 4096).decode()
        assert wanted in text, text
        return text

    def close(self) -> None:
        self.say("\x15exit\n")
        with suppress(OSError):
            while os.read(self.terminal, 4096):
                pass
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


def test_a_real_bash_completes_commands_keys_choices_and_files(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    bash = Bash(tmp_path)
    try:
        bash.say("tessera tra\t")
        bash.until("train ")
        bash.say("experiment=dem\t")
        bash.until("experiment=demo ")
        bash.say("optim.weight\t")
        bash.until("optim.weight_decay=")
        bash.say("0 data.path=cor\t")
        bash.until("data.path=corpus.jsonl")
    finally:
        bash.close()
