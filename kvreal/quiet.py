"""Is everything quiet? Nodes are asked what is pending, and what they have sent to and received from one another."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Callable, Dict, Final, List, Optional, Tuple

from kvreal import control as c

if TYPE_CHECKING:
    from kvreal.session import Session

ASK_TIMEOUT_S: Final = 2.0
LOST_AFTER_S: Final = 0.1
"""Messages that were sent and have not arrived after this long, while nothing else happens, were lost."""

Counts = Dict[str, Tuple[Dict[str, int], Dict[str, int]]]


class Quiet:
    def __init__(self, session: Session) -> None:
        self.session: Session = session

    def busy(self) -> List[str]:
        """Why the run as a whole cannot be quiet yet, as far as the runner knows by itself."""
        lines = []
        for seat in self.session.seats.values():
            if seat.restarts > 0:
                lines.append(f"{seat.name}: to be restarted")
            elif seat.host is not None and seat.paused:
                lines.append(f"{seat.name}: paused")
            elif seat.host is not None and not seat.up:
                lines.append(f"{seat.name}: starting")
        return lines

    def ask(self) -> List[str]:
        """Ask every node how it is. Why it is not quiet; empty if all are and no message is under way."""
        number = self.session.next_number()
        asked = [seat for seat in self.session.seats.values() if seat.up and not seat.paused]
        for seat in asked:
            seat.say(c.Ask(number))
        until = time.monotonic() + ASK_TIMEOUT_S
        while time.monotonic() < until:
            waiting = [s for s in asked if s.up and not s.paused and (s.state is None or s.state.n < number)]
            if not waiting:
                break
            self.session.pump(until - time.monotonic())
        lines = self.busy()
        for seat in asked:
            if not seat.up or seat.paused:
                continue
            state = seat.state
            if state is None or state.n < number:
                lines.append(f"{seat.name}: gives no answer")
            else:
                lines += [f"{seat.name}: {why}" for why in state.pending]
        return lines

    def in_flight(self) -> List[str]:
        """Messages that were sent between two living nodes and have not been taken by the receiver."""
        up = [seat for seat in self.session.seats.values() if seat.up and seat.state is not None]
        lines = []
        for a in up:
            for b in up:
                assert a.state is not None and b.state is not None
                sent = a.state.sent.get(c.pair(b.name, b.life), 0)
                received = b.state.received.get(c.pair(a.name, a.life), 0)
                if sent != received:
                    lines.append(f"{a.name} -> {b.name}: {sent} sent, {received} received")
        return lines

    def counters(self) -> Counts:
        seats = self.session.seats.values()
        return {s.name: (s.state.sent, s.state.received) for s in seats if s.up and s.state is not None}

    def settle(self, unless: Callable[[], bool] = lambda: False) -> bool:
        """Return True when all nodes are quiet: nothing pending, and two rounds of asking in which no message moved and
        none was under way; False as soon as ``unless``. Raises Hang at the deadline, saying who was pending and why."""
        pause_s = 0.0005
        before: Optional[Counts] = None
        since = time.monotonic()
        while True:
            why = self.ask()
            if not why:
                now = self.counters()
                if now != before:
                    before, since = now, time.monotonic()
                    pause_s = 0.0005
                else:
                    why = self.in_flight()
                    if not why or time.monotonic() - since > LOST_AFTER_S:
                        return True
            else:
                before = None
            if unless():
                return False
            self.session.check_deadline(why)
            self.session.idle(pause_s)
            pause_s = min(pause_s * 2, 0.02)
