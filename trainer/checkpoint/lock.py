"""One run directory has one writer: a file lock, and a lease that says who holds it.

Standard library only: the launcher asks before torch is imported.
"""

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import LockedError, StorageError
from trainer.files import write_json

HEARTBEAT_SECONDS = 5.0
EXPIRED_SECONDS = 60.0


class RunLock:
    """Held from construction to `release`; the kernel frees it when the process dies.

    A file lock may not reach other hosts on network storage: a lease of another host is respected
    until its heartbeat is EXPIRED_SECONDS old. Every taking raises the generation, so that a holder
    that was taken for dead cannot commit any more.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._lease = folder, folder / "lease.json"
        self._file = open(folder / "lock", "a", encoding="utf-8")  # noqa: SIM115  until release
        if not self._take_within(1.0):  # a launcher that only looks holds it for a moment
            self._file.close()
            raise LockedError(_refusal(folder, read_lease(folder)))
        lease = read_lease(folder)
        if _is_alive_elsewhere(lease):
            self._file.close()
            raise LockedError(_refusal(folder, lease))
        self.generation = int(lease.get("generation", 0)) + 1
        self._since = time.time()
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="lease")
        self._thread.start()

    def _take_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
            else:
                return True

    def _beat(self) -> None:
        lease = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "generation": self.generation,
            "since": self._since,
            "heartbeat": time.time(),
        }
        write_json(self._lease, lease)

    def _keep_beating(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            found = read_lease(self.folder).get("generation")  # None: could not be read, just now
            if isinstance(found, int) and found > self.generation:
                return  # taken over: `check_generation` tells the writer
            with suppress(OSError):  # a full disk passes; every commit looks by itself
                self._beat()

    @property
    def descriptor(self) -> int:
        """The locked file: a process that inherits it keeps the lock alive as long as it lives."""
        return self._file.fileno()

    def release(self) -> None:
        self._stopped.set()
        self._thread.join()
        if read_lease(self.folder).get("generation") == self.generation:
            with suppress(OSError):  # what failed on this disk before is what the run ends with
                write_json(self._lease, {"generation": self.generation})
        self._file.close()


def check_generation(folder: Path, generation: int) -> None:
    """Raise StorageError where another process took the lock over: the fence before a commit.

    OSError where that cannot be told.
    """
    found = _parsed((folder / "lease.json").read_text()).get("generation")
    if found != generation:
        raise StorageError(
            f"{folder} was taken over by generation {found} (this is {generation}); "
            "nothing was committed"
        )


def refuse_if_locked(folder: Path) -> None:
    """Raise LockedError at once when another process holds the run directory."""
    if not (folder / "lock").exists():
        return
    with open(folder / "lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(_refusal(folder, read_lease(folder))) from None
    lease = read_lease(folder)
    if _is_alive_elsewhere(lease):
        raise LockedError(_refusal(folder, lease))


def read_lease(folder: Path) -> dict[str, Any]:
    """Return the lease, or an empty one where none can be read."""
    try:
        return _parsed((folder / "lease.json").read_text())
    except (OSError, ValueError):
        return {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        lease = json.loads(text)
    except ValueError:
        return {}
    return lease if isinstance(lease, dict) else {}


def _is_alive_elsewhere(lease: dict[str, Any]) -> bool:
    is_elsewhere = lease.get("host") not in (None, socket.gethostname())
    return is_elsewhere and time.time() - float(lease.get("heartbeat", 0)) < EXPIRED_SECONDS


def _refusal(folder: Path, lease: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(lease.get("since", 0))))
    holder = f"process {lease.get('pid', '?')} on {lease.get('host', '?')} since {since}"
    return (
        f"{folder} is in use by {holder}; wait for it, stop it there with a save (kill "
        f"{lease.get('pid', 'PID')}), or start a run of another name (name=..)"
    )
