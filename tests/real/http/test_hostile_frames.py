"""Frames that strangers make: counted, logged once a peer, and without any effect, at a controller and at a worker."""

from __future__ import annotations

import logging
import pickle
import random
import socket
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.protocol import messages as msg
from kvcore.protocol.messages import Register, Wire
from kvreal.endpoints import CLAIMS, FACES_ONLY, Endpoints, Header
from tests.real.http.cluster import CPU, eventually
from tests.real.http.hostile import Inside

pytestmark = pytest.mark.real
FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
encode = msgspec.msgpack.encode
TOKENS = list(range(300))


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """Two instances, of which one holds a prompt that was copied to it, and one that was moved."""
    found = Inside(tmp_path_factory.mktemp("hostile"), "a", "b")
    try:
        for tokens, copy in ((TOKENS, True), (TOKENS[100:], False)):
            assert found.workers.store("a", tokens) == len(tokens)
            eventually(lambda tokens=tokens, copy=copy: moved(found, tokens, copy) == len(tokens))
        found.quiet()
        found.before = len(found.recorded)
        yield found
    finally:
        found.close()


def moved(found: Inside, tokens: list[int], copy: bool) -> int:
    """Tokens of a move that has ended; 0 as long as the source is not known to hold them."""
    import httpx

    body = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": tokens, "copy": copy}
    answer = httpx.post(f"{found.url}/move", json=body).json()
    if not answer.get("num_tokens"):
        return 0
    event = httpx.get(f"{found.url}/events/{answer['event_id']}/wait", params={"timeout": 10}).json()
    assert event["state"] == "done", event
    return int(event["num_tokens"])


# ---- frames that no node sends
class Bomb:
    went_off = False

    def __reduce__(self) -> Any:
        return (_go_off, ())


def _go_off() -> None:
    Bomb.went_off = True


PICKLES = [pickle.dumps(Bomb(), protocol) for protocol in range(6)]


def header(node: Endpoints, **changed: str) -> bytes:
    fields = {"cluster": node.cluster, "src": "127.0.0.1:9", "dst": node.address, **changed}
    return encode(Header(**fields))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
