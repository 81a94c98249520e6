"""Moving all that a place holds: the controller fixes the list, cuts it into root-to-leaf chains and runs one move a
chain, one after another. The sum is the drain's answer; what could not be moved fails it by name."""

from __future__ import annotations

from typing import Dict, List, Tuple, final

from kvcore.protocol.messages import Key, MoveRequest

Chain = Tuple[Tuple[Key, ...], Tuple[int, ...]]


@final
class Drain:
    def __init__(self, number: int, request: MoveRequest, client: str, chains: List[Chain], deadline_ns: int) -> None:
        self.number: int = number
        self.request: MoveRequest = request
        self.client: str = client
        self.chains: List[Chain] = chains
        self.deadline_ns: int = deadline_ns
        self.next: int = 0
        self.child: int = 0
        #: chunk key -> tokens: chains share their heads, a chunk counts once
        self.planned: Dict[Key, int] = {key: n for keys, lens in chains for key, n in zip(keys, lens)}
        self.moved: Dict[Key, int] = {}
        self.left: List[str] = []
        self.cancelled: str = ""
        self.waiters: List[Tuple[str, str]] = []

    def child_ended(self, request: MoveRequest, state: str, reason: str, n: int, kept: int, why: str) -> None:
        """Count what one chain's move did. A shared head that stays for a later chain is not left behind."""
        if state == "done":
            for key, length in zip(request.keys[:n], request.lens[:n]):
                self.moved[key] = length
        if state != "done" or n < len(request.keys):
            chunks = len(request.keys) - (n if state == "done" else 0)
            self.left.append(f"{chunks} chunks: {reason or 'destination full'}")
        elif kept and why not in ("child_here", "gone"):
            self.left.append(f"{kept} chunks: kept, {why}")

    def num_tokens(self) -> int:
        return sum(self.planned.values())
