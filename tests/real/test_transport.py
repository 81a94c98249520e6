"""Transports alone, between processes that have nothing else: bytes, ends, and who may touch whose memory."""

from __future__ import annotations

import os
import signal
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from kvreal.transfer.line import dial, parse
from kvreal.transfer.proof import Tables
from kvreal.transfer.window import REVOKE, Hello
from tests.real.peers import LOCATION, TOKEN, Peer

pytestmark = pytest.mark.real

BPT = 1024
TOKENS = 64
SLOT = TOKENS * BPT
SLOTS = 16
SECOND = 1_000_000_000


class Pair:
    """a (epoch 1) holds chunks 0..SLOTS-1 in its slots; b (epoch 2) is empty. ``copy`` moves from a to b."""

    def __init__(self, transport: str, env: Dict[str, str]) -> None:
        self.a = Peer("a/0", transport, env)
        self.b = Peer("b/0", transport, env)
        self.rid = 0
        self.ends: Dict[str, str] = {}

    def begin(self, tokens: int = TOKENS, slots: int = SLOTS) -> None:
        self.tokens, self.slots = tokens, slots
        self.ends = {"a": self.a.begin(slots, tokens * BPT, 1), "b": self.b.begin(slots, tokens * BPT, 2)}
        for slot in range(slots):
            self.a.ask("fill", location=LOCATION, slot=slot, key=slot, tokens=tokens, bpt=BPT)

    def copy(
        self, read: bool, pairs: List[Tuple[int, int]], lens: int = 0, epoch: int = 0, **more: Any
    ) -> Tuple[int, int]:
        """Start moving (a's slot, b's slot) pairs; ``epoch``: believed of the other side. Returns the rid."""
        self.rid += 1
        theirs, ours = [a for a, _ in pairs], [b for _, b in pairs]
        me, peer, end, mine, other = (
            (self.b, "a/0", self.ends["a"], 2, 1) if read else (self.a, "b/0", self.ends["b"], 1, 2)
        )
        me.ask(
            "copy", rid=[2, self.rid], read=read, peer=peer, peer_epoch=epoch or other,
            peer_slots=theirs if read else ours, slots=ours if read else theirs,
            lens=[lens or self.tokens] * len(pairs), endpoint=more.pop("endpoint", end), epoch=mine, bpt=BPT, **more,
        )  # fmt: skip
        return 2, self.rid

    def mover(self, read: bool) -> Peer:
        return self.b if read else self.a

    def check(self, slot: int, key: int, tokens: int = 0) -> int:
        found = self.b.ask("check", location=LOCATION, slot=slot, key=key, tokens=tokens or self.tokens, bpt=BPT)
        assert isinstance(found, int)
        return found

    def close(self) -> None:
        self.a.kill()
        self.b.kill()


@pytest.fixture(scope="module")
def pairs() -> Iterator[Callable[[str], Pair]]:
    """One pair of processes a transport for the whole module; ``begin`` starts afresh."""
    made: Dict[str, Pair] = {}

    def get(transport: str) -> Pair:
        if transport in made and any(p.process.poll() is not None for p in (made[transport].a, made[transport].b)):
            made.pop(transport).close()
        if transport not in made:
            made[transport] = Pair(transport, {})
        return made[transport]

    yield get
    for pair in made.values():
        pair.close()


@pytest.fixture
def pair(pairs: Callable[[str], Pair], transport: str) -> Pair:
    found = pairs(transport)
    found.begin()
    return found


both = pytest.mark.parametrize("read", [True, False], ids=["read", "push"])


@both
def test_every_byte_arrives_where_it_should(pair: Pair, read: bool) -> None:
    # Neighbours in order, neighbours in the wrong order, and a gap.
    moves = [(0, 0), (1, 1), (2, 2), (5, 4), (4, 5), (9, 9), (15, 3)]
    pair.copy(read, moves)
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "done" and ended["nbytes"] == len(moves) * SLOT
    assert ended["asked_ns"] <= ended["began_ns"] <= ended["ended_ns"]
    assert pair.a.ask("wipe") == SLOTS * SLOT
    assert [pair.check(b, a) for a, b in moves] == [-1] * len(moves)


@both
def test_a_partial_chunk_moves_as_that_many_tokens(pair: Pair, read: bool) -> None:
    pair.a.ask("fill", location=LOCATION, slot=3, key=77, tokens=12, bpt=BPT)
    pair.copy(read, [(3, 3)], lens=12)
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "done" and ended["nbytes"] == 12 * BPT
    assert pair.check(3, 77, 12) == -1


