"""What is so now: read off the controller's machine at the moment of asking, between two of its steps."""

from __future__ import annotations

from typing import Dict, Final, Iterator, List, Tuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcore.protocol.controller import Controller
from kvcore.protocol.coordinator import Event
from kvcore.protocol.messages import NO_ID
from kvcore.protocol.registry import Rank, View
from kvreal.service import Service

PHASES: Final = ("pinning", "reserving", "copying", "releasing")
Stale = Dict[Tuple[str, str], int]
"""(address, location) -> since when its inventory is known to be wanting, ns."""
_PLACE: Final = ("instance_id", "rank", "location")


class Gauges(Collector):
    def __init__(self, service: Service, machine: Controller, stale: Stale) -> None:
        self.service: Service = service
        self.machine: Controller = machine
        self.stale: Stale = stale

    def collect(self) -> Iterator[Metric]:
        now = self.service.node.now()
        yield from self._pools()
        yield self._lag(now)
        yield self._events()
        yield from self._pins(now)
        machine = self.machine
        yield _gauge("kvmove_drains", "Drains under way.", len(machine.drains.open))
        yield _gauge("kvmove_instances", "Instances known.", len(machine.registry.instances()))
        yield _gauge("kvmove_incarnation", "The controller's life, counted in its journal.", machine.incarnation)
        frames = CounterMetricFamily("kvmove_frames", "Control frames by what became of them.", labels=["what"])
        for name, count in sorted(self.service.network.counters.items()):
            frames.add_metric([name.removeprefix("frames_")], count)
        yield frames
        yield from self._connections()

    def _connections(self) -> Iterator[Metric]:
        """Of the workers' ports."""
        whole, why = self.service.network.door.counts()
        about = "Connections of nodes: accepted; established; ended afterwards, also for a frame that was too large."
        connections = CounterMetricFamily("kvmove_connections", about, labels=["what"])
        for what, count in sorted(whole.items()):
            connections.add_metric([what], count)
        yield connections
        refused = CounterMetricFamily("kvmove_handshakes_refused", "Connections that were refused.", labels=["why"])
        for reason, count in sorted(why.items()):
            refused.add_metric([reason], count)
        yield refused

    def _views(self) -> Iterator[Tuple[List[str], Rank, View, int]]:
        for (instance, number), rank in sorted(self.machine.registry.ranks.items()):
            for location in rank.register.locations:
                place = [instance, str(number), location.name]
                yield place, rank, rank.views[location.name], location.slots

    def _pools(self) -> Iterator[GaugeMetricFamily]:
        used = _family("kvmove_pool_chunks", "Chunks visible in a location.", *_PLACE)
        slots = _family("kvmove_pool_slots", "Slots of a location; a chunk takes one.", *_PLACE)
        used_bytes = _family("kvmove_pool_used_bytes", "Memory that visible chunks take.", *_PLACE)
        capacity = _family("kvmove_pool_capacity_bytes", "Memory of a location.", *_PLACE)
        for place, rank, view, count in self._views():
            location = next(one for one in rank.register.locations if one.name == view.place.location)
            slot = location.slot_size(rank.register.namespace)
            used.add_metric(place, len(view.entries))
            slots.add_metric(place, count)
            used_bytes.add_metric(place, len(view.entries) * slot)
            capacity.add_metric(place, count * slot)
        yield from (used, slots, used_bytes, capacity)

    def _lag(self, now: int) -> GaugeMetricFamily:
        about = "How old what the registry knows of a rank may be: since it was heard, or found to be wanting."
        family = _family("kvmove_registry_lag_seconds", about, "instance_id", "rank")
        for (instance, number), rank in sorted(self.machine.registry.ranks.items()):
            since = [rank.heard_ns, *(ns for (address, _), ns in self.stale.items() if address == rank.address)]
            family.add_metric([instance, str(number)], max(0, now - min(since)) / 1e9)
        return family

    def _events(self) -> GaugeMetricFamily:
        family = _family("kvmove_events_in_flight", "Moves that have not ended.", "state")
        counts: Dict[str, int] = dict.fromkeys(PHASES, 0)
        for event in self.machine.moves.events.values():
            counts[event.state] = counts.get(event.state, 0) + 1
        for state, count in counts.items():
            family.add_metric([state], count)
        return family

    def _pins(self, now: int) -> Iterator[GaugeMetricFamily]:
        machine = self.machine
        moves = sum(_pinned(event) for event in machine.moves.events.values())
        user = machine.fanouts.pins
        yield _gauge("kvmove_move_pins", "Pins that moves hold at their sources' ranks.", moves)
        yield _gauge("kvmove_user_pins", "Pins and leases of users that live.", len(user))
        yield _gauge("kvmove_user_pinned_chunks", "Chunks under them.", sum(len(one.keys) for one in user.values()))
        deadlines = [machine.timers.deadlines.get(("hold", number, 0)) for number in user]
        ends = [deadline[0] for deadline in deadlines if deadline is not None]
        left = max(0, min(ends) - machine.spec.config.retry_ns - now) / 1e9 if ends else 0.0
        yield _gauge("kvmove_user_pin_next_end_seconds", "Until the first of them ends; 0 if there is none.", left)


def _pinned(event: Event) -> int:
    """Ranks at which an event's pin may be alive."""
    return sum(pid != NO_ID and released is None for pid, released in zip(event.pids, event.released))


def _family(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, labels=list(labels))


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value=value)
