"""A node: one machine, its inputs in order, its effects carried out, one alarm.

A message to an idle node is one event: it is handled when it arrives, and what it makes the node do leaves after the
service time. Until then the node is busy and later inputs wait, first come first served. A crashed node loses all it is
sent; a paused one finds it when it goes on.
"""

from __future__ import annotations

from collections import deque
from heapq import heappush
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Optional, Tuple, final

from kvcore.protocol.config import ControllerSpec, WorkerSpec
from kvcore.protocol.machine import (
    AbortCopy,
    Boot,
    CloseWindow,
    Effect,
    Input,
    Journal,
    Machine,
    Note,
    Received,
    Send,
    StartCopy,
    StartFill,
    StartRead,
    TimerFired,
    Timers,
)
from kvcore.protocol.worker import Worker
from kvcore.scenario.build import AnySpec
from kvcore.scenario.client import ClientSpec
from kvcore.scenario.faults import FINE, Verdict
from kvsim.costs import chunks_ns
from kvsim.journal import Journal as JournalFile
from kvsim.loop import NEVER_NS, Loop
from kvsim.memory import Memory
from kvsim.network import Site

if TYPE_CHECKING:
    from kvsim.cluster import Cluster

Told = Dict[type, Dict[str, int]]
"""What one input has made a node say so far: kind of message -> to whom -> how much later it leaves."""


