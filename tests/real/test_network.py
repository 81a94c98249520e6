"""Frames: what is good arrives once, what is not is counted and dropped, and nothing ends the loop."""

from __future__ import annotations

import os
import random
import time
from typing import Any, Callable, Iterator, List, Optional, Tuple

import msgspec
import pytest
import zmq

from kvcore.protocol.messages import Alive, Beat, Fence, Pinned, Wire
from kvreal import near
from kvreal.control import Address
from kvreal.network import Header, Network

pytestmark = pytest.mark.real
encode = msgspec.msgpack.Encoder().encode


@pytest.fixture(params=["near", "zeromq"])
def two(request: pytest.FixtureRequest) -> Iterator[Tuple[Network, Network]]:
    """As two processes of a host speak, and as two of different hosts do."""
    a, b = Network(), Network()
    for one in (a, b):
        if request.param == "zeromq" and one.near is not None:
            one.near.close()
            one.near = None
    a.begin("run", "a", 1)
    b.begin("run", "b", 1)
    book = {"a": Address(1, a.endpoint, ""), "b": Address(1, b.endpoint, "")}
    a.book(book)
    b.book(book)
    yield a, b
    a.close()
    b.close()


def wait(
    network: Network, until: Callable[[], bool], timeout_s: float = 5.0, sender: Optional[Network] = None
) -> List[Tuple[str, Wire]]:
    """Receive until ``until`` holds; what was received. ``sender``: whose loop goes round too, and sends what waits."""
    found: List[Tuple[str, Wire]] = []
    poller = zmq.Poller()
    for source in network.sources():
        poller.register(source, zmq.POLLIN)
    end = time.monotonic() + timeout_s
    while not until() and time.monotonic() < end:
        poller.poll(10)
        found += network.receive()
        if sender is not None:
            sender.receive()
    assert until(), f"not within {timeout_s} s: {network.counters}"
    return found


def test_messages_arrive_in_order_from_whom_they_say(two: Tuple[Network, Network]) -> None:
    a, b = two
    sent = [Fence((1, i), (2, i)) for i in range(500)]
    assert all(a.send("b", message) for message in sent)
    found = wait(b, lambda: b.counters["frames_received"] == 500, sender=a)
    assert found == [("a", message) for message in sent]
    assert a.sent == {"b#1": 500} and b.received == {"a#1": 500}


def test_beats_do_not_count_as_work(two: Tuple[Network, Network]) -> None:
    a, b = two
    a.send("b", Beat(1, ()))
    wait(b, lambda: b.counters["frames_received"] == 1)
    assert not a.sent and not b.received


def test_nobody_there_is_a_dropped_message(two: Tuple[Network, Network]) -> None:
    a, _ = two
    assert not a.send("nobody", Alive(1, 2, 3))
    assert a.counters["frames_dropped"] == 1


@pytest.mark.parametrize(
    "header",
    [
        Header("another run", "a", 1, "b", 1),
        Header("run", "a", 1, "c", 1),
        Header("run", "a", 1, "b", 2),
    ],
    ids=["another run", "another node", "another life"],
)
def test_foreign_frames_are_dropped(two: Tuple[Network, Network], header: Header) -> None:
    a, b = two
    push(b, [encode(header), encode(Alive(1, 2, 3))])
    assert wait(b, lambda: b.counters.get("frames_foreign", 0) == 1) == []
    a.send("b", Alive(1, 2, 3))
    assert wait(b, lambda: b.counters["frames_received"] == 1) == [("a", Alive(1, 2, 3))]


def push(network: Network, *frames: Any) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(network.endpoint)
    for parts in frames:
        socket.send_multipart(parts)
    socket.close()
    context.term()


def test_malformed_frames_are_counted_and_dropped(two: Tuple[Network, Network]) -> None:
    a, b = two
    rng = random.Random(7)
    header = encode(Header("run", "a", 1, "b", 1))
    good = encode(Fence((1, 2), (3, 4)))
    bad: List[List[bytes]] = [
        [b""], [header], [b"", b""], [header, b""], [header, good, b""], [good, header],
        [header, encode({"type": "NoSuch"})], [header, encode({"type": "Fence"})],
        [header, encode({"type": "Fence", "pid": [1, 2], "rid": [3, 4], "more": 1})], [header, b"\xc1"],
        [encode(["run", "a", 1, "b", 1, "more"]), good], [encode(["run", b"\xff\xfe", 1, "b", 1]), good],
    ]  # fmt: skip
    for _ in range(300):
        torn = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            torn[rng.randrange(len(torn))] = rng.randrange(256)
        bad.append([header, bytes(torn[: rng.randrange(len(torn))])])
        bad.append([rng.randbytes(rng.randrange(30)), rng.randbytes(rng.randrange(60))])
    push(b, *bad)
    wait(b, lambda: b.counters["frames_malformed"] >= len(bad))
    a.send("b", Alive(1, 2, 3))
    assert wait(b, lambda: b.counters["frames_received"] == 1) == [("a", Alive(1, 2, 3))]


def test_garbage_on_the_port_harms_nobody(two: Tuple[Network, Network]) -> None:
    import socket

    a, b = two
    port = int(b.endpoint.rpartition(":")[2])
    for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", os.urandom(2000)):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(garbage)
    a.send("b", Alive(1, 2, 3))
    assert wait(b, lambda: b.counters["frames_received"] == 1) == [("a", Alive(1, 2, 3))]


def test_a_new_life_is_reached_at_its_new_place(two: Tuple[Network, Network]) -> None:
    a, b = two
    a.send("b", Alive(1, 1, 1))
    wait(b, lambda: b.counters["frames_received"] == 1)
    again = Network()
    try:
        again.begin("run", "b", 2)
        a.book({"b": Address(2, again.endpoint, "")})
        a.send("b", Alive(2, 2, 2))
        assert wait(again, lambda: again.counters["frames_received"] == 1) == [("a", Alive(2, 2, 2))]
        assert a.sent == {"b#1": 1, "b#2": 1}
        assert b.receive() == []
    finally:
        again.close()


def _near_never_waits(a: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MAX_QUEUED_BYTES", 1 << 20)
    message = Pinned(1, (2, 2), slots=tuple(range(5_000)))
    begun = time.monotonic()
    taken = [a.send("b", message) for _ in range(1000)]
    assert time.monotonic() - begun < 1.0
    assert taken[0] and not taken[-1] and a.counters["frames_dropped"] == taken.count(False)


def test_a_send_never_waits_for_a_receiver_that_does_not_take(
    two: Tuple[Network, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = two
    if a.near is not None:
        _near_never_waits(a, monkeypatch)
        return
    a.peers["b"][1].close(linger=0)
    socket = a.context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    a.peers["b"] = (a.peers["b"][0], socket, b"")
    begun = time.monotonic()
    for _ in range(1000):
        assert not a.send("b", Alive(1, 2, 3))
    assert time.monotonic() - begun < 1.0 and a.counters["frames_dropped"] == 1000
