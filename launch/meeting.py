"""How the launchers of several nodes find each other: node 0 listens, the others come to it.

Both sides prove that they know the key of the run, which lies in its folder. Messages are JSON.
Standard library only.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from launch.group import Node

MEET_SECONDS = 600.0  # nodes of one job may start minutes apart
PORTS = range(20_000, 32_000)  # below those that Linux hands out
TRIES = 8  # ports, one after the other
_POLL_SECONDS = 0.1
_STALL_SECONDS = 10  # for the rest of a message that has begun
_SILENT_SECONDS, _PROBES = 10, 3  # after which a machine counts as gone that answers nothing


class LostError(Exception):
    """The other side has ended, or cannot be reached any more."""


class Link:
    """A connection to another launcher."""

    def __init__(self, found: socket.socket) -> None:
        found.settimeout(None)
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENT_SECONDS), (socket.TCP_KEEPINTVL, _SILENT_SECONDS),
            (socket.TCP_KEEPCNT, _PROBES),
            (socket.TCP_USER_TIMEOUT, 1000 * _SILENT_SECONDS * _PROBES),
        ):  # fmt: skip
            found.setsockopt(socket.IPPROTO_TCP, option, value)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stall = struct.pack("ll", _STALL_SECONDS, 0)  # a stranger may say nothing
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
        self._connection = Connection(found.detach())

    def send(self, **message: Any) -> None:
        """Send one object; LostError where nobody is left to take it."""
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise LostError from error

    def receive(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """Return the next object, None: none came within so many seconds. LostError."""
        try:
            if not self._connection.poll(seconds):
                return None
            return dict(json.loads(self._connection.recv_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise LostError from error

    def prove(self, key: bytes, *, is_first: bool) -> bool:
        """Whether both sides know the key; one of them asks first."""
        steps = [deliver_challenge, answer_challenge]
        try:
            for step in steps if is_first else reversed(steps):
                step(self._connection, key)
        except (AuthenticationError, OSError, EOFError, AssertionError):
            self.close()
            return False
        return True

    def close(self) -> None:
        self._connection.close()


def ports_of(key: str) -> range:
    """Return where a run's launchers meet: other runs of the same machine meet elsewhere."""
    first = PORTS[int(key[:8], 16) % (len(PORTS) - TRIES)]
    return range(first, first + TRIES)


class Meeting:
    """Node 0's side: everybody of this run who comes, until all nodes are there."""

    def __init__(self, node: Node, key: str, ports: range) -> None:
        self.node, self._key = node, key.encode()
        self.hellos: dict[int, tuple[Link, dict[str, Any]]] = {}
        self._socket = _listen(ports)
        threading.Thread(target=self._accept, daemon=True, name="meeting").start()

    def gather(self, is_stopped: Callable[[], bool]) -> list[Link]:
        """Return the links to nodes 1, 2, ..; ValueError or TimeoutError where they do not fit or
        come. Fewer where a stop was asked for meanwhile."""
        deadline = time.monotonic() + MEET_SECONDS
        while len(self.hellos) < self.node.count - 1 and not is_stopped():
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self.node.count)) - self.hellos.keys())
                raise TimeoutError(
                    f"nodes {missing} of {self.node.count} did not come to {self.node.address} "
                    f"within {MEET_SECONDS:.0f} s; see what their launchers said, and whether this "
                    "address can be reached from there"
                )
            time.sleep(_POLL_SECONDS)
        self.close()
        for number, (_, hello) in self.hellos.items():
            if hello["processes"] != self.node.processes:
                raise ValueError(
                    f"node {number} has {hello['processes']} processes and node 0 has "
                    f"{self.node.processes}; give all nodes the same number"
                )
        return [self.hellos[number][0] for number in sorted(self.hellos)]

    def close(self) -> None:
        """Let nobody in any more."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # close alone leaves the thread in accept
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed: all are there
            while True:
                found, _ = self._socket.accept()
                threading.Thread(target=self._welcome, args=(found,), daemon=True).start()

    def _welcome(self, found: socket.socket) -> None:
        link = Link(found)
        if not link.prove(self._key, is_first=True):
            return
        with suppress(LostError):
            hello = link.receive(_STALL_SECONDS)
            if hello and hello.get("node") in range(1, self.node.count):
                self.hellos[hello["node"]] = link, hello  # one that starts anew comes again


def _listen(ports: range) -> socket.socket:
    for port in ports:
        with suppress(OSError):  # somebody else's: the next one
            return socket.create_server(("", port), backlog=128)
    raise ValueError(
        f"ports {ports.start} to {ports.stop - 1} of this machine are all in use, where the "
        "launchers of the other nodes would come; set MASTER_PORT to the first of 8 free ones "
        "(of a Slurm job: launch.setup='export MASTER_PORT=..')"
    )


def come(node: Node, key: str, ports: range, is_stopped: Callable[[], bool]) -> Link | None:
    """Return the link to node 0; None where a stop was asked for. TimeoutError."""
    deadline = time.monotonic() + MEET_SECONDS
    while not is_stopped():
        for port in ports:
            with suppress(OSError, LostError):
                link = Link(socket.create_connection((node.address, port), _STALL_SECONDS))
                if link.prove(key.encode(), is_first=False):
                    host = socket.gethostname()
                    link.send(node=node.rank, processes=node.processes, host=host)
                    return link
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"node {node.rank} did not find node 0 at {node.address}, ports {ports.start} to "
                f"{ports.stop - 1}, within {MEET_SECONDS:.0f} s; see whether it has started, and "
                "whether this address can be reached from here"
            )
        time.sleep(_POLL_SECONDS)
    return None
