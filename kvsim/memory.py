"""What each slot of one process holds, as truth about bytes rather than bytes.

A slot holds the KV of ``(key, num_tokens)``, whole; or torn bytes: of no key, half written or corrupted. Where the real
backend compares every byte, this compares who they belong to, so a protocol mistake shows in both worlds.
"""

from __future__ import annotations

from typing import Dict, Final, Iterable, Sequence, Tuple, final

from kvcore.protocol.messages import Key

Content = Tuple[Key, int]
"""(key, number of its tokens, from the first)."""

TORN: Final[Content] = (b"", 0)


@final
class Memory:
    """The locations of one life of one worker."""

    def __init__(self, locations: Iterable[str]) -> None:
        self.slots: Dict[str, Dict[int, Content]] = {name: {} for name in locations}

    def write(self, location: str, slot: int, key: Key, num_tokens: int) -> None:
        self.slots[location][slot] = (key, num_tokens)

    def tear(self, location: str, slots: Sequence[int]) -> None:
        """These are being written to: until that has ended they hold no key's bytes."""
        held = self.slots[location]
        for slot in slots:
            held[slot] = TORN

    def verify(self, location: str, slot: int, key: Key, num_tokens: int) -> bool:
        """Are the first ``num_tokens`` tokens in this slot those of ``key``?"""
        held, tokens = self.slots[location].get(slot, TORN)
        return held == key and tokens >= num_tokens and num_tokens > 0


def copy_slots(
    source: Dict[int, Content],
    source_slots: Sequence[int],
    target: Dict[int, Content],
    target_slots: Sequence[int],
    lens: Sequence[int],
) -> None:
    """What the source slots hold now is in the target slots from now on. ``lens``: tokens copied of each; slots beyond
    it are left alone."""
    for src, dst, num_tokens in zip(source_slots, target_slots, lens):
        held = source.get(src, TORN)
        target[dst] = held if held[1] <= num_tokens else (held[0], num_tokens)
