"""Where ranks on one machine meet. Standard library only: the supervisor starts without torch."""

import secrets
import socket

LOW = range(20_000, 32_000)
"""Below those that Linux hands out (from 32,768 on): between the choice and rank 0's listening are
seconds, in which any connection on this machine may be given one of those."""


def free_port(ports: range = LOW, address: str = "127.0.0.1") -> int:
    """Return one of `ports`, any of them, on which nobody listens at an address; "": at any."""
    with hold_port(ports, address) as holder:
        return int(holder.getsockname()[1])


def hold_port(ports: range = LOW, address: str = "127.0.0.1") -> socket.socket:
    """Return a socket on such a port: while it is open, no other process is given this port.

    A server that sets SO_REUSEADDR, as that of Python, can listen there all the same (Linux).
    """
    while True:
        holder = socket.socket()
        try:
            holder.bind((address, secrets.choice(ports)))
        except OSError:  # taken: another one
            holder.close()
            continue
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # behind: two would share it
        return holder
