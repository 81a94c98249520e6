"""Workloads that say how fast the simulator is: they drive the real machines without a scenario's client in the way.

``a``: two instances, one chunk, one move after another; ``a4``: with four ranks a side. ``b``: 100 instances, 64 moves
in flight, 1-32 chunks drawn by Zipf. ``b256`` and ``b1024``: the same with more in flight, so that hundreds of flows
are coupled through shared links. ``c``: 10,000 instances, 1,000 in flight. tests/bench measures them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Callable, Dict, Final, List, Optional, Tuple, final

from kvcore.protocol.config import Config, ControllerSpec, WorkerSpec
from kvcore.protocol.machine import Boot, Command, Effect, Input, Machine, Received, Send
from kvcore.protocol.messages import Answer, Key, Location, MoveRequest, Namespace, StoreRequest
from kvcore.scenario import schema
from kvcore.scenario.build import AnySpec, Built, make_machine
from kvcore.scenario.client import ClientSpec
from kvcore.scenario.faults import FaultPlan
from kvcore.scenario.history import FileHistory, NoHistory
from kvcore.scenario.units import Rate
from kvsim.cluster import Cluster
from kvsim.costs import Profile
from kvsim.node import Node
from kvsim.run import CollectorTamed, header

CPU = "LocalCPUBackend"


@final
class Load:
    """``chunks``: the longest prompt; lengths are Zipf-distributed from 1. ``window``: moves in flight."""

    def __init__(
        self, name: str, instances: int, window: int, chunks: int, exponent: float, moves: int, ranks: int = 1
    ) -> None:
        self.name: str = name
        self.instances: int = instances
        self.window: int = window
        self.chunks: int = chunks
        self.exponent: float = exponent
        self.moves: int = moves
        self.ranks: int = ranks


LOADS: Final[Dict[str, Load]] = {
    "a": Load("a", 2, 1, 1, 1.0, 20_000),
    "a4": Load("a4", 2, 1, 1, 1.0, 5_000, ranks=4),
    "b": Load("b", 100, 64, 32, 1.2, 10_000),
    "b256": Load("b256", 100, 256, 32, 1.2, 5_000),
    "b1024": Load("b1024", 100, 1024, 32, 1.2, 2_000),
    "c": Load("c", 10_000, 1_000, 32, 1.05, 50_000),
}

#: A fast fabric and fast nodes: what is in flight is then copies, and they are what couples the flows.
PROFILE: Final = Profile(
    name="bench", message_latency_ns=20_000, service_ns=1_000, journal_ns=0, transfer_ns=20_000, descriptor_ns=500
)


@final
class Prompt:
    def __init__(self, number: int, keys: Tuple[Key, ...], lens: Tuple[int, ...], at: int) -> None:
        self.number: int = number
        self.keys: Tuple[Key, ...] = keys
        self.lens: Tuple[int, ...] = lens
        self.at: int = at
        self.goes_to: int = at


@final
class Pump(Machine):
    """A light client: at ``store`` it stores its prompts, from ``go`` on it keeps ``window`` moves in flight."""

    def __init__(self, load: Load, seed: int) -> None:
        super().__init__()
        self.load: Load = load
        self.rng: random.Random = random.Random(f"{load.name}/{seed}")
        self.prompts: List[Prompt] = self._draw_prompts()
        self.idle: List[Prompt] = []
        self.flying: Dict[str, Prompt] = {}
        self.stored: int = 0
        self.count: int = 0
        self.done: int = 0
        self.failed: int = 0
        self.chunks: int = 0
        self.positions: List[Tuple[str, str]] = [(f"i{i}", CPU) for i in range(load.instances)]

    def _draw_prompts(self) -> List[Prompt]:
        load = self.load
        weights = [1.0 / (i + 1) ** load.exponent for i in range(load.chunks)]
        count = max(2 * load.window, 2)
        if load.window == 1:
            count = 1
        lengths = self.rng.choices(range(1, load.chunks + 1), weights, k=count)
        found: List[Prompt] = []
        for number, length in enumerate(lengths):
            keys = tuple([b"%08d%08d" % (number, i) for i in range(length)])
            found.append(Prompt(number, keys, (256,) * length, self.rng.randrange(load.instances)))
        return found

    def handle(self, now: int, item: Input) -> List[Effect]:
        out: List[Effect] = []
        if type(item) is Received:
            answer = item.msg
            if type(answer) is Answer:
                self._answered(answer, out)
        elif isinstance(item, Command):
            if item.what == "store":
                for prompt in self.prompts:
                    request = StoreRequest(f"s{prompt.number}", CPU, prompt.keys, prompt.lens)
                    for rank in range(self.load.ranks):
                        out.append(Send(f"i{prompt.at}/{rank}", request))
            else:
                self.idle = list(self.prompts)
                for _ in range(self.load.window):
                    self._move(out)
        elif not isinstance(item, Boot):
            raise TypeError(item)
        return out

    def _answered(self, answer: Answer, out: List[Effect]) -> None:
        state = answer.state
        if state == "copying":
            return
        prompt = self.flying.pop(answer.op, None)
        if prompt is None:
            self.stored += 1
            return
        if state == "done":
            self.done += 1
            self.chunks += len(prompt.keys)
            prompt.at = prompt.goes_to
        else:
            self.failed += 1
        self.idle.append(prompt)
        self._move(out)

    def _move(self, out: List[Effect]) -> None:
        idle = self.idle
        i = int(self.rng.random() * len(idle))
        idle[i], idle[-1] = idle[-1], idle[i]
        prompt = idle.pop()
        count = self.load.instances
        prompt.goes_to = (prompt.at + 1 + int(self.rng.random() * (count - 1))) % count
        self.count += 1
        op = f"m{self.count}"
        self.flying[op] = prompt
        positions = self.positions
        request = MoveRequest(op, positions[prompt.at], positions[prompt.goes_to], prompt.keys, prompt.lens)
        out.append(Send("ctl", request))

    def pending(self) -> List[str]:
        return []


def built_for(load: Load, seed: int = 0) -> Built:
    config = Config(events_kept=1000)
    space = Namespace(ranks=load.ranks, bytes_per_token=65536)
    specs: List[AnySpec] = [ControllerSpec("ctl", config)]
    # Room for all: what is measured is moving, not evicting.
    place = (Location(CPU, 64 * load.chunks),)
    for i in range(load.instances):
        for rank in range(load.ranks):
            specs.append(WorkerSpec(f"i{i}/{rank}", f"i{i}", rank, "ctl", space, place, config))
    specs.append(ClientSpec("client", config))
    return Built(
        name=load.name,
        order="racing",
        seed=seed,
        config=config,
        specs=tuple(specs),
        deadline_ns=1 << 60,
        network=schema.Network(nic=schema.Link(bandwidth=Rate.parse("5 GB/s"))),
    )


@final
class Bench:
    """One workload, built and stored, ready to be measured by ``clock``: seconds of CPU time."""

    def __init__(self, load: Load, clock: Callable[[], float], history: Optional[Path] = None, seed: int = 0) -> None:
        self.load: Load = load
        self.clock: Callable[[], float] = clock
        built = built_for(load, seed)
        sink = FileHistory(history, header(built)) if history is not None else NoHistory()
        self.pump: Pump = Pump(load, seed)
        plan = FaultPlan((), built.config, built.nodes)
        self.cluster: Cluster = Cluster(built, PROFILE, plan, sink, self._make)
        self.client: Node = self.cluster.nodes["client"]
        self.cpu_s: float = 0.0
        self.inputs: int = 0
        self._prepare()

    def _make(self, spec: AnySpec) -> Machine:
        return self.pump if isinstance(spec, ClientSpec) else make_machine(spec)

    def _prepare(self) -> None:
        loop = self.cluster.loop
        for node in self.cluster.nodes.values():
            node.boot()
        loop.advance(5_000_000_000)
        self.client.arrive(Command("store"), None)
        loop.advance(60_000_000_000)
        want = len(self.pump.prompts) * self.load.ranks
        if self.pump.stored != want:
            raise RuntimeError(f"{self.pump.stored} of {want} prompts are stored")

    def run(self, moves: int) -> None:
        """Until so many moves are done, counted from now."""
        cluster = self.cluster
        loop = cluster.loop
        pump = self.pump
        inputs = cluster.inputs()
        goal = pump.done + moves
        with CollectorTamed():
            start_s = self.clock()
            if not pump.flying:
                self.client.arrive(Command("go"), None)
            while pump.done < goal:
                loop.advance(loop.now_ns + 5_000_000)
            cluster.history.flush()
            self.cpu_s = self.clock() - start_s
        self.inputs = cluster.inputs() - inputs

    def report(self, moves: int) -> str:
        solver = self.cluster.fabric.solver
        return (
            f"{self.load.name:6} {moves / self.cpu_s:8,.0f} moves/s {self.inputs / self.cpu_s:9,.0f} inputs/s"
            f" {self.inputs / moves:5.1f} inputs a move {1e6 * self.cpu_s / self.inputs:5.2f} us an input"
            f" {solver.solves / moves:5.2f} solves a move, {solver.filled / max(1, solver.solves):5.1f} flows each,"
            f" {self.pump.failed} failed"
        )
