"""A world without time: the real machines, a network that only grows, memory that knows what each slot holds.

Every message ever sent may be delivered at any later step, any number of times, or never; every armed timer may fire at
any step. The exhaustive search (search.py) forks worlds; tests drive one by hand. No clock but ``now``, which stands
still unless ``pause`` moves it.
"""

from __future__ import annotations

import pickle
from typing import Callable, Dict, List, Optional, Tuple

from kvcore.protocol.config import Config, ControllerSpec, NodeSpec, WorkerSpec
from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import (
    AbortCopy,
    Boot,
    CloseWindow,
    CopyDone,
    CopyStopped,
    Effect,
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
    TimerName,
    WindowClosed,
)
from kvcore.protocol.messages import Answer, Key, Location, Namespace, Wire
from kvcore.protocol.worker import Worker

Letter = Tuple[str, str, Wire]
"""(src, dst, message)."""


def specs(
    instances: Dict[str, int], config: Config, ranks: int = 1, locations: Tuple[str, ...] = ("cpu",)
) -> List[NodeSpec]:
    """A controller and ``instances`` (name -> slots of each location), each of ``ranks`` ranks."""
    namespace = Namespace(ranks=ranks, chunk_tokens=1, bytes_per_token=1)
    nodes: List[NodeSpec] = [ControllerSpec("ctl", config)]
    for name, slots in instances.items():
        for rank in range(ranks):
            places = tuple(Location(location, slots) for location in locations)
            nodes.append(WorkerSpec(f"{name}/{rank}", name, rank, "ctl", namespace, places, config))
    return nodes


def build_machine(spec: NodeSpec) -> Machine:
    return Controller(spec) if isinstance(spec, ControllerSpec) else Worker(spec)


