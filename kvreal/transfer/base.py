"""A process's copies: they run beside the loop, end exactly once, and can be told to stop.

    transfer.start(copy)             in a thread; the loop never waits
    transfer.abort(rid)              ends as stopped, once its writer is known to have stopped (or done, if it won)
    transfer.close_window(peer, e)   answered when nothing of process (peer, e) can land here any more
    transfer.fileno()                readable when ``take()`` has something
    transfer.take()                  [Ended | Progress | WindowShut]

Which transport carries a copy is chosen for each: the first in ``carriers`` that both ends have and that reaches both
locations. Injected fates (fail, corrupt, stuck, slow, a fraction) are carried out here, alike for every transport.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections import deque
from typing import Callable, Deque, Dict, List, Optional, Sequence, Tuple, Union

import msgspec

from kvcore.protocol.messages import Rid
from kvcore.scenario.profile import Profile
from kvcore.scenario.topology import kind_of
from kvreal.checksum import Mismatch, Mode, compare, mode_of, sums
from kvreal.memory import Memory
from kvreal.slab import copy_bytes
from kvreal.spans import Ints, Slots, packed, runs
from kvreal.store import DiskError
from kvreal.transfer import file
from kvreal.transfer.carrier import Carrier, Link
from kvreal.transfer.choice import choose
from kvreal.transfer.flow import BATCH_BYTES, Flow
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Copy, Ended, Job, Progress, Stopped, WindowShut
from kvreal.transfer.line import Endpoint, Line, Lines, dial, parse, unix_name
from kvreal.transfer.window import OVER, WRONG, Grant, Hello, Window, WindowServer, hang_up
from kvreal.transfer.workers import Workers

Make = Callable[[Memory, str, Flow], Carrier]

log = logging.getLogger("kvmove.transfer")


class Transfer:
    """One a process; it outlives runs (``begin`` starts the next)."""

    def __init__(self, memory: Memory, makes: Dict[str, Make], at: Tuple[str, int] = ("127.0.0.1", 0)) -> None:
        """``makes``: of carriers by name, the preferred one first; of several, those that cannot work here are left
        out (``lacking`` says why). ``at``: where peers ask for windows. TransferError if that is taken, or none works.
        """
        self.memory: Memory = memory
        self.process: str = uuid.uuid4().hex[:16]
        self.address: str = ""
        self.token: str = ""
        self.epoch: int = 0
        self.lock: threading.Lock = threading.Lock()
        self.jobs: Dict[Rid, Job] = {}
        self.greeting: List[str] = []
        self.closing: List[Tuple[str, int]] = []
        self.results: Deque[Union[Ended, Progress, WindowShut]] = deque()
        self.checksums: Mode = "off"
        self.mismatches: int = 0
        """Copies whose bytes were wrong, as sums have found."""
        self.wake: int = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.flow: Flow = Flow()
        self.carriers: Dict[str, Carrier] = {}
        self.lacking: Dict[str, str] = {}
        for name, make in makes.items():
            try:
                carrier = make(memory, self.process, self.flow)
            except Exception as error:
                if len(makes) == 1:
                    raise
                self.lacking[name] = " ".join(str(error).split())[:200] or type(error).__name__
            else:
                self.carriers[carrier.name] = carrier
        if not self.carriers:
            raise TransferError(f"no transport works here: {self.lacking}")
        self.auto: bool = True
        """Nobody has named the transport that is to be taken."""
        self.profile: Optional[Profile] = None
        """What was measured of these transports here; see choice.py."""
        self.said: Dict[Tuple[str, str, str], str] = {}
        self.lines: Lines = Lines()
        self.workers: Workers = Workers("copy")
        unix = any(carrier.unix for carrier in self.carriers.values())
        self.windows: WindowServer = WindowServer(
            self._prepare, self._serve, self._revoke, self._check_closing, at,
            unix_name(self.process) if unix else "",
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The transport that is preferred."""
        return next(iter(self.carriers))

    # ---- the side whose memory is touched
    def _prepare(self, window: Window) -> Grant:
        hello = window.hello
        self.memory.check_all(hello.location, window.slots, window.sizes)
        carrier = self._carrier(hello.by)
        if hello.kind == "write":
            self._soil(carrier, hello.location, window.slots)
        at = carrier.prepare(window)
        check = mode_of(hello.check or "off")
        wanted = check != "off" and hello.kind == "read" and not hello.part
        found = sums(self.memory, hello.location, window.slots, window.sizes, hello.keys, check) if wanted else ()
        return Grant(True, "", carrier.info(hello), packed(at), tuple(found))

    def _soil(self, carrier: Optional[Carrier], location: str, slots: Slots) -> None:
        if carrier is None or carrier.soils:
            self.memory.soil(location, slots, poison=True)
        else:
            self.memory.note(location, slots)

    def _carrier(self, name: str) -> Carrier:
        carrier = self.carriers.get(name)
        if carrier is None:
            raise TransferError(f"no transport {name!r} here, only {', '.join(self.carriers)}")
        return carrier

    def _serve(self, window: Window) -> bytes:
        hello = window.hello
        if not self.carriers[hello.by].serve(window):
            return b""
        if hello.kind == "write" and hello.check and not hello.part:
            mode = mode_of(hello.check)
            try:
                compare(self.memory, hello.location, window.slots, window.sizes, hello.keys, mode, hello.sums)
            except Mismatch:
                return WRONG  # whoever wrote it says so, and writes it again
        return OVER

    def _revoke(self, window: Window) -> None:
        self.carriers[window.hello.by].revoke(window)

    # ---- the loop's side
    def endpoint(self) -> str:
        cards = tuple((name, carrier.card()) for name, carrier in self.carriers.items())
        return Endpoint(self.windows.host, self.windows.port, self.process, cards).text()

    def ucx_prints_to(self, fd: int) -> None:
        """Where UCX says what it uses; see proof.py."""
        for carrier in self.carriers.values():
            carrier.ucx_prints_to(fd)

    def memory_changed(self) -> None:
        """Slabs were made or dropped."""
        for carrier in self.carriers.values():
            carrier.memory_changed()

    def fileno(self) -> int:
        return self.wake

    def begin(self, token: str, address: str) -> None:
        """A new run of this process, as ``address``. Nothing of the last one may be running."""
        self.token = token
        self.address = address
        self.windows.begin(token, address)
        self.set_epoch(0)
        self.take()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.windows.set_epoch(epoch)
        for carrier in self.carriers.values():
            carrier.new_life()

    def start(self, copy: Copy) -> None:
        rid = copy.effect.rid
        with self.lock:
            if rid in self.jobs:
                return  # carried out twice: the first one's end answers both
            job = self.jobs[rid] = Job(copy, self.jobs.get(copy.effect.after))
        self.workers.run(lambda: self._run(job))

    def abort(self, rid: Rid) -> None:
        with self.lock:
            job = self.jobs.get(rid)
        if job is None:
            now = time.monotonic_ns()
            self._report(Ended(rid, "stopped", "not running", True, "", "", 0, now, now, now))
            return
        job.stop()

    def close_window(self, peer: str, epoch: int) -> None:
        self.windows.close(peer, epoch)
        with self.lock:
            self.closing.append((peer, epoch))
            mine = [job for job in self.jobs.values() if _reads(job, peer, epoch)]
        for job in mine:
            job.stop()
        self._check_closing()

    def take(self) -> List[Union[Ended, Progress, WindowShut]]:
        """What has ended, or come further, since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        found: List[Union[Ended, Progress, WindowShut]] = []
        while self.results:
            found.append(self.results.popleft())
        return found

    def next_deadline(self) -> Optional[int]:
        with self.lock:
            jobs = [job for job in self.jobs.values() if not job.expired]
            return min([min(job.tell_ns, job.deadline_ns) for job in jobs], default=None)

    def expire(self, now: int) -> None:
        """Every copy ends within copy_max_ns: tell those to stop whose time is up. They end as failed. And say how far
        the others are."""
        with self.lock:
            told = [found for job in self.jobs.values() if (found := job.progress(now)) is not None]
            late = [job for job in self.jobs.values() if job.deadline_ns <= now and not job.expired]
        for item in told:
            self._report(item)
        for job in late:
            job.expired = True
            job.stop()

    def pending(self) -> List[str]:
        with self.lock:
            lines = [f"copy {rid[1]} with {job.copy.effect.peer}" for rid, job in self.jobs.items()]
            lines += [f"closing the window of {peer}" for peer, _ in self.closing]
            lines += [f"connecting to {address}" for address in self.greeting]
        return lines + [f"window of {w.hello.peer} open" for w in list(self.windows.windows) if w.hello.kind != "greet"]

    def stop(self) -> None:
        self.windows.stop()
        with self.lock:
            jobs = list(self.jobs.values())
        for job in jobs:
            job.stop()
        self.lines.forget()
        self.workers.stop()
        self.memory.leave_arena()
        for carrier in self.carriers.values():
            carrier.stop()

    # ---- a copy's thread
    def _run(self, job: Job) -> None:
        copy = job.copy
        effect = copy.effect
        state, why, transport = "done", "", ""
        try:
            transport = self._carry(job)
            if copy.fate.fail:
                state, why = "failed", "injected failure"
        except Stopped:
            state = "stopped"
        except (TransferError, DiskError, OSError) as error:
            state, why = "failed", str(error) or type(error).__name__
        except Exception as error:  # whatever a transport's library raises ends this copy, never the node
            state, why = "failed", f"{type(error).__name__}: {error}"
        if state == "stopped" and job.expired:
            state, why = "failed", "copy_max_ns passed"
        self.flow.pass_by(job)
        if state != "done":
            self._forget(job)
        now = time.monotonic_ns()
        began = job.began_ns or now
        ended = Ended(
            effect.rid, state, why, effect.read, effect.peer, transport, job.moved, job.asked_ns, began, now, job.chosen
        )  # fmt: skip
        with self.lock:
            del self.jobs[effect.rid]
        self._report(ended)
        self._check_closing()

    def _forget(self, job: Job) -> None:
        """What a copy that came to nothing has written to a disk of this process."""
        effect = job.copy.effect
        if effect.read:
            self.memory.forget(effect.location, effect.slots)
        elif effect.peer == self.address:
            self.memory.forget(effect.peer_location, effect.peer_slots)

    def _carry(self, job: Job) -> str:
        fate = job.copy.fate
        if fate.delay_ns:
            job.aborted.wait(fate.delay_ns / 1e9)
            job.check()
        begun = time.monotonic_ns()
        self.flow.enter(job)
        try:
            transport = self._across(job)
        finally:
            self.flow.leave(job)
        if fate.stuck and not fate.fail:  # what has landed has landed, but nobody is told
            job.aborted.wait()
            raise Stopped
        if fate.slow > 1.0:
            elapsed_s = (time.monotonic_ns() - begun) / 1e9
            job.aborted.wait(elapsed_s * (fate.slow - 1.0))
            job.check()
        return transport

    def _across(self, job: Job) -> str:
        effect = job.copy.effect
        if not len(job.spans):  # an injected fault lets none of the bytes through
            if effect.read:
                self._soil(None, effect.location, effect.slots)
            return "none"
        try:
            return self._once(job)
        except Mismatch as error:  # once more, as nothing of it is visible yet
            self.mismatches += 1
            log.warning("copy %d with %s: %s; it is made once more", effect.rid[1], effect.peer, error)
            job.corrupt, job.moved = False, 0
        try:
            return self._once(job)
        except Mismatch as error:
            self.mismatches += 1
            raise TransferError(f"wrong bytes twice: {error}") from error

    def _once(self, job: Job) -> str:
        return self._carry_locally(job) if job.copy.effect.peer == self.address else self._carry_over(job)

    def _mode(self, job: Job) -> Mode:
        """Disks have sums of their own."""
        effect = job.copy.effect
        disk = self.memory.on_disk(effect.location) or kind_of(effect.peer_location) == "disk"
        return "off" if disk or not effect.keys else self.checksums

    def _mine(self, job: Job, mode: Mode) -> Tuple[Ints, Ints, Tuple[bytes, ...]]:
        """(slots, sizes, keys) of this side."""
        keys = job.copy.effect.keys[: len(job.spans)] if mode != "off" else ()
        return job.spans.mine, job.spans.sizes, keys

    def _spoil(self, job: Job) -> None:
        """Turn one byte over in the middle of what was read."""
        slot, _, size = job.spans[len(job.spans) // 2]
        location = job.copy.effect.location
        self.memory.alone(location, slot)
        spoiled = self.memory.get(location, slot, size).copy()
        spoiled[size // 2] ^= 0xFF
        key = job.copy.effect.keys[len(job.spans) // 2] if job.copy.effect.keys else b""
        self.memory.put(location, slot, spoiled, key)

    def _carry_locally(self, job: Job) -> str:
        """Between two locations of this process."""
        effect = job.copy.effect
        to, fro = (effect.location, effect.peer_location) if effect.read else (effect.peer_location, effect.location)
        into, out = (effect.slots, effect.peer_slots) if effect.read else (effect.peer_slots, effect.slots)
        job.began()
        by = self._copied(job, fro, out, to, into)
        if job.corrupt and effect.read:
            self._spoil(job)
        mode = self._mode(job)
        _, sizes, keys = self._mine(job, mode)
        compare(self.memory, to, into[: len(sizes)], sizes, keys, mode,
                sums(self.memory, fro, out[: len(sizes)], sizes, keys, mode))  # fmt: skip
        return by

    def _copied(self, job: Job, fro: str, out: Sequence[int], to: str, into: Sequence[int]) -> str:
        """Between two locations of this process; returns by what."""
        effect = job.copy.effect
        if self.memory.share(fro, out, to, into):
            job.moved = job.nbytes
            return "arena"
        self.memory.soil(to, into, poison=True)
        if self.memory.on_disk(to) or self.memory.on_disk(fro):
            file.carry(job, self.memory, self.flow, to, fro)
            return "file"
        if not self.memory.on_gpu(to) and not self.memory.on_gpu(fro):
            self._memcpy(job, to, fro)
            return "memcpy"
        for mine, theirs, size in job.spans:
            target, source = (mine, theirs) if effect.read else (theirs, mine)
            self.memory.put(to, target, self.memory.get(fro, source, size))
            job.check()
            job.moved += size
        return "memcpy"

    def _memcpy(self, job: Job, to: str, fro: str) -> None:
        spans = job.spans
        into, out = (spans.mine, spans.theirs) if job.copy.effect.read else (spans.theirs, spans.mine)
        for location, slots in ((to, into), (fro, out)):
            self.memory.check_all(location, slots, spans.sizes)
        targets, sources = self.memory.addresses(to, into), self.memory.addresses(fro, out)
        for target, source, size in zip(*(one.tolist() for one in runs(targets, sources, spans.sizes, BATCH_BYTES))):
            self.flow.turn(job, size)
            try:
                copy_bytes(target, source, size)
            finally:
                self.flow.done()
            job.moved += size

    # ---- to another process
    def _carry_over(self, job: Job) -> str:
        endpoint = parse(job.copy.endpoint)
        carrier = self._choose(job, endpoint)
        if job.copy.effect.read and not job.corrupt and self._mode(job) == "off":
            if by := carrier.at_once(job, endpoint):
                return by
        try:
            links: List[Link] = []
            try:
                self._open(job, endpoint, carrier, links)
                transport = carrier.carry(job, links[0])
                job.woken_by(None)
                job.check()  # its line may have been hung up on at the last moment
                self._verify(job, links)
            except Mismatch:
                raise  # the lines are good
            except BaseException:
                job.woken_by(None)
                for link in links:
                    link.line.close()
                raise
        except Mismatch:
            for link in links:
                self.lines.give(link.line)
            raise
        except Exception:
            if not job.aborted.is_set():
                carrier.forget(endpoint.process)  # a connection that failed once is not tried again
                self.lines.forget(endpoint.process)
            raise
        for link in links:
            self.lines.give(link.line)
        return transport

    def _verify(self, job: Job, links: List[Link]) -> None:
        """End the windows, and compare what has crossed with what was to cross. Mismatch."""
        effect = job.copy.effect
        mode = self._mode(job)
        if effect.read and job.corrupt:
            self._spoil(job)
        for link in reversed(links):
            link.line.end()
            if mode != "off" and not effect.read and self._word(job, link.line) == WRONG:
                raise Mismatch(f"{effect.peer} has other bytes than were written", ())
        slots, sizes, keys = self._mine(job, mode)
        if effect.read:
            compare(self.memory, effect.location, slots, sizes, keys, mode, links[0].grant.sums)

    def _word(self, job: Job, line: Line) -> bytes:
        """What the peer says of a window that has ended. It may never say anything: whoever stops the copy hangs up."""
        job.woken_by(_hanger(line))
        try:
            return line.settle()
        except OSError:
            job.check()
            raise
        finally:
            job.woken_by(None)

    def _choose(self, job: Job, endpoint: Endpoint) -> Carrier:
        effect = job.copy.effect
        chosen = choose(job, self.carriers, endpoint, self.profile, self.auto)
        job.chosen = chosen.why
        where = (endpoint.process, effect.location, effect.peer_location)
        if self.said.get(where) != chosen.carrier.name:
            self.said[where] = chosen.carrier.name
            log.info("copies between %s and %s of %s: %s", *where[1:], effect.peer, chosen.why)
        return chosen.carrier

    def _open(self, job: Job, endpoint: Endpoint, carrier: Carrier, links: List[Link]) -> None:
        """The windows at the peer for this copy, into ``links``: one a stream, each on a line of its own."""
        effect = job.copy.effect
        mode = self._mode(job)
        slots, sizes, keys = self._mine(job, mode)
        if not keys and kind_of(effect.peer_location) == "disk":
            keys = effect.keys[: len(job.spans)]
        first = Hello(
            self.token,
            "read" if effect.read else "write",
            self.address,
            job.copy.epoch,
            effect.peer,
            effect.peer_epoch,
            effect.peer_location,
            packed(job.spans.theirs),
            packed(job.spans.sizes),
            carrier.layout(endpoint),
            carrier.name,
            keys=keys,
            check=mode if mode != "off" else "",
            sums=() if effect.read else tuple(sums(self.memory, effect.location, slots, sizes, keys, mode)),
        )
        parts = 1

        def hello(line: Line) -> Hello:
            nonlocal parts
            parts = parts if links else carrier.streams(job)
            return first if parts == 1 else msgspec.structs.replace(first, part=len(links), parts=parts)

        def soil() -> None:
            whole = len(effect.slots) == len(job.spans)
            self._soil(carrier, effect.location, job.spans.mine if whole else effect.slots)

        while len(links) < parts:
            links.append(self._ask(endpoint, carrier, hello, job, soil if effect.read and not links else lambda: None))
        links[0].others = links[1:]

    def _ask(
        self,
        endpoint: Endpoint,
        carrier: Carrier,
        hello: Callable[[Line], Hello],
        job: Optional[Job],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Link:
        """Over a line that is there, or else over a new one. Whoever stops the copy meanwhile hangs up on it."""
        line = self.lines.take(endpoint.process)
        if line is not None and line.unix and not carrier.unix:
            line.close()
            line = None
        while True:
            kept = line is not None
            line = line or dial(endpoint, carrier.unix)
            try:
                if job is not None:
                    job.woken_by(_hanger(line))
                link = Link(line, line.open(hello(line), self.windows.secret, meanwhile))
                if job is not None:
                    job.woken_by(None)
                return link
            except BaseException as error:
                if job is not None:
                    job.woken_by(None)
                line.close()
                if isinstance(error, OSError):
                    if job is not None:
                        job.check()
                    if kept:  # it was hung up on while nobody looked
                        line = None
                        continue
                raise

    def introduce(self, address: str, endpoint: str) -> None:
        """Connect to a peer before the first copy needs it. One that cannot be reached is none of our business yet."""
        where = parse(endpoint)
        if where.process != self.process:
            with self.lock:
                self.greeting.append(address)
            self.workers.run(lambda: self._greet(address, where))

    def _greet(self, address: str, endpoint: Endpoint) -> None:
        try:
            for name, carrier in self.carriers.items():
                if endpoint.card(name) is not None:
                    with contextlib.suppress(Exception):
                        self._shake_hands(address, endpoint, carrier)
        finally:
            with self.lock:
                self.greeting.remove(address)

    def _shake_hands(self, address: str, endpoint: Endpoint, carrier: Carrier) -> None:
        layout = carrier.layout(endpoint)
        hello = Hello(self.token, "greet", self.address, 0, address, 0, layout=layout, by=carrier.name)
        link = self._ask(endpoint, carrier, lambda _: hello, None)
        try:
            carrier.introduce(endpoint, link)
            link.line.end()
        except BaseException:
            link.line.close()
            raise
        self.lines.give(link.line)

    # ---- ends
    def _report(self, item: Union[Ended, Progress, WindowShut]) -> None:
        self.results.append(item)
        os.eventfd_write(self.wake, 1)

    def _check_closing(self) -> None:
        """Answer each close whose writers, theirs and mine on their behalf, have all stopped."""
        with self.lock:
            shut = []
            for peer, epoch in self.closing:
                reading = any(_reads(job, peer, epoch) for job in self.jobs.values())
                if not reading and not self.windows.writers(peer, epoch):
                    shut.append((peer, epoch))
            for item in shut:
                self.closing.remove(item)
        for peer, epoch in shut:
            self._report(WindowShut(peer, epoch))


def _reads(job: Job, peer: str, epoch: int) -> bool:
    effect = job.copy.effect
    return effect.read and effect.peer == peer and effect.peer_epoch <= epoch


def _hanger(line: Line) -> Callable[[], None]:
    return lambda: hang_up(line.sock, close=False)
