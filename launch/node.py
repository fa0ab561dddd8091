"""One node's launcher of a run that a scheduler has started: `python -m launch.node FOLDER`.

There is one on each node. Node 0's decides and speaks, the others do as it says; all of them end
with the same code. Standard library only, but for what reads the config.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch.crew import say_end
from launch.deadline import end_time, note_end, refuse_past
from launch.determinism import hold
from launch.exit_codes import INTERNAL, PREEMPTED, code_of
from launch.follower import Follower
from launch.group import Node, safe_paths
from launch.handover import Handover, note_outcome, read_handover
from launch.meeting import Link, LostError, Meeting, come, ports_of
from launch.request import LEASE_SECONDS, new_start, once_free, refuse
from launch.restarts import standing
from launch.signals import on_stop
from launch.supervisor import WORKER, Supervisor
from launch.terminal import redact_tracebacks, say
from launch.watchdog import WatchdogSpec


def node_of(environ: Mapping[str, str], handover: Handover) -> Node:
    """Return which node this is: by NODE_RANK, else by Slurm's variables of a step."""
    names = ("NODE_RANK", "SLURM_PROCID")
    found = next((environ[name] for name in names if name in environ), None)
    if handover.nodes > 1 and (found is None or "MASTER_ADDR" not in environ):
        raise ValueError(
            f"this is a run on {handover.nodes} nodes, and "
            f"{'NODE_RANK' if found is None else 'MASTER_ADDR'} is not set; set NODE_RANK to this "
            "node's number, from 0, and MASTER_ADDR to the address of node 0"
        )
    rank = int(found) if found is not None and found.isdigit() else 0
    if rank >= handover.nodes:
        raise ValueError(
            f"this is node {rank} of a run on {handover.nodes} nodes; start one launcher for each "
            "node, or submit with launch.nodes=.."
        )
    if handover.nodes == 1:
        return Node(processes=handover.processes)
    return Node(
        processes=handover.processes, rank=rank, count=handover.nodes,
        address=environ["MASTER_ADDR"],
    )  # fmt: skip


class Launcher:
    """One node's part of a run that was handed over in the folder `place`."""

    def __init__(self, place: Path, handover: Handover, node: Node, worker: str = WORKER) -> None:
        self.place, self.handover, self.node, self.worker = place, handover, node, worker
        self.signals: list[int] = []
        """The first that came, if any."""
        self._committed_before = self._committed()
        first = os.environ.get("MASTER_PORT")
        ports = ports_of(handover.key)
        self._ports = range(int(first), int(first) + len(ports)) if first else ports

    def run(self) -> int:
        """Return the exit code of the run, the same on all nodes."""
        on_stop(self._receive)
        hold(self.handover.deterministic, os.environ)
        note_end(end_time(self.handover.stop_at, os.environ))
        os.environ |= safe_paths(os.environ)
        try:
            return self._follow() if self.node.rank else self._lead()
        except TimeoutError as error:  # not all nodes have come
            say(str(error))
            return self._code_of(error)

    def _code_of(self, error: Exception) -> int:
        """Return the code to end with; a lost node is worth another job where this one has brought
        the run on, or where the scheduler counts."""
        if isinstance(error, LostError | TimeoutError) and (
            self.handover.counts_starts or self._committed() > self._committed_before
        ):
            return PREEMPTED
        return code_of(error)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self.signals:
            self.signals.append(number)

    def _is_stopped(self) -> bool:
        return bool(self.signals)

    def _lead(self) -> int:
        links: list[Link] = []
        try:
            if self.node.count > 1:
                meeting = Meeting(self.node, self.handover.key, self._ports)
                links += meeting.gather(self._is_stopped)
            attempt = None if self.signals else self._attempt()
            code = self._stopped() if attempt is None else self._supervise(attempt, links)
        except Exception as error:
            say_end(links, self._note(self._code_of(error)))
            raise
        code = self._note(code)
        say_end(links, code)
        from launch.report.write import try_report  # here: ranks are watched without the trainer

        try_report(Path(self.handover.folder))
        return code

    def _supervise(self, attempt: Path, links: Sequence[Link]) -> int:
        limits = self.handover.watchdog
        return Supervisor(
            self.node.processes, attempt, self.worker, restarts=self.handover.restarts,
            watchdog=WatchdogSpec(**limits) if limits else None, node=self.node, links=links,
            signals=self.signals, counts_starts=self.handover.counts_starts,
        ).run()  # fmt: skip

    def _attempt(self) -> Path | None:
        """Return the folder of this start, once the run is free; None where a stop came first."""
        from trainer.code_version import git_commit
        from trainer.directory import CONFIG
        from trainer.stored_config import read_stored

        refuse_past(self.handover.stop_at)
        if (now := git_commit()) not in (None, self.handover.git_commit):
            say(f"submitted with the code of {self.handover.git_commit}, which is {now} now")
        folder, tree = Path(self.handover.folder), read_stored(self.place / CONFIG)

        def start() -> Path:
            refuse(folder, tree)
            return new_start(folder, tree, tuple(self.handover.words))

        return once_free(start, LEASE_SECONDS, self._is_stopped)

    def _follow(self) -> int:
        link = come(self.node, self.handover.key, self._ports, self._is_stopped)
        if link is None:
            return PREEMPTED
        follower = Follower(
            self.node, link, self.worker, lambda: self.signals[0] if self.signals else None
        )
        try:
            return follower.run()
        except LostError as error:
            code = self._code_of(error)
            if self.node.rank == 1:  # one of those that are left speaks
                code = self._note(code)
                say(
                    f"node 0 of {self.node.count} is lost: its launcher has ended, or cannot be "
                    f"reached; {standing(self._committed())} (exit code {code})"
                )
            return code

    def _stopped(self) -> int:
        name = signal.Signals(self.signals[0]).name
        say(f"stopped by {name} before anything was started (exit code {PREEMPTED})")
        return PREEMPTED

    def _committed(self) -> int:
        from trainer.directory import newest_step

        return newest_step(Path(self.handover.folder))

    def _note(self, code: int) -> int:
        """Return the code to end with, written down for the scheduler."""
        noted = note_outcome(self.place, code, self._committed())
        if noted != code:
            say(
                f"stopped again and again without a new checkpoint: not once more (exit code "
                f"{noted}); give it more time (launch.time), or save sooner (save_every)"
            )
        return noted


def main(arguments: list[str], worker: str = WORKER) -> int:
    """Launch one node's part; return the exit code of the run."""
    redact_tracebacks()
    place = Path(arguments[0])
    try:
        handover = read_handover(place)
        return Launcher(place, handover, node_of(os.environ, handover), worker).run()
    except Exception as error:  # whatever has a remedy is said in one line
        code = code_of(error)
        if code == INTERNAL:
            raise
        say(str(error))
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
