"""Launchers of others start `-m launch train`: the losses are those of our own.

pytest -m slow tests/cluster/test_other_launchers.py
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.worker import refuse_lone_rank
from tests.test_architecture import ROOT
from trainer.ports import free_port
from trainer.record import read_lines

STEPS = 3
LIMIT_SECONDS = 600.0
BIN = Path(sys.executable).parent
TINY = [
    "experiment=demo", "name=run", f"max_steps={STEPS}", "log_every=1", "eval_every=null",
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1",
    "data.row_tokens=32", "data.global_rows=8", "data.micro_rows=2", "data.max_documents=10",
    "precision=fp32", "callbacks.ngrams=null", "callbacks.closing.sample_tokens=0",
]  # fmt: skip
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "launch"],
    "accelerate": [
        "accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m", "launch",
    ],
    "deepspeed": ["deepspeed", "--num_gpus=2", "--no_local_rank", "--module", "launch"],
}  # fmt: skip
HOSTFILE = [
    str(BIN / "deepspeed"), "--hostfile={folder}/hosts", "--master_addr=127.0.0.1",
    "--master_port={port}", "--no_local_rank",
]  # fmt: skip
HOSTS = "127.0.0.1 slots=1\nlocalhost slots=1\n"
"""Two names of this machine: two nodes, each with one process."""
PDSH = """#!{python}
# Runs a line for each host as pdsh does, with %n for its number, but all of them on this machine.
import subprocess, sys
hosts = sys.argv[sys.argv.index("-w") + 1].split(",")
line = " ".join(sys.argv[sys.argv.index("-w") + 2:])
runs = [subprocess.Popen(line.replace("%n", str(n)), shell=True) for n in range(len(hosts))]
sys.exit(max([run.wait() for run in runs]))
"""


def losses(folder: Path, *commands: list[str], words: Sequence[str] = ()) -> list[float]:
    """Return those of one run, which all commands together start."""
    path = f"{folder}:{BIN}:{os.environ['PATH']}"
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": path}
    started = []
    for number, command in enumerate(commands):
        every = [*command, "train", *TINY, f"runs={folder}", *words]
        with open(folder / f"{number}.log", "wb") as log:
            started.append(subprocess.Popen(every, cwd=ROOT, env=environ, stdout=log, stderr=log))
    for number, process in enumerate(started):
        assert process.wait(LIMIT_SECONDS) == 0, (folder / f"{number}.log").read_text()
    lines = read_lines(folder / "run" / "metrics.jsonl")
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[float]:
    ours = [sys.executable, "-m", "launch"]
    folder = tmp_path_factory.mktemp("ours")
    return losses(folder, ours, words=["launch.processes=2", f"data.cache={cache}"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_of_another_launcher_give_the_losses_of_ours(
    tmp_path: Path, cache: Path, expected: list[float], name: str
) -> None:
    program, *flags = LAUNCHERS[name]
    command = [str(BIN / program), *flags]
    assert losses(tmp_path, command, words=[f"data.cache={cache}"]) == expected
    assert len(expected) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("by", ["one command on each host", "pdsh"])
def test_two_hosts_of_deepspeed_give_the_losses_of_one(
    tmp_path: Path, cache: Path, expected: list[float], by: str
) -> None:
    (tmp_path / "hosts").write_text(HOSTS)
    pdsh = tmp_path / "pdsh"
    pdsh.write_text(PDSH.format(python=sys.executable))
    pdsh.chmod(0o755)
    flags = [["--no_ssh", f"--node_rank={node}"] for node in (0, 1)]
    if by == "pdsh":
        flags = [["--no_ssh_check"]]
    head = [word.format(folder=tmp_path, port=free_port()) for word in HOSTFILE]
    commands = [[*head, *each, "--module", "launch"] for each in flags]
    assert losses(tmp_path, *commands, words=[f"data.cache={cache}"]) == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_accelerate_that_starts_one_process_of_two_is_refused(tmp_path: Path) -> None:
    flags = ["launch", "--cpu", "--num_processes=2", "--quiet", "-m", "launch", "train"]
    done = subprocess.run(
        [str(BIN / "accelerate"), *flags, *TINY, f"runs={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "tessera: accelerate launch --cpu starts one process" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_rank_is_refused_only_where_several_were_meant() -> None:
    one = {"ACCELERATE_MIXED_PRECISION": "no"}
    refuse_lone_rank({})
    refuse_lone_rank({"MASTER_ADDR": "127.0.0.1"})
    refuse_lone_rank(one)
    refuse_lone_rank(one | {"MASTER_ADDR": "127.0.0.1", "RANK": "0"})
    with pytest.raises(ValueError, match="use --multi_gpu"):
        refuse_lone_rank(one | {"MASTER_ADDR": "127.0.0.1"})
