"""A play and what came of it, in one text file: lines that begin with "> " drive a world, the others are transcript.

    > world a=4 b=4 [ranks=2] [push] [twin=b]     instances and their slots; twin claims the id of another
    > store a/0 xy          > use a/0 x           the chain of x and its child y
    > move M a b xy [copy] [idem=k] [step=1]      > drain D a b
    > cancel M   > status M   > lookup xy         > clear b   > pin P b x   > unpin P
    > mail                                        deliver all that is under way, end no copy
    > settle                                      and end every copy, store and read
    > until Fetch                                 go on until one is under way, and leave it there
    > hold Release          > again Release       take one out of the network; deliver one (again), now
    > end b/0               > fail b/0            the copy at b/0 ends well, or not
    > fire a/0 lease        > elapse 5 s          one timer; all timers that are due by then
    > crash b/0             > boot b/0

A transcript line is an input, "node <- what"; what the node then does is indented below it. Beats of no consequence are
left out. Numbers of events and epochs are written incarnation-counter.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import msgspec

from kvcore.protocol.config import Rules, S, WorkerSpec
from kvcore.protocol.machine import Effect, Input, Journal, Received, Send, TimerFired
from kvcore.protocol.messages import (
    Answer,
    Beat,
    Location,
    LookupRequest,
    MoveRequest,
    PinRequest,
    StatusRequest,
    UnpinRequest,
    event_name,
)
from kvcore.scenario.world import World
from tests.core.drive import CPU, Story, keys, lens

NUMBERS = ("event", "parent", "epoch", "src_epoch", "peer_epoch")
IDS = ("inc", "pid", "rid", "after")
HIDDEN = (
    "namespace",
    "lens",
    "locations",
    "incarnation",
    "register",
    "request",
    "location",
    "src_location",
    "peer_location",
)


# ---- writing
def struct(value: Any) -> str:
    """A message, input or effect: its name, then its fields that are not as usual."""
    words = [type(value).__name__]
    defaults = dict(zip(reversed(value.__struct_fields__), reversed(value.__struct_defaults__)))
    for name in value.__struct_fields__:
        held = getattr(value, name)
        if name not in HIDDEN and (name not in defaults or held != defaults[name]) and held != ():
            words.append(f"{name}={field(name, held)}")
    return " ".join(words)


def field(name: str, value: Any) -> str:
    if name in NUMBERS:
        return event_name(value)
    if name in IDS:
        return f"{event_name(value[0])}.{value[1]}"
    if name.endswith("_ns") or name == "stamp":
        return f"{value / S:g}s"
    if name in ("sources", "destinations"):
        return ",".join(f"{node}:{event_name(one)}.{other}" for node, (one, other) in value)
    return plain(value)


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, tuple):
        letters = all(isinstance(one, bytes) for one in value)
        return ("" if letters else ",").join(plain(one) for one in value)
    if type(value).__name__ in ("Entry", "LocationSeq"):
        return plain(getattr(value, "key", b"")) or f"{value.location}:{value.seq}"
    if isinstance(value, msgspec.Struct):
        return "(" + " ".join(struct(value).split()[1:]) + ")"
    return str(value)


def given(item: Input) -> str:
    if isinstance(item, Received):
        # What a node says stands in full where it is sent.
        return struct(item.msg) if item.src == "client" else f"{type(item.msg).__name__} of {item.src}"
    if isinstance(item, TimerFired):
        return f"{item.name[0]} timer"
    return struct(item)


def done(effect: Effect) -> str:
    if isinstance(effect, Send):
        return f"{effect.dst} <- {struct(effect.msg)}"
    return f"Journal {struct(effect.record)}" if isinstance(effect, Journal) else struct(effect)


class Play:
    """Carries a script out and writes its transcript."""

    def __init__(self) -> None:
        self.lines: List[str] = []
        self.w: Story = Story(Rules())
        self.events: Dict[str, int] = {}
        self.now: int = 0
        self.verbs: Dict[str, Callable[..., None]] = {
            name[3:]: getattr(self, name) for name in dir(self) if name.startswith("do_")
        }

    def observe(self, world: World, node: str, item: Input, effects: List[Effect]) -> None:
        beat = isinstance(item, TimerFired) and item.name[0] == "beat"
        heard = isinstance(item, Received) and isinstance(item.msg, Beat)
        shown = [one for one in effects if not (isinstance(one, Send) and isinstance(one.msg, Beat))]
        if (beat or heard) and not shown:
            return
        if world.now != self.now:
            self.now = world.now
            self.lines.append(f"at {self.now / S:g} s")
        self.lines.append(f"{node} <- {given(item)}")
        self.lines += [f"    {done(effect)}" for effect in shown]

    def run(self, script: List[str]) -> str:
        for line in script:
            self.lines.append(f"> {line}" if line else "")
            if line and not line.startswith("#"):
                verb, *words = line.split()
                self.verbs[verb](*words)
        return "\n".join(self.lines) + "\n"

    # ---- the world
    def do_world(self, *words: str) -> None:
        named = dict(word.partition("=")[::2] for word in words)
        ranks = int(named.pop("ranks", 1))
        push = "push" in named
        twin = named.pop("twin", "")
        slots = {name: int(number) for name, number in named.items() if name != "push"}
        self.w = Story(Rules(), slots, ranks, push=push)
        self.w.observe = self.observe
        if twin:
            self._twin(twin)

    def _twin(self, of: str) -> None:
        like = self.w.specs[f"{of}/0"]
        assert isinstance(like, WorkerSpec)
        self.w.specs["twin/0"] = WorkerSpec("twin/0", of, 0, "ctl", like.namespace, (Location(CPU, 4),), like.config)

    def do_crash(self, node: str) -> None:
        self.w.crash(node)

    def do_boot(self, node: str) -> None:
        self.w.boot(node)

    # ---- engines and clients
    def do_store(self, node: str, text: str) -> None:
        self.w.store(node, text)

    def do_use(self, node: str, text: str) -> None:
        self.w.use(node, text)

    def do_move(self, op: str, src: str, dst: str, text: str, *more: str) -> None:
        idem = next((word[5:] for word in more if word.startswith("idem=")), "")
        step = next((int(one[5:]) for one in more if one.startswith("step=")), 0)
        event = self.w.move(src, dst, text, op, "copy" in more, idem, step=step)
        self.events.setdefault(op, event)

    def do_drain(self, op: str, src: str, dst: str) -> None:
        self.w.request(MoveRequest(op, (src, CPU), (dst, CPU)))
        self.events[op] = self.w.begun()[-1]

    def do_cancel(self, op: str) -> None:
        self.w.cancel(self.events[op])

    def do_status(self, op: str) -> None:
        self.w.request(StatusRequest("status", self.events[op]))

    def do_lookup(self, text: str) -> None:
        self.w.request(LookupRequest("lookup", keys(text), lens(text)))

    def do_clear(self, instance: str) -> None:
        self.w.clear(instance)

    def do_pin(self, op: str, instance: str, text: str) -> None:
        self.w.request(PinRequest(op, (instance, CPU), keys(text), lens(text)))
        self.events[op] = max(self.w.controller().fanouts.open, default=0)

    def do_unpin(self, op: str) -> None:
        self.w.request(UnpinRequest("unpin", self.events[op]))

    # ---- the network, copies, time
    def do_mail(self) -> None:
        self.w.mail()

    def do_settle(self) -> None:
        self.w.settle()

    def do_until(self, name: str) -> None:
        self.w.until(self._type(name))

    def do_hold(self, name: str) -> None:
        self.w.hold(self._type(name))

    def do_again(self, name: str) -> None:
        self.w.deliver(self.w.ever(self._type(name)))

    def _type(self, name: str) -> type:
        from kvcore.protocol import messages

        found = getattr(messages, name)
        assert isinstance(found, type)
        return found

    def do_end(self, node: str) -> None:
        self.w.finish_copy(node, self.w.copying(node))

    def do_fail(self, node: str) -> None:
        self.w.finish_copy(node, self.w.copying(node), ok=False)

    def do_fire(self, node: str, kind: str) -> None:
        self.w.fire(node, next(name for name in self.w.machines[node].timers.deadlines if name[0] == kind))

    def do_elapse(self, number: str, unit: str) -> None:
        self.w.elapse(int(float(number) * {"s": S, "ms": S // 1000}[unit]))

    # ---- how it ended
    def do_end_state(self) -> None:
        """What every place holds, who was answered what, and what is still open."""
        for node, machine in self.w.machines.items():
            if node != "ctl":
                self.lines.append(f"{node} holds {self.w.at(node) or 'nothing'}")
            self.lines += [f"{node} is not quiet: {line}" for line in machine.pending()]
        for op, answers in self.w.answers.items():
            self.lines.append(f"{op}: " + ", then ".join(_answer(answer) for answer in answers))


def _answer(answer: Answer) -> str:
    reason = f" ({answer.reason})" if answer.reason else ""
    return f"{answer.state}{reason} {answer.num_tokens}"
