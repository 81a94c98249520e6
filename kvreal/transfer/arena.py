"""Handing over: between instances of one host that keep their CPU memory in one arena, no byte is copied.

The mover makes its slots name what the peer's name (a read), or the peer's what its own do (a push); kvreal/arena.py
says what that means. Pins, fences and windows are as for every transport: while a window is open the peer's slots keep
their meaning, and the change is over in one step.
"""

from __future__ import annotations

from typing import Optional

from kvreal.arena import Member, card
from kvreal.memory import Memory
from kvreal.spans import Ints, Slots
from kvreal.transfer.carrier import Carrier, Link
from kvreal.transfer.flow import Flow
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Job
from kvreal.transfer.line import parse
from kvreal.transfer.window import Window, hang_up


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

    def card(self) -> str:
        """Of each location there: its name, its arena and this process's row in it."""
        return " ".join(f"{name}={card(member)}" for name, (member, _) in self.memory.rows.items())

    def between(self, card: str, mine: str, theirs: str) -> bool:
        here, there = _row_of(self.card(), mine), _row_of(card, theirs)
        return bool(here) and here.rpartition("/")[0] == there.rpartition("/")[0]

    def carry(self, job: Job, link: Link) -> str:
        effect = job.copy.effect
        member = self._member(effect.location)
        peer = int(_row_of(parse(job.copy.endpoint).card(self.name) or "", effect.peer_location).rpartition("/")[2])
        mine = self.memory.row(effect.location, job.spans.mine)
        theirs = link.at
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
