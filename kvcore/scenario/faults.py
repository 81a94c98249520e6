"""One pure fault plan, asked by both drivers: most divergence between a simulation and its reality is two fault
interpreters that disagree.

Where a scenario leaves room, this is what it means:

* An anchor counts matching messages per sending node and life, from 1. A fault fires from the ``nth`` on, ``times`` in
  a row, and never more than ``times`` a node in the whole run. ``drop: N`` drops N in a row each time; ``drop: all``
  drops from the nth of each life on.
* ``delay`` with ``duplicate``: the message itself is on time, each further copy comes ``delay`` after the one before.
* ``reorder``: held back until the next message to the same node has gone, ``delay_ns`` (default: one retry) at most.
* What happens to nodes (crash, pause, partition, slow, full, unmount, cancel) happens once a run, whoever reaches the
  anchor first. ``Action.fault`` is the fault's number, so that a driver of several processes can tell that it has
  happened.
* A crash of the client is ``ClientDies``: the driver gives it ``Command("die", (for_ns,))``.
* ``when: {started: m}`` and ``{ended: m}`` with the name of a step: when the client issues it, when it has ended.
"""

from __future__ import annotations

from typing import Dict, Final, Iterable, List, Optional, Sequence, Tuple, Union

import msgspec

from kvcore.protocol.config import Config
from kvcore.protocol.machine import Effect, Input, Journal, Note, Received, Send, StartCopy, StartFill
from kvcore.scenario.schema import CLIENT, CopyFault, Fault, When
from kvcore.scenario.units import Duration


# ---- what a driver is told ------------------------------------------------------------------------------------------
class Acting(msgspec.Struct, frozen=True, gc=False, tag=True, forbid_unknown_fields=True):
    """Base of what a fault does to nodes. -1 ns: for good, or until faults stop."""


class Crash(Acting, frozen=True, gc=False):
    node: str
    restart_after_ns: int = -1
    fault: int = -1


class Pause(Acting, frozen=True, gc=False):
    node: str
    for_ns: int = -1
    fault: int = -1


class Partition(Acting, frozen=True, gc=False):
    """Nothing passes between ``a`` and ``b``; ``one_way``: nothing from a to b."""

    a: Tuple[str, ...]
    b: Tuple[str, ...]
    one_way: bool = False
    for_ns: int = -1
    fault: int = -1


class Slow(Acting, frozen=True, gc=False):
    """All that the node does takes ``factor`` times as long."""

    node: str
    factor: float
    for_ns: int = -1
    fault: int = -1


class Full(Acting, frozen=True, gc=False):
    """The driver gives the worker ``Command(what, (location, "on"))``, and ``"off"`` after ``for_ns``. ``what``: full;
    or unmount: the bytes are gone as well."""

    node: str
    location: str
    for_ns: int = -1
    fault: int = -1
    what: str = "full"


class CancelOp(Acting, frozen=True, gc=False):
    """The driver gives the client ``Command("cancel", (op,))``."""

    op: str
    fault: int = -1


class ClientDies(Acting, frozen=True, gc=False):
    """The driver gives the client ``Command("die", (str(for_ns),))``."""

    for_ns: int = -1
    fault: int = -1


Action = Union[Crash, Pause, Partition, Slow, Full, CancelOp, ClientDies]


