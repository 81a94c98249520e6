"""What the controller counts, for Prometheus. Units are in the names; nothing here is asked for on a move's way.

What has happened is counted here, from the service's steps and the log's ended events; what is so now is read off the
machine when somebody asks (gauges.py).
"""

from __future__ import annotations

from typing import Any, Dict, Final, List, Set, Tuple

from fastapi import APIRouter
from fastapi.responses import Response
from msgspec import UNSET
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

from kvcore.protocol import machine as m
from kvcore.protocol.controller import Controller
from kvcore.protocol.coordinator import RELEASING
from kvcore.protocol.messages import (
    Answer,
    Clear,
    Cleared,
    Delta,
    Expelled,
    Fetch,
    Hold,
    Inc,
    Key,
    Pin,
    PinRequest,
    Release,
    Released,
    Resync,
    Snap,
    Unhold,
)
from kvreal.http.events import EventLog
from kvreal.http.gauges import Gauges, Stale
from kvreal.http.models import EventView
from kvreal.http.views import ENDED
from kvreal.service import TERMINAL, Service

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
ASKING: Final = frozenset({Pin, Fetch, Release, Hold, Unhold, Clear})
"""What the controller sends once an event and rank; every more is a retry."""


class Metrics:
    """Listens to the service's steps and the log's ended events."""

    def __init__(self, service: Service, log: EventLog) -> None:
        self.service: Service = service
        self.machine: Controller = log.machine
        self.registry: CollectorRegistry = CollectorRegistry()
        #: event -> (message, rank's address) that have been sent for it
        self.asked: Dict[int, Set[Tuple[type, str]]] = {}
        #: (address, location) -> (incarnation, number) of the last change that was counted
        self.counted: Dict[Tuple[str, str], Tuple[Inc, int]] = {}
        #: (address, location) -> since when its inventory is known to be wanting
        self.stale: Stale = {}
        self.moves: Counter = self._counter("moves", "Ended events.", "kind", "state", "reason")
        self.tokens: Counter = self._counter("moved_tokens", "Tokens whose KV ended moves brought.", "kind")
        self.bytes: Counter = self._counter("moved_bytes", "Bytes copied by ended moves.", "transport")
        self.phases: Histogram = self._seconds("move_phase_seconds", "How long a phase of a move took.", "phase")
        self.whole: Histogram = self._seconds("move_seconds", "A move from its request to its end.", "state")
        self.added: Counter = self._counter("chunks_added", "Chunks that came.", "instance_id", "location")
        self.evicted: Counter = self._counter(
            "chunks_evicted", "Chunks that left for another reason than a move.", "instance_id", "location"
        )
        self.deleted: Counter = self._counter("chunks_deleted", "Chunks that moves deleted at their sources.")
        self.kept: Counter = self._counter("chunks_kept", "Chunks that moves had to leave at their sources.")
        self.cleared: Counter = self._counter("locations_cleared", "Clears that a rank has answered.")
        self.pins: Counter = self._counter("pin_requests", "User pins and leases asked for.", "what")
        self.retries: Counter = self._counter("retries", "Messages sent again for want of an answer.", "message")
        self.stale_epochs: Counter = self._counter(
            "stale_epoch_drops", "Messages of processes that are not believed any more.", "message"
        )
        self.resyncs: Counter = self._counter("resyncs", "Inventories that had to be asked for anew.")
        self.ranks: Counter = self._counter("ranks", "Ranks that came, went, or were refused.", "what")
        self.registry.register(Gauges(service, self.machine, self.stale))
        service.listeners.append(self.step)
        log.on_ended.append(self.ended)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"kvmove_{name}", about, labels, registry=self.registry)

    def _seconds(self, name: str, about: str, *labels: str) -> Histogram:
        return Histogram(f"kvmove_{name}", about, labels, registry=self.registry, buckets=SECONDS)

    # ---- what happens
    def step(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        if isinstance(item, m.Received):
            self._received(item.src, item.msg)
        for effect in effects:
            if isinstance(effect, m.Send):
                self._sent(now, effect.dst, effect.msg)
            elif isinstance(effect, m.Note):
                self._noted(effect)
        for effect in effects:
            if isinstance(effect, m.Journal) and isinstance(effect.record, m.Outcome):
                self.asked.pop(effect.record.event, None)

    def _received(self, src: str, message: Any) -> None:
        if isinstance(message, Delta):
            self._delta(src, message)
        elif isinstance(message, Released):
            if message.deleted > 0:
                self.deleted.inc(message.deleted)
            if message.kept > 0:
                self.kept.inc(message.kept)
        elif isinstance(message, Snap):
            self.stale.pop((src, message.location), None)
        elif isinstance(message, Cleared):
            self.cleared.inc()
        elif isinstance(message, PinRequest):
            self.pins.labels("renew" if message.event else "begin").inc()

    def _sent(self, now: int, dst: str, message: Any) -> None:
        kind = type(message)
        if kind in ASKING:
            asked = self.asked.setdefault(message.event, set())
            if (kind, dst) in asked:
                self.retries.labels(kind.__name__).inc()
            asked.add((kind, dst))
        elif kind is Answer:
            if message.event and message.state in TERMINAL:
                self.asked.pop(message.event, None)
        elif kind is Resync:
            self.resyncs.inc()
            self.stale.setdefault((dst, message.location), now)
        elif kind is Expelled:
            self.stale_epochs.labels("Beat").inc()

    def _noted(self, note: m.Note) -> None:
        if note.kind == "stale_epoch":
            self.stale_epochs.labels(note.detail.partition(" ")[0]).inc()
        elif note.kind in ("believed", "dead", "register_refused"):
            self.ranks.labels(note.kind).inc()
            self._forget(note.detail)

    def _forget(self, address: str) -> None:
        """Another process is there now, or none."""
        for key in [key for key in self.stale if key[0] == address]:
            del self.stale[key]
        here = self.machine.registry.by_address
        if len(self.counted) > 64 + 16 * len(here):
            self.counted = {key: at for key, at in self.counted.items() if key[0] in here}

    def _delta(self, src: str, message: Delta) -> None:
        """Count a change once, when the registry has taken it."""
        rank = self.machine.registry.by_address.get(src)
        view = rank.views.get(message.location) if rank is not None else None
        at = (message.inc, message.seq)
        if rank is None or view is None or (view.inc, view.seq) != at:
            return
        if self.counted.get((src, message.location)) == at:
            return
        self.counted[(src, message.location)] = at
        place = (rank.register.instance, message.location)
        if message.adds:
            self.added.labels(*place).inc(len(message.adds))
        if message.drops:
            moved = self._moved(src, message.location)
            evicted = sum(key not in moved for key in message.drops)
            if evicted:
                self.evicted.labels(*place).inc(evicted)

    def _moved(self, src: str, location: str) -> Set[Key]:
        """What moves are deleting at this source now. It says so only after its inventory has changed."""
        moves = self.machine.moves
        found: Set[Key] = set()
        for number in moves.by_node.get(src, ()):
            event = moves.events[number]
            request = event.request
            if event.state == RELEASING and not request.copy and src in event.src and request.src[1] == location:
                found.update(request.keys[: event.n])
        return found

    def ended(self, view: EventView) -> None:
        reason = view.reason if isinstance(view.reason, str) else ""
        self.moves.labels(view.kind, view.state, reason).inc()
        if view.kind not in ("move", "copy"):
            return
        if view.state == "done":
            self.tokens.labels(view.kind).inc(view.num_tokens)
        if view.bytes is not UNSET and view.bytes:
            self.bytes.labels(view.transport if isinstance(view.transport, str) else "unknown").inc(view.bytes)
        if view.duration_s is not UNSET:
            self.whole.labels(view.state).observe(view.duration_s)
        if isinstance(view.phases_s, dict):
            for phase, seconds in view.phases_s.items():
                if phase not in ENDED:
                    self.phases.labels(phase).observe(seconds)

    def text(self) -> bytes:
        self.service.catch_up()
        return bytes(generate_latest(self.registry))


def router(metrics: Metrics, dependencies: List[Any]) -> APIRouter:
    """GET /metrics."""
    routes = APIRouter()

    @routes.get("/metrics", dependencies=dependencies, include_in_schema=False)
    async def show() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
