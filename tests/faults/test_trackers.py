"""A21: no network, or a server that accepts and never answers: the run does not notice.

All of it (2 minutes): pytest -m slow tests/faults/test_trackers.py
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import CHECK_FAILED
from tests.conftest import Figure
from tests.tracked_runs import run_folder, steps_of, sync, write_points
from tests.wandb_server import environment_of, silent_server, wandb_server
from trainer.directory import REWIND
from trainer.numerics.rewinds import REWINDS
from trainer.trackers.side import BROKEN_OFF_SECONDS, FINISH_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

START_SECONDS = 90.0  # of an interpreter and wandb's own process, on a loaded machine


@pytest.mark.parametrize(("file", "text"), [(REWIND, "1"), (REWINDS, '{"1": {}}')])
def test_a_curve_that_was_taken_back_is_a_second_run_on_the_server(
    tmp_path: Path, file: str, text: str
) -> None:
    run = run_folder(tmp_path, 1, 2, 3)
    with wandb_server() as server:
        assert sync(run, server.environment).returncode == 0
        (run / file).write_text(text)
        write_points(run, 2, resumed_step=1)
        assert sync(run, server.environment).returncode == 0
    assert steps_of(server) == [[1, 2, 3], [1, 2]]
    first, second = server.histories
    assert second == f"{first}-r2"


def test_a_server_that_fails_leaves_sync_with_one_line_and_code_1(tmp_path: Path) -> None:
    run = run_folder(tmp_path, 1)
    with wandb_server() as server:
        pass
    done = sync(run, server.environment)  # nobody listens any more
    assert done.returncode == CHECK_FAILED
    assert len([line for line in done.stderr.splitlines() if line.startswith("tessera:")]) == 1


def started_side(run: Path, environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start what feeds a tracker, as rank 0 does."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.trackers.side", str(run), "curves", str(os.getpid())],
            env=os.environ | environment, stdin=subprocess.PIPE, stderr=file,
        )  # fmt: skip


def test_a_side_process_feeds_the_tracker_while_the_run_goes_on(tmp_path: Path) -> None:
    run = run_folder(tmp_path, 1, 2)
    with wandb_server() as server:
        side = started_side(run, server.environment, tmp_path / "log")
        deadline = time.monotonic() + START_SECONDS
        while not any(server.histories.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert steps_of(server) == [[1]]
        write_points(run, 3, resumed_step=2)
        side.communicate(b".", timeout=FINISH_SECONDS + START_SECONDS)
    assert side.returncode == 0
    assert steps_of(server) == [[1, 2, 3]]
    assert (tmp_path / "log").read_text() == ""


def test_a_tracker_that_never_answers_is_left_in_time_and_says_what_to_do(tmp_path: Path) -> None:
    run = run_folder(tmp_path, 1, 2)
    with silent_server() as port:
        side = started_side(run, environment_of(port), tmp_path / "log")
        time.sleep(1.0)
        since = time.monotonic()
        side.communicate(b"", timeout=BROKEN_OFF_SECONDS + START_SECONDS)
    assert side.returncode != 0
    assert time.monotonic() - since < BROKEN_OFF_SECONDS + 5.0
    said = (tmp_path / "log").read_text()
    assert f"tessera sync run={run}" in said
    assert len(said.splitlines()) == 1


COMMAND = [
    sys.executable, "-m", "launch", "train", "experiment=demo", "model.hidden_size=32",
    "model.intermediate_size=64", "model.num_hidden_layers=1", "data.row_tokens=32",
    "data.max_documents=10", "callbacks.ngrams=null", "callbacks.closing.sample_tokens=0",
    "max_steps=12", "log_every=1", "eval_every=null", "precision=fp32",
]  # fmt: skip
OFFLINE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def trained(runs: Path, *words: str, prefix: Any = (), **environment: str) -> list[dict[str, Any]]:
    """Train to the end, which is asserted; return the points without what a clock says."""
    done = subprocess.run(
        [*prefix, *COMMAND, f"runs={runs}", *words],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (runs / "demo" / "metrics.jsonl").read_text().splitlines()
    kept = ("step", "split", "loss", "grad_norm", "lr", "tokens")
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


def first_step_after(runs: Path) -> float:
    """Return the seconds from a start, when its folder was made, to its first step."""
    begun = (runs / "demo" / "attempts" / "001" / "config.yaml").stat().st_mtime
    line = (runs / "demo" / "metrics.jsonl").read_text().splitlines()[0]
    return float(json.loads(line)["time"]) - begun


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], float]:
    runs = tmp_path_factory.mktemp("untracked")
    trained(runs / "warm")  # tokens are cached
    return trained(runs), first_step_after(runs)


def test_a_run_without_network_ends_well_and_is_sent_later(
    tmp_path: Path, untracked: Any, figure: Figure
) -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None or os.getuid() != 0:
        assert "CI" not in os.environ, "apt-get install util-linux iproute2, and run as root"
        pytest.skip("unshare -n needs root, util-linux and iproute2")
    key = environment_of(1)["WANDB_API_KEY"]
    points = trained(
        tmp_path, "tracker=wandb", prefix=OFFLINE,
        WANDB_API_KEY=key, WANDB_BASE_URL="https://api.wandb.ai",
    )  # fmt: skip
    assert points == untracked[0]
    late = first_step_after(tmp_path) - untracked[1]
    figure("A21 no network (exit code 0): first step, later than without a tracker", late, "s")
    assert late < 10.0
    with wandb_server() as server:
        for _ in range(2):
            assert sync(tmp_path / "demo", server.environment).returncode == 0
    assert steps_of(server) == [list(range(1, 13))]


def test_a_server_that_never_answers_does_not_hold_up_a_run(
    tmp_path: Path, untracked: Any, figure: Figure
) -> None:
    with silent_server() as port:
        points = trained(tmp_path, "tracker=wandb", **environment_of(port))
    assert points == untracked[0]
    late = first_step_after(tmp_path) - untracked[1]
    figure("A21 a server that never answers: first step, later than without", late, "s")
    assert late < 10.0


def test_a_full_disk_of_the_tracker_does_not_end_a_run(tmp_path: Path, untracked: Any) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "tracker").symlink_to("/dev/full")  # no folder can be made there
    assert trained(tmp_path, "tracker=wandb", **environment_of(1)) == untracked[0]