class World:
    """``observe(world, node, item, effects)`` is called after every input: the place of the checkers."""

    def __init__(
        self, nodes: List[NodeSpec], observe: Optional[Callable[[World, str, Input, List[Effect]], None]] = None
    ) -> None:
        self.specs: Dict[str, NodeSpec] = {spec.name: spec for spec in nodes}
        self.observe: Optional[Callable[[World, str, Input, List[Effect]], None]] = observe
        self.now: int = 0
        self.machines: Dict[str, Machine] = {}
        self.lives: Dict[str, int] = {}
        #: everything ever sent, in the order of first sending
        self.sent: Dict[Letter, None] = {}
        #: sent and not yet delivered once, oldest first
        self.fresh: Dict[Letter, None] = {}
        #: (node, location) -> slot -> key whose bytes it holds
        self.memory: Dict[Tuple[str, str], Dict[int, Key]] = {}
        #: (node, rid) -> a copy that runs; True: asked to stop
        self.copies: Dict[Tuple[str, Tuple[int, int]], Tuple[StartCopy, bool]] = {}
        self.fills: Dict[Tuple[str, int], StartFill] = {}
        self.reads: Dict[Tuple[str, int], StartRead] = {}
        self.windows: Dict[Tuple[str, str, int], None] = {}
        self.journal: List[JournalRecord] = []
        self.answers: Dict[str, List[Answer]] = {}
        self.notes: List[Tuple[str, Note]] = []
        for name in self.specs:
            self.boot(name)
        self.settle()
        self.sent.clear()

    # ---- life
    def boot(self, name: str) -> None:
        """A fresh process; a running one of that name is killed first."""
        self.crash(name)
        self.lives[name] = self.lives.get(name, 0) + 1
        spec = self.specs[name]
        self.machines[name] = build_machine(spec)
        if isinstance(spec, ControllerSpec):
            self.give(name, Boot(journal=tuple(self.journal)))
        else:
            for location in spec.locations:
                self.memory[(name, location.name)] = {}
            self.give(name, Boot(nonce=self.lives[name]))

    def crash(self, name: str) -> None:
        """Kill a process: its memory and its copies end with it."""
        self.machines.pop(name, None)
        self.copies = {at: copy for at, copy in self.copies.items() if at[0] != name}
        self.fills = {at: fill for at, fill in self.fills.items() if at[0] != name}
        self.reads = {at: read for at, read in self.reads.items() if at[0] != name}

    # ---- inputs
    def give(self, name: str, item: Input) -> List[Effect]:
        """One input to one machine, and its effects carried out."""
        effects = self.machines[name].handle(self.now, item)
        for effect in effects:
            self._carry_out(name, effect)
        if self.observe is not None:
            self.observe(self, name, item, effects)
        return effects

    def _carry_out(self, name: str, effect: Effect) -> None:
        if isinstance(effect, Send):
            if effect.dst in self.specs:
                letter = (name, effect.dst, effect.msg)
                self.sent[letter] = None
                self.fresh[letter] = None
            elif isinstance(effect.msg, Answer):
                self.answers.setdefault(effect.msg.op, []).append(effect.msg)
        elif isinstance(effect, StartCopy):
            self.copies[(name, effect.rid)] = (effect, False)
        elif isinstance(effect, AbortCopy):
            held = self.copies.get((name, effect.rid))
            if held is not None:
                self.copies[(name, effect.rid)] = (held[0], True)
        elif isinstance(effect, StartFill):
            self.fills[(name, effect.fid)] = effect
        elif isinstance(effect, StartRead):
            self.reads[(name, effect.fid)] = effect
        elif isinstance(effect, CloseWindow):
            self.windows[(name, effect.peer, effect.epoch)] = None
        elif isinstance(effect, Journal):
            self.journal.append(effect.record)
        elif isinstance(effect, Note):
            self.notes.append((name, effect))

    def request(self, op_message: Wire, to: str = "ctl") -> List[Effect]:
        """A client's request, handled at once."""
        return self.give(to, Received("client", op_message))

    def deliver(self, letter: Letter) -> None:
        """Deliver one message (again). A dead receiver loses it."""
        self.fresh.pop(letter, None)
        if letter[1] in self.machines:
            self.give(letter[1], Received(letter[0], letter[2]))

    def fire(self, name: str, timer: TimerName) -> None:
        self.give(name, TimerFired(timer))

    def land(self, node: str, rid: Tuple[int, int]) -> None:
        """The bytes of a running copy land: what the source's slots hold *now*. May happen more than once."""
        copy = self.copies[(node, rid)][0]
        ours = self.memory[(node, copy.location)]
        theirs = self.memory.get((copy.peer, copy.peer_location), {})
        if copy.read:
            for mine, other in zip(copy.slots, copy.peer_slots):
                ours[mine] = theirs.get(other, b"?")
        elif self._epoch(copy.peer) == copy.peer_epoch:
            for mine, other in zip(copy.slots, copy.peer_slots):
                theirs[other] = ours.get(mine, b"?")

    def _epoch(self, name: str) -> int:
        machine = self.machines.get(name)
        return machine.epoch if isinstance(machine, Worker) else 0

    def finish_copy(self, node: str, rid: Tuple[int, int], ok: bool = True) -> None:
        """A copy ends: done after its bytes have landed, stopped if that was asked, or failed."""
        copy, stopping = self.copies[(node, rid)]
        if stopping:
            del self.copies[(node, rid)]
            self.give(node, CopyStopped(rid))
            return
        # A push to a process that is gone, or that has another epoch, never lands.
        ok = ok and (copy.read or self._epoch(copy.peer) == copy.peer_epoch)
        if ok:
            self.land(node, rid)
        del self.copies[(node, rid)]
        self.give(node, CopyDone(rid, ok, "" if ok else "failed"))

    def finish_fill(self, node: str, fid: int) -> None:
        fill = self.fills.pop((node, fid))
        for slot, key in zip(fill.slots, fill.keys):
            self.memory[(node, fill.location)][slot] = key
        self.give(node, FillDone(fid, True))

    def finish_read(self, node: str, fid: int) -> None:
        read = self.reads.pop((node, fid))
        memory = self.memory[(node, read.location)]
        ok = all(memory.get(slot) == key for slot, key in zip(read.slots, read.keys))
        self.give(node, ReadDone(fid, ok))

    def close_window(self, node: str, peer: str, epoch: int) -> None:
        del self.windows[(node, peer, epoch)]
        if node in self.machines:
            self.give(node, WindowClosed(peer, epoch))

    def pause(self, ns: int) -> None:
        """Time passes for everyone. Deadlines that are due by then run before each machine's next input."""
        self.now += ns

    # ---- the easy way through
    def step(self) -> bool:
        """Do the oldest thing that is due without any timer. False: nothing is."""
        if self.fresh:
            self.deliver(next(iter(self.fresh)))
        elif self.copies:
            self.finish_copy(*next(iter(self.copies)))
        elif self.fills:
            self.finish_fill(*next(iter(self.fills)))
        elif self.reads:
            self.finish_read(*next(iter(self.reads)))
        elif self.windows:
            self.close_window(*next(iter(self.windows)))
        else:
            return False
        return True

    def settle(self, limit: int = 10_000) -> None:
        """Deliver and finish everything, in order, until nothing is under way."""
        while self.step():
            limit -= 1
            if limit < 0:
                raise RuntimeError("the world does not settle")

    def take(self, kind: type, nth: int = 0) -> Letter:
        """The nth undelivered message of a type (a test's way of naming it)."""
        return [letter for letter in self.fresh if isinstance(letter[2], kind)][nth]

    def until(self, kind: type, limit: int = 1000) -> Letter:
        """Go on, message by message, until one of that type is under way, and leave it undelivered."""
        for _ in range(limit):
            found = [letter for letter in self.fresh if isinstance(letter[2], kind)]
            if found:
                return found[0]
            if not self.step():
                break
        raise LookupError(f"no {kind.__name__} was sent")

    def lose(self, letter: Letter) -> None:
        self.fresh.pop(letter, None)

    def worker(self, name: str) -> Worker:
        machine = self.machines[name]
        assert isinstance(machine, Worker)
        return machine

    def controller(self) -> Controller:
        machine = self.machines["ctl"]
        assert isinstance(machine, Controller)
        return machine

    def fork(self) -> World:
        """An independent copy."""
        return pickle.loads(pickle.dumps(self, pickle.HIGHEST_PROTOCOL))  # type: ignore[no-any-return]
