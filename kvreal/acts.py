"""Faults of nodes, carried out by the runner: crash is SIGKILL, pause is SIGSTOP; the others are orders to the nodes.

A node's own plan notices when its anchor is met and says Fired; faults anchored to a time are the runner's own. A crash
or a pause of the noticing node itself has been carried out by that node when its Fired arrives.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Dict, List, Optional, Tuple, Union

from kvcore.protocol import machine as m
from kvcore.protocol.config import WorkerSpec
from kvcore.scenario.faults import Action, CancelOp, ClientDies, Crash, FaultPlan, Full, Partition, Pause, Slow
from kvreal import control as c

if TYPE_CHECKING:
    from kvreal.seats import Seat
    from kvreal.session import Session


class Acts:
    def __init__(self, session: Session) -> None:
        self.session: Session = session
        built = session.built
        self.plan: FaultPlan = FaultPlan(built.faults if session.faults else (), built.config, built.nodes)
        self.done: List[Action] = []
        self.struck: List[Tuple[int, Action]] = []
        self.open: List[Action] = []
        self.waiting: List[Tuple[Seat, int, int, List[Seat]]] = []

    def fired_counts(self) -> Dict[str, int]:
        """``kind at anchor`` -> how often, over all nodes and lives."""
        counts = dict(self.plan.fired)
        for seat in self.session.seats.values():
            for fired in seat.fired.values():
                for what, times in fired.items():
                    if not what.endswith(" at a time"):  # the runner's own, and counted there
                        counts[what] = counts.get(what, 0) + times
        return dict(sorted(counts.items()))

    def workload_starts(self) -> None:
        """The client's first step: times count from here."""
        session = self.session
        session.workload_started()
        for at_ns, action in self.plan.timed():
            session.after(at_ns, partial(self._begin, action))

    def _begin(self, action: Action) -> None:
        self.carry_out(action, None)

    def fired(self, seat: Seat, message: c.Fired) -> None:
        """Carry it out; if the node waits, tell it when those whom it concerns have seen to it."""
        touched: List[Seat] = []
        for action in message.actions:
            touched += self.carry_out(action, seat)
        if message.wait:
            number = self.session.next_number()
            others = [other for other in touched if other is not seat and other.up and not other.paused]
            for other in others:
                other.say(c.Ask(number))  # answered in order: by then it has done what it was told before
            self.waiting.append((seat, message.wait, number, others))
            self.answered()

    def answered(self) -> None:
        """Somebody has spoken, or gone: who need not wait any more?"""
        for item in list(self.waiting):
            seat, wait, number, others = item
            if not any(o.up and not o.paused and (o.state is None or o.state.n < number) for o in others):
                self.waiting.remove(item)
                seat.say(c.Carried(wait))

    def carry_out(self, action: Action, by: Optional[Seat]) -> List[Seat]:
        """``by``: the node that noticed; None for one of the runner's own. Faults of nodes happen once, but whoever has
        carried one out by its own hand already has done so. Returns the nodes that have been told to do something."""
        own = by is not None and isinstance(action, (Crash, Pause)) and action.node == by.name
        if self.session.calm or action in self.done:
            if own and by is not None:
                self._again(action, by)
            return []
        self.done.append(action)
        self.struck.append((self.session.now(), action))
        self.plan.begin(action)
        self._tell(c.Begin(action), by)
        seats = self.session.seats
        if isinstance(action, Crash):
            self._crash(action, by)
        elif isinstance(action, Pause):
            self._pause(action, by)
        elif isinstance(action, (Partition, Slow)):
            self._last(action)
            return list(seats.values())
        elif isinstance(action, Full):
            self._full(action)
            return [seats[action.node]]
        elif isinstance(action, CancelOp):
            return self._to_client(m.Command("cancel", (action.op,)))
        elif isinstance(action, ClientDies):
            return self._to_client(m.Command("die", (str(action.for_ns),)))
        return []

    def _again(self, action: Action, seat: Seat) -> None:
        """A node has done to itself what had been done to it already, before it could hear of it: undo it at once."""
        session = self.session
        if isinstance(action, Pause):
            if not seat.paused:
                session.after(0, lambda: session.resume(seat))
        elif isinstance(action, Crash):
            seat.dying = True
            if action.restart_after_ns >= 0 and not seat.restarts:
                seat.restarts += 1
                session.after(0, lambda: session.restart(seat))

    def _crash(self, action: Crash, by: Optional[Seat]) -> None:
        session = self.session
        seat = session.seats[action.node]
        if by is seat:
            seat.dying = True  # by its own hand, once what it had sent has left
        else:
            session.kill(seat)
        if action.restart_after_ns >= 0:
            seat.restarts += 1
            session.after(action.restart_after_ns, lambda: session.restart(seat))

    def _pause(self, action: Pause, by: Optional[Seat]) -> None:
        session = self.session
        seat = session.seats[action.node]
        if by is seat:
            seat.paused = True
        else:
            session.pause(seat)
        if action.for_ns >= 0:
            session.after(action.for_ns, lambda: session.resume(seat))

    def _last(self, action: Union[Partition, Slow]) -> None:
        """It is in force until its time is over."""
        self.open.append(action)
        for_ns = action.for_ns
        if for_ns >= 0:
            self.session.after(for_ns, lambda: self._over(action))

    def _over(self, action: Action) -> None:
        if action in self.open:
            self.open.remove(action)
            self._tell(c.Finish(action))

    def _tell(self, message: c.Said, but: Optional[Seat] = None) -> None:
        for seat in self.session.seats.values():
            if seat is not but:
                seat.say(message)

    def _full(self, action: Full) -> None:
        self._fill(action, "on")
        if action.for_ns >= 0:
            self.session.after(action.for_ns, lambda: self._fill(action, "off"))
        else:
            self.open.append(action)

    def _fill(self, action: Full, state: str) -> None:
        seat = self.session.seats[action.node]
        if isinstance(seat.spec, WorkerSpec):
            seat.say(c.Give(m.Command(action.what, (action.location, state))))

    def _to_client(self, command: m.Command) -> List[Seat]:
        client = self.session.seats[self.session.client]
        client.say(c.Give(command))
        return [client]

    def calm_down(self) -> None:
        """The liveness phase: partitions heal, paused nodes go on, full pools are usable; restarts still happen."""
        for action in self.open:
            if isinstance(action, Full):
                self._fill(action, "off")
            else:
                self._tell(c.Finish(action))
        self.open = []
        for seat in self.session.seats.values():
            if seat.paused:
                self.session.resume(seat)
        self._tell(c.Calm())

    def restarted(self, seat: Seat) -> None:
        """A fresh process knows nothing of the faults that have happened or are in force."""
        for action in self.done:
            seat.say(c.Begin(action))
            if action not in self.open:
                seat.say(c.Finish(action))
        for action in self.open:
            if isinstance(action, Full) and action.node == seat.name:
                self._fill(action, "on")
        if self.session.calm:
            seat.say(c.Calm())