kinds = st.sampled_from([kind.__name__ for kind in get_args(Wire)])
claims = st.sampled_from(
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
"""Four thousand million elements, it says."""
nested = st.integers(2, 5000).map(lambda depth: b"\x91" * depth)
tagged = st.builds(
    lambda kind, fields: encode({**fields, "type": kind}),
    kinds,
    st.dictionaries(st.text(max_size=8), anything, min_size=1, max_size=3),
)
bodies = st.one_of(st.binary(max_size=200), anything.map(encode), tagged, claims, nested, st.sampled_from(PICKLES))


@st.composite
def no_frame(draw: st.DrawFn, node: Endpoints, whole: list[list[bytes]]) -> list[bytes]:
    """Parts that are not a frame of this cluster to this node."""
    kinds = ["parts", "one bad", "body", "header", "cut", "longer", "foreign", "face", "pickle", "request"]
    what = draw(st.sampled_from(kinds))
    good = draw(st.sampled_from(whole))
    if what == "parts":
        count = draw(st.sampled_from([1, 3, 4, 9]))
        return [draw(st.sampled_from(good)) for _ in range(count)]
    if what == "one bad":
        return [good[0], good[1], draw(bodies), good[1]]
    if what == "header":
        return [draw(bodies), good[1]]
    if what == "cut":
        part = draw(st.integers(0, 1))
        end = draw(st.integers(0, len(good[part]) - 1))
        return [good[0][:end], good[1]] if part == 0 else [good[0], good[1][:end]]
    if what == "longer":
        return [good[0], good[1] + draw(st.binary(min_size=1, max_size=20))]
    if what == "foreign":
        name, value = draw(
            st.sampled_from([("cluster", "other"), ("cluster", ""), ("dst", "127.0.0.1:1"), ("dst", "")])
        )
        return [header(node, **{name: value}), good[1]]
    if what == "face":
        src = draw(st.sampled_from(["http/1", "", "ctl", "a/0", "127.0.0.1", "x" * 300 + ":1", "127.0.0.1:1\n", "é:1"]))
        return [header(node, src=src), good[1]]
    if what == "pickle":
        return draw(st.sampled_from([[PICKLES[4]], [good[0], PICKLES[2]], [PICKLES[3], PICKLES[3]]]))
    if what == "request":
        return [header(node), encode(draw(st.sampled_from(REQUESTS)))]
    return [header(node), draw(bodies)]


REQUESTS: list[Any] = [
    msg.MoveRequest("x", ("a", CPU), ("b", CPU)),
    msg.ClearRequest("x", ("a", CPU)),
    msg.UnpinRequest("x", 1),
    msg.CancelRequest("x", 1),
    msg.StoreRequest("x", CPU, (b"k" * 32,), (64,)),
    msg.UseRequest("x", CPU, (b"k" * 32,), (64,)),
    msg.Answer("x", "done"),
]


def samples(inside: Inside, node: Endpoints) -> list[list[bytes]]:
    """One frame of each kind that this node was sent before the attacks began."""
    found: dict[str, list[bytes]] = {}
    for _, dst, parts in inside.recorded[: inside.before]:
        if dst == node.address:
            found.setdefault(msgspec.msgpack.decode(parts[1])["type"], parts)
    return [found[kind] for kind in sorted(found)]


def decodes(node: Endpoints, parts: list[bytes]) -> bool:
    """Is it a frame after all? Random bytes may be."""
    try:
        found = msgspec.msgpack.decode(parts[0], type=Header)
        bodies = [msgspec.msgpack.decode(part, type=Wire) for part in parts[1:]]
    except (msgspec.MsgspecError, UnicodeDecodeError, IndexError, RecursionError):
        return False
    good = len(parts) >= 2 and found.cluster == node.cluster and found.dst == node.address
    good = good and not any(type(body) in FACES_ONLY for body in bodies)
    return good and found.src.startswith("127.0.0.1:") and found.src.isascii()


@pytest.mark.parametrize("which", [0, 1], ids=["controller", "worker"])
@FEW
@given(data=st.data())
def test_what_is_no_frame_is_counted_and_changes_nothing(inside: Inside, which: int, data: st.DataObject) -> None:
    node = inside.nodes()[which]
    whole = samples(inside, node)
    frames = data.draw(
        st.lists(no_frame(node, whole).filter(lambda parts: not decodes(node, parts)), min_size=1, max_size=12)
    )
    before = inside.state()
    counted = inside.count(node)
    sock = inside.sender(node.address)
    for parts in frames:
        sock.send_multipart(parts)
    inside.until_counted(node, counted + len(frames))
    sock.close()
    assert inside.state() == before
    assert inside.running()
    assert not Bomb.went_off


def test_each_peer_is_logged_once_a_kind(inside: Inside, caplog: pytest.LogCaptureFixture) -> None:
    node = inside.nodes()[0]
    node.told.clear()
    with caplog.at_level(logging.WARNING, "kvmove.network"):
        sock = inside.sender(node.address)
        counted = inside.count(node)
        for _ in range(50):
            sock.send_multipart([b"junk", b"\n\x1b[31mjunk"])
            sock.send_multipart([header(node, cluster="other\n\x1b[31m"), b""])
        inside.until_counted(node, counted + 100)
        sock.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "kvmove.network"]
    assert len(lines) == 2, lines
    assert "malformed frame from 127.0.0.1" in lines[0]
    assert "foreign frame from 127.0.0.1" in lines[1]
    assert not [line for line in lines if "\n" in line or "\x1b" in line], (
        "what a stranger says writes no lines of its own"
    )


def test_two_nodes_behind_an_address_are_told_apart_and_a_flood_of_names_is_bounded(
    inside: Inside, caplog: pytest.LogCaptureFixture
) -> None:
    node = inside.nodes()[0]
    node.told.clear()
    with caplog.at_level(logging.WARNING, "kvmove.network"):
        sock = inside.sender(node.address)
        counted = inside.count(node)
        for port in (1, 2, 1, 2):
            sock.send_multipart([header(node, cluster="other", src=f"127.0.0.1:{port}"), b""])
        inside.until_counted(node, counted + 4)
        assert len(caplog.records) == 2, caplog.records
        for port in range(100):
            sock.send_multipart([header(node, cluster="other", src=f"127.0.0.1:{port}"), b""])
        inside.until_counted(node, counted + 104)
        sock.close()
    assert len(caplog.records) == CLAIMS


def test_who_has_been_heard_before_still_may_not_say_what_only_faces_say() -> None:
    node = Endpoints("127.0.0.1:0")
    peer = Endpoints("127.0.0.1:0")
    try:
        found: list[Any] = []
        good = msg.Alive(1, 2, 3)
        for asked in (msg.StatusRequest("op", 1), msg.Answer("op", "done", 1, 1)):
            refused = node.counters["frames_refused"]
            peer.send(node.address, good)
            eventually(lambda: found.extend(node.receive()[0]) or found)
            peer.send(node.address, asked)  # type: ignore[arg-type]
            peer.send(node.address, good)
            eventually(lambda: found.extend(node.receive()[0]) or len(found) >= 2)
            assert found == [(peer.address, good)] * 2
            assert node.counters["frames_refused"] == refused + 1
            found.clear()
    finally:
        node.close()
        peer.close()