@both
def test_the_transport_named_is_the_one_that_carried(pair: Pair, read: bool, transport: str) -> None:
    """Against the kernel's own count of what went through this process's TCP sockets."""
    pair.begin(tokens=4096, slots=4)
    mover = pair.mover(read)
    pair.copy(read, [(0, 0)])
    mover.ended()
    before = mover.ask("tcp_bytes")
    pair.copy(read, [(1, 1), (2, 2)])
    (ended,) = mover.ended()
    through_tcp = mover.ask("tcp_bytes") - before
    assert ended["state"] == "done"
    if transport == "tcp":
        assert ended["transport"] == "tcp" and through_tcp >= ended["nbytes"]
    elif transport == "socket":
        assert ended["transport"] == "unix" and through_tcp == 0
    elif "tcp" in ended["transport"]:
        assert through_tcp >= ended["nbytes"]
    else:
        assert ended["transport"].startswith("nixl/ucx/") and "unknown" not in ended["transport"]
        assert through_tcp < ended["nbytes"] // 10


@both
def test_abort_of_a_stuck_copy_ends_as_stopped(pair: Pair, read: bool) -> None:
    rid = pair.copy(read, [(0, 0)], fate={"stuck": True})
    mover = pair.mover(read)
    assert any(f"copy {rid[1]} " in line for line in mover.ask("pending"))
    mover.ask("abort", rid=rid)
    (ended,) = mover.ended()
    assert ended["state"] == "stopped" and ended["rid"] == list(rid), ended


@both
def test_abort_of_what_does_not_run_is_answered(pair: Pair, read: bool) -> None:
    pair.mover(read).ask("abort", rid=[2, 4711])
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "stopped"


@both
def test_after_an_abort_nothing_lands(pair: Pair, read: bool) -> None:
    """Wherever the abort meets the copy: once it has ended, the destination's memory stays as it is."""
    pair.begin(tokens=4096, slots=16)
    mover = pair.mover(read)
    for _ in range(5):
        rid = pair.copy(read, [(slot, slot) for slot in range(16)])
        mover.ask("abort", rid=rid)
        ends = [ended["state"] for ended in mover.ended()]
        # One that has ended before it is told to stop is answered by both.
        assert ends in (["stopped"], ["done"], ["done", "stopped"])
        if ends == ["done"]:
            assert [ended["state"] for ended in mover.ask("take", wait_s=0.0)] in ([], ["stopped"])
        pair.b.ask("wipe")  # the slots get another use
        before = [pair.check(slot, slot) for slot in range(16)]
        assert before == [0] * 16
        assert [pair.check(slot, slot) for slot in range(16)] == before


