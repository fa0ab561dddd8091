"""The workers of all nodes of one start, seen from node 0 as one group. Standard library only."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.group import Group, Node
from launch.meeting import Link, LostError
from launch.verdict import Witness

KILL_SECONDS = 30.0  # for another node to say that none of its workers is left
ANY_INTERFACE = ""


class Member:
    """Another node in one start, as far as its launcher told."""

    def __init__(self, link: Link, ranks: range) -> None:
        self.link, self.ranks = link, ranks
        self.is_running, self.has_failed, self.is_lost = True, False, False
        self.places: list[dict[str, Any]] = [{}] * len(ranks)
        self.witnesses: list[Witness] | None = None
        self.heard: list[int] = []
        """Signals that reached this node."""
        self.refusal = ""

    def tell(self, **message: Any) -> None:
        try:
            self.link.send(**message)
        except LostError:
            self.is_lost = True

    def listen(self) -> None:
        """Take in what has come."""
        try:
            while not self.is_lost and (message := self.link.receive()) is not None:
                self._take(message)
        except LostError:
            self.is_lost = True

    def _take(self, message: dict[str, Any]) -> None:
        if "signal" in message:
            self.heard.append(message["signal"])
        elif "refusal" in message:
            self.refusal, self.is_running, self.has_failed = message["refusal"], False, True
            self.witnesses = [Witness(rank=rank) for rank in self.ranks]
        elif "witnesses" in message:
            self.witnesses = [Witness(**each) for each in message["witnesses"]]
        else:
            self.is_running, self.has_failed = message["is_running"], message["has_failed"]
            self.places = message["places"]


class Crew:
    """Behaves as a Group does, over all nodes."""

    def __init__(
        self, node: Node, attempt: Path, worker: str, links: Sequence[Link], restarts: int = 0
    ) -> None:
        self.node, self.attempt = node, attempt
        from trainer.ports import free_port  # here: the help needs nothing of the trainer

        self.port = free_port(address=ANY_INTERFACE)
        self.own = Group(node, attempt, worker, self.port, restarts)
        size = node.processes
        self.others = [
            Member(link, range(number * size, (number + 1) * size))
            for number, link in enumerate(links, 1)
        ]

    def start(self) -> None:
        count = self.own.restarts
        self._tell(do="start", attempt=str(self.attempt), port=self.port, restarts=count)
        self.own.start()

    def _tell(self, **message: Any) -> None:
        for member in self.others:
            member.tell(**message)

    @property
    def is_running(self) -> bool:
        for member in self.others:
            member.listen()
        others = any(member.is_running and not member.is_lost for member in self.others)
        return self.own.is_running or others

    @property
    def has_failed(self) -> bool:
        return self.own.has_failed or any(m.has_failed or m.is_lost for m in self.others)

    @property
    def heard(self) -> list[int]:
        """Signals that reached other nodes."""
        return [number for member in self.others for number in member.heard]

    @property
    def lost(self) -> str:
        """Names the nodes whose launchers are gone; empty: none."""
        numbers = [n for n, member in enumerate(self.others, 1) if member.is_lost]
        return ", ".join(map(str, numbers))

    @property
    def refusal(self) -> str:
        """Why a node started nothing."""
        return next((member.refusal for member in self.others if member.refusal), "")

    def send(self, number: int) -> None:
        self._tell(do="signal", number=number)
        self.own.send(number)

    def places(self) -> list[dict[str, Any]]:
        return self.own.places() + [place for member in self.others for place in member.places]

    def note_failure(self) -> None:
        self._tell(do="note_failure")
        self.own.note_failure()

    def interrogate(self) -> None:
        self._tell(do="interrogate")
        self.own.interrogate()

    def kill(self) -> None:
        """Leave no worker on any node that can still be reached."""
        self._tell(do="kill")
        self.own.kill()
        deadline = time.monotonic() + KILL_SECONDS
        while any(member.witnesses is None and not member.is_lost for member in self.others):
            for member in self.others:
                member.listen()
                member.is_lost |= member.witnesses is None and time.monotonic() > deadline
            time.sleep(0.01)

    def witnesses(self) -> list[Witness]:
        found = self.own.witnesses()
        for member in self.others:
            # Of a lost node nothing is known but where its ranks were.
            found += member.witnesses or [
                Witness(rank=rank, place=place)
                for rank, place in zip(member.ranks, member.places, strict=True)
            ]
        return found


def say_end(links: Sequence[Link], code: int) -> None:
    """Tell the other launchers that the run has ended; one that is gone needs not to know."""
    for link in links:
        with suppress(LostError):
            link.send(do="end", code=code)
