"""One run directory has one writer: who holds it, who may take it over, and who finds out."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import lock as lock_module
from trainer.checkpoint.lock import (
    EXPIRED_SECONDS,
    RunLock,
    check_generation,
    read_lease,
    refuse_if_locked,
)
from trainer.errors import LockedError, StorageError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from trainer.checkpoint.lock import RunLock, check_generation
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
check_generation(lock.folder, lock.generation)
print("unaffected", flush=True)
sys.stdin.readline()
lock.release()
"""
FULL_DISK = """
import resource, sys, time
from pathlib import Path
from trainer.checkpoint import lock as lock_module
lock_module.HEARTBEAT_SECONDS = 0.02
lock = lock_module.RunLock(Path(sys.argv[1]))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
time.sleep(0.3)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
freed = time.time()
while time.time() < freed + 60 and lock_module.read_lease(Path(sys.argv[1]))["heartbeat"] < freed:
    time.sleep(0.02)
print("beats" if lock_module.read_lease(Path(sys.argv[1]))["heartbeat"] >= freed else "silent")
"""


@contextmanager
def another_process(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Yield a process that holds the lock of `folder`."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def say(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@contextmanager
def held(folder: Path) -> Iterator[RunLock]:
    lock = RunLock(folder)
    try:
        yield lock
    finally:
        lock.release()


def write_lease(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lease.json").write_text(json.dumps(fields))


def foreign_lease(seconds_old: float) -> dict[str, Any]:
    now = time.time()
    return {
        "host": "node17.example", "pid": 4321, "generation": 6,
        "since": now - 5000, "heartbeat": now - seconds_old,
    }  # fmt: skip


def at(since: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))


@pytest.mark.parametrize("take", [RunLock, refuse_if_locked])
def test_second_process_is_refused_and_told_who_holds_the_run(
    tmp_path: Path, take: Callable[[Path], object]
) -> None:
    with another_process(tmp_path) as holder:
        lease = read_lease(tmp_path)
        started = time.monotonic()
        with pytest.raises(LockedError) as refusal:
            take(tmp_path)
        assert time.monotonic() - started < EXPIRED_SECONDS / 2  # nobody waited for the lease
        message = str(refusal.value)
        assert str(tmp_path) in message
        assert (
            f"process {holder.pid} on {socket.gethostname()} since {at(lease['since'])}" in message
        )
        assert "name=" in message  # what to change
        assert say(holder) == "unaffected"
        assert read_lease(tmp_path)["generation"] == lease["generation"]


def test_killed_holder_leaves_the_lock_free(tmp_path: Path) -> None:
    with another_process(tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert read_lease(tmp_path)["pid"] == holder.pid  # its lease is still there
        refuse_if_locked(tmp_path)
        with held(tmp_path) as lock:
            assert lock.generation == 2


def test_released_lock_is_free_at_once(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(LockedError):
        refuse_if_locked(tmp_path)
    refuse_if_locked(tmp_path)
    with another_process(tmp_path) as holder:
        assert say(holder) == "unaffected"


def test_asking_takes_nothing_and_writes_nothing(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path):
        pass
    before = (tmp_path / "lease.json").read_bytes()
    refuse_if_locked(tmp_path)
    assert (tmp_path / "lease.json").read_bytes() == before


@pytest.mark.parametrize("take", [RunLock, refuse_if_locked])
def test_fresh_lease_of_another_host_is_refused(
    tmp_path: Path, take: Callable[[Path], object]
) -> None:
    lease = foreign_lease(EXPIRED_SECONDS / 2)
    write_lease(tmp_path, **lease)
    (tmp_path / "lock").touch()
    with pytest.raises(LockedError) as refusal:
        take(tmp_path)
    assert f"process 4321 on node17.example since {at(lease['since'])}" in str(refusal.value)
    assert read_lease(tmp_path) == lease


def test_expired_lease_of_another_host_is_taken_over(tmp_path: Path) -> None:
    write_lease(tmp_path, **foreign_lease(EXPIRED_SECONDS + 1))
    (tmp_path / "lock").touch()
    refuse_if_locked(tmp_path)
    with held(tmp_path) as lock:
        assert lock.generation == 7
        check_generation(lock.folder, lock.generation)
        assert read_lease(tmp_path)["host"] == socket.gethostname()
        assert read_lease(tmp_path)["pid"] == os.getpid()


def test_generation_rises_at_each_taking(tmp_path: Path) -> None:
    generations = []
    for _ in range(4):
        with held(tmp_path) as lock:
            check_generation(lock.folder, lock.generation)
            generations.append(lock.generation)
    assert generations == [1, 2, 3, 4]


@pytest.mark.parametrize("text", ["", "garbage", "[]", "\x00\x00"])
def test_unreadable_lease_stops_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "lease.json").write_text(text)
    (tmp_path / "lock").touch()
    refuse_if_locked(tmp_path)
    with held(tmp_path) as lock:
        check_generation(lock.folder, lock.generation)


def test_check_raises_once_another_generation_took_over(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    check_generation(lock.folder, lock.generation)
    write_lease(tmp_path, **foreign_lease(0))
    with pytest.raises(StorageError, match=r"taken over by generation 6 \(this is 1\)") as caught:
        check_generation(lock.folder, lock.generation)
    assert str(tmp_path) in str(caught.value)
    lock.release()


def test_heartbeat_of_a_former_holder_leaves_the_lease_of_its_successor_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    with held(tmp_path):
        successor = foreign_lease(0)
        write_lease(tmp_path, **successor)
        time.sleep(0.1)
        assert read_lease(tmp_path) == successor


def test_release_by_a_former_holder_leaves_the_lease_of_its_successor_alone(tmp_path: Path) -> None:
    """Else a third start is let in beside the successor, and generations go backwards."""
    successor = foreign_lease(0)
    with held(tmp_path):
        write_lease(tmp_path, **successor)
    assert read_lease(tmp_path) == successor


def test_holder_renews_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    with held(tmp_path):
        first = read_lease(tmp_path)
        deadline = time.monotonic() + 60
        while read_lease(tmp_path)["heartbeat"] == first["heartbeat"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert read_lease(tmp_path) | {"heartbeat": 0} == first | {"heartbeat": 0}


def test_heartbeat_goes_on_after_the_disk_was_full_for_a_while(tmp_path: Path) -> None:
    """Else another host takes over a live run a minute later."""
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "beats\n", found.stderr
