"""Keys: only peers deliver a frame, only they touch memory, and what strangers say is not even decoded."""

from __future__ import annotations

import ast
import json
import logging
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import zmq

from kvcore.protocol.config import WorkerSpec
from kvcore.protocol.machine import StartCopy
from kvcore.protocol.messages import Alive, Location, Namespace
from kvreal import keys as key_files
from kvreal.endpoints import EndpointError, Endpoints, Header
from kvreal.engines.thread import EngineThread
from kvreal.keys import Keys, KeysError, load
from kvreal.memory import Memory
from kvreal.service import Service, WorkerParts
from kvreal.transfer import TransferError
from kvreal.transfer import make as make_transfer
from kvreal.transfer.frames import Challenge, Sealed, read_message, send_message
from kvreal.transfer.job import Copy, Ended, Fate
from kvreal.transfer.line import Line
from kvreal.transfer.window import Grant, Hello, Info
from tests.real.http.cluster import QUICK, ROOT, Cluster, Controller, Workers, eventually
from tests.real.http.processes import commands, free_ports

pytestmark = pytest.mark.real
MESSAGE = Alive(1, 2, 3)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    key_files.new(tmp_path / "mine", "first")
    return tmp_path / "mine"


# ---- files
def test_new_makes_keys_that_only_their_owner_can_use(tmp_path: Path) -> None:
    made = key_files.new(tmp_path / "k", "first")
    names = [str(path.relative_to(tmp_path / "k")) for path in made]
    assert names == ["cluster.public", "cluster.secret", "node.public", "node.secret", "peers/first.public"]
    for path in made:
        others = path.stat().st_mode & 0o077
        assert others == 0 or path.suffix == ".public", path
    with pytest.raises(KeysError, match="has keys already"):
        key_files.new(tmp_path / "k", "second")


def test_add_makes_a_node_that_the_others_hear(mine: Path, tmp_path: Path) -> None:
    key_files.add(mine, tmp_path / "other", "gpu7")
    other = load(tmp_path / "other")
    assert other.cluster == load(mine).cluster
    assert other.node != load(mine).node
    assert sorted(load(mine).peers.names().values()) == ["first", "gpu7"]
    assert sorted(other.peers.names().values()) == ["first", "gpu7"]
    assert other.window_secret() == load(mine).window_secret()
    with pytest.raises(KeysError, match="is there already"):
        key_files.add(mine, tmp_path / "third", "gpu7")
    with pytest.raises(KeysError, match="expected a node's name"):
        key_files.add(mine, tmp_path / "third", "../gpu8")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: (path / "cluster.secret").chmod(0o644), "everyone on this machine can use it"),
        (lambda path: (path / "node.secret").unlink(), "cannot read the key: No such file"),
        (lambda path: (path / "node.public").write_text("hello"), "is no key, expected 40 characters"),
        (lambda path: (path / "node.public").write_bytes(zmq.curve_keypair()[0]), "does not belong to node.secret"),
        (lambda path: (path / "peers" / "first.public").unlink(), "no *.public in it, so nobody would be heard"),
    ],
)
def test_bad_keys_are_one_line(mine: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(mine)
    with pytest.raises(KeysError) as error:
        load(mine)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    secret = (mine / "cluster.secret").read_text().strip()
    assert secret not in str(error.value)


def test_beyond_this_machine_a_node_needs_keys() -> None:
    with pytest.raises(EndpointError, match=r"0.0.0.0:0: others could reach it; give keys"):
        Endpoints("0.0.0.0:0")


# ---- messages
class Sender:
    """Sends a well-formed frame to a node, with whatever keys it has."""

    def __init__(self, node: Endpoints, setup: Callable[[zmq.Socket[bytes]], None]) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sock = self.context.socket(zmq.PUSH)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.monitor = self.sock.get_monitor_socket()
        setup(self.sock)
        self.sock.connect(f"tcp://{node.address}")
        header = msgspec.msgpack.encode(Header(node.cluster, "127.0.0.1:1", node.address))
        self.sock.send_multipart([header, msgspec.msgpack.encode(MESSAGE)])

    def until_refused(self, timeout_s: float = 10.0) -> None:
        """The handshake has failed, or the connection was ended, at least once."""
        until = time.monotonic() + timeout_s
        bad = (
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_CONNECT_RETRIED
        )  # fmt: skip
        while time.monotonic() < until:
            if self.monitor.poll(100):
                event, _ = struct.unpack("=hi", self.monitor.recv_multipart()[0])
                if event & bad:
                    return
        raise AssertionError("was not refused")

    def close(self) -> None:
        self.sock.disable_monitor()
        self.context.destroy(linger=0)


def refused(node: Endpoints, why: str) -> int:
    """Both ends see that one has keys and the other none; whichever is quicker ends the connection."""
    counts = node.door.counts()[1]
    return counts[why] + (counts["broken_off"] if why == "no_keys" else 0)


def received(node: Endpoints) -> list[tuple[str, object]]:
    found = []
    while True:
        some, more = node.receive()
        found += some
        if not more:
            return found


def curve(server: bytes, pair: tuple[bytes, bytes]) -> Callable[[zmq.Socket[bytes]], None]:
    def setup(sock: zmq.Socket[bytes]) -> None:
        sock.setsockopt(zmq.CURVE_SERVERKEY, server)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, pair[0])
        sock.setsockopt(zmq.CURVE_SECRETKEY, pair[1])

    return setup


