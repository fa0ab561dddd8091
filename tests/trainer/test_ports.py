"""A port for ranks to meet at."""

import socket

import pytest

from trainer.ports import free_port, hold_port


def test_a_port_is_free_and_none_that_the_kernel_hands_out() -> None:
    found = {free_port() for _ in range(20)}
    assert len(found) > 1
    assert max(found) < 32_768
    for port in found:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.socket() as taken:
        first = free_port()
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert {free_port(range(first, first + 3)) for _ in range(20)} <= {first + 1, first + 2}


def test_a_port_that_is_held_is_given_to_nobody_else_and_can_be_listened_at() -> None:
    with hold_port() as holder:
        address = holder.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with socket.create_server(address), socket.create_connection(address):
            pass
