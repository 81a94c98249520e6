"""What must hold once nothing is under way: Leak and View."""

from __future__ import annotations

from typing import Dict, Final, Iterator, Mapping, Tuple

from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import Machine
from kvcore.protocol.messages import Key, Position
from kvcore.protocol.registry import Rank, Registry
from kvcore.protocol.worker import Worker
from kvcore.scenario.check_slots import leftover, recount, short

_LASTING: Final = frozenset({"register", "beat", "hold", "dead", "restored", "forget"})
"""Timers that a quiet machine may have: a node's own, and users' leases."""

Line = Tuple[str, str, str]
"""(property, node, text)."""


def quiet_lines(machines: Mapping[str, Machine]) -> Iterator[Line]:
    """Everything that is still open, and every difference between the view and what is there."""
    for node in sorted(machines):
        machine = machines[node]
        for text in machine.pending():
            yield ("Leak", node, text)
        if isinstance(machine, (Worker, Controller)):
            for name in sorted(machine.timers.deadlines):
                if name[0] not in _LASTING:
                    yield ("Leak", node, f"timer {name[0]} of {name[1]} runs")
        if isinstance(machine, Worker):
            for text in recount(machine):
                yield ("Free", node, text)
            for text in leftover(machine):
                yield ("Leak", node, text)
        elif isinstance(machine, Controller):
            yield from _views(node, machine.registry, machines)


def _views(node: str, registry: Registry, machines: Mapping[str, Machine]) -> Iterator[Line]:
    for _, rank in sorted(registry.ranks.items()):
        worker = machines.get(rank.address)
        if isinstance(worker, Worker) and worker.epoch == rank.epoch:
            for text in _view(rank, worker):
                yield ("View", node, text)
    counted: Dict[Key, Dict[Position, int]] = {}
    for rank in registry.ranks.values():
        for view in rank.views.values():
            for key in view.entries:
                held = counted.setdefault(key, {})
                position = (view.place.instance, view.place.location)
                held[position] = held.get(position, 0) + 1
    listed = {
        key: {(place.instance, place.location): count for place, count in held.items()}
        for key, held in registry.holders.items()
    }
    if listed != counted:
        yield ("View", node, "how many ranks hold each key is not what their views say")


def _view(rank: Rank, worker: Worker) -> Iterator[str]:
    for pool in worker.pool_list:
        where = f"{rank.address} {pool.name}"
        view = rank.views.get(pool.name)
        if view is None:
            yield f"{where} is not in the view"
            continue
        if view.inc != pool.inc or view.seq != pool.seq:
            yield f"{where} is at {pool.inc} seq {pool.seq}, its view at {view.inc} seq {view.seq}"
        extra = [short(key) for key in view.entries if key not in pool.index]
        missing = [short(key) for key in pool.index if key not in view.entries]
        if extra or missing:
            yield f"{where}: the view has {sorted(extra)[:8]} too many and lacks {sorted(missing)[:8]}"
        for key, entry in view.entries.items():
            held = pool.index.get(key)
            if held is not None and (held.parent, held.num_tokens) != (entry.parent, entry.num_tokens):
                yield f"{where}: the view has another parent or length of {short(key)}"
