"""Runs on a real Slurm with two nodes: they end, are stopped, come again, and compute the same.

`bash tests/cluster/run.sh` installs Slurm where it may and runs this.
"""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from launch.exit_codes import BAD_CONFIG, FINISHED
from tests.cluster.mini_slurm import is_installed
from tests.cluster.submitted import MAX_STEPS, NODES, Cluster
from tests.launch.test_supervisor import check_saved, curve, ledger
from trainer.checkpoint.commit import committed_steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_installed(), reason="needs root, and slurm-wlm and munge installed"),
]


def test_run_on_two_nodes_has_the_bits_of_two_processes(cluster: Cluster, whole: Path) -> None:
    job = cluster.submit("two", f"max_steps={MAX_STEPS}", "launch.time=01:00:00")
    job.until_state("COMPLETED")
    assert curve(job.run) == curve(whole)
    assert not job.processes(b"launch.worker")
    check_saved(job.run, MAX_STEPS)
    said = [line for line in job.log.splitlines() if line.startswith("tessera: ")]
    assert not [line for line in said if "submitted with the code of" not in line]


def test_job_told_of_its_limit_saves_is_queued_again_and_goes_on(
    cluster: Cluster, whole: Path
) -> None:
    """Slurm's own signal, which the batch script gets as `--signal=B:USR1@..` does."""
    job = cluster.submit("told", f"max_steps={MAX_STEPS}")
    job.until_steps(15)
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    job.until_state("COMPLETED")
    assert job.value("Restarts") == "1"
    assert curve(job.run) == curve(whole)
    steps = [line["step"] for line in ledger(job.run)]
    assert steps == list(range(1, MAX_STEPS + 1))  # the last step was saved: none came twice
    assert "stopped by SIGUSR1; last committed step: " in job.log
    assert f"queued again as job {job.number}" in job.log
    assert sorted(each.name for each in (job.run / "attempts").iterdir()) == ["001", "002"]


def test_limit_of_time_queues_a_job_again_and_scancel_ends_it_saved(cluster: Cluster) -> None:
    words = ("max_steps=1000000", "save_every=null", "launch.time=00:03:00")
    job = cluster.submit("limit", *words, "launch.signal_seconds=60")
    # Nothing else saves. A busy machine may be stopped before its first step at first.
    job.until(lambda: bool(committed_steps(job.run / "checkpoints")))
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=01:00:00")
    first = committed_steps(job.run / "checkpoints")[0]
    told = re.compile(r"stopped by (SIGUSR1|its time limit); last committed step: \d")
    job.until(lambda: bool(told.search(job.log)))  # it comes after the save
    job.until_steps(first + 15)
    restarts = job.value("Restarts")
    assert int(restarts) >= 1
    workers = job.processes(b"launch.worker")
    assert len(workers) == 2
    job.cancel()
    job.until_state("CANCELLED")
    job.until(lambda: not job.processes(b"launch"))
    last = ledger(job.run)[-1]["step"]
    check_saved(job.run, last)
    assert last >= first + 15
    steps = [line["step"] for line in ledger(job.run)]
    assert steps == list(range(1, last + 1))
    assert re.search(r"stopped by SIG(TERM|USR1); last committed step: \d", job.log)
    assert job.value("Restarts") == restarts


@pytest.mark.parametrize("node", [0, 1])
def test_killed_launcher_of_a_node_queues_the_job_again(
    cluster: Cluster, whole: Path, node: int
) -> None:
    job = cluster.submit(f"killed-{node}", f"max_steps={MAX_STEPS}", "save_every=10")
    job.until_steps(25)
    for pid in job.processes(b"launch.node"):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"SLURM_PROCID={node}".encode() in variables:
            os.kill(pid, signal.SIGKILL)
    job.until_state("COMPLETED")
    assert job.value("Restarts") == "1"
    assert f"node {node} of 2 is lost: its launcher has ended" in job.log
    assert curve(job.run) == curve(whole)


def test_job_that_is_refused_by_slurm_is_one_line_and_leaves_nothing(cluster: Cluster) -> None:
    for words, reason in (
        (("launch.partition=night",), "launch.partition=night is no partition of this cluster"),
        (("launch.gpus=1",), "Slurm did not take the job: "),
    ):
        done = cluster.train("name=refused", *NODES, *words)
        assert done.returncode == BAD_CONFIG, done.stderr
        (line,) = done.stderr.splitlines()
        assert reason in line
    assert not (cluster.folder / "refused").exists()


def test_bad_config_of_a_queued_job_is_told_and_not_queued_again(cluster: Cluster) -> None:
    job = cluster.submit("held", "max_steps=50", "launch.options=[--hold]")
    shutil.rmtree(job.run / "jobs" / "001" / "config.yaml", ignore_errors=True)
    (job.run / "jobs" / "001" / "config.yaml").write_text("[]")
    cluster.ask("scontrol", "release", job.number)
    job.until_state("FAILED")
    assert job.value("ExitCode") == f"{BAD_CONFIG}:0"
    assert job.value("Restarts") == "0"
    assert job.log.count("config.yaml holds no keys") == 1


def test_edit_of_the_config_after_submission_changes_no_queued_job(cluster: Cluster) -> None:
    """What the job trains lies in its folder: neither Hydra nor the YAML files are asked again."""
    job = cluster.submit("queued", "max_steps=3", "launch.options=[--hold]")
    stored = (job.run / "jobs" / "001" / "config.yaml").read_text()
    cluster.ask("scontrol", "release", job.number)
    job.until_state("COMPLETED")
    assert (job.run / "attempts" / "001" / "config.yaml").read_text() == stored
    assert "configs" not in (job.run / "jobs" / "001" / "job.sh").read_text()


def test_command_inside_of_an_allocation_trains_in_it(cluster: Cluster, whole: Path) -> None:
    words = ("name=inside", f"max_steps={MAX_STEPS}", *NODES)
    done = cluster.train(*words, before=("salloc", "--nodes=2", "--quiet"))
    assert done.returncode == FINISHED, done.stderr
    assert curve(cluster.folder / "inside") == curve(whole)
    done = cluster.train("launch=slurm", before=("salloc", "--nodes=2", "--quiet"))
    assert done.returncode == BAD_CONFIG
    assert "launch.nodes=1, but this is inside of job " in done.stderr