@both
def test_every_copy_ends_by_its_deadline(pair: Pair, read: bool) -> None:
    pair.copy(read, [(0, 0)], fate={"stuck": True}, copy_max_ns=SECOND // 5)
    pair.mover(read).tell("take", wait_s=0.3)  # the loop that looks at deadlines
    ended = pair.mover(read).answer() or pair.mover(read).ended(5)
    assert [e["state"] for e in ended] == ["failed"] and "copy_max_ns" in ended[0]["why"]


@both
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_failing_copy_lands_a_fraction(pair: Pair, read: bool, fraction: float) -> None:
    pair.copy(read, [(0, 0), (1, 1)], fate={"fail": True, "fraction": fraction})
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "failed" and ended["nbytes"] == int(2 * SLOT * fraction)
    assert (pair.check(0, 0) == -1) == (fraction == 0.5)
    assert pair.check(1, 1) >= 0


@both
def test_a_corrupt_copy_differs_in_one_byte(pair: Pair, read: bool) -> None:
    pair.copy(read, [(0, 0), (1, 1)], fate={"corrupt": True})
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "done"
    assert sorted([pair.check(0, 0), pair.check(1, 1)])[0] == -1
    assert max(pair.check(0, 0), pair.check(1, 1)) > 0
    assert pair.a.ask("check", location=LOCATION, slot=1, key=1, tokens=TOKENS, bpt=BPT) == -1


@both
def test_another_epoch_is_refused_and_nothing_lands(pair: Pair, read: bool) -> None:
    pair.copy(read, [(0, 0)], epoch=9)
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "failed" and "epoch 9" in ended["why"]
    assert pair.check(0, 0) >= 0


def test_a_window_closes_when_its_writer_has_stopped_and_stays_closed(pair: Pair) -> None:
    where = parse(pair.ends["b"])
    writer = dial(where, unix=False)  # by hand, so that it stays open
    hello = Hello(TOKEN, "write", "a/0", 1, "b/0", 2, LOCATION, ((0, SLOT),), by=where.cards[0][0])
    writer.open(hello, b"")
    assert any("window of a/0" in line for line in pair.b.ask("pending"))
    pair.b.ask("close", peer="a/0", epoch=1)
    if writer.sock.recv(1) == REVOKE:  # one-sided: only its owner can end it
        assert pair.b.ask("take", wait_s=0.0) == []
        writer.end()
    (shut,) = pair.b.ended()
    assert shut == {"what": "WindowShut", "peer": "a/0", "epoch": 1}
    writer.close()
    pair.copy(False, [(1, 1)])
    (ended,) = pair.a.ended()
    assert ended["state"] == "failed" and "closed" in ended["why"]
    assert pair.check(1, 1) >= 0


def test_closing_a_window_stops_reads_from_that_peer_too(pair: Pair) -> None:
    pair.copy(True, [(0, 0)], fate={"stuck": True})
    pair.b.ask("close", peer="a/0", epoch=1)
    found = pair.b.ended()
    if len(found) < 2:  # they may be taken together, or one after the other
        found += pair.b.ended()
    assert [item["what"] for item in found] == ["Ended", "WindowShut"]
    assert found[0]["state"] == "stopped"


def test_a_window_nobody_has_open_closes_at_once(pair: Pair) -> None:
    pair.b.ask("close", peer="x/0", epoch=3)
    assert [item["what"] for item in pair.b.ended()] == ["WindowShut"]


@both
def test_a_peer_that_is_killed_ends_the_copy(pairs: Callable[[str], Pair], transport: str, read: bool) -> None:
    pair = pairs(transport)
    pair.begin()
    pair.copy(read, [(1, 1)])  # the connection is there
    assert pair.mover(read).ended()[0]["state"] == "done"
    victim = pair.a if read else pair.b
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    pair.copy(read, [(0, 0)])
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "failed" and ended["why"]


@both
def test_a_paused_peer_does_not_end_a_copy_but_an_abort_of_a_read_does(
    pairs: Callable[[str], Pair], transport: str, read: bool
) -> None:
    pair = pairs(transport)
    pair.begin()
    victim = pair.a if read else pair.b
    victim.process.send_signal(signal.SIGSTOP)
    try:
        rid = pair.copy(read, [(0, 0)])
        mover = pair.mover(read)
        assert mover.ask("take", wait_s=0.2) == []
        mover.ask("abort", rid=rid)
        (ended,) = mover.ended()
        assert ended["state"] == "stopped"
    finally:
        victim.process.send_signal(signal.SIGCONT)
    pair.copy(read, [(1, 1)])
    assert pair.mover(read).ended()[0]["state"] == "done"


def test_another_runs_copy_is_refused(pair: Pair) -> None:
    pair.a.ask("begin", location=LOCATION, slots=SLOTS, slot_bytes=SLOT, address="z/0", epoch=1)
    pair.copy(True, [(0, 0)])
    (ended,) = pair.b.ended()
    assert ended["state"] == "failed" and "this is z/0" in ended["why"]


@both
def test_a_peers_new_layout_is_noticed(pair: Pair, read: bool) -> None:
    """A pooled process keeps its agent and its slab, but its locations lie elsewhere in the next run."""
    pair.copy(read, [(0, 0)])
    pair.mover(read).ended()
    pair.begin(tokens=16, slots=8)
    pair.copy(read, [(5, 6)])
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "done" and pair.check(6, 5) == -1
    pair.begin(tokens=8192, slots=16)  # larger than the slab: another registration
    pair.copy(read, [(5, 6)])
    (ended,) = pair.mover(read).ended()
    assert ended["state"] == "done" and pair.check(6, 5) == -1


def test_a_foreign_or_broken_endpoint_fails_the_copy_only(pair: Pair) -> None:
    unknown = "kvmove|127.0.0.1|1|x"
    for endpoint in ("", "nonsense", "smoke|127.0.0.1|1|x|nixl", f"{unknown}|", f"{unknown}|nixl,socket"):
        pair.copy(True, [(0, 0)], endpoint=endpoint)
        (ended,) = pair.b.ended()
        assert ended["state"] == "failed" and ended["why"]


def test_garbage_at_the_window_port_harms_nobody(pair: Pair) -> None:
    import socket

    port = int(pair.ends["a"].split("|")[2])
    for garbage in (b"", b"\x00", b"\xff" * 64, b"\x05\x00\x00\x00hello", os.urandom(4096)):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(garbage)
    pair.copy(True, [(0, 0)])
    assert pair.b.ended()[0]["state"] == "done" and pair.check(0, 0) == -1


@pytest.mark.parametrize("tls", ["", "tcp"], ids=["default", "tcp"])
def test_ucx_counts_what_we_name(tls: str) -> None:
    """Two agents whose UCX prints, at its end, how often it used which protocol: the same lanes as we read."""
    from kvreal.transfer import available

    if "nixl" not in available():
        pytest.skip("transport nixl is not installed here")
    env = {"UCX_TLS": tls} if tls else {}
    names = {}
    for info in ("*remote memory*", "used"):
        pair = Pair("nixl", {**env, "UCX_PROTO_INFO": info})
        try:
            pair.begin()
            for read in (True, False):
                pair.copy(read, [(0, 0)])
                (ended,) = pair.mover(read).ended()
                assert ended["state"] == "done"
                if info != "used":
                    names["read" if read else "write"] = ended["transport"].rpartition("/")[2]
            if info == "used":
                for read in (True, False):
                    tables = Tables()
                    tables.feed(pair.mover(read).ask("quit"))
                    what = "read" if read else "write"
                    assert tables.lanes(what, SLOT) == names[what]
            if tls:
                assert set(names.values()) == {tls}
        finally:
            pair.close()
