"""Messages within a host: who is near, what arrives, and that nothing which comes or goes there harms anybody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Callable, Iterator, List, Sequence

import pytest

from kvreal import near
from kvreal.endpoints import Endpoints
from kvreal.near import Near

pytestmark = pytest.mark.real


def at(name: str) -> str:
    """A name that nobody else has."""
    return f"{name}:{os.getpid()}:{time.monotonic_ns()}"


@pytest.fixture
def made() -> Iterator[Callable[[str], Near]]:
    every: List[Near] = []

    def make(name: str) -> Near:
        every.append(Near(name))
        return every[-1]

    yield make
    for one in every:
        one.close()


def arrives(one: Near, count: int, timeout_s: float = 5.0, other: Near | None = None) -> List[List[bytes]]:
    found: List[List[bytes]] = []
    end = time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < end, f"{len(found)} of {count} frames"
        found += one.arriving()
        if other is not None:
            other.arriving()
    return found


def test_frames_arrive_whole_in_order_and_of_any_size(made: Callable[[str], Near]) -> None:
    name = at("b")
    a, b = made(at("a")), made(name)
    sent = [[b"head", os.urandom(size), b""] for size in (0, 1, 5000, 3 << 20, 7, 300_000)]
    assert all(a.send(name, frame) for frame in sent)
    assert arrives(b, len(sent), other=a) == sent


def test_who_is_not_here_is_said_to_be_elsewhere_and_found_once_it_is_here(
    made: Callable[[str], Near], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "AGAIN_S", 0.0)
    name = at("late")
    a = made(at("a"))
    assert a.send(name, [b"h", b"1"]) is None
    late = made(name)
    assert a.send(name, [b"h", b"2"]) is True
    assert arrives(late, 1) == [[b"h", b"2"]]


def test_who_comes_back_is_reached_and_who_has_gone_is_not(made: Callable[[str], Near]) -> None:
    name = at("b")
    a, b = made(at("a")), made(name)
    assert a.send(name, [b"1"])
    b.close()
    assert a.send(name, [b"2"]) is None
    a.absent.clear()
    again = made(name)
    assert a.send(name, [b"3"]) is True
    assert arrives(again, 1) == [[b"3"]]


def test_what_is_too_large_to_go_at_once_reaches_who_came_back(made: Callable[[str], Near]) -> None:
    """Its rest waits for room on the new line as on any other."""
    name = at("b")
    a, b = made(at("a")), made(name)
    assert a.send(name, [b"1"])
    b.close()
    again = made(name)
    large = os.urandom(3 << 20)
    assert a.send(name, [large]) is True
    assert arrives(again, 1, other=a) == [[large]]


def test_who_ends_as_often_as_it_is_called_is_not_near(
    made: Callable[[str], Near], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = at("b")
    a, _ = made(at("a")), made(name)

    def ended(line: near.Line, parts: Sequence[bytes]) -> bool:
        raise BrokenPipeError

    monkeypatch.setattr(near.Line, "write", ended)
    assert a.send(name, [b"1"]) is None and not a.lines


def test_an_end_is_seen_without_a_send(made: Callable[[str], Near]) -> None:
    name = at("b")
    a, b = made(at("a")), made(name)
    a.send(name, [b"1"])
    b.close()
    a.arriving()
    assert not a.lines and not a.fds


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n", b"\x08\0\0\0\x02\0\0\0\x01\0\0\0\x07\0\0\0", b"\0" * 16]
)
def test_garbage_ends_its_connection_and_no_other(made: Callable[[str], Near], garbage: bytes) -> None:
    name = at("b")
    a, b = made(at("a")), made(name)
    assert a.send(name, [b"before"])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"\0kvmove/{name}")
        sock.sendall(garbage)
        found = arrives(b, 1)
        end = time.monotonic() + 5
        while not b.garbled and time.monotonic() < end:
            found += b.arriving()
        assert b.take_garbled() == 1 and sock.recv(1) == b""
    assert a.send(name, [b"after"])
    assert found + arrives(b, 1) == [[b"before"], [b"after"]]


def test_a_torn_frame_is_nothing(made: Callable[[str], Near]) -> None:
    name = at("b")
    b = made(name)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"\0kvmove/{name}")
        sock.sendall(b"\x08\0\0\0\x01\0\0\0\x04\0")
        end = time.monotonic() + 5
        while not b.callers and time.monotonic() < end:
            assert b.arriving() == []
        assert b.arriving() == []
    end = time.monotonic() + 5
    while b.callers and time.monotonic() < end:
        assert b.arriving() == []
    assert not b.callers and not b.garbled


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_user_is_neither_heard_nor_called(made: Callable[[str], Near]) -> None:
    name, theirs = at("b"), at("theirs")
    b = made(name)
    told, tell = os.pipe()
    go, going = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        theirs_door = Near(theirs)
        os.write(tell, repr(theirs_door.send(name, [b"x"])).encode())
        os.close(going)
        os.read(go, 1)
        os._exit(0)
    try:
        assert os.read(told, 100) == b"None"
        assert b.arriving() == [] and not b.callers
        assert b.send(theirs, [b"for one of mine"]) is None
    finally:
        for fd in (going, go, told, tell):
            os.close(fd)
        os.waitpid(child, 0)


def test_what_was_sent_before_a_kill_arrives(made: Callable[[str], Near]) -> None:
    name = at("b")
    b = made(name)
    code = (
        "import os, signal\nfrom kvreal.near import Near\none = Near('gone')\n"
        f"one.send({name!r}, [b'h', b'x' * 100])\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert arrives(b, 1) == [[b"h", b"x" * 100]]


def test_a_node_with_keys_has_no_such_door() -> None:
    class Keyless:
        def listening(self, sock: object) -> None: ...

        def calling(self, sock: object, address: str) -> None: ...

    with_keys = Endpoints("127.0.0.1:0", curve=Keyless())
    without = Endpoints("127.0.0.1:0")
    try:
        assert with_keys.near is None and without.near is not None and without.near.doors
    finally:
        with_keys.close()
        without.close()
