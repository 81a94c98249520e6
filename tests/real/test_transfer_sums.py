"""Copies with checksums between two transports of one process: what is found wrong, how often, who is waited for."""

from __future__ import annotations

import threading
import time
from typing import Any, Iterator, List

import numpy as np
import pytest

from kvcore.protocol.machine import StartCopy
from kvreal.memory import Memory
from kvreal.transfer import make
from kvreal.transfer.job import Copy, Ended, Fate

pytestmark = pytest.mark.real
LOCATION = "LocalCPUBackend"
SLOT = 4096
KEYS = (b"k" * 32,)


class Side:
    """One process's memory and transport, with every byte summed. Its slot 0 is full of ``value``."""

    def __init__(self, address: str, value: int) -> None:
        self.memory = Memory()
        self.memory.lay_out([(LOCATION, 2)], SLOT)
        self.memory.put(LOCATION, 0, np.full(SLOT, value, dtype=np.uint8))
        self.transfer = make("socket", self.memory)
        self.transfer.checksums = "all"
        self.transfer.begin("a run", address)
        self.transfer.set_epoch(1)

    def move(self, peer: Side, read: bool, corrupt: bool = False) -> StartCopy:
        effect = StartCopy(
            (1, time.monotonic_ns()), read, peer.transfer.address, 1, LOCATION, (0,), LOCATION, (0,), (SLOT,), "", KEYS
        )
        fate = Fate(corrupt=corrupt)
        self.transfer.start(Copy(effect, peer.transfer.endpoint(), 1, 1, 60 * 10**9, fate))
        return effect

    def ended(self) -> Ended:
        until = time.monotonic() + 20
        found: List[Any] = []
        while not found and time.monotonic() < until:
            found = list(self.transfer.take())
            threading.Event().wait(0.005)
        assert found and isinstance(found[0], Ended)
        return found[0]


@pytest.fixture
def a() -> Iterator[Side]:
    side = Side("a/0", 1)
    yield side
    side.transfer.stop()


@pytest.fixture
def b() -> Iterator[Side]:
    side = Side("b/0", 2)
    yield side
    side.transfer.stop()


@pytest.mark.parametrize("read", [True, False], ids=["read", "push"])
def test_one_wrong_byte_is_found_and_the_copy_made_once_more(a: Side, b: Side, read: bool) -> None:
    mover, other = (b, a) if read else (a, b)
    mover.move(other, read, corrupt=True)
    assert mover.ended().state == "done"
    assert mover.transfer.mismatches == 1
    assert set(b.memory.get(LOCATION, 0, SLOT).tolist()) == {1}


def test_wrong_bytes_twice_fail_the_copy(a: Side, b: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil = b.transfer._spoil
    take_over = b.transfer._verify

    def verify(job: Any, links: Any) -> None:
        spoil(job)  # whatever was asked for
        take_over(job, links)

    monkeypatch.setattr(b.transfer, "_verify", verify)
    b.move(a, True)
    ended = b.ended()
    assert ended.state == "failed" and "wrong bytes twice" in ended.why and b.transfer.mismatches == 2


def test_a_writer_waits_for_its_peers_word_only_until_it_is_stopped(
    a: Side, b: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that stands still after the last byte, before it has said that they are right."""
    reached, go_on = threading.Event(), threading.Event()
    serve = b.transfer.carriers["socket"].serve

    def stands_still(window: Any) -> bool:
        over = serve(window)
        reached.set()
        go_on.wait(60)
        return over

    monkeypatch.setattr(b.transfer.carriers["socket"], "serve", stands_still)
    effect = a.move(b, False)
    assert reached.wait(20)
    a.transfer.abort(effect.rid)
    ended = a.ended()
    go_on.set()
    assert ended.state == "stopped"
