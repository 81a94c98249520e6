"""The engine's side of a worker's memory: it fills slots with what keys stand for, and reads and checks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, final

from kvcore.protocol.machine import FillDone, ReadDone, StartFill, StartRead
from kvcore.scenario.faults import CopyFate

if TYPE_CHECKING:
    from kvsim.cluster import Cluster
    from kvsim.node import Node


@final
class Filling:
    __slots__ = ("effect", "fate", "life", "node")

    def __init__(self, node: Node, effect: StartFill, fate: Optional[CopyFate]) -> None:
        self.node: Node = node
        self.life: int = node.life
        self.effect: StartFill = effect
        self.fate: Optional[CopyFate] = fate


@final
class Reading:
    __slots__ = ("effect", "good", "life", "node")

    def __init__(self, node: Node, effect: StartRead, good: bool) -> None:
        self.node: Node = node
        self.life: int = node.life
        self.effect: StartRead = effect
        self.good: bool = good


@final
class Engine:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster: Cluster = cluster

    def fill(self, node: Node, effect: StartFill, at_ns: int) -> None:
        cluster = self.cluster
        fate = cluster.plan.copy(cluster.loop.now_ns, node.name, effect) if cluster.plan_active else None
        node.memory.tear(effect.location, effect.slots)
        took_ns = cluster.profile.fill_time_ns(sum(effect.lens) * node.bytes_per_token[effect.location])
        if fate is not None:
            if fate.stuck:
                took_ns = cluster.copy_max_ns
            took_ns = round(took_ns * fate.slow) + fate.delay_ns
        cluster.loop.at(at_ns + took_ns, self._filled, Filling(node, effect, fate))

    def _filled(self, filling: Filling, _: Any) -> None:
        node = filling.node
        if node.life != filling.life:
            return
        effect = filling.effect
        fate = filling.fate
        if fate is not None and (fate.fail or fate.stuck):
            node.on_arrival(FillDone(effect.fid, False), None)
            return
        write = node.memory.write
        for slot, key, num_tokens in zip(effect.slots, effect.keys, effect.lens):
            write(effect.location, slot, key, num_tokens)
        if fate is not None and fate.corrupt:
            node.memory.tear(effect.location, effect.slots[:1])
        node.on_arrival(FillDone(effect.fid, True), None)

    def read(self, node: Node, effect: StartRead, at_ns: int) -> None:
        """Bytes must be right when the reading starts and still when it ends."""
        cluster = self.cluster
        took_ns = cluster.profile.read_time_ns(sum(effect.lens) * node.bytes_per_token[effect.location])
        good = whole(node, effect)
        cluster.loop.at(at_ns + max(took_ns, effect.hold_ns), self._read, Reading(node, effect, good))

    def _read(self, reading: Reading, _: Any) -> None:
        node = reading.node
        if node.life == reading.life:
            good = reading.good and whole(node, reading.effect)
            node.on_arrival(ReadDone(reading.effect.fid, good), None)


def whole(node: Node, effect: StartRead) -> bool:
    """Do the slots hold what their keys stand for?"""
    verify = node.memory.verify
    for slot, key, num_tokens in zip(effect.slots, effect.keys, effect.lens):
        if not verify(effect.location, slot, key, num_tokens):
            return False
    return True