def test_only_peers_deliver_a_frame(mine: Path, tmp_path: Path) -> None:
    """In the clear, with an unknown key, with another cluster's, by PLAIN: nothing arrives. A peer's frame does."""
    key_files.new(tmp_path / "foreign", "first")
    foreign = load(tmp_path / "foreign")
    known = load(mine)
    node = Endpoints("127.0.0.1:0", curve=known)
    peer = Endpoints("127.0.0.1:0", curve=load(mine))

    def plain(sock: zmq.Socket[bytes]) -> None:
        sock.setsockopt(zmq.PLAIN_USERNAME, b"admin")
        sock.setsockopt(zmq.PLAIN_PASSWORD, b"admin")

    strangers = {
        "in the clear": lambda sock: None,
        "plain": plain,
        "unknown client key": curve(known.cluster[0], zmq.curve_keypair()),
        "another cluster's client": curve(known.cluster[0], foreign.node),
        "another cluster's server key": curve(foreign.cluster[0], known.node),
    }
    try:
        for (what, setup), why in zip(
            strangers.items(), ("no_keys", "no_keys", "unknown_key", "unknown_key", "other_keys"), strict=True
        ):
            before = refused(node, why)
            stranger = Sender(node, setup)
            try:
                stranger.until_refused()
                assert received(node) == [], what
                eventually(lambda why=why, before=before: refused(node, why) > before, what=what)
            finally:
                stranger.close()
        assert all(count == 0 for name, count in node.counters.items() if name.startswith("frames_")), node.counters
        assert peer.send(node.address, MESSAGE)
        found: list[tuple[str, object]] = []
        eventually(lambda: found.extend(received(node)) or found)
        assert found == [(peer.address, MESSAGE)]
    finally:
        peer.close()
        node.close()


