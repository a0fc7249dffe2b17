"""Sockets that listen for a service, opened by whoever starts it and handed on to each of its lives.

The port is the service's from before its first life until after its last: nobody else can take it meanwhile, and who
connects between two lives is answered by the next.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Final

from weft.errors import SettingsError

# Connections that may wait to be taken.
BACKLOG: Final = 1024


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen on every address of the host, on the same port: any free one for 0. The sockets are closed at the end.

    Raises:
        SettingsError: the port is in use, or the host is not this machine.
    """
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
                listener = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # Addresses of IPv4 are sockets of their own.
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address[0], port, *address[2:]))
                listener.listen(BACKLOG)
                port = listener.getsockname()[1]
                sockets.append(listener)
        except OSError as error:
            what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise SettingsError(f"port {port} on {host} {what}: give another one with --port or --host") from error
        yield sockets


def adopt(descriptors: str) -> list[socket.socket]:
    """The sockets that were handed on to this process, by their file descriptors (`3,4`). Raises SettingsError."""
    try:
        return [socket.socket(fileno=int(descriptor)) for descriptor in descriptors.split(",")]
    except (OSError, ValueError) as error:
        raise SettingsError(f"--listen-fds: {descriptors!r} are no descriptors of sockets: {error}") from error
