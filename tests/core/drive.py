"""Driving a World by hand: the moves of a story, one a line, and what is asked of the world at its end."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Tuple

import pytest

from kvcore.protocol.config import Config, Rules
from kvcore.protocol.machine import Begin, CopyDone, CopyStopped, Effect, Received, TimerFired
from kvcore.protocol.messages import (
    NO_ID,
    Answer,
    Beat,
    CancelRequest,
    ClearRequest,
    Found,
    Key,
    LookupRequest,
    MoveRequest,
    StatusRequest,
    StoreRequest,
    UseRequest,
    Wire,
)
from kvcore.scenario.world import Letter, World, specs

CPU = "cpu"
Run = Callable[[Rules], str]


def keys(text: str) -> Tuple[Key, ...]:
    """One key a letter: "xy" is the chain of x and its child y."""
    return tuple(letter.encode() for letter in text)


def lens(text: str) -> Tuple[int, ...]:
    return (1,) * len(text)


def hole(on: str, off: str, also_off: Tuple[str, ...] = ()) -> Callable[[Run], Callable[[str], None]]:
    """A test of one rule, named by the test's name: its run ends in ``on`` with the rule and in ``off`` without it.
    ``also_off``: other rules that guard this run as well, switched off in both."""

    def decorate(run: Run) -> Callable[[str], None]:
        rule = run.__name__.split("_")[1]

        @pytest.mark.parametrize("state", ["on", "off"])
        def test(state: str) -> None:
            switched = dict.fromkeys(also_off, False)
            if state == "off":
                switched[rule] = False
            expected = on if state == "on" else off
            ended = run(Rules(**switched))
            assert ended == expected, f"with {rule} {state}: {ended!r}, expected {expected!r}"

        test.__name__ = run.__name__
        test.__doc__ = run.__doc__
        return test

    return decorate


class Story(World):
    """A world of instances a, b, c..., each with one location, and the verbs that stories are told with."""

    def __init__(
        self,
        rules: Rules,
        instances: Optional[Dict[str, int]] = None,
        ranks: int = 1,
        locations: Tuple[str, ...] = (CPU,),
        push: bool = False,
        **constants: int,
    ) -> None:
        self.ops: int = 0
        #: what a story is about, for tests that look at one machine: its event, reservation, process and node
        self.event: int = 0
        self.rid: Tuple[int, int] = NO_ID
        self.who: Tuple[str, int] = ("", 0)
        self.node: str = "ctl"
        config = Config(rules=rules, direction="push" if push else "auto", **constants)  # type: ignore[arg-type]
        super().__init__(specs(instances or {"a": 4, "b": 4}, config, ranks, locations))

    # ---- what clients and engines do
    def op(self) -> str:
        self.ops += 1
        return f"op{self.ops}"

    def store(self, node: str, text: str, location: str = CPU) -> str:
        """Store a chain at one rank, its bytes written at once. The state answered: ok or refused."""
        op = self.op()
        self.request(StoreRequest(op, location, keys(text), lens(text)), node)
        for at in [at for at in self.fills if at[0] == node]:
            self.finish_fill(*at)
        return self.answers[op][-1].state

    def move(
        self,
        src: str,
        dst: str,
        text: str,
        op: str = "",
        copy: bool = False,
        idem: str = "",
        location: str = CPU,
        step: int = 0,
    ) -> int:
        """Ask for a move; its event, or 0 if it is refused. Nothing is delivered yet."""
        begun = self.begun()
        request = MoveRequest(
            op or self.op(), (src, CPU), (dst, location), keys(text), lens(text), copy=copy, idem=idem, step=step
        )
        self.request(request)
        return self.begun()[-1] if len(self.begun()) > len(begun) else 0

    def begun(self) -> List[int]:
        """All events ever begun, by this controller and those before it."""
        return [record.event for record in self.journal if isinstance(record, Begin)]

    def use(self, node: str, text: str) -> str:
        """Begin to load a chain; the op that is answered when the read ends."""
        op = self.op()
        self.request(UseRequest(op, CPU, keys(text), lens(text)), node)
        return op

    def cancel(self, event: int) -> None:
        self.request(CancelRequest(self.op(), event))

    def clear(self, instance: str) -> str:
        op = self.op()
        self.request(ClearRequest(op, (instance, CPU)))
        return op

    def ask(self, message: Wire, op: str) -> Answer:
        self.request(message)
        return self.answers[op][-1]

    def status(self, event: int) -> Answer:
        op = self.op()
        return self.ask(StatusRequest(op, event), op)

    def lookup(self, text: str) -> Tuple[Found, ...]:
        op = self.op()
        return self.ask(LookupRequest(op, keys(text), lens(text)), op).found

    # ---- what the network and time do
    def say(self, letter: Letter) -> List[Effect]:
        """Deliver a message, and what its receiver does."""
        self.fresh.pop(letter, None)
        return self.give(letter[1], Received(letter[0], letter[2]))

    def ever(self, kind: type, src: str = "") -> Letter:
        """The first message of a type that was ever sent."""
        return next(one for one in self.sent if isinstance(one[2], kind) and one[0].startswith(src))

    def only(self, *types: type) -> None:
        """Deliver messages of these types, and what they bring, and no others."""
        while due := [one for one in self.fresh if isinstance(one[2], types)]:
            self.deliver(due[0])

    def due(self, node: str, when: int) -> List[Effect]:
        """The alarm of a node rings at ``when``: whatever is due by then, and nothing else."""
        self.now = when
        return self.give(node, TimerFired(("none", 0, 0)))

    def hold(self, kind: type, dst: str = "") -> Letter:
        """Take a message that is under way out of the network; it may be delivered later, or never."""
        letter = next(one for one in self.fresh if isinstance(one[2], kind) and one[1].startswith(dst))
        self.lose(letter)
        return letter

    def mail(self, lose: Tuple[type, ...] = (), deaf: Tuple[str, ...] = (), keep: Tuple[type, ...] = ()) -> None:
        """Deliver all that is under way, and what that brings, but end no copy, store, or read.
        ``lose``: these get lost; ``keep``: these stay under way; ``deaf``: what is for these nodes stays under way."""
        while True:
            due = [one for one in self.fresh if one[1] not in deaf and not isinstance(one[2], keep)]
            if not due:
                return
            if isinstance(due[0][2], lose):
                self.lose(due[0])
            else:
                self.deliver(due[0])

    def elapse(self, ns: int, lose: Tuple[type, ...] = (), frozen: Tuple[str, ...] = ()) -> None:
        """Time passes: every timer fires when due and messages arrive at once. ``frozen``: nodes that stand still."""
        end = self.now + ns
        self.mail(lose, frozen)
        while True:
            due = [
                (timer[0], name, timer[1])
                for name, machine in self.machines.items()
                if name not in frozen and (timer := machine.timers.next()) is not None
            ]
            if not due or min(due)[0] > end:
                break
            when, name, timer_name = min(due)
            self.now = max(self.now, when)
            self.fire(name, timer_name)
            self.mail(lose, frozen)
            for window in list(self.windows):
                self.close_window(*window)
        self.now = end

    def lease_ends(self, node: str, event: int) -> None:
        self.fire(node, ("lease", event, 0))

    def land_and_end(self, node: str, rid: Tuple[int, int]) -> None:
        """A copy that was asked to stop, too late: its bytes land, then it ends."""
        self.land(node, rid)
        stopped = self.copies.pop((node, rid))[1]
        self.give(node, CopyStopped(rid) if stopped else CopyDone(rid, True))

    def copying(self, node: str) -> Tuple[int, int]:
        """The one copy that runs at a node."""
        (rid,) = [rid for name, rid in self.copies if name == node]
        return rid

    # ---- what the world looks like
    def at(self, node: str, location: str = CPU) -> str:
        """The keys visible at a rank, sorted."""
        return "".join(sorted(key.decode() for key in self.worker(node).pools[location].index))

    def whole_at(self, text: str) -> str:
        """The instances at which a whole chain is visible, at every rank."""
        found: Dict[str, bool] = {}
        for name in sorted(self.specs):
            if name != "ctl":
                here = name in self.machines and set(text) <= set(self.at(name))
                found[name[0]] = found.get(name[0], True) and here
        return "".join(name for name, whole in found.items() if whole)

    def wrong_bytes(self) -> str:
        """Visible chunks whose slot holds something else: "b/0 x holds z"."""
        wrong = []
        for name in self.machines:
            for pool in self.worker(name).pool_list if name != "ctl" else []:
                memory = self.memory[(name, pool.name)]
                for key, entry in pool.index.items():
                    held = memory.get(entry.slot, b"?")
                    if held != key:
                        wrong.append(f"{name} {key.decode()} holds {held.decode()}")
        return ", ".join(wrong)

    def leaks(self) -> str:
        """What is still open, once everything should be over."""
        return ", ".join(f"{name}: {line}" for name, machine in self.machines.items() for line in machine.pending())

    def beat(self, node: str) -> None:
        self.fire(node, ("beat", 0, 0))
        self.deliver(self.take(Beat))
