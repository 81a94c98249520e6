"""Handing over: between instances of one host that keep their CPU memory in one arena, no byte is copied.

The mover makes its slots name what the peer's name (a read), or the peer's what its own do (a push); kvreal/arena.py
says what that means. Pins and fences are as for every transport, and so are windows where something is written. A read
is over in one step, under the arena's lock, in which the peer's life is looked at: once it is known where the peer's
locations begin, which a first window tells, it asks for none.
"""

from __future__ import annotations

from typing import Dict, Final, Optional, Tuple

from kvreal.arena import Changed, Member
from kvreal.memory import Memory
from kvreal.spans import Ints, Slots
from kvreal.transfer.carrier import Carrier, Link
from kvreal.transfer.flow import Flow
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Job
from kvreal.transfer.line import Endpoint, parse
from kvreal.transfer.window import Window, hang_up

KNOWN_MAX: Final = 4096


def _row_of(card: str, location: str) -> str:
    """``arena/row`` of a location in a card; "" if it lies in none."""
    return next((row for name, _, row in (one.partition("=") for one in card.split(" ")) if name == location), "")


class ArenaCarrier(Carrier):
    name = "arena"
    soils = False

    def __init__(self, memory: Memory, process: str, flow: Flow) -> None:
        super().__init__(memory, process, flow)
        if not memory.arena:
            raise TransferError("no arena is named (kvmove.arena, or --arena)")
        #: (peer's card, address, epoch, location) -> (which of its slots are the location's, its mark), by a window
        self.firsts: Dict[Tuple[str, str, int, str], Tuple[int, int]] = {}

    def card(self) -> str:
        """Of each location there: its name, its arena and this process's row in it."""
        return " ".join(f"{name}={member.card}" for name, (member, _) in self.memory.rows.items())

    def new_life(self) -> None:
        for member, _ in self.memory.rows.values():
            member.renew()

    def between(self, card: str, mine: str, theirs: str) -> bool:
        here, there = _row_of(self.card(), mine), _row_of(card, theirs)
        return bool(here) and here.rpartition("/")[0] == there.rpartition("/")[0]

    def at_once(self, job: Job, endpoint: Endpoint) -> str:
        effect = job.copy.effect
        card = endpoint.card(self.name) or ""
        first, mark = self.firsts.get((card, effect.peer, effect.peer_epoch, effect.peer_location), (0, 0))
        if not mark:
            return ""
        self.memory.note(effect.location, job.spans.mine)
        peer = _number(_row_of(card, effect.peer_location))
        mine = self.memory.row(effect.location, job.spans.mine)
        job.began()
        job.check()
        try:
            self._member(effect.location).take(peer, job.spans.theirs + first, mine, mark)
        except Changed:
            return ""  # a window will say what it is now
        job.moved = job.nbytes
        return self.name

    def carry(self, job: Job, link: Link) -> str:
        effect = job.copy.effect
        member = self._member(effect.location)
        card = parse(job.copy.endpoint).card(self.name) or ""
        peer = _number(_row_of(card, effect.peer_location))
        mine = self.memory.row(effect.location, job.spans.mine)
        theirs = link.at
        if len(self.firsts) >= KNOWN_MAX:
            self.firsts.clear()
        if len(theirs):  # the window is open: what it says and the mark go together
            of = (card, effect.peer, effect.peer_epoch, effect.peer_location)
            self.firsts[of] = int(theirs[0]) - int(job.spans.theirs[0]), member.mark(peer)
        job.began()
        job.check()
        if effect.read:
            member.take(peer, theirs, mine)
        else:
            member.give(peer, theirs, mine)
            if job.corrupt:
                self._spoil(member, peer, theirs, job)
        job.moved = job.nbytes
        return "arena"

    def _member(self, location: str) -> Member:
        member = self.memory.member(location)
        if member is None:
            raise TransferError(f"{location} does not lie in the arena")
        return member

    def _spoil(self, member: Member, peer: int, theirs: Ints, job: Job) -> None:
        """Turn a byte over in what the peer has got, and in that only."""
        other: Optional[Member] = member.of(peer)
        middle = len(theirs) // 2
        if other is not None:
            other.own(theirs[middle : middle + 1], keep=True)
            member.arena.bytes[other.offset(int(theirs[middle])) + job.spans[middle][2] // 2] ^= 0xFF

    # ---- the side whose memory is touched
    def prepare(self, window: Window) -> Slots:
        return self.memory.row(window.hello.location, window.slots)

    def revoke(self, window: Window) -> None:
        hang_up(window.sock, close=False)


def _number(row: str) -> int:
    """Which of its arena's members a row is."""
    return int(row.rpartition("/")[2])
