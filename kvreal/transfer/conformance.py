"""What every transport must do, as tests: between two processes that have nothing else.

    python -m kvreal.transfer.conformance NAME               NAME: of an installed transport, or module:Class
    python -m kvreal.transfer.conformance mine:Carrier -k window -x       whatever else pytest takes

or, among a project's own tests,

    from kvreal.transfer.conformance import Conformance

    class TestMine(Conformance):
        transport = "mine"                                   # env, locations and others: see below

Checked are the bytes (whole and partial chunks, many descriptors, copies at once), the ends (abort, deadline, peers
that are killed or frozen), and who may touch whose memory (epochs, windows, layouts): what a transport says has ended
lands nothing more. A copy is said to have ended by its mover; that is when the destination's memory is looked at.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any, ClassVar, Dict, Final, Iterator, List, Sequence, Tuple

import pytest

from kvreal.spans import packed
from kvreal.transfer import TransferError, resolve
from kvreal.transfer.conformance_peer import LOCATION, TOKEN, Peer
from kvreal.transfer.line import dial, parse
from kvreal.transfer.window import REVOKE, Hello

BPT: Final = 1024
TOKENS: Final = 64
SLOT: Final = TOKENS * BPT
SLOTS: Final = 16
SECOND: Final = 1_000_000_000

both = pytest.mark.parametrize("read", [True, False], ids=["read", "push"])


class Pair:
    """a (epoch 1) holds chunks 0..SLOTS-1 in its slots; b (epoch 2) is empty. ``copy`` moves from a to b."""

    def __init__(
        self, transport: str, env: Dict[str, str], locations: Tuple[str, str] = (LOCATION, LOCATION)
    ) -> None:
        self.locations: Tuple[str, str] = locations
        self.a: Peer = Peer("a/0", transport, env)
        self.b: Peer = Peer("b/0", transport, env)
        self.rid: int = 0
        self.tokens: int = 0
        self.slots: int = 0
        self.bpt: int = BPT
        self.ends: Dict[str, str] = {}

    def begin(self, tokens: int = TOKENS, slots: int = SLOTS, bpt: int = BPT) -> None:
        self.tokens, self.slots, self.bpt = tokens, slots, bpt
        size = tokens * bpt
        self.ends = {
            "a": self.a.begin(slots, size, 1, self.locations[0]),
            "b": self.b.begin(slots, size, 2, self.locations[1]),
        }
        self.fill(range(slots), range(slots))

    def fill(self, slots: Sequence[int], keys: Sequence[int], tokens: int = 0) -> None:
        """Chunks ``keys`` into a's slots."""
        tokens = tokens or self.tokens
        self.a.ask(
            "fill", location=self.locations[0], slots=list(slots), keys=list(keys), tokens=tokens, bpt=self.bpt
        )

    def copy(
        self, read: bool, pairs: Sequence[Tuple[int, int]], lens: int = 0, epoch: int = 0, **more: Any
    ) -> Tuple[int, int]:
        """Start moving (a's slot, b's slot) pairs; ``epoch``: believed of the other side. Returns the rid."""
        self.rid += 1
        theirs, ours = [a for a, _ in pairs], [b for _, b in pairs]
        here, there = self.locations
        me, peer, end, mine, other = (
            (self.b, "a/0", self.ends["a"], 2, 1) if read else (self.a, "b/0", self.ends["b"], 1, 2)
        )
        me.ask(
            "copy", rid=[2, self.rid], read=read, peer=peer, peer_epoch=epoch or other,
            peer_slots=theirs if read else ours, slots=ours if read else theirs,
            peer_location=here if read else there, location=there if read else here,
            lens=[lens or self.tokens] * len(pairs), endpoint=more.pop("endpoint", end), epoch=mine, bpt=self.bpt,
            **more,
        )  # fmt: skip
        return 2, self.rid

    def mover(self, read: bool) -> Peer:
        return self.b if read else self.a

    def ends_of(self, read: bool, count: int) -> List[Dict[str, Any]]:
        """Wait for ``count`` ends at the mover."""
        found: List[Dict[str, Any]] = []
        while len(found) < count:
            more = self.mover(read).ended()
            assert more, f"{len(found)} of {count} have ended"
            found += more
        return found

    def check(self, slot: int, key: int, tokens: int = 0) -> int:
        """-1 if b's slot holds the chunk, else the first byte that differs."""
        return self.check_all([(slot, key)], tokens)[0]

    def check_all(self, chunks: Sequence[Tuple[int, int]], tokens: int = 0) -> List[int]:
        """Of (slot, key)."""
        found = self.b.ask(
            "check", location=self.locations[1], slots=[slot for slot, _ in chunks], keys=[key for _, key in chunks],
            tokens=tokens or self.tokens, bpt=self.bpt,
        )  # fmt: skip
        assert isinstance(found, list)
        return found

    @property
    def alive(self) -> bool:
        return all(peer.process.poll() is None for peer in (self.a, self.b))

    def close(self) -> None:
        self.a.kill()
        self.b.kill()


