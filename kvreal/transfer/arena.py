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


class ArenaCarrier(Carrier):
    name = "arena"
    soils = False

    def __init__(self, memory: Memory, process: str, flow: Flow) -> None:
        super().__init__(memory, process, flow)
        if not memory.arena:
            raise TransferError("no arena is named (kvmove.arena, or --arena)")

    def card(self) -> str:
        return card(self.memory.member) if self.memory.member is not None else ""

    def reaches(self, card: str, mine: str, theirs: str) -> bool:
        here = self.card().rpartition("/")[0]
        return mine == theirs == "cpu" and bool(here) and card.rpartition("/")[0] == here

    def carry(self, job: Job, link: Link) -> str:
        effect = job.copy.effect
        member = self._member()
        peer = int((parse(job.copy.endpoint).card(self.name) or "").rpartition("/")[2])
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

    def _member(self) -> Member:
        if self.memory.member is None:
            raise TransferError("this process has nothing in the arena")
        return self.memory.member

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
