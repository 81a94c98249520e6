"""The smallest driver there can be: every message takes 1 us, every copy 10 us, and it asks the fault plan nothing.

For tests of what stands beside the drivers (client, history, phases, rendering, expectations).
"""

from __future__ import annotations

import heapq
from typing import Any, Dict, List, Optional, Tuple

import msgspec

from kvcore.protocol.machine import (
    AbortCopy,
    Boot,
    CloseWindow,
    Command,
    CopyDone,
    CopyStopped,
    FillDone,
    Input,
    Journal,
    JournalRecord,
    Machine,
    Note,
    ReadDone,
    Received,
    Send,
    StartCopy,
    StartFill,
    StartRead,
    TimerFired,
    WindowClosed,
)
from kvcore.protocol.worker import Worker
from kvcore.scenario.build import Built, build, make_machine, placement
from kvcore.scenario.client import Client
from kvcore.scenario.history import VERSION, Header, ListHistory, NoHistory
from kvcore.scenario.result import PhaseTracker, Result
from kvcore.scenario.schema import Scenario
from kvcore.scenario.units import dec_hook

MESSAGE_NS = 1_000
COPY_NS = 10_000


def scenario(**more: Any) -> Scenario:
    """Two instances of one rank, two slots of two tokens each, unless said otherwise."""
    basic = {
        "name": "tiny",
        "kv": {"chunk": "2 tokens", "bytes_per_token": "1 B"},
        "instances": {
            "a": {"locations": {"cpu": {"size": "16 B"}}},
            "b": {"locations": {"cpu": {"size": "16 B"}}},
        },
    }
    return msgspec.convert({**basic, **more}, Scenario, dec_hook=dec_hook)


def header(built: Built) -> Header:
    return Header(VERSION, "sim", built.name, built.seed, built)


class Tiny:
    def __init__(self, built: Built, history: Optional[NoHistory] = None) -> None:
        self.built = built
        self.history = history or ListHistory(header(built))
        self.phases = PhaseTracker(built.bytes_per_token)
        self.now = 0
        self.count = 0
        self.queue: List[Tuple[int, int, str, Input]] = []
        self.machines: Dict[str, Machine] = {}
        self.journal: List[JournalRecord] = []
        self.settling = False
        self.finished = False

    def run(self) -> Result:
        for number, spec in enumerate(self.built.specs):
            self.boot(spec.name, number + 1)
        while not self.finished and self.step():
            pass
        client = self.machines["client"]
        assert isinstance(client, Client)
        return Result(
            "sim",
            self.built.name,
            self.built.seed,
            operations=client.operations,
            placement=placement(self.built, self.visible()),
            phases=self.phases.done,
        )

    def visible(self) -> Dict[str, Dict[str, Any]]:
        workers = {name: machine for name, machine in self.machines.items() if isinstance(machine, Worker)}
        return {name: {p.name: p.index for p in worker.pool_list} for name, worker in workers.items()}

    def boot(self, name: str, nonce: int) -> None:
        specs = {spec.name: spec for spec in self.built.specs}
        self.machines[name] = make_machine(specs[name])
        self.give(name, Boot(nonce=nonce, journal=tuple(self.journal) if name == "ctl" else ()))

    def step(self) -> bool:
        """The next message, answer or timer; what is settled first, when nothing is under way."""
        quiet = not any(machine.pending() for machine in self.machines.values())
        if self.settling and quiet and not self.queue:
            self.settling = False
            self.give("client", Command("settled"))
            return True
        alarms = [(due[0], name, due[1]) for name, m in self.machines.items() if (due := m.timers.next()) is not None]
        alarm = min(alarms) if alarms else None
        if self.queue and (alarm is None or self.queue[0][0] <= alarm[0]):
            self.now, _, node, item = heapq.heappop(self.queue)
            self.give(node, item)
        elif alarm is not None:
            self.now = max(self.now, alarm[0])
            self.give(alarm[1], TimerFired(alarm[2]))
        return bool(self.queue or alarm)

    def give(self, node: str, item: Input) -> None:
        effects = self.machines[node].handle(self.now, item)
        self.history.add(self.now, node, item, effects)
        self.phases.step(self.now, node, item, effects)
        for effect in effects:
            self.carry_out(node, effect)

    def later(self, delay_ns: int, node: str, item: Input) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay_ns, self.count, node, item))

    def carry_out(self, node: str, effect: Any) -> None:
        if isinstance(effect, Send):
            self.later(MESSAGE_NS, effect.dst, Received(node, effect.msg))
        elif isinstance(effect, StartCopy):
            self.later(COPY_NS, node, CopyDone(effect.rid, True))
        elif isinstance(effect, AbortCopy):
            self.later(0, node, CopyStopped(effect.rid))
        elif isinstance(effect, StartFill):
            self.later(COPY_NS, node, FillDone(effect.fid, True))
        elif isinstance(effect, StartRead):
            self.later(COPY_NS + effect.hold_ns, node, ReadDone(effect.fid, True))
        elif isinstance(effect, CloseWindow):
            self.later(0, node, WindowClosed(effect.peer, effect.epoch))
        elif isinstance(effect, Journal):
            self.journal.append(effect.record)
        elif isinstance(effect, Note) and node == "client":
            self.settling = self.settling or effect.kind == "settle"
            self.finished = self.finished or effect.kind == "finished"


def play(history: Optional[NoHistory] = None, **more: Any) -> Tuple[Built, Tiny, Result]:
    built = build(scenario(**more))
    tiny = Tiny(built, history)
    return built, tiny, tiny.run()
