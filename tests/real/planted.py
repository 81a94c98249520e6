"""Transports with a fault in each, which the conformance suite must find: by ``tests.real.planted:NAME``."""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterator

import numpy as np

from kvreal.transfer import sockets
from kvreal.transfer.sockets import Batch, SocketCarrier
from kvreal.transfer.window import Window

_batches = sockets.batches


def _altered(alter: Callable[[Batch], Batch]) -> None:
    """What is about to be received goes through ``alter``."""

    def batches(*args: Any, fill: bool = True, **more: Any) -> Iterator[Batch]:
        for batch in _batches(*args, fill=fill, **more):
            yield batch if fill else alter(batch)

    sockets.batches = batches


class Short(SocketCarrier):
    """Takes every byte and puts all but the last seven where they belong."""

    name = "short"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        _altered(lambda batch: Batch([*batch.views[:-1], batch.views[-1][:-7], np.empty(7, dtype=np.uint8)]))


class Late(SocketCarrier):
    """Says that it is done, and puts the bytes away half a second later."""

    name = "late"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        _altered(self._later)

    @staticmethod
    def _later(batch: Batch) -> Batch:
        buffers = [np.empty_like(view) for view in batch.views]

        def land() -> None:
            for view, buffer in zip(batch.views, buffers):
                view[:] = buffer

        def store() -> None:
            threading.Timer(0.5, land).start()

        return Batch(buffers, store)


class Deaf(SocketCarrier):
    """Goes on receiving what a writer sends through a window that was closed."""

    name = "deaf"

    def revoke(self, window: Window) -> None:
        window.revoked = False


class Nameless(SocketCarrier):
    name = ""


def no_carrier(*_: Any) -> object:
    return object()
