"""torchrun over two nodes with addresses of their own: network namespaces of this machine.

As root, with iproute2: pytest -m slow tests/cluster/test_namespaces.py
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import ROOT
from trainer.record import read_lines

STEPS, KILLED_AT = 60, 15
INTERFACE, NETWORK = "ts0", "10.77.0"
LIMIT_SECONDS = 1500.0
WORDS = [
    "experiment=demo", "name=run", f"max_steps={STEPS}", "log_every=1", "save_every=5",
    "checkpoint.background=false", "eval_every=null", "model.hidden_size=32",
    "model.intermediate_size=64", "model.num_hidden_layers=1", "data.row_tokens=32",
    "data.global_rows=8", "data.micro_rows=2", "data.max_documents=10", "precision=fp32",
    "callbacks.ngrams=null", "callbacks.closing.sample_tokens=0",
]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(4000),
    pytest.mark.skipif(
        os.getuid() != 0 or shutil.which("ip") is None,
        reason="needs root and iproute2 to make network namespaces",
    ),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Make two namespaces with a cable between them; nothing else is connected."""
    names = [f"tessera{os.getpid()}{letter}" for letter in "ab"]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", INTERFACE, "netns", names[0], "type", "veth",
           "peer", "name", INTERFACE, "netns", names[1])  # fmt: skip
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", INTERFACE)
            for each in (INTERFACE, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield names
    finally:
        for name in names:
            kill(name)
            ip("netns", "delete", name)


def kill(name: str) -> None:
    """End every process of a namespace at once, as a power cut does."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in found.stdout.split():
        subprocess.run(["kill", "-9", pid])


def start(name: str, number: int, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start the command of one node."""
    with open(folder / "output.log", "ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "launch", *words,
             f"launch.address={NETWORK}.{number}"],
            env=os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE}, cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip


def losses(folder: Path) -> list[float]:
    lines = read_lines(folder / "run" / "metrics.jsonl") if (folder / "run").exists() else []
    return [line["loss"] for line in lines if line["split"] == "train"]


def wait_for(folder: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(losses(folder)) < step:
        assert time.monotonic() < deadline, (folder / "output.log").read_text()
        time.sleep(0.02)


def test_a_node_is_killed_and_replaced_and_the_losses_are_those_of_one_machine(
    tmp_path: Path, nodes: list[str]
) -> None:
    words = ["train", *WORDS, f"data.cache={tmp_path / 'cache'}"]
    here, cluster = tmp_path / "here", tmp_path / "cluster"
    cluster.mkdir()
    local = [sys.executable, "-m", "launch", *words, f"runs={here}", "launch.processes=2"]
    subprocess.run(local, cwd=ROOT, check=True)
    words += [f"runs={cluster}", "launch=torchrun", "launch.nodes=2",
              f"launch.endpoint={NETWORK}.1", "launch.restarts=5"]  # fmt: skip
    running = [start(name, number, cluster, *words) for number, name in enumerate(nodes, 1)]
    wait_for(cluster, KILLED_AT)
    kill(nodes[1])
    running[1].wait()
    replacement = start(nodes[1], 2, cluster, *words)
    codes = [each.wait(LIMIT_SECONDS) for each in (running[0], replacement)]
    assert codes == [0, 0], (cluster / "output.log").read_text()
    assert losses(cluster) == losses(here)
    assert len(losses(here)) == STEPS
    assert len(list((cluster / "run" / "attempts").iterdir())) > 1
    ledger = [sys.executable, "-m", "launch", "ledger", f"run={cluster / 'run'}"]
    subprocess.run(ledger, cwd=ROOT, check=True)


def test_the_doctor_looks_at_both_nodes_and_at_what_lies_between(
    tmp_path: Path, nodes: list[str]
) -> None:
    line = ["torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={NETWORK}.1:29400", "-m", "launch", "doctor", f"runs={tmp_path}",
            "json=true"]  # fmt: skip
    running = []
    for number, name in enumerate(nodes, 1):
        own = [f"--rdzv-conf=is_host={int(number == 1)}", f"--local-addr={NETWORK}.{number}"]
        host = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"node{number}"]
        running.append(subprocess.Popen(
            ["ip", "netns", "exec", name, *host, sys.executable, "-m", line[0], *own, *line[1:]],
            env=os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE}, cwd=ROOT,
            stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
    told = [each.communicate(timeout=LIMIT_SECONDS)[0] for each in running]
    (report,) = (json.loads(text) for text in told if text.strip())
    found = {finding["check"]: finding for finding in report["findings"]}
    assert found["hosts"]["found"] in ("node1, node2", "node2, node1")
    for name in ("clocks of hosts", "shared folder", "between hosts", "all-reduce"):
        assert found[name]["is_fine"], found[name]
    assert "the same on 2 hosts" in found["shared folder"]["found"]
    assert "matmul" in found