@final
class Node:
    __slots__ = (
        "alarm_ns",
        "alive",
        "bytes_per_token",
        "closed",
        "cluster",
        "gate_ns",
        "handle",
        "held",
        "inputs",
        "is_client",
        "journal",
        "life",
        "loop",
        "machine",
        "memory",
        "name",
        "number",
        "on_arrival",
        "paused",
        "peers",
        "queue",
        "restarts_ns",
        "seed",
        "service_ns",
        "site",
        "spec",
        "timers",
        "turn",
        "uniform_ns",
        "worker",
    )

    def __init__(
        self, cluster: Cluster, spec: AnySpec, bytes_per_token: Dict[str, int], number: int, seed: int
    ) -> None:
        self.cluster: Cluster = cluster
        self.loop: Loop = cluster.loop
        self.spec: AnySpec = spec
        self.name: str = spec.name
        self.number: int = number
        self.seed: int = seed
        self.bytes_per_token: Dict[str, int] = bytes_per_token  # of each location
        self.is_client: bool = isinstance(spec, ClientSpec)
        self.machine: Machine = Machine()  # none before the first boot
        self.handle: Callable[[int, Any], List[Effect]] = self.machine.handle
        self.timers: Timers = self.machine.timers
        self.worker: Optional[Worker] = None
        self.memory: Memory = Memory([])
        self.journal: JournalFile = JournalFile(cluster.events_kept)  # survives a crash
        self.alive: bool = False
        self.paused: bool = False
        self.restarts_ns: int = -1  # when it will be booted again, if it is to be
        #: rises with every crash, boot, pause and resume: what was scheduled for another turn does nothing
        self.turn: int = 0
        self.life: int = 0
        #: an input is taken at once from then on; NEVER while dead, paused, or while others wait in the queue
        self.gate_ns: int = NEVER_NS
        self.service_ns: int = cluster.profile.service_ns
        self.queue: Optional[Deque[Input]] = None  # made when first needed: there may be very many nodes
        self.alarm_ns: int = NEVER_NS
        self.closed: Dict[Tuple[str, int], None] = {}
        self.held: Dict[str, List[Received]] = {}  # messages that wait to be overtaken, by destination
        self.inputs: int = 0
        self.site: Site = cluster.network.site(spec)
        self.peers: Dict[str, Node] = cluster.nodes
        self.uniform_ns: int = cluster.network.uniform_ns
        self.on_arrival: Callable[[Any, Any], None] = self.arrive
        if cluster.plan.watches_inputs:
            self.on_arrival = self.arrive_asking

    # ---- lives ------------------------------------------------------------------------------------------------------
    def boot(self, _: Any = None, __: Any = None) -> None:
        spec = self.spec
        self.turn += 1
        self.life += 1
        self.alive = True
        self.paused = False
        self.restarts_ns = -1
        self.machine = self.cluster.make(spec)
        self.handle = self.machine.handle
        self.timers = self.machine.timers
        self.worker = self.machine if isinstance(self.machine, Worker) else None
        if isinstance(spec, WorkerSpec):
            self.memory = Memory([location.name for location in spec.locations])
            boot = Boot(nonce=self._nonce())
        elif isinstance(spec, ControllerSpec):
            boot = Boot(journal=self.journal.all())
        else:
            boot = Boot()
        self.gate_ns = self.loop.now_ns
        self.arrive(boot, None)

    def _nonce(self) -> int:
        """Different for every process of a run, the same in every run."""
        return (self.seed & 0xFFFF) << 40 | (self.number + 1) << 16 | self.life

    def crash(self) -> None:
        self.turn += 1
        self.alive = False
        self.paused = False
        self.gate_ns = NEVER_NS
        self.alarm_ns = NEVER_NS
        self.queue = None
        self.held.clear()
        self.closed.clear()
        self.service_ns = self.cluster.profile.service_ns
        self.cluster.transfers.crashed(self)
        self.cluster.on_died(self.name)

    def pause(self) -> None:
        if self.alive and not self.paused:
            self.turn += 1
            self.paused = True
            self.gate_ns = NEVER_NS
            self.cluster.transfers.paused(self)

    def resume(self) -> None:
        if self.paused:
            self.turn += 1
            self.paused = False
            self.gate_ns = self.loop.now_ns
            self.alarm_ns = NEVER_NS
            self.cluster.transfers.resumed(self)
            if self.queue:
                self._drain_from_gate()
            self.arm()

    def epoch(self) -> int:
        """The epoch that this process has, 0 for none (and for a dead one)."""
        worker = self.worker
        return worker.epoch if worker is not None and self.alive else 0

    # ---- inputs -----------------------------------------------------------------------------------------------------
    def arrive(self, item: Input, _: Any) -> None:
        """Handle an input, or let it wait for its turn. Everything that a run does goes through here."""
        loop = self.loop
        now = loop.now_ns
        if now < self.gate_ns:
            self._wait(item)
            return
        effects = self.handle(now, item)
        self.inputs += 1
        leave = self.gate_ns = now + self.service_ns
        cluster = self.cluster
        if cluster.attended:
            if cluster.watched:
                cluster.watch(now, self, item, effects)
            if cluster.detailed:
                leave = self.gate_ns = leave + chunks_ns(cluster.profile, item, effects)
            if cluster.plan_active:
                self._carry_asking(now, effects, leave)
                effects = []
            elif cluster.detailed:
                self._carry_detailed(effects, leave)
                effects = []
        for effect in effects:
            kind = type(effect)
            if kind is Send:
                peer = self.peers.get(effect.dst)  # type: ignore[union-attr]
                if peer is not None:
                    wire_ns = self.uniform_ns
                    if wire_ns < 0:
                        wire_ns = cluster.network.message_ns(self.site, peer.site)
                    seq = loop.seq = loop.seq + 1
                    received = Received(self.name, effect.msg)  # type: ignore[union-attr]
                    heappush(loop.heap, (leave + wire_ns, seq, peer.on_arrival, received, None))
            elif kind is not Note or self.is_client:
                leave = self._carry(effect, leave)
        heap = self.timers.heap
        if heap and heap[0][0] < self.alarm_ns:
            self.arm()

    def _wait(self, item: Input) -> None:
        if self.alive:
            if self.queue is None:
                self.queue = deque()
            self.queue.append(item)
            if len(self.queue) == 1 and not self.paused:
                self._drain_from_gate()

    def _drain_from_gate(self) -> None:
        self.loop.at(self.gate_ns, self.drain, self.turn)
        self.gate_ns = NEVER_NS

    def give(self, item: Input, life: int) -> None:
        """An input that is meant for one life."""
        if life == self.life:
            self.on_arrival(item, None)

    def drain(self, turn: int, _: Any) -> None:
        """Not busy any more: the next input in line."""
        queue = self.queue
        if turn == self.turn and queue:
            self.gate_ns = self.loop.now_ns
            self.arrive(queue.popleft(), None)
            if queue and turn == self.turn:
                self._drain_from_gate()

    def has_queued(self, kind: type, rid: Tuple[int, int]) -> bool:
        return any(type(item) is kind and item.rid == rid for item in self.queue or ())  # type: ignore[union-attr]

    # ---- the alarm --------------------------------------------------------------------------------------------------
    def arm(self) -> None:
        """One alarm a node: for the earliest deadline, if that is before the alarm that is set."""
        due = self.machine.timers.next()
        if due is not None and due[0] < self.alarm_ns and not self.paused and self.alive:
            now = self.loop.now_ns
            when = self.alarm_ns = due[0] if due[0] > now else now
            self.loop.at(when, self._alarm, when, self.turn)

    def _alarm(self, when: int, turn: int) -> None:
        if when != self.alarm_ns or turn != self.turn:
            return
        now = self.loop.now_ns
        self.alarm_ns = NEVER_NS
        due = self.machine.timers.next()
        if due is None:
            return
        if due[0] > now:
            self.arm()
        elif now >= self.gate_ns:
            self.arrive(TimerFired(due[1]), None)
        elif not self.queue:
            self.alarm_ns = self.gate_ns
            self.loop.at(self.gate_ns, self._alarm, self.gate_ns, turn)
        # else: whoever is next in line sets it anew

    # ---- effects ----------------------------------------------------------------------------------------------------
    def _carry(self, effect: Effect, leave: int) -> int:
        """Anything but a Send. Returns when what follows it leaves."""
        cluster = self.cluster
        if isinstance(effect, Journal):
            self.journal.append(effect.record)
            leave += cluster.profile.journal_ns
            if self.gate_ns < leave:
                self.gate_ns = leave
        elif isinstance(effect, StartCopy):
            cluster.transfers.start(self, effect, leave)
        elif isinstance(effect, Note):
            if self.is_client:
                cluster.on_note(effect)
        else:
            self._carry_rare(effect, leave)
        return leave

    def _carry_rare(self, effect: Effect, leave: int) -> None:
        cluster = self.cluster
        if isinstance(effect, AbortCopy):
            cluster.transfers.abort(self, effect.rid, leave)
        elif isinstance(effect, StartFill):
            cluster.engine.fill(self, effect, leave)
        elif isinstance(effect, StartRead):
            cluster.engine.read(self, effect, leave)
        elif isinstance(effect, CloseWindow):
            cluster.transfers.close_window(self, effect.peer, effect.epoch, leave)
        else:
            raise TypeError(f"{self.name}: an effect that no driver knows: {effect!r}")

    # ---- the same, where nodes that are told at once wake one after the other ---------------------------------------
    def _carry_detailed(self, effects: List[Effect], leave: int) -> None:
        told: Told = {}
        for effect in effects:
            if isinstance(effect, Send):
                peer = self.peers.get(effect.dst)
                if peer is not None:
                    left = self._woken(told, effect, leave)
                    arrives_ns = left + self.cluster.network.message_ns(self.site, peer.site)
                    self.loop.at(arrives_ns, peer.on_arrival, Received(self.name, effect.msg))
            elif type(effect) is not Note or self.is_client:
                leave = self._carry(effect, leave)

    def _woken(self, told: Told, effect: Send, leave: int) -> int:
        """When a message leaves: later, the more nodes were told the like just before. Nothing overtakes it: what goes
        to the same node with it leaves no sooner, and this node stays busy as long."""
        alike = told.setdefault(type(effect.msg), {})
        late_ns = alike.setdefault(effect.dst, len(alike) * self.cluster.profile.wake_ns)
        for others in told.values():
            late_ns = max(late_ns, others.get(effect.dst, 0))
        if self.gate_ns < leave + late_ns:
            self.gate_ns = leave + late_ns
        return leave + late_ns

    # ---- the same, with faults --------------------------------------------------------------------------------------
    def arrive_asking(self, item: Input, verdict: Any) -> None:
        """``verdict``: not None if the plan has been asked about this input already."""
        cluster = self.cluster
        if verdict is not None or not self.alive:
            self.arrive(item, None)
            return
        asked = cluster.plan.input(self.loop.now_ns, self.name, item)
        for action in asked.actions:
            cluster.on_action(action)
        for i in range(0 if asked.drop else asked.copies):
            late_ns = asked.delay_ns + i * asked.copy_gap_ns
            if late_ns:
                self.loop.at(self.loop.now_ns + late_ns, self.arrive_asking, item, asked)
            else:
                self.arrive(item, None)

    def _carry_asking(self, now: int, effects: List[Effect], leave: int) -> None:
        cluster = self.cluster
        plan = cluster.plan
        turn = self.turn
        told: Told = {}
        for effect in effects:
            verdict = plan.effect(now, self.name, effect) if cluster.asks_about(effect) else FINE
            if verdict is FINE and type(effect) is not Send:
                leave = self._carry(effect, leave)
                continue
            if verdict is FINE and not plan.blocks and not self.held:
                peer = self.peers.get(effect.dst)  # type: ignore[union-attr]
                if peer is not None:
                    left = self._woken(told, effect, leave) if cluster.detailed else leave  # type: ignore[arg-type]
                    arrives_ns = left + cluster.network.message_ns(self.site, peer.site)
                    self.loop.at(arrives_ns, peer.on_arrival, Received(self.name, effect.msg))  # type: ignore[union-attr]
                continue
            if isinstance(effect, Send):
                self._send_asking(effect, verdict, self._woken(told, effect, leave) if cluster.detailed else leave)
            elif verdict.drop:
                pass
            elif verdict.delay_ns:
                self.loop.at(now + verdict.delay_ns, self._carry_late, effect, self.life)
            else:
                leave = self._carry(effect, leave)
            for action in verdict.actions:
                cluster.on_action(action)
            if not self.alive or turn != self.turn and not self.paused:
                return  # it died in the middle of it

    def _carry_late(self, effect: Effect, life: int) -> None:
        if self.alive and self.life == life:
            self._carry(effect, self.loop.now_ns)

    def _send_asking(self, effect: Send, verdict: Verdict, leave: int) -> None:
        cluster = self.cluster
        peer = cluster.nodes.get(effect.dst)
        if peer is None or verdict.drop or cluster.plan.blocked(self.name, effect.dst):
            return
        item = Received(self.name, effect.msg)
        arrives_ns = leave + cluster.network.message_ns(self.site, peer.site)
        if verdict.reorder:
            self.held.setdefault(effect.dst, []).append(item)
            self.loop.at(arrives_ns + verdict.delay_ns, self._let_go, item, peer)
            return
        for i in range(verdict.copies):
            self.loop.at(arrives_ns + verdict.delay_ns + i * verdict.copy_gap_ns, peer.on_arrival, item)
        overtaken = self.held.pop(effect.dst, None)
        if overtaken is not None:
            for held in overtaken:
                self.loop.at(arrives_ns + verdict.delay_ns, peer.on_arrival, held)

    def _let_go(self, item: Received, peer: Node) -> None:
        """Nothing has overtaken a message that was to be reordered: it goes at last."""
        waiting = self.held.get(peer.name)
        if waiting is not None:
            left = [held for held in waiting if held is not item]
            if len(left) < len(waiting):
                self.held[peer.name] = left
                peer.on_arrival(item, None)
