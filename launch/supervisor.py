"""Starts the workers, forwards signals, starts them again together, and leaves nobody behind.

On this machine, and through the launchers of other nodes on theirs. Standard library only. Stands
in for torchrun, which turns every exit code into 1, dies on SIGUSR1 with its workers running on,
and leaves orphans when it is killed.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from launch.crew import Crew
from launch.deadline import in_vain
from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL, MEANINGS, NO_PROGRESS, PREEMPTED
from launch.group import Group, Node
from launch.meeting import Link
from launch.restarts import (
    Failure,
    Restarts,
    failure_of,
    how_it_stopped,
    last_step,
    leave_verdict,
    standing,
    way_on,
    with_hang,
)
from launch.signals import PATIENTLY_STOPPING, STOP_SIGNALS, STOPPING, on_stop
from launch.stragglers import Stragglers
from launch.terminal import say, show_cursor
from launch.verdict import Witness
from launch.watchdog import Hang, Watchdog, WatchdogSpec

GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
POLL_SECONDS = 0.05
LOOK_SECONDS = 0.25  # between two looks at all places
WORKER = "launch.worker"


class Supervisor:
    """A run of N processes, over all of its starts; they run the module `worker`."""

    def __init__(
        self,
        processes: int,
        attempt: Path,
        worker: str = WORKER,
        *,
        restarts: int = 0,
        watchdog: WatchdogSpec | None = None,
        node: Node | None = None,
        links: Sequence[Link] = (),
        signals: list[int] | None = None,
        counts_starts: bool = False,
    ) -> None:
        """`attempt` is the folder of the first start, with its config.yaml.

        Under a scheduler: the first `node` of several, `links` to the launchers of the others, and
        `signals` that came already, of which only the first counts; `counts_starts` of a Handover.
        """
        self.node = node or Node(processes=processes)
        self.attempt, self.worker, self.links = attempt, worker, links
        self.watchdog = watchdog
        self.signals: list[int] = [] if signals is None else signals
        self._is_patient, self._counts_starts = signals is not None, counts_starts
        self._committed_before = self._committed()
        self.restarts = Restarts(restarts, self._committed_before)
        self.failed_at: float | None = None
        """When the failure was seen from which the run has not yet come back."""
        self.recoveries: list[float] = []

    def run(self) -> int:
        """Start the workers, wait for all of them, and return the exit code of the run."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        on_stop(self._receive)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # inherited, until workers can write stacks
        while True:
            outcome = self._start_once()
            if isinstance(outcome, int):
                return outcome
            leave_verdict(self.attempt, outcome)
            end = self.restarts.end(outcome)
            if end is None and self.signals:
                end = outcome.code, f"{outcome}; not started again, since a stop was asked for"
            if end is not None:
                say(end[1])
                return end[0]
            say(f"{outcome}; starting again ({self.restarts.counted})")
            self.attempt = self._next_attempt()

    def _receive(self, number: int, _: FrameType | None) -> None:
        # A scheduler tells every process of a job, some of which tell us; SIGKILL is its second.
        if not (self._is_patient and self.signals):
            self.signals.append(number)

    def _start_once(self) -> int | Failure:
        """Return the exit code of the run, or the failure of this start."""
        count = len(self.restarts.failures)
        group: Group | Crew = (
            Crew(self.node, self.attempt, self.worker, self.links, count)
            if self.links
            else Group(self.node, self.attempt, self.worker, restarts=count)
        )
        hang = None
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            group.start()  # with signals blocked, as they were on the way here: workers inherit it
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            hang = self._wait(group)
        finally:
            group.kill()
            show_cursor()  # rank 0 may have had no time for it
        return self._judge(group, hang)

    def _wait(self, group: Group | Crew) -> Hang | None:
        """Return when all workers have ended, or when those that are left are to be killed."""
        watchdog = None
        if self.watchdog:
            watchdog = Watchdog(self.watchdog, self.node.world_size, self._committed() + 1)
        stragglers = Stragglers(self.node.world_size)
        forwarded, looked_at, failed_at = 0, time.monotonic(), None
        while group.is_running:
            time.sleep(POLL_SECONDS)
            for number in group.heard:
                self._receive(number, None)
            for number in self.signals[forwarded:]:
                self._forward(group, number)
                forwarded += 1
            if forwarded > 1:
                return None
            now = time.monotonic()
            if failed_at is None and group.has_failed:
                failed_at = now
                group.note_failure()
                self.failed_at = self.failed_at or now
            if group.lost or (failed_at is not None and now - failed_at > GRACE_SECONDS):
                return None
            if failed_at is None and now - looked_at > LOOK_SECONDS:
                places, gap, looked_at = group.places(), now - looked_at, now
                self._welcome_back(places)
                if told := stragglers.look(places, gap):
                    say(told)
                hang = watchdog.look(places, gap) if watchdog else None
                if hang:
                    self.failed_at = self.failed_at or now
                    group.interrogate()
                    return hang
        return None

    def _forward(self, group: Group | Crew, number: int) -> None:
        name = signal.Signals(number).name
        if len(self.signals) == 1:
            say(f"{name}: {PATIENTLY_STOPPING if self._is_patient else STOPPING}")
        group.send(number)

    def _welcome_back(self, places: list[dict[str, Any]]) -> None:
        """Say when a run that was started again has done its first step."""
        if self.failed_at is None:
            return
        done = max(map(last_step, places))
        if done > self.restarts.failures[-1].committed:
            self.recoveries.append(time.monotonic() - self.failed_at)
            self.failed_at = None
            say(f"back at work after {self.recoveries[-1]:.1f} s: step {done} is done")

    def _judge(self, group: Group | Crew, hang: Hang | None) -> int | Failure:
        if len(self.signals) > 1:
            return self._left_at_once(self.signals[-1])
        witnesses = group.witnesses()
        if group.lost or group.refusal:
            return self._without_a_node(group, witnesses)
        # Leaving without a record is a failure, with 0 too.
        codes = [each.code if each.code in MEANINGS else INTERNAL for each in witnesses]
        if set(codes) == {FINISHED}:
            if self.restarts.failures:
                say(self.restarts.in_words(self.recoveries))
            return FINISHED
        records = [each.record for each in witnesses]
        left_early = [record for record in records if record.get("has_begun") is False]
        if set(codes) == {PREEMPTED} or (self.signals and left_early):
            reason = (left_early or records)[0]["reason"]
            step, code = self._committed(), PREEMPTED
            is_saved = self._is_patient or step > self._committed_before  # who is patient may count
            if vain := in_vain(records[0], is_saved, os.environ):
                reason, code = f"{reason}; {vain}", NO_PROGRESS
            say(how_it_stopped(reason, step, code))
            return code
        failure = failure_of(witnesses, codes, self._committed())
        return failure if hang is None else with_hang(failure, hang, self.attempt)

    def _left_at_once(self, number: int) -> int:
        step, code = self._committed(), 128 + number
        say(
            f"{signal.Signals(number).name}: stopped at once by a second signal, without a save; "
            f"{standing(step)}; {way_on(step)} (exit code {code})"
        )
        return code

    def _without_a_node(self, group: Group | Crew, witnesses: Sequence[Witness]) -> Failure:
        """Judge a start that lost the launcher of a node, which only the scheduler can replace."""
        failure = failure_of(witnesses, [INTERNAL] * len(witnesses), self._committed())
        if group.refusal:
            return replace(failure, code=BAD_CONFIG, is_final=True, sentence=group.refusal)
        # Worth another job where this one has brought the run on: else it might go on for ever,
        # but where the scheduler counts.
        is_worth_it = self._counts_starts or failure.committed > self._committed_before
        return replace(
            failure,
            code=PREEMPTED if is_worth_it else INTERNAL,
            is_final=True,
            sentence=f"node {group.lost} of {self.node.count} is lost: its launcher has ended, or "
            "cannot be reached",
        )

    def _committed(self) -> int:
        from trainer.directory import newest_step

        return newest_step(self.attempt.parent.parent)

    def _next_attempt(self) -> Path:
        from trainer.directory import CONFIG, new_attempt

        attempt = new_attempt(self.attempt.parent.parent)
        shutil.copyfile(self.attempt / CONFIG, attempt / CONFIG)
        return attempt


def main() -> int:
    processes, attempt, restarts, watchdog = sys.argv[1:]
    spec = WatchdogSpec(**limits) if (limits := json.loads(watchdog)) else None
    code = Supervisor(int(processes), Path(attempt), restarts=int(restarts), watchdog=spec).run()
    from launch.report.write import try_report  # here: ranks are watched without the trainer

    try_report(Path(attempt).parent.parent)
    return code


if __name__ == "__main__":
    sys.exit(main())