def test_who_is_refused_is_logged_once_each_by_what_it_is(
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind one address: two nodes whose keys nobody knows, by their keys; one of another cluster, however often."""
    node = Endpoints("127.0.0.1:0", curve=load(mine))
    known = load(mine)
    unknown = [zmq.curve_keypair() for _ in range(2)]
    other, _ = zmq.curve_keypair()
    with caplog.at_level(logging.WARNING, "kvmove"):
        for setup, why in (
            (curve(known.cluster[0], unknown[0]), "unknown_key"), (curve(known.cluster[0], unknown[1]), "unknown_key"),
            (curve(known.cluster[0], unknown[0]), "unknown_key"), (curve(other, known.node), "other_keys"),
            (curve(other, known.node), "other_keys"),
        ):  # fmt: skip
            before = refused(node, why)
            stranger = Sender(node, setup)
            eventually(lambda why=why, before=before: refused(node, why) > before)
            stranger.close()
    node.close()
    lines = [record.getMessage() for record in caplog.records]
    for public, _ in unknown:
        assert len([line for line in lines if f"its public key {public.decode()} is none of the peers" in line]) == 1
    (clear,) = [line for line in lines if "its keys are of another cluster" in line]
    assert re.match(r"refused (127\.0\.0\.1:\d+|unknown): ", clear)
    assert len(lines) == 3, lines


def test_a_refusal_is_told_again_at_the_tenth_and_the_hundredth(caplog: pytest.LogCaptureFixture) -> None:
    node = Endpoints("127.0.0.1:0")
    (watch,) = node.door.watches
    with caplog.at_level(logging.WARNING, "kvmove"):
        for port in range(150):
            watch.tell(f"10.0.0.7:{port}", "not_zeromq")
            watch.tell(f"10.0.0.8:{port}", "unknown_key")  # told by who has looked for it
    node.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "refused 10.0.0.7:0: it does not speak ZeroMQ as it should",
        "refused 10.0.0.7 10 times by now: it does not speak ZeroMQ as it should",
        "refused 10.0.0.7 100 times by now: it does not speak ZeroMQ as it should",
    ]


def test_a_node_does_not_speak_to_who_has_not_the_clusters_secret(mine: Path, tmp_path: Path) -> None:
    """A listener that pretends to be a node gets no frame: its own server key is not the cluster's."""
    key_files.new(tmp_path / "foreign", "first")
    (tmp_path / "foreign" / "peers" / "victim.public").write_bytes((mine / "node.public").read_bytes())
    impostor = Endpoints("127.0.0.1:0", curve=load(tmp_path / "foreign"))
    clear = Endpoints("127.0.0.1:0")
    peer = Endpoints("127.0.0.1:0", curve=load(mine))
    node = Endpoints("127.0.0.1:0", curve=load(mine))
    try:
        for other in (impostor, clear, node):
            peer.send(other.address, MESSAGE)
        eventually(lambda: received(node))
        assert received(impostor) == received(clear) == []
    finally:
        for one in (impostor, clear, peer, node):
            one.close()


def test_a_peer_that_is_taken_out_is_refused_from_its_next_handshake_on(mine: Path, tmp_path: Path) -> None:
    node = Endpoints("127.0.0.1:0", curve=load(mine))
    try:
        key_files.add(mine, tmp_path / "other", "gpu7")  # the node is running: it looks anew
        other = load(tmp_path / "other")
        peer = Endpoints("127.0.0.1:0", curve=other)
        peer.send(node.address, MESSAGE)
        eventually(lambda: received(node))
        peer.close()
        (mine / "peers" / "gpu7.public").unlink()
        stranger = Sender(node, curve(other.cluster[0], other.node))
        stranger.until_refused()
        assert received(node) == []
        stranger.close()
    finally:
        node.close()


def test_a_node_with_keys_ends_at_once_and_can_be_made_again(mine: Path) -> None:
    for _ in range(20):
        begun = time.monotonic()
        node = Endpoints("127.0.0.1:0", curve=load(mine))
        peer = Endpoints("127.0.0.1:0", curve=load(mine))
        peer.send(node.address, MESSAGE)
        eventually(lambda node=node: received(node))
        peer.send_off()
        node.close()
        assert time.monotonic() - begun < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "doorkeeper" and not _ending(thread)]


def _ending(thread: threading.Thread) -> bool:
    thread.join(5)
    return not thread.is_alive()


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
    hello = Hello("kvmove", "read", "b", 1, "a", 1, "A", ((0, 4096),), by="socket")
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
    hello = msgspec.msgpack.encode(Hello("kvmove", "read", "b", 1, "a", 1, "A", ((0, 4096),), by="socket"))
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


# ---- all of it at once
class KeyedWorkers(Workers):
    def __init__(self, controller: str, keys: Keys) -> None:
        super().__init__(controller)
        self.keys = keys

    async def _start(self, instance: str, rank: int, space: Namespace, slots: int, places: object) -> Service:
        network = Endpoints("127.0.0.1:0", curve=self.keys)
        memory = Memory()
        memory.lay_out([("LocalCPUBackend", slots)], space.chunk_tokens * space.bytes_per_token, slots)
        transfer = make_transfer("socket", memory)
        transfer.windows.secret = self.keys.window_secret()
        transfer.begin("kvmove", network.address)
        places_ = (Location("LocalCPUBackend", slots),)
        spec = WorkerSpec(network.address, instance, rank, self.controller, space, places_, QUICK)
        service = Service(spec, network, worker=WorkerParts(memory, transfer, EngineThread(memory)))
        await service.start()
        return service


