"""`launch=torchrun`: the line for each node, and what its end is taken for."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.agent import Agent
from launch.exit_codes import BAD_CONFIG, DATA, FINISHED, INTERNAL, PREEMPTED
from launch.node_watch import AGENT, NodeWatch
from launch.protocol import Job
from launch.torchrun import TorchrunSpec
from launch.traces import STOPPED, state_of
from launch.watchdog import WatchdogSpec
from tests.test_architecture import ROOT
from trainer.record import read_lines


class Checked:
    """A run that may have an even number of ranks."""

    def check(self, world_size: int) -> None:
        if world_size % 2:
            raise ValueError(f"{world_size} ranks do not divide data.global_rows; take 2 or 4")


def job(*words: str, resume: str = "auto") -> Job:
    folder = Path("/runs/demo")
    tree = {"resume": resume}
    return Job(run=Checked(), tree=tree, folder=folder, end=None, words=words)


def line(spec: TorchrunSpec, *words: str) -> list[str]:
    """Return what a shell makes of the printed line."""
    comment, text = spec.preview(job(*words)).split("\n", 1)
    assert comment.startswith("# on ")
    variable, *words = shlex.split(text.replace("\\\n", " "))
    assert variable == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    return words


def test_the_printed_line_is_the_one_that_is_run() -> None:
    spec = TorchrunSpec(nodes=2, processes=8, endpoint="node1", restarts=5)
    words = ("experiment=demo", "name=it's", "launch=torchrun", "launch.nodes=2")
    printed = line(spec, *words)
    assert printed == ["torchrun", *spec.arguments(job(*words))]
    assert printed[1:7] == [
        "--nnodes=2", "--nproc-per-node=8", "--max-restarts=5", "--rdzv-backend=c10d",
        "--rdzv-endpoint=node1:29400", "--rdzv-id=demo",
    ]  # fmt: skip
    assert "SIGUSR1" in printed[7]
    assert printed[-6:] == ["-m", "launch", "train", "experiment=demo", "name=it's", "launch=local"]


def test_nodes_may_come_and_go_where_every_number_of_them_is_legal() -> None:
    spec = TorchrunSpec(nodes=1, max_nodes=2, processes=2, endpoint="node1:1234")
    assert "--nnodes=1:2" in line(spec)
    assert "--rdzv-endpoint=node1:1234" in line(spec)
    with pytest.raises(ValueError, match="3 ranks do not divide"):
        TorchrunSpec(nodes=2, max_nodes=4, processes=1, endpoint="node1").preview(job())


def test_one_machine_meets_nowhere_and_an_address_says_who_is_the_host() -> None:
    assert "--standalone" in line(TorchrunSpec(processes=2))
    two = {"nodes": 2, "endpoint": "10.0.0.1"}
    assert "--rdzv-conf=is_host=1" in line(TorchrunSpec(**two, address="10.0.0.1"))  # type: ignore
    assert "--rdzv-conf=is_host=0" in line(TorchrunSpec(**two, address="10.0.0.2"))  # type: ignore


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"nodes": 0}, "set it to 1 or more"), ({"processes": 0}, "set it to 1 or more"),
        ({"restarts": -1}, "set it to 0 or more"), ({"nodes": 2}, "set launch.endpoint=HOST:29400"),
        ({"nodes": 3, "max_nodes": 2, "endpoint": "a"}, "less than launch.nodes=3"),
    ],
)  # fmt: skip
def test_what_cannot_meet_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TorchrunSpec(**values)


def test_a_run_that_never_resumes_may_not_be_restarted() -> None:
    with pytest.raises(ValueError, match="would start another run at each restart"):
        TorchrunSpec().preview(job(resume="never"))
    assert "torchrun" in TorchrunSpec(restarts=0).preview(job(resume="never"))


def left(folder: Path, *codes: int | None, **values: Any) -> Agent:
    """Return the agent of a run whose last start left these codes; None: no record."""
    agent = Agent(folder, [])
    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True)
    (attempt / "environment.json").write_text(json.dumps({"world_size": len(codes)}))
    for rank, code in enumerate(codes):
        if code is not None:
            record = {"code": code, "reason": f"reason {code}", "time": 1.0, "step": 3} | values
            (attempt / f"exit.{rank:05d}.json").write_text(json.dumps(record))
    return agent


def test_success_is_what_all_ranks_recorded_whatever_torchrun_returned(tmp_path: Path) -> None:
    assert left(tmp_path / "a", 0, 0).judge(1) == (FINISHED, "")


def test_a_saved_stop_is_75_though_torchrun_calls_it_a_success_or_a_failure(tmp_path: Path) -> None:
    for number, returned in enumerate((0, 1)):
        code, text = left(tmp_path / str(number), 75, 75).judge(returned)
        assert code == PREEMPTED
        assert text == (
            "reason 75; last committed step: none; the same command starts anew (exit code 75)"
        )


def test_a_failure_keeps_the_code_and_the_reason_of_the_rank_that_failed(tmp_path: Path) -> None:
    code, text = left(tmp_path, DATA, DATA).judge(1)
    assert code == DATA
    assert "rank 0 of 2 failed first: reason 65" in text


def test_a_rank_without_a_record_is_a_failure_though_torchrun_returned_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.agent.SETTLE_SECONDS", 0.0)
    code, text = left(tmp_path, 0, None).judge(0)
    assert code == INTERNAL
    assert "rank 1 of 2" in text


def test_a_start_that_no_rank_began_is_a_failure_but_a_stop_before_it_is_none(
    tmp_path: Path,
) -> None:
    left(tmp_path, 0, 0)  # an earlier start, which proves nothing
    agent = Agent(tmp_path, [])
    assert agent.judge(0)[0] == INTERNAL
    agent.signals.append(signal.SIGTERM)
    assert agent.judge(-15) == (PREEMPTED, "stopped by SIGTERM before anything was started")


def process_at(place: Path, rank: int, agent: int) -> "subprocess.Popen[bytes]":
    """Start a process of this agent, which says that it is one of a run's ranks."""
    environ = os.environ | {AGENT: str(agent)}
    process = subprocess.Popen(["sleep", "300"], env=environ)
    at = {"pid": process.pid, "host": socket.gethostname(), "phase": "train_step", "step": 7}
    place.mkdir(parents=True, exist_ok=True)
    (place / f"place.{rank:05d}.json").write_text(json.dumps(at | {"beats": 1}))
    return process


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_stopped_rank_of_ours_ends_with_all_of_its_node_and_no_other_process_does(
    tmp_path: Path, is_ours: bool
) -> None:
    watch = NodeWatch(tmp_path, [], 2, WatchdogSpec(stopped_seconds=2.0))
    assert watch.look(1.0) is None  # nothing has been started yet
    agent = os.getpid() if is_ours else 1
    place = tmp_path / "attempts" / "001"
    processes = [process_at(place, rank, agent) for rank in (2, 3)]
    try:
        assert watch.look(1.0) is None
        processes[1].send_signal(signal.SIGSTOP)
        while state_of(processes[1].pid) != STOPPED:  # once the kernel has given it its turn
            time.sleep(0.01)
        told = [watch.look(1.0) for _ in range(5)]
        said = [line for line in told if line]
        assert bool(said) is is_ours
        if is_ours:
            assert said[0].startswith("rank 3 is stopped (SIGSTOP) in step 7 (train_step) for 3 s ")
            assert [process.wait(10) for process in processes] == [-signal.SIGKILL] * 2
    finally:
        for process in processes:
            process.kill()
            process.wait()


