"""Launchers of several nodes, here on one machine, with workers that train nothing: one run."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL, NO_PROGRESS, PREEMPTED
from launch.group import Node
from launch.handover import OUTCOME, Handover, read_handover
from launch.meeting import Meeting, come, ports_of
from launch.node import node_of
from tests.faults.plain_worker import WORKER, Plan
from trainer.checkpoint.commit import committed_steps

LIMIT_SECONDS = 150.0
CODE = f"import sys; from launch.node import main; sys.exit(main(sys.argv[1:], {WORKER!r}))"
KEY = "0123456789abcdef" * 2


@dataclass(frozen=True, kw_only=True)
class Started:
    """The launchers of all nodes of a run."""

    launchers: list[subprocess.Popen[bytes]]
    folder: Path

    def wait(self) -> list[int]:
        return [launcher.wait(LIMIT_SECONDS) for launcher in self.launchers]

    @property
    def text(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def attempts(self) -> int:
        return len(list((self.folder / "run" / "attempts").iterdir()))

    def places(self, attempt: int = 1) -> list[dict[str, Any]]:
        """Return where each rank is, once all have begun a step."""
        folder = self.folder / "run" / "attempts" / f"{attempt:03d}"
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            texts = [p.read_text().partition("\n")[0] for p in sorted(folder.glob("place.*"))]
            places = [json.loads(text) for text in texts if text.endswith("}")]
            if len(places) == len(self.launchers) and all(place["step"] for place in places):
                return places
            time.sleep(0.02)
        raise AssertionError(self.text)


def handover(folder: Path, nodes: int = 2, **changes: Any) -> Handover:
    values: dict[str, Any] = {
        "folder": str(folder / "run"), "nodes": nodes, "processes": 1, "restarts": 3,
        "watchdog": {"stopped_seconds": 1.0},  # other limits a busy machine may reach
        "stop_at": None, "deterministic": "off", "git_commit": None, "key": KEY,
    }  # fmt: skip
    return Handover(**values | changes)


@contextmanager
def started(folder: Path, plan: Plan, nodes: int = 2, **changes: Any) -> Iterator[Started]:
    """Start one launcher for each node; nothing of them outlives the block."""
    tree = asdict(plan) | {"resume_step": None, "resume_allow": []}
    (folder / "config.yaml").write_text(json.dumps(tree))
    (folder / "launch.json").write_text(json.dumps(asdict(handover(folder, nodes, **changes))))
    launchers = []
    with open(folder / "output", "wb") as output:
        for rank in range(nodes):
            around = {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            launchers.append(
                subprocess.Popen(
                    [sys.executable, "-c", CODE, str(folder)],
                    env=os.environ | around, stderr=output, stdout=output,
                )
            )  # fmt: skip
    try:
        yield Started(launchers=launchers, folder=folder)
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


def is_there(pid: int) -> bool:
    try:
        return b"plain_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def outcome(run: Started) -> int:
    return int((run.folder / OUTCOME).read_text())


def test_run_on_three_nodes_ends_everywhere_with_zero_and_no_word(tmp_path: Path) -> None:
    words = ["seed=1", "launch=slurm"]
    with started(tmp_path, Plan(steps=3), nodes=3, words=words) as run:
        assert run.wait() == [FINISHED] * 3, run.text
    start = tmp_path / "run" / "attempts" / "001"
    assert json.loads((start / "command.json").read_text()) == {"words": words}
    assert [line for line in run.text.splitlines() if "submitted" not in line] == []
    records = [json.loads(p.read_text()) for p in sorted(tmp_path.rglob("exit.*.json"))]
    assert [record["code"] for record in records] == [FINISHED] * 3
    assert outcome(run) == FINISHED


@pytest.mark.parametrize(("kind", "victim"), [("kill", 1), ("exit 0", 1), ("stop", 1)])
def test_failure_on_one_node_starts_all_nodes_again_together(
    tmp_path: Path, kind: str, victim: int
) -> None:
    with started(tmp_path, Plan(kind=kind)) as run:
        first = run.places()
        assert run.wait() == [FINISHED] * 2, run.text
    assert run.attempts == 2
    assert committed_steps(tmp_path / "run" / "checkpoints")[0] == 6
    failed, *_, last = [line for line in run.text.splitlines() if f"rank {victim} of 2" in line]
    assert "in step 5 (train_step)" in failed
    assert "last committed step: 3" in failed
    assert "finished after 1 restart;" in last
    assert not any(is_there(place["pid"]) for place in first)


def test_failure_again_and_again_ends_all_nodes_with_the_same_code(tmp_path: Path) -> None:
    with started(tmp_path, Plan(kind="kill", starts=9), restarts=1) as run:
        assert run.wait() == [NO_PROGRESS] * 2, run.text
    assert outcome(run) == NO_PROGRESS


@pytest.mark.parametrize("node", [0, 1])
def test_signals_to_any_node_save_once_and_end_all(tmp_path: Path, node: int) -> None:
    """A scheduler tells launchers and workers, and several times."""
    with started(tmp_path, Plan(steps=2000)) as run:
        places = run.places()
        for _ in range(3):
            run.launchers[node].send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        assert run.wait() == [PREEMPTED] * 2, run.text
    assert not any(is_there(place["pid"]) for place in places)
    last = run.text.splitlines()[-1]
    assert "stopped by SIGUSR1; last committed step: " in last
    assert outcome(run) == PREEMPTED


@pytest.mark.parametrize(("lost", "left"), [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("saved", "counts_starts", "code"),
    [(True, False, PREEMPTED), (False, False, INTERNAL), (False, True, PREEMPTED)],
)
def test_lost_launcher_ends_the_others_who_say_so(
    tmp_path: Path, lost: int, left: int, saved: bool, counts_starts: bool, code: int
) -> None:
    """With 75 where the job has brought the run on, or is counted: it is worth another one."""
    plan = Plan(steps=2000, save_every=1 if saved else 5000)
    with started(tmp_path, plan, counts_starts=counts_starts) as run:
        places = run.places()
        while saved and not committed_steps(tmp_path / "run" / "checkpoints"):
            time.sleep(0.02)
        run.launchers[lost].kill()
        assert run.launchers[left].wait(LIMIT_SECONDS) == code, run.text
    assert not any(is_there(place["pid"]) for place in places)
    assert f"node {lost} of 2 is lost: its launcher has ended" in run.text
    assert outcome(run) == code


@pytest.mark.parametrize(("counts_starts", "code"), [(True, PREEMPTED), (False, INTERNAL)])
@pytest.mark.parametrize("rank", [0, 1])
def test_node_to_which_nobody_comes_says_so(
    tmp_path: Path, rank: int, counts_starts: bool, code: int
) -> None:
    """With 75 where the scheduler counts: the other pod may only have come late."""
    plan = handover(tmp_path, counts_starts=counts_starts, key=secrets.token_hex(16))
    (tmp_path / "launch.json").write_text(json.dumps(asdict(plan)))
    impatient = f"import launch.meeting; launch.meeting.MEET_SECONDS = 1.0; {CODE}"
    done = subprocess.run(
        [sys.executable, "-c", impatient, str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert "within 1 s; see wh" in done.stderr


def test_refusal_of_node_0_ends_the_others_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with started(tmp_path, Plan()) as run:
        assert run.wait() == [BAD_CONFIG] * 2
    assert run.text.count("can be written by other users") == 1


def test_node_is_refused_that_has_no_number_or_no_address() -> None:
    plan = handover(Path("x"), nodes=2)
    with pytest.raises(ValueError, match="NODE_RANK is not set; set NODE_RANK"):
        node_of({"MASTER_ADDR": "a"}, plan)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        node_of({"SLURM_PROCID": "1"}, plan)
    with pytest.raises(ValueError, match="this is node 2 of a run on 2 nodes"):
        node_of({"SLURM_PROCID": "2", "MASTER_ADDR": "a"}, plan)
    assert node_of({"SLURM_PROCID": "1", "MASTER_ADDR": "a"}, plan).rank == 1


def test_folder_without_a_handover_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no launch\.json"):
        read_handover(tmp_path)


def test_stranger_without_the_key_is_not_taken_for_a_node() -> None:
    ports, stops = ports_of(KEY), iter([False, False, True])
    meeting = Meeting(Node(processes=1, count=2), KEY, ports)
    stranger = Node(processes=1, count=2, rank=1)
    assert come(stranger, "another", ports, lambda: next(stops)) is None
    assert not meeting.hellos
    link = come(stranger, KEY, ports, lambda: False)
    assert link is not None
    assert len(meeting.gather(lambda: False)) == 1


def test_taken_port_is_passed_over() -> None:
    ports = ports_of(KEY)
    first, second = (Meeting(Node(processes=1, count=2), key, ports) for key in ("other", KEY))
    link = come(Node(processes=1, count=2, rank=1), KEY, ports, lambda: False)
    assert link is not None
    assert (len(first.hellos), len(second.gather(lambda: False))) == (0, 1)
    first.close()
