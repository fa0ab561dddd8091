"""Starts torchrun for one node, tells it of signals, and says how the run ended.

torchrun returns 1 for a run that has saved and stopped, and 0 for one that ended on a single rank:
what counts is what the ranks left in the folder of their start. Standard library only.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

from launch.exit_codes import FINISHED, INTERNAL, PREEMPTED, in_words
from launch.node_watch import AGENT, NodeWatch
from launch.restarts import failure_of, how_it_stopped
from launch.signals import STOP_SIGNALS, on_stop
from launch.terminal import say
from launch.traces import read_places, read_records
from launch.verdict import Witness
from launch.watchdog import WatchdogSpec
from trainer.directory import ENVIRONMENT, attempts_of, newest_step

SETTLE_SECONDS, POLL_SECONDS = 10.0, 0.1  # for ranks of other nodes to leave their records
LOOK_SECONDS = 0.5  # between two looks at the ranks of this node


class Agent:
    """torchrun with its arguments, for the run of a folder."""

    def __init__(
        self, folder: Path, arguments: list[str], processes: int = 1,
        watchdog: WatchdogSpec | None = None,
    ) -> None:  # fmt: skip
        """`processes` are on this node; `watchdog` says when one of them hangs, None: never."""
        self.folder, self.arguments = folder, arguments
        self.before = set(attempts_of(folder))
        self.watch = NodeWatch(folder, self.before, processes, watchdog) if watchdog else None
        self.signals: list[int] = []

    def run(self) -> int:
        """Return the exit code of the run."""
        on_stop(self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # torchrun inherits the mask
        from trainer.parent_death import die_with

        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *self.arguments],
            env=os.environ | {AGENT: str(os.getpid())},
            start_new_session=True,  # the terminal's Ctrl-C reaches us alone: we forward it
            preexec_fn=partial(die_with, os.getpid()),
        )
        forwarded, looked_at = 0, time.monotonic()
        while torchrun.poll() is None:
            for number in self.signals[forwarded:]:
                torchrun.send_signal(number)
                forwarded += 1
            gap = time.monotonic() - looked_at
            if self.watch and gap > LOOK_SECONDS:
                looked_at += gap
                if told := self.watch.look(gap):
                    say(told)
            time.sleep(POLL_SECONDS)
        code, sentence = self.judge(torchrun.returncode)
        if sentence:
            say(sentence)
        return code

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signals.append(number)

    def judge(self, returned: int) -> tuple[int, str]:
        """Return the exit code of the run and the last words, by what its last start has left."""
        new = [each for each in attempts_of(self.folder) if each not in self.before]
        if not new:
            if self.signals:
                name = signal.Signals(self.signals[0]).name
                return PREEMPTED, f"stopped by {name} before anything was started"
            return INTERNAL, f"torchrun ended with code {returned} before any rank had begun"
        attempt = new[-1]
        ranks = range(_size(attempt))
        deadline = time.monotonic() + SETTLE_SECONDS
        while not all(records := read_records(attempt, ranks)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        codes = [int(record.get("code", INTERNAL)) for record in records]
        if set(codes) == {FINISHED}:
            return FINISHED, ""
        stopped = [record for record in records if record.get("code") == PREEMPTED]
        if stopped and set(codes) <= {FINISHED, PREEMPTED}:
            step = newest_step(self.folder)
            return PREEMPTED, how_it_stopped(stopped[0]["reason"], step)
        places = read_places(attempt, ranks)
        witnesses = [
            Witness(rank=rank, place=place, record=record)
            for rank, place, record in zip(ranks, places, records, strict=True)
        ]
        failure = failure_of(witnesses, codes, newest_step(self.folder))
        return failure.code, f"{failure}; {in_words(failure.code)}"


def _size(attempt: Path) -> int:
    """Return how many ranks a start had; those that left a trace, where it did not come far."""
    try:
        return int(json.loads((attempt / ENVIRONMENT).read_text())["world_size"])
    except (OSError, ValueError, KeyError):
        traces = attempt.glob("*.?????.json")
        return max((int(path.name.split(".")[1]) + 1 for path in traces), default=1)


def main() -> int:
    folder, processes, limits, *arguments = sys.argv[1:]
    spec = WatchdogSpec(**found) if (found := json.loads(limits)) else None
    return Agent(Path(folder), arguments, int(processes), spec).run()


if __name__ == "__main__":
    sys.exit(main())
