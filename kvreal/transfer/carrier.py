"""A transport: one way in which bytes cross. What all of them share (threads, windows, fates, deadlines) is in base.py.

To add one, write a class like those beside this file and name it under the entry point group ``kvmove.transports``;
``kvreal.transfer.conformance`` tests it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional

from kvreal.memory import Memory, kind_of
from kvreal.spans import Ints, Slots, unpacked
from kvreal.transfer.job import Job
from kvreal.transfer.line import Line
from kvreal.transfer.window import Grant, Hello, Info, Window

if TYPE_CHECKING:
    from kvreal.transfer.flow import Flow
    from kvreal.transfer.line import Endpoint


class Link:
    """The mover's side of an open window. ``line.sock`` belongs to the transport until ``carry`` returns; what it has
    written must then have been read, and the other way round, but for single bytes that ``Window.ended`` skips."""

    def __init__(self, line: Line, grant: Grant) -> None:
        self.line: Line = line
        self.grant: Grant = grant
        self.at: Ints = unpacked(grant.at)
        """Where the peer's slots lie, as its carrier's ``prepare`` has said."""
        self.others: List[Link] = []
        """The other windows of the same copy, where ``streams`` asks for several."""


class Carrier:
    """One a process and transport."""

    name: str = ""
    soils: bool = True
    """Whether it writes into the slots that a copy fills; otherwise they come to hold what others have written."""
    unix: bool = True
    """Whether its windows may be asked for over a Unix socket."""

    def __init__(self, memory: Memory, process: str, flow: Flow) -> None:
        """``process``: unique; peers' carriers know this one by it. TransferError if it cannot work here."""
        self.memory: Memory = memory
        self.process: str = process
        self.flow: Flow = flow

    def card(self) -> str:
        """What a peer's ``reaches`` judges by; no comma, no ``|``."""
        return ""

    def between(self, card: str, mine: str, theirs: str) -> bool:
        """``reaches`` of two locations, by name. For a transport to which one location is not like another."""
        return self.reaches(card, kind_of(mine), kind_of(theirs))

    def reaches(self, card: str, mine: str, theirs: str) -> bool:
        """Whether it can carry bytes between a location of mine and one of the peer's, of which ``card`` tells and
        which are ``cpu``, ``disk`` or ``gpu`` memory."""
        raise NotImplementedError

    def shuns(self, card: str, read: bool) -> str:
        """Why ``auto`` should have such a copy carried by another, where another can; empty: it need not."""
        return ""

    # ---- the side that moves the bytes, in a thread of its own
    def layout(self, endpoint: Endpoint) -> int:
        """Which layout of the peer's memory is known, for its ``info`` to leave out what is."""
        return -1

    def streams(self, job: Job) -> int:
        """How many windows, each on a line of its own, a copy is to have."""
        return 1

    def at_once(self, job: Job, endpoint: Endpoint) -> str:
        """A read that needs no window, as it is over in one step that sees for itself whether the peer is in the life
        that is meant: as ``carry``. Empty: there must be a window."""
        return ""

    def carry(self, job: Job, link: Link) -> str:
        """Move ``job.spans`` (kvreal/spans.py); returns what carried them. Raises Stopped, TransferError or OSError,
        and then nothing that it has begun may still be under way, or the end of its process's connection must end it.
        """
        raise NotImplementedError

    def forget(self, process: str) -> None:
        """A copy with that process has failed: connections to it are made anew."""

    def introduce(self, endpoint: Endpoint, link: Link) -> None:
        """Connect to a peer before the first copy needs it, within a window for no memory at all."""

    # ---- the side whose memory is touched
    def prepare(self, window: Window) -> Slots:
        """Before a window is granted; whatever this raises refuses it. Addresses of its slots, if they have no
        order."""
        return ()

    def info(self, hello: Hello) -> Optional[Info]:
        """What a peer must know to reach this memory; None if it knows it."""
        return None

    def serve(self, window: Window) -> bool:
        """Runs as long as the window is open. True: its owner has said that it is over; False: the connection is
        gone."""
        return window.ended()

    def revoke(self, window: Window) -> None:
        """Make the window's owner stop; must not block."""
        raise NotImplementedError

    # ---- life
    def new_life(self) -> None:
        """This process has another address or epoch than before."""

    def ucx_prints_to(self, fd: int) -> None:
        """Where UCX says what it uses, for those that use it."""

    def memory_changed(self) -> None:
        """Slabs were made or dropped."""

    def stop(self) -> None:
        """The process ends."""
