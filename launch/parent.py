"""What ties a worker to its supervisor: it ends with it, and tells it where it hangs."""

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.exit_codes import INTERNAL
from trainer import parent_death

if TYPE_CHECKING:
    from trainer.whereabouts import Whereabouts


def die_with(parent: int) -> None:
    """End when the supervisor does; leave if it is dead already.

    Supervisors start workers in their main thread, whose end counts.
    """
    if not parent_death.die_with(parent):
        os._exit(INTERNAL)


def obey(pipe: int, attempt: Path, rank: int, whereabouts: "Whereabouts") -> None:
    """From now on, end when the pipe does, and say what this rank waits in when it is asked."""
    from launch.last_words import last_collective, write_whole

    def listen() -> None:
        while os.read(pipe, 1):
            collective = last_collective()
            if collective is None or collective["is_done"]:
                continue  # not in a collective: silence says so
            wait = {"code": INTERNAL, "reason": "it waits", "time": time.time()}
            wait |= {**whereabouts.place, "is_consequence": True, "collective": collective}
            write_whole(attempt / f"wait.{rank:05d}.json", wait)
        os._exit(INTERNAL)

    threading.Thread(target=listen, daemon=True, name="supervisor's pipe").start()


class Stacks:
    """The file that SIGUSR2 writes the stacks of all threads to, without needing Python's lock."""

    def __init__(self, attempt: Path, rank: int) -> None:
        self.path = attempt / f"stacks.{rank:05d}.txt"
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  until close
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)

    def close(self) -> None:
        """Leave no empty file behind."""
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
