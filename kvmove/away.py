"""The machines that a run takes processes from: this one, and those of ``--peer``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvcore.scenario.build import Built

if TYPE_CHECKING:
    from kvreal.borrow import Away, Borrowed
    from kvreal.pool import Lender, Pool


class Fleet:
    """This machine's pool, and the peers'. PeerError or TransferError if it cannot be had; nothing is left then."""

    def __init__(self, transport: str, peers: Sequence[str] = (), secret: bytes = b"", bind: str = "") -> None:
        """``peers``: as ``--peer`` has them. ``bind``: where they reach this machine, if not by the way in which it
        reaches them."""
        from kvreal.borrow import Away, PeerError
        from kvreal.pool import LOOPBACK, Pool

        if peers and transport == "arena":
            raise PeerError("--transport arena: its instances share a host's memory, and a peer's are on another host")
        self.peers: list[tuple[Away, Borrowed]] = []
        with ExitStack() as opened:
            for text in peers:
                away = opened.enter_context(Away(text, secret))
                self.peers.append((away, opened.enter_context(away.borrow(transport))))
            mine = {there.mine for _, there in self.peers}
            if len(mine) > 1 and not bind:
                ways = " and ".join(sorted(mine))
                raise PeerError(f"peers reach this machine at {ways}, expected --bind ADDRESS to say which all can")
            shared = {there.secret for _, there in self.peers}
            if len(shared) > 1:
                raise PeerError("--peer: several by ssh, expected --peer-token FILE for all")
            at = bind or next(iter(mine), LOOPBACK)
            chosen = {there.transport for _, there in self.peers}
            transport = chosen.pop() if len(chosen) == 1 else transport
            self.pool: Pool = opened.enter_context(Pool(transport, bind=at, secret=next(iter(shared), b"")))
            self.stack: ExitStack = opened.pop_all()

    def elsewhere(self, built: Built) -> dict[str, Lender]:
        """Instance -> where its ranks run, of those that do not run here."""
        from kvreal.borrow import place

        names = place([away for away, _ in self.peers], list(built.instances))
        return {name: there for name, (_, there) in zip(names, self.peers)}

    def close(self) -> None:
        self.stack.close()
