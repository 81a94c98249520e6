"""Keys: only peers deliver a frame, and what strangers say is not even decoded."""

from __future__ import annotations

import json
import logging
import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest
import zmq

from kvcore.protocol.config import WorkerSpec
from kvcore.protocol.messages import Alive, Location, Namespace
from kvreal import keys as key_files
from kvreal.endpoints import EndpointError, Endpoints, Header
from kvreal.engines.thread import EngineThread
from kvreal.keys import Keys, KeysError, load
from kvreal.memory import Memory
from kvreal.ports import free_ports
from kvreal.service import Service, WorkerParts
from kvreal.transfer import make as make_transfer
from tests.real.http.cluster import QUICK, Cluster, Controller, Workers, eventually
from tests.real.http.processes import commands

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
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one address: two nodes whose keys nobody knows, by their keys; one of another cluster, however often."""
    # On a busy machine a connection may be over before its address is asked for; the next test is of that.
    monkeypatch.setattr("kvreal.door.peer_of", lambda descriptor: f"127.0.0.1:{descriptor}")
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


def test_who_had_gone_before_it_was_looked_at_is_told_only_where_nobody_was(caplog: pytest.LogCaptureFixture) -> None:
    node = Endpoints("127.0.0.1:0")
    (watch,) = node.door.watches
    with caplog.at_level(logging.WARNING, "kvmove"):
        watch.tell("unknown", "other_keys")
        watch.tell("10.0.0.7:1", "not_zeromq")
        watch.tell("unknown", "not_zeromq")
    node.close()
    assert [record.getMessage() for record in caplog.records] == [
        "refused unknown: its keys are of another cluster",
        "refused 10.0.0.7:1: it does not speak ZeroMQ as it should",
    ]


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
