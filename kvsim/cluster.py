"""What the nodes of one run share: the clock, the network, the copies under way, and who watches."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, final

from kvcore.protocol.config import WorkerSpec
from kvcore.protocol.machine import Effect, Input, Machine, Note, Send
from kvcore.scenario.build import AnySpec, Built, make_machine
from kvcore.scenario.faults import FaultPlan
from kvcore.scenario.history import NoHistory
from kvsim.costs import AUTO, Copying, Profile
from kvsim.engine import Engine
from kvsim.fabric import Fabric
from kvsim.loop import Loop
from kvsim.network import Network
from kvsim.node import Node
from kvsim.transfer import Transfers

Observer = Callable[[int, str, Machine, Input, List[Effect]], None]


def _token_bytes(spec: AnySpec) -> Dict[str, int]:
    """Of each location of a worker: bytes of one token there."""
    if not isinstance(spec, WorkerSpec):
        return {}
    return {place.name: spec.space(place.name).bytes_per_token for place in spec.locations}


@final
class Cluster:
    def __init__(
        self,
        built: Built,
        profile: Profile,
        plan: FaultPlan,
        history: NoHistory,
        make: Callable[[AnySpec], Machine] = make_machine,
        transport: str = AUTO,
    ) -> None:
        self.make: Callable[[AnySpec], Machine] = make
        self.loop: Loop = Loop()
        self.profile: Profile = profile
        self.plan: FaultPlan = plan
        self.plan_active: bool = plan.active
        self.anchors: Dict[str, None] = dict.fromkeys([name for _, name in plan.rules])
        self.history: NoHistory = history
        self.observe: Optional[Observer] = None
        self.watched: bool = history.on
        #: messages cost more than their number
        self.detailed: bool = profile.detailed
        #: somebody watches, the plan must be asked, or costs are detailed: not the shortest way
        self.attended: bool = history.on or plan.active or profile.detailed
        self.queued: Optional[Callable[[Tuple[int, int], int], None]] = None
        self.on_died: Callable[[str], None] = _ignore
        #: bytes were written: (node, location, slots)
        self.on_landed: Optional[Callable[[Node, str, Sequence[int]], None]] = None
        self.on_note: Callable[[Note], None] = _ignore
        self.on_action: Callable[[Any], None] = _ignore
        self.fabric: Fabric = Fabric(self.loop)
        self.network: Network = Network(built, profile, self.fabric)
        #: what copies cost, where the profile knows more than plain numbers
        self.copying: Optional[Copying] = Copying(profile, transport, self.fabric) if profile.copies else None
        self.transfers: Transfers = Transfers(self)
        self.engine: Engine = Engine(self)
        self.copy_max_ns: int = built.config.copy_max_ns
        self.progress_ns: int = built.config.progress_ns
        self.checksums: str = built.config.checksums
        self.events_kept: int = built.config.events_kept
        self.nodes: Dict[str, Node] = {}
        for number, spec in enumerate(built.specs):
            self.nodes[spec.name] = Node(self, spec, _token_bytes(spec), number, built.seed)

    def observed_by(self, observe: Observer) -> None:
        """Call it after every input, before the effects are carried out."""
        self.observe = observe
        self.watched = self.attended = True

    def watch(self, now: int, node: Node, item: Input, effects: List[Effect]) -> None:
        if self.history.on:
            self.history.add(now, node.name, item, effects)
        if self.observe is not None:
            self.observe(now, node.name, node.machine, item, effects)

    def asks_about(self, effect: Effect) -> bool:
        """Can any fault be anchored to it? Most effects are none of the plan's business."""
        if type(effect) is Send:
            return type(effect.msg).__name__ in self.anchors
        return type(effect) is not Note or effect.detail in self.anchors

    def inputs(self) -> int:
        """How many inputs machines have handled so far."""
        return sum([node.inputs for node in self.nodes.values()])


def _ignore(_: Any) -> None:
    """Nobody wants to know."""