class Conformance:
    """Subclass it, and name the ``transport``. ``env``: of its processes, beside this one's. ``locations``: where the
    bytes lie at their source and at their destination."""

    transport: ClassVar[str] = ""
    env: ClassVar[Dict[str, str]] = {}
    locations: ClassVar[Tuple[str, str]] = (LOCATION, LOCATION)
    made: ClassVar[List[Pair]] = []

    @classmethod
    def setup_class(cls) -> None:
        cls.made = []

    @classmethod
    def teardown_class(cls) -> None:
        for pair in cls.made:
            pair.close()

    @pytest.fixture
    def pair(self) -> Pair:
        """The two processes, begun afresh; new ones if a test before has killed one."""
        try:
            resolve(self.transport)
        except TransferError as error:
            pytest.skip(str(error))
        for dead in [pair for pair in self.made if not pair.alive]:
            self.made.remove(dead)
            dead.close()
        if not self.made:
            self.made.append(Pair(self.transport, self.env, self.locations))
        pair = self.made[0]
        pair.begin()
        return pair

    # ---- bytes
    @both
    def test_every_byte_arrives_where_it_should(self, pair: Pair, read: bool) -> None:
        # Neighbours in order, neighbours in the wrong order, and a gap.
        moves = [(0, 0), (1, 1), (2, 2), (5, 4), (4, 5), (9, 9), (15, 3)]
        pair.copy(read, moves)
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done" and ended["nbytes"] == len(moves) * SLOT
        assert ended["asked_ns"] <= ended["began_ns"] <= ended["ended_ns"]
        assert pair.check_all([(b, a) for a, b in moves]) == [-1] * len(moves)
        assert pair.a.ask("wipe") == SLOTS * SLOT  # and they are bytes of its own, not a's
        assert pair.check_all([(b, a) for a, b in moves]) == [-1] * len(moves)

    @both
    def test_slots_that_were_not_meant_stay_as_they_are(self, pair: Pair, read: bool) -> None:
        pair.copy(read, [(slot, slot) for slot in range(SLOTS)])
        assert pair.mover(read).ended()[0]["state"] == "done"
        pair.copy(read, [(3, 5), (9, 0)])
        assert pair.mover(read).ended()[0]["state"] == "done"
        expected = {5: 3, 0: 9}
        assert pair.check_all([(slot, expected.get(slot, slot)) for slot in range(SLOTS)]) == [-1] * SLOTS

    @both
    def test_what_is_done_has_landed(self, pair: Pair, read: bool) -> None:
        """Large enough for the last byte to be late; looked at from its end."""
        pair.begin(tokens=2048, slots=16)
        for _ in range(2):
            pair.copy(read, [(slot, slot) for slot in range(16)])
            (ended,) = pair.mover(read).ended()
            assert ended["state"] == "done" and ended["nbytes"] == 16 * 2048 * BPT
            assert pair.check_all([(slot, slot) for slot in range(15, -1, -1)]) == [-1] * 16
            pair.b.ask("wipe")  # the slots get another use, in which nothing may land
            before = pair.check_all([(slot, slot) for slot in range(16)])
            assert min(before) >= 0, before
            assert pair.check_all([(slot, slot) for slot in range(16)]) == before

    @both
    @pytest.mark.parametrize("tokens", [1, 12, 63])
    def test_a_partial_chunk_moves_as_that_many_tokens(self, pair: Pair, read: bool, tokens: int) -> None:
        pair.copy(read, [(3, 3)])  # what is there before
        assert pair.mover(read).ended()[0]["state"] == "done"
        pair.fill([3], [77], tokens)
        pair.copy(read, [(3, 3)], lens=tokens)
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done" and ended["nbytes"] == tokens * BPT
        assert pair.check(3, 77, tokens) == -1

    @both
    def test_many_descriptors(self, pair: Pair, read: bool) -> None:
        """Each of 2048 small chunks to a place that is no neighbour of the one before."""
        pair.begin(tokens=1, slots=2048, bpt=4096)
        moves = [(slot, slot * 761 % 2048) for slot in range(2048)]
        pair.copy(read, moves)
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done" and ended["nbytes"] == 2048 * 4096
        assert pair.check_all([(b, a) for a, b in moves]) == [-1] * 2048

    @both
    def test_a_chunk_whose_size_divides_by_nothing(self, pair: Pair, read: bool) -> None:
        pair.begin(tokens=4099, slots=5, bpt=1001)
        pair.copy(read, [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)], lens=4097)
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done" and ended["nbytes"] == 5 * 4097 * 1001
        pair.fill(range(5), range(5), 4097)
        again = pair.copy(read, [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)], lens=4097)
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done" and ended["rid"] == list(again)
        assert pair.check_all([(4 - slot, slot) for slot in range(5)], 4097) == [-1] * 5

    @both
    def test_copies_at_once_end_once_each_and_mix_nothing_up(self, pair: Pair, read: bool) -> None:
        pair.begin(tokens=512, slots=64)
        rids = [pair.copy(read, [(i * 8 + j, i * 8 + 7 - j) for j in range(8)]) for i in range(8)]
        ended = pair.ends_of(read, 8)
        assert sorted(tuple(end["rid"]) for end in ended) == sorted(rids)
        assert {end["state"] for end in ended} == {"done"}
        chunks = [(i * 8 + 7 - j, i * 8 + j) for i in range(8) for j in range(8)]
        assert pair.check_all(chunks) == [-1] * 64

    def test_both_directions_at_once(self, pair: Pair) -> None:
        """b reads from a while a pushes to b."""
        pair.begin(tokens=1024, slots=32)
        for i in range(4):
            pair.copy(True, [(slot, slot) for slot in range(i * 4, i * 4 + 4)])
            pair.copy(False, [(slot, slot) for slot in range(16 + i * 4, 20 + i * 4)])
        ended = pair.ends_of(True, 4) + pair.ends_of(False, 4)
        assert {end["state"] for end in ended} == {"done"}
        assert pair.check_all([(slot, slot) for slot in range(32)]) == [-1] * 32

    # ---- ends
    @both
    def test_abort_of_a_stuck_copy_ends_as_stopped(self, pair: Pair, read: bool) -> None:
        rid = pair.copy(read, [(0, 0)], fate={"stuck": True})
        mover = pair.mover(read)
        assert any(f"copy {rid[1]} " in line for line in mover.ask("pending"))
        mover.ask("abort", rid=rid)
        (ended,) = mover.ended()
        assert ended["state"] == "stopped" and ended["rid"] == list(rid), ended

    @both
    def test_abort_of_what_does_not_run_is_answered(self, pair: Pair, read: bool) -> None:
        pair.mover(read).ask("abort", rid=[2, 4711])
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "stopped"

    @both
    def test_after_an_abort_nothing_lands(self, pair: Pair, read: bool) -> None:
        """Wherever the abort meets the copy: once it has ended, the destination's memory stays as it is."""
        pair.begin(tokens=4096, slots=16)
        mover = pair.mover(read)
        for _ in range(3):
            rid = pair.copy(read, [(slot, slot) for slot in range(16)])
            mover.ask("abort", rid=rid)
            ends: List[str] = []
            while not ends:  # one that ends just as it is told to stop is answered twice, in either order
                ends = [ended["state"] for ended in mover.ended() if ended["rid"] == list(rid)]
            assert set(ends) <= {"stopped", "done"}
            pair.b.ask("wipe")  # the slots get another use
            before = pair.check_all([(slot, slot) for slot in range(16)])
            assert min(before) >= 0, before
            assert pair.check_all([(slot, slot) for slot in range(16)]) == before

    @both
    def test_every_copy_ends_by_its_deadline(self, pair: Pair, read: bool) -> None:
        pair.copy(read, [(0, 0)], fate={"stuck": True}, copy_max_ns=SECOND // 5)
        pair.mover(read).tell("take", wait_s=0.3)  # the loop that looks at deadlines
        ended = pair.mover(read).answer() or pair.mover(read).ended(5)
        assert [e["state"] for e in ended] == ["failed"] and "copy_max_ns" in ended[0]["why"]

    @both
    @pytest.mark.parametrize("fraction", [0.0, 0.5])
    def test_a_failing_copy_lands_a_fraction(self, pair: Pair, read: bool, fraction: float) -> None:
        pair.copy(read, [(0, 0), (1, 1)], fate={"fail": True, "fraction": fraction})
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "failed" and ended["nbytes"] == int(2 * SLOT * fraction)
        assert (pair.check(0, 0) == -1) == (fraction == 0.5)
        assert pair.check(1, 1) >= 0

    @both
    def test_a_corrupt_copy_differs_in_one_byte(self, pair: Pair, read: bool) -> None:
        pair.copy(read, [(0, 0), (1, 1)], fate={"corrupt": True})
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done"
        found = sorted(pair.check_all([(0, 0), (1, 1)]))
        assert found[0] == -1 and found[1] > 0
        (intact,) = pair.a.ask("check", location=self.locations[0], slots=[1], keys=[1], tokens=TOKENS, bpt=BPT)
        assert intact == -1

    # ---- peers that go
    @both
    def test_a_peer_that_is_killed_ends_the_copy(self, pair: Pair, read: bool) -> None:
        pair.copy(read, [(1, 1)])  # the connection is there
        assert pair.mover(read).ended()[0]["state"] == "done"
        victim = pair.a if read else pair.b
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait()
        pair.copy(read, [(0, 0)])
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "failed" and ended["why"]

    @both
    def test_a_peer_that_is_killed_in_the_middle_ends_the_copy(self, pair: Pair, read: bool) -> None:
        pair.begin(tokens=8192, slots=16)
        pair.copy(read, [(slot, slot) for slot in range(16)])
        victim = pair.a if read else pair.b
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait()
        (ended,) = pair.mover(read).ended()
        assert ended["state"] in ("failed", "done")
        if read and ended["state"] == "done":
            assert pair.check_all([(slot, slot) for slot in range(16)]) == [-1] * 16

    @both
    def test_a_frozen_peer_does_not_end_a_copy_but_an_abort_does(self, pair: Pair, read: bool) -> None:
        victim = pair.a if read else pair.b
        victim.freeze()
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
        assert pair.check(1, 1) == -1

    # ---- whose memory
    @both
    def test_another_epoch_is_refused_and_nothing_lands(self, pair: Pair, read: bool) -> None:
        pair.copy(read, [(0, 0)], epoch=9)
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "failed" and "epoch 9" in ended["why"]
        assert pair.check(0, 0) >= 0

    def test_a_window_closes_when_its_writer_has_stopped_and_stays_closed(self, pair: Pair) -> None:
        where = parse(pair.ends["b"])
        writer = dial(where, unix=False)  # by hand, so that it stays open
        writer.sock.settimeout(10)
        one, by = (packed([0]), packed([SLOT])), where.cards[0][0]
        hello = Hello(TOKEN, "write", "a/0", 1, "b/0", 2, self.locations[1], *one, by=by)
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

    def test_once_a_window_is_shut_its_writer_writes_no_more(self, pair: Pair) -> None:
        """The mirror rule: slots of a push that was given up are not used again before this."""
        pair.begin(tokens=4096, slots=16)
        for _ in range(2):
            pair.copy(False, [(slot, slot) for slot in range(16)])
            pair.b.ask("close", peer="a/0", epoch=1)
            found: List[str] = []
            while "WindowShut" not in found:
                found += [item["what"] for item in pair.b.ended()]
            pair.b.ask("wipe")
            before = pair.check_all([(slot, slot) for slot in range(16)])
            (ended,) = pair.a.ended()
            assert ended["state"] in ("failed", "done")
            assert pair.check_all([(slot, slot) for slot in range(16)]) == before
            pair.begin(tokens=4096, slots=16)  # another run: the window may be opened again

    def test_closing_a_window_stops_reads_from_that_peer_too(self, pair: Pair) -> None:
        pair.copy(True, [(0, 0)], fate={"stuck": True})
        pair.b.ask("close", peer="a/0", epoch=1)
        found = pair.b.ended()
        if len(found) < 2:  # they may be taken together, or one after the other
            found += pair.b.ended()
        assert [item["what"] for item in found] == ["Ended", "WindowShut"]
        assert found[0]["state"] == "stopped"

    def test_a_window_nobody_has_open_closes_at_once(self, pair: Pair) -> None:
        pair.b.ask("close", peer="x/0", epoch=3)
        assert [item["what"] for item in pair.b.ended()] == ["WindowShut"]

    def test_another_runs_copy_is_refused(self, pair: Pair) -> None:
        pair.a.ask("begin", location=self.locations[0], slots=SLOTS, slot_bytes=SLOT, address="z/0", epoch=1)
        pair.copy(True, [(0, 0)])
        (ended,) = pair.b.ended()
        assert ended["state"] == "failed" and "this is z/0" in ended["why"]

    @both
    def test_a_peers_new_layout_is_noticed(self, pair: Pair, read: bool) -> None:
        """A pooled process keeps its slab, but its locations lie elsewhere in the next run."""
        pair.copy(read, [(0, 0)])
        pair.mover(read).ended()
        pair.begin(tokens=16, slots=8)
        pair.copy(read, [(5, 6)])
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done" and pair.check(6, 5) == -1
        pair.begin(tokens=8192, slots=16)  # larger than the slab: another one
        pair.copy(read, [(5, 6)])
        (ended,) = pair.mover(read).ended()
        assert ended["state"] == "done" and pair.check(6, 5) == -1

    # ---- what others send
    def test_a_foreign_or_broken_endpoint_fails_the_copy_only(self, pair: Pair) -> None:
        unknown = "kvmove|127.0.0.1|1|x"
        for endpoint in ("", "nonsense", "smoke|127.0.0.1|1|x|nixl", f"{unknown}|", f"{unknown}|nixl,socket"):
            pair.copy(True, [(0, 0)], endpoint=endpoint)
            (ended,) = pair.b.ended()
            assert ended["state"] == "failed" and ended["why"]

    def test_garbage_at_the_window_port_harms_nobody(self, pair: Pair) -> None:
        port = parse(pair.ends["a"]).port
        for garbage in (b"", b"\x00", b"\xff" * 64, b"\x05\x00\x00\x00hello", os.urandom(4096)):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(garbage)
        pair.copy(True, [(0, 0)])
        assert pair.b.ended()[0]["state"] == "done" and pair.check(0, 0) == -1


# ---- run by itself
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transport", default="", help="the transport to test: its name, or module:Class")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is TestTransport:
        TestTransport.transport = metafunc.config.getoption("--transport", "")


class TestTransport(Conformance):
    """The one that ``--transport`` names."""

    @pytest.fixture(autouse=True)
    def named(self) -> Iterator[None]:
        assert self.transport, "name a transport: --transport NAME"
        yield


def main(argv: Sequence[str]) -> int:
    """``NAME [pytest's arguments]``."""
    if not argv or argv[0].startswith("-"):
        print("usage: python -m kvreal.transfer.conformance NAME [what pytest takes]", file=sys.stderr)
        return 2
    try:
        resolve(argv[0])
    except TransferError as error:
        print(error, file=sys.stderr)
        return 2
    name = "kvreal.transfer.conformance"
    return int(pytest.main(["-p", name, "--pyargs", name, "--transport", argv[0], *argv[1:]]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