class Verdict(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What becomes of a message or an input, and what else happens. Of ``copies``, the first comes after ``delay_ns``,
    each other ``copy_gap_ns`` after the one before. ``actions``: of an effect, right after it, before what follows it
    (which a crash loses); of an input, before the machine takes it (a crash loses it)."""

    drop: bool = False
    delay_ns: int = 0
    copies: int = 1
    copy_gap_ns: int = 0
    reorder: bool = False
    actions: Tuple[Action, ...] = ()


class CopyFate(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What becomes of the bytes: ``fraction`` of them lands before it fails or sticks. ``slow``: times as long;
    ``delay_ns``: before the first of them moves."""

    fail: bool = False
    corrupt: bool = False
    stuck: bool = False
    slow: float = 1.0
    fraction: float = 1.0
    delay_ns: int = 0


FINE: Final = Verdict()
GOOD_COPY: Final = CopyFate()

Spent = Tuple[int, str, int]
"""(number of a fault's rule, node, how often it fired there)."""


# ---- what a fault was compiled to -----------------------------------------------------------------------------------
class Rule:
    """One fault at one anchor. ``fault``: its place in the scenario. ``span``: how many matching things in a row it
    concerns, -1: all from ``nth`` on."""

    def __init__(
        self, number: int, place: int, fault: Fault, when: When, config: Config, nodes: Tuple[str, ...]
    ) -> None:
        self.number: int = number
        self.nth: int = when.nth
        self.by: Optional[Dict[str, None]] = expand(when.by, nodes) if when.by else None
        self.to: Optional[Dict[str, None]] = expand(when.to, nodes) if when.to else None
        dropped = fault.drop if isinstance(fault.drop, int) else 1
        self.span: int = -1 if fault.drop == "all" else fault.times * dropped
        self.fault: int = place
        self.label: str = _label(when)
        self.kinds: Tuple[str, ...] = tuple([kind for kind in fault.kinds if kind in _MESSAGE_KINDS])
        self.action_kinds: Tuple[str, ...] = tuple([kind for kind in fault.kinds if kind in _ACTION_KINDS])
        self.copy: CopyFault = fault.copy or CopyFault()
        self.late_ns: int = self.copy.delay.ns(config) if self.copy.delay is not None else 0
        delay_ns = fault.delay.ns(config) if fault.delay is not None else 0
        late_copies = fault.duplicate > 0 and not fault.drop
        self.verdict: Verdict = Verdict(
            drop=fault.drop is not None,
            delay_ns=0 if late_copies else (delay_ns or config.retry_ns if fault.reorder else delay_ns),
            copies=1 + fault.duplicate,
            copy_gap_ns=delay_ns if late_copies else 0,
            reorder=fault.reorder,
        )


_MESSAGE_KINDS: Final = ("drop", "delay", "duplicate", "reorder")
_ACTION_KINDS: Final = ("partition", "crash", "pause", "slow", "full", "unmount", "cancel")
_OP_NOTES: Final[Dict[str, str]] = {"invoke": "started", "ok": "ended", "fail": "ended", "info": "ended"}


def _label(when: When) -> str:
    anchor = when.anchor
    return "a time" if anchor == "at" else f"{anchor} {getattr(when, anchor)}"


def expand(name: Union[str, Sequence[str]], nodes: Tuple[str, ...]) -> Dict[str, None]:
    """The addresses that names mean, in the order of ``nodes``: an instance's name means all of its ranks."""
    names = (name,) if isinstance(name, str) else tuple(name)
    return {node: None for node in nodes if node in names or node.partition("/")[0] in names}


class FaultPlan:
    """``nodes``: all addresses. ``active`` False: there is no fault, or no more; drivers then skip every question."""

    def __init__(
        self, faults: Iterable[Fault], config: Config, nodes: Tuple[str, ...], spent: Iterable[Spent] = ()
    ) -> None:
        self.config: Config = config
        self.nodes: Tuple[str, ...] = nodes
        self.rules: Dict[Tuple[str, str], List[Rule]] = {}  # (anchor, name) -> rules
        self.copies: Dict[str, List[Rule]] = {}  # effect -> rules of copies
        self.actions: Dict[int, Tuple[Action, ...]] = {}  # fault -> what it does to nodes
        self.counts: Dict[Tuple[int, str], int] = {}  # (rule, node) -> matching things in this life
        self.spent: Dict[Tuple[int, str], int] = {}  # (rule, node) -> times fired
        self.acted: Dict[int, None] = {}
        self.fired: Dict[str, int] = {}
        """``kind at anchor`` -> how often: the coverage of a run."""
        self.blocks: List[Partition] = []
        self.slowed: List[Slow] = []
        self._timed: List[Tuple[int, Action]] = []
        self._labels: Dict[int, Tuple[str, ...]] = {}  # fault -> what to count when its timed action begins
        for number, fault in enumerate(faults):
            self._add(number, fault)
        for number, node, times in spent:
            self.spent[(number, node)] = times
        self._timed.sort(key=_first)
        self.watches_inputs: bool = any(anchor in ("received", "ended") for anchor, _ in self.rules)
        """False: ``input`` need not be asked."""
        self.active: bool = bool(self.rules or self.copies or self._timed)

    def _add(self, number: int, fault: Fault) -> None:
        when = fault.when
        kinds = fault.kinds
        actions = self._compile(number, fault)
        if actions:
            self.actions[number] = actions
        if when is not None and when.at is not None:
            at = when.at.ns(self.config)
            self._timed += [(at, action) for action in actions]
            self._labels[number] = tuple([f"{kind} at a time" for kind in kinds])
            return
        if fault.copy is not None:
            anchor = when if when is not None and when.started else When(started="StartCopy")
            self.copies.setdefault(anchor.started, []).append(
                Rule(2 * number + 1, number, fault, anchor, self.config, self.nodes)
            )
        if when is not None and (actions or any(kind in _MESSAGE_KINDS for kind in kinds)):
            at_what = (when.anchor, str(getattr(when, when.anchor)))
            self.rules.setdefault(at_what, []).append(Rule(2 * number, number, fault, when, self.config, self.nodes))

    def _compile(self, number: int, fault: Fault) -> Tuple[Action, ...]:
        found: List[Action] = []
        if fault.crash is not None:
            after = self._ns(fault.crash.restart_after)
            for node in expand(fault.crash.node, self.nodes):
                found.append(ClientDies(after, number) if node == CLIENT else Crash(node, after, number))
        if fault.pause is not None:
            for_ns = self._ns(fault.pause.duration)
            found += [Pause(node, for_ns, number) for node in expand(fault.pause.node, self.nodes)]
        if fault.partition is not None:
            part = fault.partition
            a = tuple(expand(part.between, self.nodes))
            b = tuple(expand(part.others, self.nodes))
            found.append(Partition(a, b, part.one_way, self._ns(part.duration), number))
        if fault.slow is not None:
            for_ns = self._ns(fault.slow.duration)
            found += [Slow(node, fault.slow.factor, for_ns, number) for node in expand(fault.slow.node, self.nodes)]
        for what, tier in (("full", fault.full), ("unmount", fault.unmount)):
            if tier is not None:
                instance, _, location = tier.at.partition("/")
                for_ns = self._ns(tier.duration)
                found += [Full(node, location, for_ns, number, what) for node in expand(instance, self.nodes)]
        if fault.cancel:
            found.append(CancelOp(fault.cancel, number))
        return tuple(found)

    def _ns(self, duration: Union[Duration, None]) -> int:
        return duration.ns(self.config) if duration is not None else -1

    # ---- questions ---------------------------------------------------------------------------------------------------
    def effect(self, now: int, node: str, effect: Effect) -> Verdict:
        """Asked of every effect before it is carried out."""
        kind = type(effect)
        rules = self.rules
        if kind is Send:
            found = rules.get(("sent", type(effect.msg).__name__))  # type: ignore[union-attr]
            return self._judge(found, node, effect.dst) if found is not None else FINE  # type: ignore[union-attr]
        if kind is Note:
            anchor = _OP_NOTES.get(effect.kind, "") if node == CLIENT else ""  # type: ignore[union-attr]
            found = rules.get((anchor, effect.detail))  # type: ignore[union-attr]
        else:
            found = rules.get(("started", kind.__name__))
            if kind is Journal:
                record = rules.get(("started", type(effect.record).__name__))  # type: ignore[union-attr]
                found = record if found is None else found + (record or [])
        return self._judge(found, node, "") if found is not None else FINE

    def input(self, now: int, node: str, item: Input) -> Verdict:
        """Asked of every input before it is given to the machine."""
        if type(item) is Received:
            found = self.rules.get(("received", type(item.msg).__name__))
            return self._judge(found, node, item.src) if found is not None else FINE
        found = self.rules.get(("ended", type(item).__name__))
        return self._judge(found, node, "") if found is not None else FINE

    def copy(self, now: int, node: str, effect: Union[StartCopy, StartFill]) -> CopyFate:
        """Asked when ``node`` starts a copy or a fill."""
        fate = GOOD_COPY
        for rule in self.copies.get(type(effect).__name__, ()):
            if self.active and self._hit(rule, node, ""):
                copy = rule.copy
                fate = CopyFate(
                    fate.fail or copy.fail,
                    fate.corrupt or copy.corrupt,
                    fate.stuck or copy.stuck,
                    fate.slow * copy.slow,
                    min(fate.fraction, copy.fraction),
                    fate.delay_ns + rule.late_ns,
                )
                self._count(_copy_kind(copy), rule.label)
        return fate

    def blocked(self, src: str, dst: str) -> bool:
        """Is there a partition between them, in this direction?"""
        for part in self.blocks:
            if (src in part.a and dst in part.b) or (not part.one_way and src in part.b and dst in part.a):
                return True
        return False

    def slowness(self, node: str) -> float:
        """How many times as long everything takes at ``node`` now."""
        factor = 1.0
        for slow in self.slowed:
            if slow.node == node:
                factor *= slow.factor
        return factor

    # ---- the driver's word -------------------------------------------------------------------------------------------
    def begin(self, action: Action) -> None:
        """It is in force. To be called for each action, whoever it came from."""
        for label in self._labels.pop(action.fault, ()):
            self.fired[label] = self.fired.get(label, 0) + 1
        self.acted[action.fault] = None
        # A node that has noticed it itself may be told of it as well: it ends once.
        if isinstance(action, Partition) and action not in self.blocks:
            self.blocks.append(action)
        elif isinstance(action, Slow) and action not in self.slowed:
            self.slowed.append(action)

    def end(self, action: Action) -> None:
        """Its time is over."""
        if isinstance(action, Partition) and action in self.blocks:
            self.blocks.remove(action)
        elif isinstance(action, Slow) and action in self.slowed:
            self.slowed.remove(action)

    def timed(self) -> List[Tuple[int, Action]]:
        """(ns since the workload's start, what happens then), earliest first."""
        return list(self._timed)

    def restarted(self, node: str) -> None:
        """A new life: its messages are counted from 1 again. What has fired has fired."""
        for at in [at for at in self.counts if at[1] == node]:
            del self.counts[at]

    def stop(self) -> None:
        """The liveness phase: no partition is left, and nothing goes wrong any more."""
        self.active = False
        self.blocks.clear()
        self.slowed.clear()

    def spendings(self) -> Tuple[Spent, ...]:
        """What has fired so far, for the plan of a process that takes over (``spent``)."""
        return tuple([(number, node, times) for (number, node), times in self.spent.items()])

    # ---- inside ------------------------------------------------------------------------------------------------------
    def _judge(self, rules: List[Rule], node: str, peer: str) -> Verdict:
        verdict = FINE
        if not self.active:
            return verdict
        for rule in rules:
            if not self._hit(rule, node, peer):
                continue
            one = rule.verdict
            actions: Tuple[Action, ...] = ()
            if rule.fault in self.actions and rule.fault not in self.acted:
                self.acted[rule.fault] = None
                actions = self.actions[rule.fault]
                for kind in rule.action_kinds:
                    self._count(kind, rule.label)
            for kind in rule.kinds:
                self._count(kind, rule.label)
            verdict = Verdict(
                verdict.drop or one.drop,
                verdict.delay_ns + one.delay_ns,
                verdict.copies + one.copies - 1,
                max(verdict.copy_gap_ns, one.copy_gap_ns),
                verdict.reorder or one.reorder,
                verdict.actions + actions,
            )
        return verdict

    def _hit(self, rule: Rule, node: str, peer: str) -> bool:
        """Count a matching thing; does the rule concern it?"""
        if (rule.by is not None and node not in rule.by) or (rule.to is not None and peer not in rule.to):
            return False
        at = (rule.number, node)
        count = self.counts[at] = self.counts.get(at, 0) + 1
        if count < rule.nth:
            return False
        if rule.span >= 0:
            spent = self.spent.get(at, 0)
            if count >= rule.nth + rule.span or spent >= rule.span:
                return False
            self.spent[at] = spent + 1
        return True

    def _count(self, kind: str, label: str) -> None:
        what = f"{kind} at {label}"
        self.fired[what] = self.fired.get(what, 0) + 1


def _copy_kind(copy: CopyFault) -> str:
    for name in ("fail", "corrupt", "stuck"):
        if getattr(copy, name):
            return f"copy {name}"
    return "copy slow" if copy.slow > 1.0 else "copy delay"


def _first(item: Tuple[int, Action]) -> int:
    return item[0]
