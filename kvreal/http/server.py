"""A process's HTTP server: its socket is bound before anything else begins, and its signals are the process's own."""

from __future__ import annotations

import contextlib
import socket
from typing import Iterator

import uvicorn

from kvreal.endpoints import EndpointError


class Server(uvicorn.Server):
    """Leaves signals alone: the process has more to end than HTTP."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not accept yet. EndpointError: the port is taken."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = sorted(infos, key=lambda one: one[0] != socket.AF_INET)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise EndpointError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return sock
