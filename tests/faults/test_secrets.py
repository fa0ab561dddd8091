"""A31: no secret of config, command line, environment, error text or git remote is written down."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.exit_codes import BAD_CONFIG, INTERNAL
from launch.last_words import describe, leave_record, report
from launch.verdict import MAX_REASON
from tests.ranks import run_ranks
from tests.runs import tiny_run
from tests.secrets import SECRETS, URL, shown
from trainer.callbacks.protocol import Callback, RunView
from trainer.directory import CONFIG, new_attempt
from trainer.distributed import Placement
from trainer.errors import StorageError
from trainer.progress import Progress
from trainer.trackers.wandb import WandbTracker
from trainer.whereabouts import Whereabouts

TEXT = "; ".join(map(shown, SECRETS))


@dataclass(frozen=True)
class Careless:
    """A callback that logs every secret at the start, and dies of them at step 2."""

    def build(self) -> "CarelessCallback":
        return CarelessCallback()


class CarelessCallback(Callback):
    """Says what it should keep to itself."""

    def on_start(self, view: RunView, progress: Progress) -> None:
        import logging

        logging.getLogger("trainer.callbacks").info("connects with %s", TEXT)
        logging.getLogger("other.library").warning("could not reach %s", URL)

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step == 2:
            raise RuntimeError(f"no answer from {TEXT}")


def train_carelessly(placement: Placement, folder: Path, cache: Path) -> int:
    """Train one rank up to its exit record, with all that it prints in `folder`."""
    from launch.terminal import redact_tracebacks
    from launch.worker import execute

    for name, secret in SECRETS.items():
        os.environ[f"SERVICE_{name.upper().replace(' ', '_')}"] = secret
    for number in (1, 2):
        os.dup2(os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    redact_tracebacks()

    def locate(_: int) -> Path:
        attempt = new_attempt(folder / "tiny")
        (attempt / CONFIG).write_text("seed: 0")
        return attempt

    offline = WandbTracker(mode="offline", name=None)
    run = tiny_run(cache, callbacks={"careless": Careless()}, tracker={"wandb": offline})
    code = execute(run, placement, locate)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of everything that a run has left which failed over secrets."""
    folder = tmp_path_factory.mktemp("careless")
    (folder / "tiny").mkdir()
    assert run_ranks(1, train_carelessly, folder, cache) == [INTERNAL]
    return folder


def written(folder: Path) -> dict[str, bytes]:
    """Return all files with what they hold."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", SECRETS)
def test_a_run_that_fails_over_secrets_leaves_none_of_them(careless: Path, name: str) -> None:
    found = written(careless)
    assert {"tiny/attempts/001/exit.00000.json", "tiny/metrics.jsonl", "printed"} <= set(found)
    assert [path for path, data in found.items() if SECRETS[name].encode() in data] == []


def test_what_was_masked_is_said_all_the_same(careless: Path) -> None:
    printed = (careless / "printed").read_text()
    for said in ("connects with [redacted]", "could not reach https://[redacted]@", "Traceback"):
        assert said in printed
    record = careless / "tiny" / "attempts" / "001" / "exit.00000.json"
    assert "no answer from [redacted]" in record.read_text()


def test_an_exit_record_is_masked_whole_before_anything_is_cut(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = SECRETS["hub token"]
    error = StorageError("." * (MAX_REASON - 12) + f" {secret}")
    whereabouts = Whereabouts()
    whereabouts.enter("train_step", 3, [(0, 8)], [f"{URL}[0:8]"])
    record = describe(error, whereabouts, Placement())
    assert secret not in record["reason"]
    assert record["provenance"] == ["https://[redacted]@git.example.org/team/repo.git[0:8]"]
    report(error, record, Placement(), None)
    assert secret[:8] not in capfd.readouterr().err
    leave_record(tmp_path, 0, record)
    assert json.loads((tmp_path / "exit.00000.json").read_text()) == record


def test_a_secret_on_the_command_line_starts_nothing(tmp_path: Path, capfd: Any) -> None:
    words = [f"runs={tmp_path}", "experiment=demo"]
    for name in SECRETS:
        assert main(["train", *words, f'data.path="{shown(name)}"']) == BAD_CONFIG
    output = capfd.readouterr()
    assert not [name for name in SECRETS if SECRETS[name] in output.out + output.err]
    assert list(tmp_path.iterdir()) == []
