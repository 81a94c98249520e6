"""One run: who sits where, what they said, what is to be done when. Everything blocks in ``pump`` and nowhere else."""

from __future__ import annotations

import heapq
import select
import signal
import time
import uuid
from pathlib import Path
from typing import Callable, Dict, Final, List, Mapping, Optional, Tuple

from kvcore.protocol import machine as m
from kvcore.protocol.config import ControllerSpec, WorkerSpec
from kvcore.scenario.build import Built, encode
from kvreal import control as c
from kvreal.acts import Acts
from kvreal.journal import records
from kvreal.pool import Host, HostError, Lender
from kvreal.quiet import ASK_TIMEOUT_S, Quiet
from kvreal.seats import Broken, Hang, Seat

START_TIMEOUT_S: Final = 60.0


class Session:
    """Boots the nodes of ``built`` on hosts of ``pool`` and supervises them until they are quiet, or it is too late."""

    def __init__(
        self,
        built: Built,
        pool: Lender,
        folder: Path,
        limit_ns: int,
        faults: bool = True,
        elsewhere: Optional[Mapping[str, Lender]] = None,
    ) -> None:
        """``elsewhere``: instance -> where its ranks run, if not on hosts of ``pool``."""
        self.built: Built = built
        self.encoded: bytes = encode(built)
        self.pool: Lender = pool
        self.elsewhere: Mapping[str, Lender] = elsewhere or {}
        self.folder: Path = folder
        self.run: str = uuid.uuid4().hex
        self.seats: Dict[str, Seat] = {spec.name: Seat(spec) for spec in built.specs}
        self.client: str = built.specs[-1].name
        self.faults: bool = faults
        self.base_ns: int = time.monotonic_ns()
        self.timers: List[Tuple[int, int, Callable[[], None]]] = []
        self.count: int = 0
        self.notes: List[Tuple[str, c.Noted]] = []
        self.asked: int = 0
        self.histories: List[Tuple[Lender, Path]] = []
        self.calm: bool = False
        self.started_ns: int = 0
        self.limit_ns: int = limit_ns
        self.deadline_ns: int = int(START_TIMEOUT_S * 1e9)
        self.acts: Acts = Acts(self)
        self.quiet: Quiet = Quiet(self)

    # ---- time
    def now(self) -> int:
        return time.monotonic_ns() - self.base_ns

    def after(self, delay_ns: int, what: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.timers, (self.now() + delay_ns, self.count, what))

    def workload_started(self) -> None:
        self.started_ns = self.now()
        self.deadline_ns = self.started_ns + self.limit_ns

    # ---- seats and hosts
    def start(self) -> None:
        """Every node assigned, bound, known to all others and booted: controller, then workers, then client."""
        lenders: Dict[Lender, List[Seat]] = {}
        for seat in self.seats.values():
            lenders.setdefault(self.lender(seat), []).append(seat)
        taken: Dict[str, Host] = {}
        for lender, seats in lenders.items():
            taken.update(zip([seat.name for seat in seats], lender.take(len(seats))))
        for seat in self.seats.values():
            self._assign(seat, taken[seat.name])
        self._until(lambda: all(seat.up for seat in self.seats.values()), START_TIMEOUT_S, "start")
        self.publish()
        for seat in self.seats.values():
            if seat.life > 1:
                continue  # a fault has killed it meanwhile: its next life is booted once it is bound
            self._boot(seat)
            self._heard_out(seat)  # one after the other, so that they register in the order in which they are written

    def _heard_out(self, seat: Seat) -> None:
        """Return when the node has done what it has been told so far (or is not to be asked)."""
        number = self.next_number()
        seat.say(c.Ask(number))
        self._until(
            lambda: not seat.up or seat.paused or (seat.state is not None and seat.state.n >= number),
            START_TIMEOUT_S,
            "start",
        )

    def lender(self, seat: Seat) -> Lender:
        """Whose hosts a node runs on."""
        return self.elsewhere.get(seat.name.rpartition("/")[0], self.pool)

    def _assign(self, seat: Seat, host: Host) -> None:
        seat.life += 1
        seat.host = host
        seat.address = None
        seat.dying = False
        seat.failed = False
        history = self.folder / f"{seat.name.replace('/', '-')}.{seat.life}.jsonl"
        self.histories.append((host.pool, history))
        journal = str(self.journal) if isinstance(seat.spec, ControllerSpec) else ""
        seat.say(
            c.Assign(
                self.run,
                seat.name,
                seat.life,
                self.encoded,
                self.base_ns + host.pool.clock_ns,
                journal,
                host.pool.path(history),
                self.faults and not self.calm,
                seat.spent,
            )
        )

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"

    def publish(self) -> None:
        """Tell everyone who is where now."""
        book = c.Book({seat.name: seat.address for seat in self.seats.values() if seat.address is not None})
        for seat in self.seats.values():
            if seat.up:
                seat.say(book)

    def _boot(self, seat: Seat) -> None:
        boot = m.Boot()
        if isinstance(seat.spec, WorkerSpec):
            boot = m.Boot(nonce=uuid.uuid4().int >> 66)
        elif isinstance(seat.spec, ControllerSpec):
            boot = m.Boot(journal=records(self.journal))
        seat.say(c.Give(boot))

    def kill(self, seat: Seat) -> None:
        """SIGKILL to a node's process, and the end of its life."""
        host = seat.host
        if host is not None:
            host.pool.discard(host)
            self._left(seat)

    def _left(self, seat: Seat) -> None:
        seat.host = None
        seat.address = None
        seat.paused = False
        seat.dying = False
        self.publish()
        self.acts.answered()

    def restart(self, seat: Seat) -> None:
        """A new process for a dead node. One that is not warm takes about a second."""
        if seat.host is None:
            self._assign(seat, self.lender(seat).spare())
        elif seat.dying:  # it has said that it will end, and has not yet
            self.after(1_000_000, lambda: self.restart(seat))
        else:  # another fault's restart was sooner
            seat.restarts -= 1

    def pause(self, seat: Seat) -> None:
        if seat.host is not None:
            seat.paused = True
            seat.host.send_signal(signal.SIGSTOP)

    def resume(self, seat: Seat) -> None:
        """SIGCONT, again a little later if the SIGSTOP that it undoes came after it."""
        seat.paused = False
        host = seat.host
        if host is not None:
            host.send_signal(signal.SIGCONT)
            self.after(20_000_000, lambda: self._resume_again(seat, host))

    def _resume_again(self, seat: Seat, host: Host) -> None:
        if seat.host is host and not seat.paused and host.stopped():
            host.send_signal(signal.SIGCONT)
            self.after(20_000_000, lambda: self._resume_again(seat, host))

    # ---- hearing
    def pump(self, timeout_s: float) -> None:
        """Wait for something to be said or due, and see to it. Raises Broken if a node cannot go on."""
        now = self.now()
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()
        if self.timers:
            timeout_s = min(timeout_s, max(0.0, (self.timers[0][0] - self.now()) / 1e9))
        poller = select.poll()
        by_fd: Dict[int, Tuple[Seat, Host]] = {}
        for seat in self.seats.values():
            if seat.host is not None:
                by_fd[seat.host.pipe.read_fd] = (seat, seat.host)
                poller.register(seat.host.pipe.read_fd, select.POLLIN)
                if seat.host.pipe.outgoing:
                    by_fd[seat.host.pipe.write_fd] = (seat, seat.host)
                    poller.register(seat.host.pipe.write_fd, select.POLLOUT)
        for fd, _ in poller.poll(max(0.0, timeout_s) * 1000):
            seat, host = by_fd[fd]
            if seat.host is not host:
                continue
            host.pipe.flush()
            if fd == host.pipe.read_fd:
                self._hear(seat, host)

    def _hear(self, seat: Seat, host: Host) -> None:
        try:
            messages = host.pipe.hear()
        except c.ControlError as error:
            raise Broken("control", seat.name, str(error)) from error
        for message in messages:
            self._heard(seat, message)
        if host.pipe.ended and seat.host is host:
            expected = seat.dying
            host.pool.discard(host)
            self._left(seat)
            if not expected:
                raise Broken("died", seat.name, f"its process ended on its own, {host.status()}")

    def _heard(self, seat: Seat, message: c.Said) -> None:
        if isinstance(message, c.State):
            seat.state = message
            self.acts.answered()
        elif isinstance(message, c.Noted):
            self.notes.append((seat.name, message))
            if message.kind == "start" and seat.name == self.client:
                self.acts.workload_starts()
        elif isinstance(message, c.Fired):
            self.acts.fired(seat, message)
        elif isinstance(message, c.Spent):
            seat.spent = message.spent
            seat.fired[seat.life] = message.fired
        elif isinstance(message, c.Bound):
            seat.address = c.Address(seat.life, message.control, message.data)
            if seat.life > 1:
                self.publish()
                self.acts.restarted(seat)
                self._boot(seat)
                seat.restarts -= 1
        elif isinstance(message, c.Ready):
            assert seat.host is not None
            seat.host.transport = message.transport
        elif isinstance(message, c.Checked):
            seat.checked.append(message)
        elif isinstance(message, c.Idle):
            seat.idle = message.clean
        elif isinstance(message, c.Failed):
            seat.failed = True
            raise Broken(message.kind, seat.name, message.text)

    def _until(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        until = time.monotonic() + timeout_s
        while not done():
            left = until - time.monotonic()
            if left <= 0:
                raise HostError(f"the nodes did not {what} within {timeout_s:.0f} s")
            self.pump(left)

    # ---- quiet?
    def next_number(self) -> int:
        self.asked += 1
        return self.asked

    def ask(self) -> List[str]:
        """Why the nodes are not quiet; empty if they are."""
        return self.quiet.ask()

    def settle(self, seen: int = -1) -> bool:
        """Return True when all nodes are quiet, False when the client says something after its note number ``seen``: it
        does not wait any longer. Raises Hang at the deadline, saying who was pending and why."""
        return self.quiet.settle(lambda: seen >= 0 and any(node == self.client for node, _ in self.notes[seen:]))

    def idle(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            if left <= 0:
                return
            self.pump(left)

    def check_deadline(self, why: List[str]) -> None:
        if self.now() > self.deadline_ns:
            raise Hang("\n".join(why or ["nothing is pending, but the client has not finished"]))

    # ---- the run
    def play(self) -> None:
        """From the client's boot to the end of its last step and quiet after it. Raises Hang or Broken."""
        seen = 0
        finished = False
        while not finished:
            while seen == len(self.notes):
                left = (self.deadline_ns - self.now()) / 1e9
                if left <= 0:
                    self.check_deadline(self.ask())
                self.pump(max(0.0, min(left, 1.0)))
            node, note = self.notes[seen]
            seen += 1
            if node != self.client:
                continue
            if note.kind == "settle":
                if self.settle(seen):
                    self.seats[self.client].say(c.Give(m.Command("settled")))
            elif note.kind == "finished":
                finished = True
        self.calm = True
        self.acts.calm_down()
        self.settle()
        if self.acts.fired_counts():
            # What a fault kept from the controller, a Beat brings to light (H29).
            self.idle((self.built.config.beat_ns + self.built.config.retry_ns) / 1e9)
            self.settle()

    def verify(self, wipe: bool) -> None:
        """Overwrite what is free, then let each process compare what it has; the answers are in ``seat.checked``."""
        up = [seat for seat in self.seats.values() if seat.up and not seat.paused and not seat.failed]
        for what in (True, False) if wipe else (False,):
            counts = {seat.name: len(seat.checked) for seat in up}
            for seat in up:
                seat.say(c.Verify(what))
            self._until(
                lambda counts=counts: all(  # type: ignore[misc]
                    len(s.checked) > counts[s.name] or not s.up or s.failed for s in up
                ),
                START_TIMEOUT_S,
                "check their memory",
            )

    def release(self) -> None:
        """Give the hosts back to the pool; those that are not clean, or do not answer, are killed."""
        for seat in self.seats.values():
            if seat.host is not None and not seat.paused and seat.address is not None:
                seat.say(c.Release())
        until = time.monotonic() + ASK_TIMEOUT_S
        try:
            while any(s.up and not s.paused and s.idle is None for s in self.seats.values()):
                left = until - time.monotonic()
                if left <= 0:
                    break
                self.pump(left)
        except (Broken, HostError):
            pass  # it is killed below
        self.abandon()

    def abandon(self) -> None:
        """Every host back to the pool, killed unless it said that it is clean."""
        for seat in self.seats.values():
            if seat.host is not None:
                host, seat.host, seat.address = seat.host, None, None
                host.pool.give_back(host, bool(seat.idle))
