"""What goes wrong in a scenario out of a stream of choices: any kind of fault, at any anchor that makes sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, Final, List, Mapping, Optional, Sequence, Tuple

from kvcore.scenario.schema import (
    CLIENT,
    CONTROLLER,
    CopyFault,
    CrashFault,
    Fault,
    FullFault,
    NamespaceFault,
    PartitionFault,
    PauseFault,
    SlowFault,
    UnmountFault,
    When,
)
from kvcore.scenario.units import Duration

if TYPE_CHECKING:
    from kvcore.scenario.arbitrary import Draw

#: Messages of a move, in its order but for what the client says.
READ: Final = (
    "Pin",
    "Pinned",
    "Fetch",
    "Reserved",
    "Fence",
    "Fenced",
    "Committed",
    "Release",
    "Released",
    "End",
    "Answer",
    "MoveRequest",
)
PUSH: Final = tuple(["Push" if name == "Fence" else "Pushed" if name == "Fenced" else name for name in READ])
#: Others of the protocol: some appear only where something has gone wrong already.
OTHERS: Final = (
    "Delta",
    "Beat",
    "Register",
    "Registered",
    "Renew",
    "Retain",
    "Refused",
    "Resync",
    "Snap",
    "Stop",
    "Stopped",
    "StoreRequest",
    "UseRequest",
    "LookupRequest",
    "CancelRequest",
    "Clear",
    "Cleared",
    "Hold",
    "Held",
    "Unhold",
    "Probe",
    "Alive",
    "Expelled",
    "Suspect",
    "PeerGone",
)
#: Where one that is lost is asked for again, and nothing else comes of it.
RETRIED: Final = ("Pin", "Pinned", "Fetch", "Reserved", "Committed", "Release", "Released")
STARTED: Final = ("Begin", "Decide", "Outcome", "StartCopy", "StartFill", "StartRead", "AbortCopy", "CloseWindow")
ENDED: Final = ("CopyDone", "FillDone", "CopyStopped", "ReadDone", "WindowClosed")
#: Kinds of fault as they are drawn: what upsets more comes more often.
MIXED: Final = (
    *("drop", "drop", "drop", "delay", "duplicate", "reorder", "partition", "partition", "crash", "crash", "crash"),
    *("pause", "slow", "copy fail", "copy stuck", "copy slow", "copy delay", "copy corrupt", "full", "unmount"),
    *("cancel", "namespace"),
)
AT: Final = tuple([Duration.parse(text) for text in ("1 ms", "500 us", "2 ms", "1 retry", "1 lease", "1 dead")])
SHORT: Final = tuple([Duration.parse(text) for text in ("1 retry", "3 retries", "0.5 leases", "1 lease", "2 leases")])
#: Long enough to be declared dead, and for every lease to end.
LONG: Final = tuple([Duration.parse(text) for text in ("1 lease", "2 leases", "2 deads")])
AT_ONCE: Final = Duration.parse("0 s")


class FaultDrawer:
    """``places``: ``instance/location`` -> ranks. ``moves``: the move steps' names. ``ways``: who moves
    bytes, read or push."""

    def __init__(
        self, draw: Draw, places: Mapping[str, int], moves: Sequence[str], ways: Sequence[str], racing: bool
    ) -> None:
        self.draw: Draw = draw
        self.places: Tuple[str, ...] = tuple(places)
        instances: Dict[str, int] = {place.partition("/")[0]: ranks for place, ranks in places.items()}
        self.instances: Tuple[str, ...] = tuple(instances)
        #: nodes as faults name them: instances, single ranks where there are several, the controller
        self.nodes: Tuple[str, ...] = (
            *instances,
            CONTROLLER,
            *[f"{name}/{rank}" for name, ranks in instances.items() if ranks > 1 for rank in range(ranks)],
        )
        self.moves: Tuple[str, ...] = tuple(moves)
        names = [name for way in ways for name in (PUSH if way == "push" else READ)]
        self.messages: Tuple[str, ...] = tuple(dict.fromkeys(names))
        self.racing: bool = racing
        self.likely: bool = False

    def faults(self, count: Tuple[int, int], must: str = "") -> Tuple[Fault, ...]:
        """``must``: a fault of this kind is among them, and at an anchor that is likely to be met."""
        draw = self.draw
        if not self.racing:
            return tuple([self._lost() for _ in draw.times(*count)])
        found: List[Fault] = []
        if must:
            self.likely = True
            found.append(self._of(must))
            self.likely = False
        for _ in draw.times(max(0, count[0] - len(found)), count[1] - len(found)):
            found.append(self._of(draw.choice(MIXED)))
        return tuple(found)

    def _of(self, kind: str) -> Fault:
        if kind == "cancel" and not self.moves:
            kind = "drop"
        if kind.startswith("copy "):
            return self._copy(kind.partition(" ")[2])
        makers: Dict[str, Callable[[], Fault]] = {
            "drop": self._drop,
            "delay": self._delay,
            "duplicate": self._duplicate,
            "reorder": self._reorder,
            "partition": self._partition,
            "crash": self._crash,
            "pause": self._pause,
            "slow": self._slow,
            "full": self._full,
            "unmount": self._unmount,
            "cancel": self._cancel,
            "namespace": self._namespace,
        }
        return makers[kind]()

    # ---- anchors
    def _message(self, lost: bool = False) -> When:
        """A message, or an answering input. ``lost``: one that may be lost; a driver owes a machine its answers."""
        draw = self.draw
        if self.likely:
            return When(sent=draw.choice(self.messages))
        name = draw.choice(OTHERS) if draw.once_in(5) else draw.choice(self.messages)
        by = draw.choice(self.nodes) if draw.once_in(4) else ""
        nth = draw.integer(1, 3) if draw.once_in(4) else 1
        if draw.once_in(10) and not lost:
            return When(ended=draw.choice(ENDED), by=by if by != CONTROLLER else "", nth=nth)
        if draw.once_in(4):
            return When(received=name, by=by, nth=nth)
        return When(sent=name, by=by, nth=nth)

    def _anchor(self) -> When:
        """Any: a message, an effect, a journal record, a time."""
        draw = self.draw
        kind = draw.integer(0, 7)
        if kind == 6 and not self.likely:
            return When(started=draw.choice(STARTED), nth=draw.integer(1, 2))
        return When(at=draw.choice(AT)) if kind == 7 else self._message()

    # ---- kinds
    def _lost(self) -> Fault:
        """The only one that leaves a strict scenario strict."""
        when = When(sent=self.draw.choice(RETRIED), nth=self.draw.integer(1, 2))
        return Fault(when=when, drop=1) if not self.draw.once_in(3) else Fault(when=when, duplicate=1)

    def _drop(self) -> Fault:
        drop: Any = "all" if self.draw.once_in(6) else self.draw.integer(1, 3)
        return Fault(when=self._message(lost=True), drop=drop)

    def _delay(self) -> Fault:
        times = self.draw.integer(1, 3)
        return Fault(when=self._message(), delay=self.draw.choice(SHORT), times=times)

    def _duplicate(self) -> Fault:
        delay = self.draw.choice(SHORT) if self.draw.once_in(2) else None
        return Fault(when=self._message(), duplicate=self.draw.integer(1, 3), delay=delay)

    def _reorder(self) -> Fault:
        return Fault(when=self._message(), reorder=True, times=self.draw.integer(1, 2))

    def _partition(self) -> Fault:
        draw = self.draw
        one = draw.choice(self.instances)
        others = [name for name in (CONTROLLER, *self.instances) if name != one]
        partition = PartitionFault(
            between=one, others=draw.choice(others), one_way=draw.once_in(3), duration=self._some_time(SHORT)
        )
        return Fault(when=self._anchor(), partition=partition)

    def _some_time(self, short: Sequence[Duration]) -> Optional[Duration]:
        """Mostly it ends; without an end it lasts until faults stop."""
        if self.draw.once_in(8):
            return None
        return self.draw.choice(LONG) if self.draw.once_in(3) else self.draw.choice(short)

    def _crash(self) -> Fault:
        draw = self.draw
        node = CLIENT if draw.once_in(16) else draw.choice(self.nodes)
        after: Optional[Duration] = AT_ONCE if draw.once_in(4) else draw.choice(LONG)
        if node != CONTROLLER and draw.once_in(4):
            after = None
        return Fault(when=self._anchor(), crash=CrashFault(node=node, restart_after=after))

    def _pause(self) -> Fault:
        client = self.draw.once_in(16)
        node = CLIENT if client else self.draw.choice(self.nodes)
        # Faults stop when the client has finished: one that is paused for good never does.
        duration = self.draw.choice(LONG) if client else self._some_time(SHORT)
        return Fault(when=self._anchor(), pause=PauseFault(node=node, duration=duration))

    def _slow(self) -> Fault:
        slow = SlowFault(
            node=self.draw.choice(self.nodes),
            factor=float(self.draw.choice((2, 10, 30))),
            duration=self._some_time(SHORT),
        )
        return Fault(when=self._anchor(), slow=slow)

    def _copy(self, what: str) -> Fault:
        draw = self.draw
        fraction = draw.choice((0.0, 0.5, 1.0)) if what in ("fail", "stuck") else 1.0
        copy = CopyFault(
            fail=what == "fail",
            stuck=what == "stuck",
            corrupt=what == "corrupt",
            slow=float(draw.choice((2, 10))) if what == "slow" else 1.0,
            delay=draw.choice(SHORT) if what == "delay" else None,
            fraction=fraction,
        )
        fill = what != "corrupt" and not self.likely and draw.once_in(8)
        by = draw.choice(self.instances) if not self.likely and draw.once_in(3) else ""
        return Fault(when=When(started="StartFill" if fill else "StartCopy", by=by), copy=copy)

    def _full(self) -> Fault:
        full = FullFault(at=self.draw.choice(self.places), duration=self._some_time(SHORT))
        return Fault(when=self._anchor(), full=full)

    def _unmount(self) -> Fault:
        unmount = UnmountFault(at=self.draw.choice(self.places), duration=self._some_time(SHORT))
        return Fault(when=self._anchor(), unmount=unmount)

    def _cancel(self) -> Fault:
        return Fault(when=self._anchor(), cancel=self.draw.choice(self.moves))

    def _namespace(self) -> Fault:
        fields: List[Dict[str, Any]] = [{"dtype": "float16"}, {"weights": "other"}, {"kv_layout": "heads-first"}]
        return Fault(namespace=NamespaceFault(node=self.draw.choice(self.instances), **self.draw.choice(fields)))
