"""A real Slurm on this machine: a controller and two node daemons, n1 and n2, below one folder.

It needs root, and Debian's packages slurm-wlm and munge. Both nodes share the machine's file
system and address. `python -m tests.cluster.mini_slurm FOLDER` keeps one up until Ctrl-C.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = ("n1", "n2")
START_SECONDS = 60.0
KILL_WAIT_SECONDS = 60  # between SIGTERM and SIGKILL of a cancelled job
CREDENTIAL_SECONDS = 5  # a requeued job waits so long, and one second: by default two minutes
CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16917
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
KillWait={kill_wait}
MinJobAge=3600
MessageTimeout=60
SlurmdTimeout=600
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17101-17102] CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("slurmctld", "slurmd", "munged", "srun")))


@contextmanager
def mini_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run a cluster; yield the variables under which Slurm's commands find it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(
            host=socket.gethostname(), folder=folder, expire=CREDENTIAL_SECONDS,
            kill_wait=KILL_WAIT_SECONDS,
        )
    )  # fmt: skip
    variables = {"SLURM_CONF": str(conf)}
    _name_nodes()
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_munge(folder))
        for name, *words in (
            ("slurmctld", "-D"), *(("slurmd", "-D", "-N", node) for node in NODES),
        ):  # fmt: skip
            daemons.append(_start([name, *words], folder, variables))
        _wait_until_idle(folder, variables)
        yield variables
    finally:
        _end_jobs(variables)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20.0)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _end_jobs(variables: dict[str, str]) -> None:
    """Leave no job of a test that has failed: without its daemons it would train on."""
    around, deadline = os.environ | variables, time.monotonic() + 20.0
    for flags in (["--signal=KILL", "--full"], []):
        subprocess.run(["scancel", "--user=root", *flags], env=around, check=False)
    squeue = ["squeue", "--noheader"]
    while (
        time.monotonic() < deadline
        and subprocess.run(squeue, env=around, capture_output=True, check=False).stdout
    ):
        time.sleep(0.2)


def _start(
    command: list[str], folder: Path, variables: dict[str, str]
) -> "subprocess.Popen[bytes]":
    with open(folder / "daemons.out", "ab") as output:
        return subprocess.Popen(
            command, env=os.environ | variables, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip


def _munge(folder: Path) -> "subprocess.Popen[bytes]":
    """Start a munged of our own, with a key of its own."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    daemon = _start(
        [
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
        ], folder, {},
    )  # fmt: skip
    _until(lambda: (folder / "munge.socket").exists(), "munged has no socket", folder)
    return daemon


def _name_nodes() -> None:
    """Let the names of the nodes lead to this machine, as on any cluster."""
    hosts = Path("/etc/hosts")
    known = hosts.read_text()
    missing = [node for node in NODES if node not in known.split()]
    if missing:
        with open(hosts, "a") as file:  # another file in its place may be impossible in a container
            file.write(f"127.0.0.1 {' '.join(missing)}\n")


def _wait_until_idle(folder: Path, variables: dict[str, str]) -> None:
    def is_idle() -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--states=idle", "--format=%D"],
            env=os.environ | variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip() == str(len(NODES))

    _until(is_idle, "the nodes did not become idle", folder)


def _until(condition: object, what: str, folder: Path) -> None:
    assert callable(condition)
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            logs = [path.read_text()[-2000:] for path in folder.glob("*.log")]
            raise RuntimeError("\n".join([what, (folder / "daemons.out").read_text(), *logs]))
        time.sleep(0.2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with mini_slurm(Path(sys.argv[1])) as found:
        print(" ".join(f"{key}={value}" for key, value in found.items()), flush=True)
        signal.pause()