TINY = [
    "experiment=demo", "name=run", "log_every=1", "save_every=5", "eval_every=null",
    "checkpoint.background=false", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=1", "data.row_tokens=32", "data.global_rows=8", "data.micro_rows=2",
    "data.max_documents=10", "precision=fp32", "callbacks.ngrams=null",
    "callbacks.closing.sample_tokens=0", "launch=torchrun", "launch.processes=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_signal_saves_and_gives_75_and_the_same_command_ends_with_0(tmp_path: Path) -> None:
    words = [*TINY, f"runs={tmp_path}", f"data.cache={tmp_path / 'cache'}", "max_steps=100"]
    command = [sys.executable, "-m", "launch", "train", *words]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
    while process.poll() is None and (not metrics.exists() or len(read_lines(metrics)) < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)  # which would end a plain torchrun, and leave its ranks
    assert process.wait(300) == PREEMPTED, (tmp_path / "log").read_text()
    assert "stopped by SIGUSR1; last committed step: " in (tmp_path / "log").read_text()
    subprocess.run(command, cwd=ROOT, check=True)
    assert len(read_lines(metrics)) == 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stopped_rank_is_told_of_and_all_start_again_and_finish(tmp_path: Path) -> None:
    words = [*TINY, f"runs={tmp_path}", f"data.cache={tmp_path / 'cache'}", "max_steps=100"]
    command = [sys.executable, "-m", "launch", "train", *words]
    run = tmp_path / "run"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(read_lines(metrics)) < 12):
        time.sleep(0.02)
    place = json.loads((run / "attempts" / "001" / "place.00001.json").read_text().splitlines()[0])
    os.kill(place["pid"], signal.SIGSTOP)
    assert process.wait(600) == FINISHED, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "tessera: rank 1 is stopped (SIGSTOP) in step " in text
    assert re.search(r"^start +2 goes on after step \d+$", text, re.MULTILINE)
    assert len(read_lines(metrics)) == 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_refusal_comes_before_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "train", *TINY, f"runs={tmp_path}", "resume=never"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == BAD_CONFIG
    assert len(done.stderr.splitlines()) == 1
