"""Keys: only who has the cluster's secret touches memory, and nothing that strangers say is unpickled."""

from __future__ import annotations

import ast
import pickle
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvcore.protocol.machine import StartCopy
from kvreal.memory import Memory
from kvreal.spans import packed
from kvreal.transfer import TransferError
from kvreal.transfer import make as make_transfer
from kvreal.transfer.frames import Challenge, Sealed, read_message, send_message
from kvreal.transfer.job import Copy, Ended, Fate
from kvreal.transfer.line import Line
from kvreal.transfer.window import Grant, Hello, Info
from tests.real.http.cluster import ROOT, eventually

pytestmark = pytest.mark.real


# ---- copies
class Side:
    """A process's memory and transport, with a location A of four slots."""

    def __init__(self, address: str, secret: bytes) -> None:
        self.memory = Memory()
        self.memory.lay_out([("A", 4)], 4096)
        self.transfer = make_transfer("socket", self.memory)
        self.transfer.windows.secret = secret
        self.transfer.begin("kvmove", address)
        self.transfer.set_epoch(1)

    def fill(self, value: int) -> None:
        self.memory.put("A", 0, np.full(4096, value, dtype=np.uint8))

    def first(self) -> int:
        return int(self.memory.get("A", 0, 4096)[0])

    def read_from(self, peer: Side) -> Ended:
        effect = StartCopy((1, time.monotonic_ns()), True, peer.transfer.address, 1, "A", (0,), "A", (0,), (4096,))
        self.transfer.start(Copy(effect, peer.transfer.endpoint(), 1, 1, 10**10, Fate()))
        found: list[object] = []
        eventually(lambda: found.extend(self.transfer.take()) or found)
        ended = found[0]
        assert isinstance(ended, Ended)
        return ended


@pytest.fixture
def sides() -> Iterator[Callable[[str, bytes], Side]]:
    made: list[Side] = []

    def make(address: str, secret: bytes) -> Side:
        made.append(Side(address, secret))
        return made[-1]

    yield make
    for side in made:
        side.transfer.stop()


@pytest.mark.parametrize(
    "reader, holder, state",
    [
        (b"s" * 32, b"s" * 32, "done"),
        (b"", b"", "done"),
        (b"x" * 32, b"s" * 32, "failed"),
        (b"", b"s" * 32, "failed"),
    ],
)
def test_memory_is_granted_to_who_has_the_secret(
    sides: Callable[[str, bytes], Side], reader: bytes, holder: bytes, state: str
) -> None:
    a = sides("a", holder)
    b = sides("b", reader)
    a.fill(7)
    ended = b.read_from(a)
    assert ended.state == state, ended
    assert (b.first() == 7) == (state == "done")
    eventually(lambda: a.transfer.windows.refused == (0 if state == "done" else 1))


def test_a_recorded_hello_opens_nothing(sides: Callable[[str, bytes], Side]) -> None:
    """Replayed byte for byte on a new connection: the nonce is another, so the proof is wrong."""
    a = sides("a", b"s" * 32)
    port = a.transfer.windows.port
    hello = Hello("kvmove", "read", "b", 1, "a", 1, "A", packed([0]), packed([4096]), by="socket")
    tapped: list[bytes] = []

    class Tap(socket.socket):
        def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
            tapped.append(bytes(data))
            super().sendall(data, flags)

    with Tap() as sock:
        sock.connect(("127.0.0.1", port))
        assert Line(sock, "a").open(hello, b"s" * 32).ok
    with socket.create_connection(("127.0.0.1", port)) as sock:
        read_message(sock)
        sock.sendall(tapped[0])
        with pytest.raises(ConnectionError):
            read_message(sock)
    eventually(lambda: a.transfer.windows.refused == 1)


class Bomb:
    went_off = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return (_go_off, ())


def _go_off() -> None:
    Bomb.went_off = True


def test_metadata_of_who_has_not_the_secret_is_never_looked_at() -> None:
    """NIXL's Python API unpickles a peer's metadata, so a stranger must not get that far: its answer is not decoded."""
    info = Info(1, 1, "agent", pickle.dumps(Bomb()), (), 0)
    grant = msgspec.msgpack.encode(Grant(True, "", info))
    hello = Hello("kvmove", "read", "b", 1, "a", 1)
    sealed = msgspec.msgpack.encode(Sealed(b"n" * 32, grant, b"p" * 32))
    challenge = msgspec.msgpack.encode(Challenge(b"n" * 32))
    for answers in ([grant], [challenge, grant], [challenge, sealed], [msgspec.msgpack.encode(Challenge(b"short"))]):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for answer in answers:
                send_message(theirs, answer)
            with pytest.raises(TransferError):
                Line(ours, "a").open(hello, b"s" * 32)
    assert not Bomb.went_off


