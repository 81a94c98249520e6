"""One run of a scenario in simulation: boot, play, let the faults stop, wait until all is quiet, say what happened."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union, final

from kvcore.protocol.machine import Command, Effect, Input, Machine, Note, Received, Record
from kvcore.protocol.messages import Beat, Key
from kvcore.protocol.worker import Worker
from kvcore.scenario.build import Built, as_measured, placement
from kvcore.scenario.checks import Checker
from kvcore.scenario.client import Client
from kvcore.scenario.faults import (
    Action,
    CancelOp,
    ClientDies,
    Crash,
    FaultPlan,
    Full,
    Partition,
    Pause,
    Slow,
)
from kvcore.scenario.history import VERSION, FileHistory, Header, NoHistory
from kvcore.scenario.result import Operation, PhaseTracker, Result
from kvsim.cluster import Cluster
from kvsim.costs import AUTO, Profile, load_profile
from kvsim.memory import TORN
from kvsim.node import Node

_FIRST_LOOK_NS = 100_000
"""How soon after it is asked for quiet is looked for; then ever less often."""


def run(
    built: Built,
    *,
    history: Optional[Path] = None,
    sink: Optional[NoHistory] = None,
    profile: Optional[Profile] = None,
    check: bool = True,
    max_events: Optional[int] = None,
    rates: bool = False,
    transport: str = AUTO,
) -> Result:
    """Play ``built``. ``history``: where to write it (or give a ``sink`` of your own). ``profile``: what things cost;
    default: what the scenario names, else Profile(). ``check``: check the protocol's properties after every input.
    ``rates``: tell what crossed each link when (``Result.rates``). ``transport``: whose measured costs copies have;
    one that the profile does not know has its plain ones.
    Raises EventLimit after ``max_events`` events, HistoryError for a full disk, ProfileError for a wrong profile."""
    built = as_measured(built, transport)
    lines = sink if sink is not None else NoHistory()
    if history is not None:
        lines = FileHistory(history, header(built))
    try:
        simulation = Simulation(built, profile or profile_of(built), lines, check, transport)
        simulation.cluster.fabric.watched = rates
        with CollectorTamed():
            simulation.play(max_events)
        result = simulation.result()
    finally:
        lines.close()
    result.history = str(history) if history is not None else None
    return result


def profile_of(built: Built) -> Profile:
    """The profile that its scenario names. ProfileError for a wrong one."""
    return load_profile(Path(built.network.profile)) if built.network.profile else Profile()


def header(built: Built) -> Header:
    return Header(VERSION, "sim", built.name, built.seed, built)


@final
class CollectorTamed:
    """What was built stays out of the garbage collector's sight, and it looks for garbage a hundred times less often.

    Nothing in a run makes cycles: machines, messages and flows are freed by reference counts.
    """

    def __init__(self) -> None:
        self.threshold: Any = gc.get_threshold()

    def __enter__(self) -> None:
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*self.threshold)
        gc.unfreeze()


@final
class Simulation:
    def __init__(self, built: Built, profile: Profile, history: NoHistory, check: bool, transport: str = AUTO) -> None:
        self.built: Built = built
        self.plan: FaultPlan = FaultPlan(built.faults, built.config, built.nodes)
        self.cluster: Cluster = Cluster(built, profile, self.plan, history, transport=transport)
        self.profile: Profile = profile
        self.phases: PhaseTracker = PhaseTracker(built.bytes_per_token)
        self.started_ns: int = -1
        self.waiting: str = ""  # "settle" or "finish": what happens once all is quiet
        self.look_ns: int = 0
        self.looks: int = 0
        self.calm_ns: int = -1  # when faults stopped
        self.born: Dict[str, None] = {}
        self.early: List[Union[Crash, Pause]] = []  # what is to happen to nodes that are not booted yet
        self.full: List[Full] = []
        self.hung: List[str] = []
        self.struck: List[Tuple[int, Action]] = []
        self.client: Optional[Node] = None
        for node in self.cluster.nodes.values():
            if node.is_client:
                self.client = node
        self.cluster.on_note = self._note
        self.cluster.on_action = self._act
        self.cluster.queued = self.phases.queued
        self.checker: Optional[Checker] = None
        if check:
            self.checker = Checker(self._content, bool(built.faults))
            self.cluster.on_died = self.checker.died
            self.cluster.on_landed = self._landed
        self.cluster.observed_by(self._observe)

    def play(self, max_events: Optional[int] = None) -> None:
        loop = self.cluster.loop
        for node in self.cluster.nodes.values():
            self._start_process(node)
        loop.at(self.built.deadline_ns, self._deadline, -1)
        loop.advance(1 << 61, max_events)

    def _start_process(self, node: Node) -> None:
        """Boot a node, unless a fault at the birth of one before it has killed its process already."""
        self.born[node.name] = None
        early = [action for action in self.early if action.node == node.name]
        if not any(isinstance(action, Crash) for action in early):
            node.boot()
        for action in early:
            self._act(action)

    def _observe(self, now: int, name: str, machine: Machine, item: Input, effects: List[Effect]) -> None:
        self.phases.step(now, name, item, effects)
        if type(item) is Command and item.what == "unmount" and item.args[1] == "on":
            self.cluster.nodes[name].memory.slots[item.args[0]].clear()
        if self.checker is not None:
            self.checker.step(now, name, machine, item, effects)

    def _content(self, name: str, location: str, slot: int) -> Optional[Key]:
        key, _ = self.cluster.nodes[name].memory.slots[location].get(slot, TORN)
        return key or None

    def _landed(self, node: Node, location: str, slots: Sequence[int]) -> None:
        if self.checker is not None and node.alive:
            self.checker.touched(self.cluster.loop.now_ns, node.name, node.machine, location, slots)

    # ---- what the client says ---------------------------------------------------------------------------------------
    def _note(self, note: Note) -> None:
        if note.kind == "settle":
            self._await_quiet("settle")
        elif note.kind == "start":
            self._start()
        elif note.kind == "finished":
            self._stop_faults()
            self._await_quiet("finish")

    def _start(self) -> None:
        """The workload's time zero."""
        loop = self.cluster.loop
        self.started_ns = loop.now_ns
        loop.at(loop.now_ns + self.built.deadline_ns, self._deadline, self.started_ns)
        for after_ns, action in self.plan.timed():
            loop.at(loop.now_ns + after_ns, self._act_now, action)

    def _stop_faults(self) -> None:
        """The liveness phase: whatever still runs has to come to its end now."""
        self.calm_ns = self.cluster.loop.now_ns
        self.plan.stop()
        self.cluster.plan_active = False
        for node in self.cluster.nodes.values():
            node.service_ns = self.profile.service_ns
            node.resume()
        for action in self.full:
            self._full(action, "off")
        self.full = []

    def _deadline(self, started_ns: int, _: Any) -> None:
        if started_ns == self.started_ns:
            self.hung = self.open_ends() or ["nobody: the client never finished"]
            self.cluster.loop.stop()

    # ---- quiet ------------------------------------------------------------------------------------------------------
    def _await_quiet(self, what: str) -> None:
        self.waiting = what
        self.look_ns = _FIRST_LOOK_NS
        self.looks += 1
        self.cluster.loop.at(self.cluster.loop.now_ns + self.look_ns, self._look, self.looks)

    def _look(self, number: int, _: Any) -> None:
        if number != self.looks:
            return
        loop = self.cluster.loop
        if self.open_ends(first=True):
            self.look_ns = min(self.look_ns * 5 // 4, self.built.config.retry_ns // 4 + 1)
            loop.at(loop.now_ns + self.look_ns, self._look, number)
        elif self.waiting == "finish" and loop.now_ns < self._heard_ns():
            loop.at(self._heard_ns(), self._look, number)
        elif self.waiting == "finish":
            if self.checker is not None:
                nodes = self.cluster.nodes.values()
                self.checker.quiet(loop.now_ns, {node.name: node.machine for node in nodes if node.alive})
            loop.stop()
        elif self.client is not None:
            self.waiting = ""
            self.client.arrive(Command("settled"), None)

    def _heard_ns(self) -> int:
        """When the controller has heard from everyone: what a fault kept from it, a Beat brings to light (H29)."""
        config = self.built.config
        return self.calm_ns + config.beat_ns + config.retry_ns if self.plan.fired else 0

    def open_ends(self, first: bool = False) -> List[str]:
        """Why all is not quiet, one line a thing; ``first``: the first will do."""
        found = [f"on its way: {_shown(entry[3])}" for entry in self.cluster.loop.heap if _counts(entry[3])]
        for transfer in self.cluster.transfers.active.values():
            found.append(f"{transfer.owner.name}: copies for reservation {transfer.effect.rid[1]}")
        for node in self.cluster.nodes.values():
            if first and found:
                return found
            if node.paused:
                found.append(f"{node.name}: paused")
                if first:
                    return found
            if node.alive:
                found += [f"{node.name}: {why}" for why in node.machine.pending()]
                found += [f"{node.name}: has not handled {_shown(item)}" for item in node.queue or () if _counts(item)]
            elif node.restarts_ns >= 0:
                found.append(f"{node.name}: is to restart at {node.restarts_ns} ns")
        return found

    # ---- what faults do to nodes ------------------------------------------------------------------------------------
    def _act_now(self, action: Action, _: Any) -> None:
        if self.plan.active:
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, (Crash, Pause)) and action.node not in self.born:
            self.early.append(action)
            return
        self.plan.begin(action)
        loop = self.cluster.loop
        self.struck.append((loop.now_ns, action))
        if isinstance(action, Crash):
            node = self.cluster.nodes[action.node]
            if node.alive:
                node.crash()
            if action.restart_after_ns >= 0:
                node.restarts_ns = loop.now_ns + action.restart_after_ns
                loop.at(node.restarts_ns, self._restart, node, node.turn)
        elif isinstance(action, Pause):
            node = self.cluster.nodes[action.node]
            node.pause()
            self._later(action.for_ns, self._resume, node, node.turn)
        elif isinstance(action, Partition):
            self._later(action.for_ns, self._end, action)
        elif isinstance(action, Slow):
            self._pace(action)
            self._later(action.for_ns, self._end, action)
        elif isinstance(action, Full):
            self.full.append(action)
            self._full(action, "on")
            self._later(action.for_ns, self._end, action)
        elif self.client is not None:
            self._tell_client(action)

    def _tell_client(self, action: Union[CancelOp, ClientDies]) -> None:
        assert self.client is not None
        if isinstance(action, CancelOp):
            self.client.arrive(Command("cancel", (action.op,)), None)
        else:
            self.client.arrive(Command("die", (str(action.for_ns),)), None)

    def _later(self, for_ns: int, fn: Any, a: Any, b: Any = None) -> None:
        if for_ns >= 0:
            self.cluster.loop.at(self.cluster.loop.now_ns + for_ns, fn, a, b)

    def _restart(self, node: Node, turn: int) -> None:
        if not node.alive and node.turn == turn:
            self.plan.restarted(node.name)
            node.boot()

    def _resume(self, node: Node, turn: int) -> None:
        if node.turn == turn:
            node.resume()

    def _end(self, action: Action, _: Any) -> None:
        self.plan.end(action)
        if isinstance(action, Slow):
            self._pace(action)
        elif isinstance(action, Full) and action in self.full:
            self.full.remove(action)
            self._full(action, "off")

    def _pace(self, action: Slow) -> None:
        node = self.cluster.nodes[action.node]
        node.service_ns = round(self.profile.service_ns * self.plan.slowness(action.node))

    def _full(self, action: Full, what: str) -> None:
        node = self.cluster.nodes[action.node]
        if node.alive:
            node.arrive(Command(action.what, (action.location, what)), None)

    # ---- what happened ----------------------------------------------------------------------------------------------
    def result(self) -> Result:
        cluster = self.cluster
        operations: List[Operation] = []
        if self.client is not None and isinstance(self.client.machine, Client):
            operations = self.client.machine.operations
        metrics: Dict[str, Union[int, float, str]] = {
            "events": cluster.loop.fired(),
            "inputs": cluster.inputs(),
            "moves": sum(1 for operation in operations if operation.what == "move" and operation.state == "done"),
            "copies": cluster.transfers.count,
            "bytes": cluster.transfers.bytes,
            "shares_solved": cluster.fabric.solver.solves,
            "simulated_s": round(cluster.loop.now_ns / 1e9, 9),
        }
        return Result(
            world="sim",
            scenario=self.built.name,
            seed=self.built.seed,
            operations=operations,
            violations=self.checker.violations if self.checker is not None else [],
            placement=placement(self.built, self._visible()),
            metrics=metrics,
            transport=f"simulated, profile {self.profile.name}",
            phases=self.phases.done,
            hung=self.hung,
            fired=self.plan.fired,
            struck=self.struck,
            rates=cluster.fabric.rates,
        )

    def _visible(self) -> Dict[str, Mapping[str, Mapping[Key, Any]]]:
        found: Dict[str, Mapping[str, Mapping[Key, Any]]] = {}
        for node in self.cluster.nodes.values():
            machine = node.machine
            if node.alive and isinstance(machine, Worker):
                found[node.name] = {pool.name: pool.index for pool in machine.pool_list}
        return found


def _counts(item: Any) -> bool:
    """Is it something that quiet waits for? Beats never end."""
    return isinstance(item, Record) and not (type(item) is Received and type(item.msg) is Beat)


def _shown(item: Any) -> str:
    if isinstance(item, Received):
        return f"{type(item.msg).__name__} from {item.src}"
    return type(item).__name__
