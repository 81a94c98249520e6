"""A cluster of machines that do what a test tells them and remember what they were given."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple

from kvcore.protocol.config import Config, ControllerSpec, WorkerSpec
from kvcore.protocol.machine import Boot, Command, Effect, Input, Machine, StartCopy, TimerFired
from kvcore.protocol.messages import Location, Namespace
from kvcore.protocol.worker import Worker
from kvcore.scenario import schema
from kvcore.scenario.build import AnySpec, Built
from kvcore.scenario.faults import FaultPlan
from kvcore.scenario.history import NoHistory
from kvcore.scenario.units import Rate
from kvsim.cluster import Cluster
from kvsim.costs import Profile
from kvsim.node import Node

#: Costs that are easy to add up.
PROFILE = Profile(
    name="test",
    message_latency_ns=1000,
    service_ns=100,
    journal_ns=10,
    transfer_ns=0,
    descriptor_ns=0,
    peer_death_ns=50,
    abort_ns=20,
    window_ns=30,
    fill_ns=5,
    read_ns=5,
)
CPU = "cpu"


class Puppet(Machine):
    def __init__(self, spec: AnySpec) -> None:
        super().__init__()
        self.name = spec.name
        self.seen: List[Tuple[int, Input]] = []
        self.orders: List[List[Effect]] = []
        self.reply: Optional[Callable[[int, Input], List[Effect]]] = None
        self.fired: List[Tuple[int, Any]] = []

    def handle(self, now: int, item: Input) -> List[Effect]:
        name = self.timers.pop_due(now)
        while name is not None:
            self.fired.append((now, name))
            name = self.timers.pop_due(now)
        if isinstance(item, Boot):
            return []
        if isinstance(item, Command) and item.what == "do":
            return self.orders.pop(0)
        if not isinstance(item, TimerFired):
            self.seen.append((now, item))
        return self.reply(now, item) if self.reply is not None else []

    def pending(self) -> List[str]:
        return []


class Stage:
    """``ctl`` and workers a/0, b/0, c/0 with one location; a NIC of 1 GB/s each, a byte a token."""

    def __init__(
        self,
        faults: Tuple[schema.Fault, ...] = (),
        instances: Optional[Dict[str, schema.Instance]] = None,
        network: Optional[schema.Network] = None,
        profile: Profile = PROFILE,
        config: Optional[Config] = None,
    ) -> None:
        config = config or Config()
        names = list(instances) if instances else ["a", "b", "c"]
        space = Namespace(bytes_per_token=1, chunk_tokens=1000)
        specs: List[AnySpec] = [ControllerSpec("ctl", config)]
        specs += [WorkerSpec(f"{n}/0", n, 0, "ctl", space, (Location(CPU, 64),), config) for n in names]
        self.built = Built(
            name="stage",
            order="strict",
            seed=1,
            config=config,
            specs=tuple(specs),
            deadline_ns=10**12,
            instances=instances or {},
            network=network or schema.Network(nic=schema.Link(bandwidth=Rate.parse("1 GB/s"))),
            faults=faults,
        )
        self.plan = FaultPlan(faults, config, self.built.nodes)
        self.actions: List[Any] = []
        self.cluster = Cluster(self.built, profile, self.plan, NoHistory(), Puppet)
        self.cluster.on_action = self.actions.append
        self.loop = self.cluster.loop
        for node in self.cluster.nodes.values():
            node.boot()
        self.loop.advance(10_000)

    def node(self, name: str) -> Node:
        return self.cluster.nodes[name]

    def puppet(self, name: str) -> Puppet:
        machine = self.node(name).machine
        assert isinstance(machine, Puppet)
        return machine

    def seen(self, name: str) -> List[Input]:
        return [item for _, item in self.puppet(name).seen]

    def do(self, name: str, *effects: Effect) -> None:
        """Let a node emit effects now."""
        self.puppet(name).orders.append(list(effects))
        self.node(name).arrive(Command("do"), None)

    def believe(self, name: str, epoch: int) -> None:
        """The node's process has this epoch."""
        node = self.node(name)
        assert isinstance(node.spec, WorkerSpec)
        node.worker = Worker(node.spec)
        node.worker.epoch = epoch

    def put(self, name: str, slot: int, key: bytes, tokens: int = 1000) -> None:
        self.node(name).memory.write(CPU, slot, key, tokens)

    def has(self, name: str, slot: int, key: bytes, tokens: int = 1000) -> bool:
        return self.node(name).memory.verify(CPU, slot, key, tokens)


def copy(
    peer: str,
    peer_slots: Tuple[int, ...],
    slots: Tuple[int, ...],
    read: bool = True,
    rid: Tuple[int, int] = (1, 1),
    epoch: int = 0,
) -> StartCopy:
    return StartCopy(rid, read, peer, epoch, CPU, peer_slots, CPU, slots, (1000,) * len(slots))