def test_garbage_at_a_window_is_refused_and_does_no_harm(sides: Callable[[str, bytes], Side]) -> None:
    for secret in (b"", b"s" * 32):
        a = sides("a", secret)
        b = sides("b", secret)
        a.fill(9)
        garbage = [
            b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 1 << 31), struct.pack("<I", 3) + b"abc",
            struct.pack("<I", 100) + b"short", struct.pack("<I", 6) + b"\x81\xa1\xff\xa1\xff\xc0",
            struct.pack("<I", len(pickle.dumps(Bomb()))) + pickle.dumps(Bomb()),
        ]  # fmt: skip
        for data in garbage:
            with socket.create_connection(("127.0.0.1", a.transfer.windows.port)) as sock:
                sock.sendall(data)
        count = len(garbage)
        eventually(lambda a=a, count=count: a.transfer.windows.refused == count)
        assert b.read_from(a).state == "done"
        assert b.first() == 9
    assert not Bomb.went_off


def test_who_came_before_there_was_a_secret_is_refused_after(sides: Callable[[str, bytes], Side]) -> None:
    a = sides("a", b"")
    asked = Hello("kvmove", "read", "b", 1, "a", 1, "A", packed([0]), packed([4096]), by="socket")
    hello = msgspec.msgpack.encode(asked)
    with socket.create_connection(("127.0.0.1", a.transfer.windows.port)) as sock:
        eventually(lambda: a.transfer.windows.strangers == 1)
        a.transfer.windows.secret = b"s" * 32
        send_message(sock, hello)
        with pytest.raises(ConnectionError):
            read_message(sock)


def test_those_who_connect_and_say_nothing_are_bounded(
    sides: Callable[[str, bytes], Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvreal.transfer.window.MAX_STRANGERS", 4)
    a = sides("a", b"")
    silent = [socket.create_connection(("127.0.0.1", a.transfer.windows.port)) for _ in range(10)]
    try:
        eventually(lambda: a.transfer.windows.refused == 6)
        assert a.transfer.windows.strangers == 4
    finally:
        for sock in silent:
            sock.close()
    eventually(lambda: a.transfer.windows.strangers == 0)
    a.fill(3)
    b = sides("b", b"")
    assert b.read_from(a).state == "done"


# ---- pickle
UNSAFE = re.compile(r"^(pickle|cPickle|dill|cloudpickle|marshal|shelve|jsonpickle)$")
UNSAFE_CALLS = frozenset({"send_pyobj", "recv_pyobj", "unsafe_load", "full_load"})
UNSAFE_NAMES = UNSAFE_CALLS | {"eval", "exec"}
"""By themselves; a model has a method of that name that is another thing."""


OFFLINE = ("kvcore/scenario/search/", "kvcore/scenario/world.py")
"""They search schedules in one process, and copy machines in its memory; no service has them."""


def test_nothing_of_ours_unpickles() -> None:
    """No import of pickle or its kin in what can run in a service, and no call that hides one."""
    found: list[str] = []
    for package in ("kvcore", "kvreal", "kvmove"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(OFFLINE):
                found += [f"{name}:{line}" for line in _unsafe(path)]
    assert found == []


def _unsafe(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        elif isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute)
            name = getattr(node.func, "attr" if method else "id", "")
            if name in (UNSAFE_CALLS if method else UNSAFE_NAMES):
                yield f"{node.lineno}: {name}()"
            continue
        else:
            continue
        yield from (f"{node.lineno}: {name}" for name in names if UNSAFE.match(name))


def test_no_service_has_what_unpickles_offline() -> None:
    code = (
        "import sys, kvreal.controller, kvreal.instance, kvreal.rank, kvmove.cli;"
        "print([name for name in sys.modules if name.startswith(('kvcore.scenario.search', 'kvcore.scenario.world'))])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout.strip(), ended.returncode) == ("[]", 0), ended.stderr
