"""Sockets that are opened for another process."""

from __future__ import annotations

import os
import socket

import pytest

from weft.errors import SettingsError
from weft.listen import adopt, listening


def test_a_free_port_is_kept_on_every_address_of_the_host() -> None:
    with listening("localhost", 0) as sockets:
        (port,) = {listener.getsockname()[1] for listener in sockets}
        for listener in sockets:
            with pytest.raises(OSError, match="in use"):
                socket.create_server(listener.getsockname()[:2], family=listener.family).close()
        with pytest.raises(SettingsError, match=rf"port {port} on localhost is in use"), listening("localhost", port):
            pass
    with listening("localhost", port):
        pass


def test_a_connection_waits_for_whoever_adopts_the_socket() -> None:
    with listening("127.0.0.1", 0) as (listener,), socket.create_connection(listener.getsockname()) as client:
        (adopted,) = adopt(str(os.dup(listener.fileno())))
        with adopted, adopted.accept()[0] as connection:
            connection.sendall(b"hello")
            assert client.recv(5) == b"hello"


@pytest.mark.parametrize("descriptors", ["three", "1000000"])
def test_what_is_no_socket_is_refused_by_name(descriptors: str) -> None:
    with pytest.raises(SettingsError, match=rf"--listen-fds: '{descriptors}' are no descriptors of sockets"):
        adopt(descriptors)
