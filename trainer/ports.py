"""Where ranks on one machine meet. Standard library only: the supervisor starts without torch."""

import secrets
import socket
from contextlib import suppress

LOW = range(20_000, 32_000)
"""Below those that Linux hands out (from 32,768 on): between the choice and rank 0's listening are
seconds, in which any connection on this machine may be given one of those."""


def free_port(ports: range = LOW, address: str = "127.0.0.1") -> int:
    """Return one of `ports`, any of them, on which nobody listens at an address; "": at any."""
    while True:
        port = secrets.choice(ports)
        with suppress(OSError), socket.socket() as probe:  # taken: another one
            probe.bind((address, port))
            return port