def test_a_move_with_keys_and_a_worker_without_them_is_not_heard(mine: Path, tmp_path: Path) -> None:
    controller = Controller(tmp_path, "--keys", str(mine))
    controller.start()
    found = Cluster(controller, KeyedWorkers(f"127.0.0.1:{controller.pull}", load(mine)))
    strange = Workers(f"127.0.0.1:{controller.pull}")
    try:
        strange.add("z")
        found.workers.add("a", ranks=2)
        found.workers.add("b", ranks=2)
        found.known("a", "b")
        tokens = list(range(300))
        found.stored("a", tokens)
        answer = controller.move("a", "b", tokens)
        assert answer.status_code == 200, answer.text
        assert controller.ended(answer.json()["event_id"])["state"] == "done"
        assert (found.workers.use("a", tokens), found.workers.use("b", tokens)) == (0, 300)
        assert controller.instances() == ["a", "b"]
        why = ("no_keys", "broken_off")
        refusals = [f'kvmove_handshakes_refused_total{{why="{one}"}}' for one in why]
        eventually(lambda: sum(_figure(controller, name) for name in refusals) >= 1)
        assert _figure(controller, 'kvmove_connections_total{what="established"}') >= 4
        said = (tmp_path / "controller.err").read_text()
        assert re.search("it calls without keys|it ended its handshake", said)
    finally:
        strange.close()
        found.close()


def _figure(controller: Controller, name: str) -> float:
    text = controller.http.get("/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return float(line.rpartition(" ")[2])


INSTANCE = """\
enable_controller: true
lmcache_instance_id: {name}
controller_pull_url: localhost:{pull}
chunk_size: 64
transfer_channel: tcp
kvmove:
  {{bytes_per_token: 512 B, locations: {{LocalCPUBackend: 1 MiB}}, ranks: 2, {keys}
   constants: {{beat: 100 ms, dead: 700 ms}}}}
"""


def test_instances_with_keys_in_their_files(mine: Path, tmp_path: Path) -> None:
    """Their ranks, a process each, speak with the controller and with one another; one without keys is not heard."""
    pull, reply, http, *ports = free_ports(6)
    monitor = json.dumps({"pull": pull, "reply": reply})
    with commands(tmp_path) as start:
        start("ctl", ["controller", "--port", str(http), "--monitor-ports", monitor, "--keys", str(mine)])
        instances = []
        for name, port in zip("abz", ports):
            keys = "" if name == "z" else f"keys: {mine},"
            (tmp_path / f"{name}.yaml").write_text(INSTANCE.format(name=name, pull=pull, keys=keys))
            instances.append(start(name, ["instance", "--config", f"{name}.yaml", "--port", str(port)]))
        for one in instances[:2]:
            one.until_says(": registered")
        tokens = list(range(100, 300))
        body = {"model": "meta-llama/Llama-3.1-8B-Instruct", "prompt": tokens, "max_tokens": 1}
        assert httpx.post(f"http://127.0.0.1:{ports[0]}/v1/completions", json=body, timeout=20).status_code == 200
        with httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=20) as client:
            move = {
                "old_position": ["a", "LocalCPUBackend"],
                "new_position": ["b", "LocalCPUBackend"],
                "tokens": tokens,
            }
            answer = eventually(lambda: _moved(client.post("/move", json=move).json()))
            event = client.get(f"/events/{answer['event_id']}/wait", params={"timeout": 20}).json()
            assert (event["state"], event["num_tokens"]) == ("done", 200)
            assert [one["instance_id"] for one in client.get("/instances").json()["instances"]] == ["a", "b"]
        assert "registered" not in instances[2].text()
        instances[2].until_says("it is not there, or it wants keys, and this node has none")


def _moved(answer: dict[str, object]) -> dict[str, object]:
    """Empty as long as the controller does not know yet what was stored."""
    return answer if answer.get("num_tokens") else {}


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
