"""What the controller counts, for Prometheus. Units are in the names; nothing here is asked for on a move's way."""

from __future__ import annotations

from typing import Any, Dict, Final, Iterator, List, Tuple

from fastapi import APIRouter
from fastapi.responses import Response
from msgspec import UNSET
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcore.protocol import machine as m
from kvcore.protocol.messages import Delta, Released, Resync
from kvreal.http.events import EventLog
from kvreal.http.models import EventView
from kvreal.service import Service

PHASES: Final = ("pinning", "reserving", "copying", "releasing")
SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Metrics:
    """Listens to the service's steps and the log's ended events; pools and lags are read when they are asked for."""

    def __init__(self, service: Service, log: EventLog) -> None:
        self.service: Service = service
        self.log: EventLog = log
        self.registry: CollectorRegistry = CollectorRegistry()
        self.moves: Counter = self._counter("moves", "Ended events.", "kind", "state", "reason")
        self.bytes: Counter = self._counter("moved_bytes", "Bytes copied by ended moves.", "transport")
        self.phases: Histogram = self._seconds("move_phase_seconds", "How long a phase took.", "phase")
        self.whole: Histogram = self._seconds("move_seconds", "From the request to the end.", "state")
        self.notes: Counter = self._counter("notes", "What the protocol remarked: refusals, stale epochs.", "kind")
        self.retries: Counter = self._counter("retries", "Alarms that made the controller ask again.", "kind")
        self.resyncs: Counter = self._counter("resyncs", "Inventories that had to be asked for anew.")
        self.dropped: Counter = self._counter("chunks_dropped", "Chunks that left.", "instance", "location")
        self.deleted: Counter = self._counter("chunks_deleted", "Chunks that moves deleted at their sources.")
        self.added: Counter = self._counter("chunks_added", "Chunks that came.", "instance", "location")
        self.registry.register(_Now(self))
        service.listeners.append(self.step)
        log.on_ended.append(self.ended)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"kvmove_{name}", about, labels, registry=self.registry)

    def _seconds(self, name: str, about: str, *labels: str) -> Histogram:
        return Histogram(f"kvmove_{name}", about, labels, registry=self.registry, buckets=SECONDS)

    def step(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        if isinstance(item, m.Received):
            message = item.msg
            if isinstance(message, Delta):
                self._delta(item.src, message)
            elif isinstance(message, Released) and message.deleted > 0:
                self.deleted.inc(message.deleted)
        for effect in effects:
            if isinstance(effect, m.Note):
                self.notes.labels(effect.kind).inc()
            elif isinstance(effect, m.Send) and isinstance(effect.msg, Resync):
                self.resyncs.inc()
        if isinstance(item, m.TimerFired) and effects and item.name[0] in ("retry", "fanout"):
            self.retries.labels(item.name[0]).inc()

    def _delta(self, src: str, message: Delta) -> None:
        rank = self.service.machine.registry.by_address.get(src)  # type: ignore[attr-defined]
        if rank is None:
            return
        place = (rank.register.instance, message.location)
        if message.adds:
            self.added.labels(*place).inc(len(message.adds))
        if message.drops:
            self.dropped.labels(*place).inc(len(message.drops))

    def ended(self, view: EventView) -> None:
        reason = view.reason if isinstance(view.reason, str) else ""
        self.moves.labels(view.kind, view.state, reason).inc()
        if view.kind not in ("move", "copy"):
            return
        if view.bytes is not UNSET and view.bytes:
            self.bytes.labels(view.transport if isinstance(view.transport, str) else "unknown").inc(view.bytes)
        if view.duration_s is not UNSET:
            self.whole.labels(view.state).observe(view.duration_s)
        if isinstance(view.phases_s, dict):
            for phase, seconds in view.phases_s.items():
                self.phases.labels(phase).observe(seconds)

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))


class _Now(Collector):
    """What is read off the machine at the moment of asking."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics: Metrics = metrics

    def collect(self) -> Iterator[Metric]:
        service = self.metrics.service
        machine: Any = service.machine
        yield self._pools(machine)
        yield self._capacity(machine)
        yield self._lag(machine, service.node.now())
        yield self._events(machine)
        yield _gauge("kvmove_user_pins", "User pins and leases that live.", len(machine.fanouts.pins))
        yield _gauge("kvmove_drains", "Drains under way.", len(machine.drains.open))
        yield _gauge("kvmove_instances", "Instances known.", len(machine.registry.instances()))
        yield _gauge("kvmove_incarnation", "The controller's life, counted in its journal.", machine.incarnation)
        frames = CounterMetricFamily("kvmove_frames", "Control frames by what became of them.", labels=["what"])
        for name, count in sorted(service.network.counters.items()):
            frames.add_metric([name.removeprefix("frames_")], count)
        yield frames

    def _views(self, machine: Any) -> Iterator[Tuple[str, str, str, Any, int]]:
        for (instance, number), rank in sorted(machine.registry.ranks.items()):
            slots = {location.name: location.slots for location in rank.register.locations}
            for name, view in rank.views.items():
                yield instance, str(number), name, view, slots[name]

    def _pools(self, machine: Any) -> GaugeMetricFamily:
        family = _family("kvmove_pool_chunks", "Chunks visible in a location.", "instance", "rank", "location")
        for instance, rank, location, view, _ in self._views(machine):
            family.add_metric([instance, rank, location], len(view.entries))
        return family

    def _capacity(self, machine: Any) -> GaugeMetricFamily:
        family = _family("kvmove_pool_slots", "Slots of a location.", "instance", "rank", "location")
        for instance, rank, location, _, slots in self._views(machine):
            family.add_metric([instance, rank, location], slots)
        return family

    def _lag(self, machine: Any, now: int) -> GaugeMetricFamily:
        family = _family("kvmove_registry_lag_seconds", "Since a rank was last heard.", "instance", "rank")
        for (instance, number), rank in sorted(machine.registry.ranks.items()):
            family.add_metric([instance, str(number)], max(0, now - rank.heard_ns) / 1e9)
        return family

    def _events(self, machine: Any) -> GaugeMetricFamily:
        family = _family("kvmove_events_in_flight", "Events that have not ended.", "state")
        counts: Dict[str, int] = dict.fromkeys(PHASES, 0)
        for event in machine.moves.events.values():
            counts[event.state] = counts.get(event.state, 0) + 1
        for state, count in counts.items():
            family.add_metric([state], count)
        return family


def _family(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, labels=list(labels))


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value=value)


def router(metrics: Metrics, dependencies: List[Any]) -> APIRouter:
    """GET /metrics."""
    routes = APIRouter()

    @routes.get("/metrics", dependencies=dependencies, include_in_schema=False)
    async def show() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