def test_oversized_frames_end_their_connection_only(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvreal.endpoints.MAX_FRAME_BYTES", 100_000)
    node = Endpoints("127.0.0.1:0")
    peer = Endpoints("127.0.0.1:0")
    try:
        sock = inside.sender(node.address)
        monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        sock.send_multipart([header(node), b"x" * 200_000])
        assert monitor.poll(10_000), "the connection was ended"
        sock.disable_monitor()
        sock.close()
        assert node.receive() == ([], False)
        # ZeroMQ does not say why: it is counted as any connection that ends
        eventually(lambda: node.door.counts()[0] == {"accepted": 1, "established": 1, "ended": 1})
        message = msg.Alive(1, 2, 3)
        peer.send(node.address, message)
        found: list[Any] = []
        eventually(lambda: found.extend(node.receive()[0]) or found)
        assert found == [(peer.address, message)]
    finally:
        node.close()
        peer.close()


def test_what_is_kept_goes_out_together_and_in_order() -> None:
    node, peer = Endpoints("127.0.0.1:0"), Endpoints("127.0.0.1:0")
    try:
        peer.cork()
        asked = [msg.Resync(1, f"place {number}") for number in range(70)]
        for message in asked:
            assert peer.send(node.address, message)
        peer.uncork()
        found: list[Any] = []
        eventually(lambda: found.extend(node.receive()[0]) or len(found) == len(asked))
        assert found == [(peer.address, message) for message in asked]
        assert peer.counters["frames_sent"] == node.counters["frames_received"] == len(asked)
    finally:
        node.close()
        peer.close()


def test_other_protocols_on_the_port_do_no_harm(inside: Inside) -> None:
    before = inside.state()
    junk = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"\x00" * 1000,
        random.Random(1).randbytes(4000),
    ]
    half_greeting = b"\xff" + b"\x00" * 8 + b"\x7f\x03\x00NULL"
    ports = [int(node.address.rpartition(":")[2]) for node in inside.nodes()] + [inside.reply.port]
    silent = []
    for port in ports:
        for data in [*junk, half_greeting]:
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(data)
            silent.append(sock)
    inside.quiet()
    assert inside.state() == before
    for sock in silent:
        sock.close()
    assert moved(inside, TOKENS, True) == len(TOKENS)
    assert inside.running()


def test_the_reply_socket_answers_anything_with_who_it_is(inside: Inside) -> None:
    for kind in (zmq.REQ, zmq.DEALER):
        sock = inside.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, 10_000)
        sock.connect(f"tcp://127.0.0.1:{inside.reply.port}")
        for data in (
            b"",
            b"junk",
            PICKLES[3],
            b"\xdd\xff\xff\xff\xff",
            encode(Register("a", 0, 1, msg.Namespace(), ())),
        ):
            sock.send(data)
            assert msgspec.msgpack.decode(sock.recv_multipart()[-1])["service"] == "kvmove controller"
        sock.close()
    assert not Bomb.went_off


# ---- frames that a node did send, again
@settings(FEW, max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_replayed_frames_change_nothing(inside: Inside, seed: int) -> None:
    """All that was ever said, in any order and again: registrations, inventories, every step of ended moves."""
    inside.quiet()
    pairs = list(inside.recorded)
    before = inside.state()
    chosen = random.Random(seed)
    frames = [chosen.choice(pairs) for _ in range(300)]
    socks = {node.address: inside.sender(node.address) for node in inside.nodes()}
    got = {node.address: node.counters["frames_received"] for node in inside.nodes()}
    for _, dst, parts in frames:
        socks[dst].send_multipart(parts)
    for node in inside.nodes():
        least = got[node.address] + sum(dst == node.address for _, dst, _ in frames)
        eventually(lambda node=node, least=least: node.counters["frames_received"] >= least)
    for sock in socks.values():
        sock.close()
    inside.quiet()
    assert inside.running()
    eventually(lambda: inside.state() == before, 10, "as it was")


def test_the_frames_that_were_replayed_are_those_of_moves(inside: Inside) -> None:
    said = {msgspec.msgpack.decode(parts[1])["type"] for _, _, parts in inside.recorded}
    assert {"Beat", "Delta", "Pin", "Pinned", "Fetch", "Reserved", "Committed", "Release", "Released", "End"} <= said
