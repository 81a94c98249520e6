"""What things cost in simulation: the profile, which the real controller's dry run uses as well, applied.

``Copying`` says what a copy's bytes cross where a profile has measured such copies: links that stand for what all
copies of one process, and all of a transport on this host, share.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple, final

from kvcore.protocol.machine import Effect, Input, Received, Send
from kvcore.protocol.messages import Delta, Message, Snap
from kvcore.scenario.profile import AUTO, CopyCost, Profile, ProfileError, load_profile
from kvcore.scenario.topology import kind_of
from kvsim.fabric import Fabric
from kvsim.maxmin import Link

__all__ = ["AUTO", "CopyCost", "Copying", "Profile", "ProfileError", "chunks_ns", "load_profile"]


@final
class Copying:
    """Links are made when they are first needed: there may be very many nodes."""

    def __init__(self, profile: Profile, transport: str, fabric: Fabric) -> None:
        self.profile: Profile = profile
        self.transport: str = transport
        self.fabric: Fabric = fabric
        self.costs: Dict[Tuple[str, str, bool, bool], Optional[CopyCost]] = {}
        self.hosts: Dict[str, Link] = {}
        self.processes: Dict[Tuple[str, str], Link] = {}

    def cost(self, source: str, target: str, inside: bool, push: bool) -> Optional[CopyCost]:
        """Of a copy from one location to another; None: the profile's plain numbers hold."""
        key = (source, target, inside, push)
        if key not in self.costs:
            self.costs[key] = self.profile.cost(self.transport, kind_of(source), kind_of(target), inside, push)
        return self.costs[key]

    def links(self, cost: CopyCost, carrier: str) -> Tuple[Link, ...]:
        """What it shares with others; ``carrier``: the process that carries it out."""
        found: List[Link] = []
        if cost.process_bytes_per_s:
            key = (cost.transport, carrier)
            if key not in self.processes:
                name = f"{carrier}.{cost.transport}"
                self.processes[key] = self.fabric.link(name, cost.process_bytes_per_s)
            found.append(self.processes[key])
        if cost.host_bytes_per_s:
            if cost.transport not in self.hosts:
                self.hosts[cost.transport] = self.fabric.link(f"host.{cost.transport}", cost.host_bytes_per_s)
            found.append(self.hosts[cost.transport])
        return tuple(found)


def bytes_per_s(cost: CopyCost, nbytes: int) -> float:
    """How fast such a copy's bytes go when nobody else is there."""
    return nbytes * 1e9 / cost.bytes_ns(nbytes) if nbytes else cost.rates[0][1]


def chunks_ns(profile: Profile, item: Input, effects: List[Effect]) -> int:
    """What a node spends on the chunks that messages name: one that it took in, and those that it sends."""
    count = _named(item.msg) if type(item) is Received else 0
    moved = 0
    for effect in effects:
        if type(effect) is Send:
            message = effect.msg
            count += _named(message)
            if type(message) is Delta:
                moved += len(message.adds) + len(message.drops)
    return count * profile.key_ns + moved * profile.index_ns


def _named(message: Message) -> int:
    """How many chunks a message names."""
    if type(message) is Delta:
        return len(message.adds) + len(message.drops)
    if type(message) is Snap:
        return len(message.entries)
    named: Any = getattr(message, "keys", None) or getattr(message, "slots", None)
    return len(named) if named else 0
