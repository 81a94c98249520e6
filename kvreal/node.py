"""A node: one machine, and what carries out its effects. ``give`` is the only way in; one thread calls it.

The order is the machine's contract: an input's line is in the log (handed to the kernel, so that it outlives a SIGKILL)
before its effects are carried out, and a journal record is written before the effects that follow it.
"""

from __future__ import annotations

import heapq
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, Final, List, Optional, Tuple

import msgspec

from kvcore.protocol import machine as m
from kvcore.protocol.config import ControllerSpec, WorkerSpec
from kvcore.protocol.messages import Namespace, Wire
from kvcore.scenario.build import AnySpec, Built, make_machine
from kvcore.scenario.client import Client
from kvcore.scenario.faults import FINE, GOOD_COPY, Action, Crash, FaultPlan, Pause, Verdict
from kvcore.scenario.history import VERSION, FileHistory, Header, NoHistory
from kvcore.scenario.result import CopyRecord
from kvreal.checksum import mode_of
from kvreal.control import Assign, Checked, Noted, Said, Spent, Spoiled
from kvreal.engines.thread import EngineThread, check_all
from kvreal.journal import Journal
from kvreal.memory import Memory
from kvreal.network import Network
from kvreal.transfer import Transfer
from kvreal.transfer.job import Copy, Ended, Fate, Progress, WindowShut

FORWARDED: Final = frozenset({"settle", "start", "finished", "registered", "register_refused"})
"""Notes that the runner waits for."""


class Parts(msgspec.Struct, frozen=True):
    """What a host lends to the node it is: all of it outlives the node."""

    memory: Memory
    transfer: Transfer
    engine: EngineThread
    network: Network
    say: Callable[[Said], None]
    report: Callable[[Tuple[Action, ...], bool, bool], None]
    """Tell the runner that faults ask for actions; True: return when they have been carried out."""
    flush: Callable[[], None]


class Node:
    def __init__(self, assign: Assign, built: Built, parts: Parts) -> None:
        self.name: str = assign.node
        self.base_ns: int = assign.base_ns
        self.spec: AnySpec = next(spec for spec in built.specs if spec.name == assign.node)
        self.machine: m.Machine = make_machine(self.spec)
        self.parts: Parts = parts
        self.built: Built = built
        if isinstance(self.spec, WorkerSpec):
            parts.transfer.checksums = mode_of(built.config.checksums)
        self.faults: FaultPlan = FaultPlan(
            built.faults if assign.faults else (), built.config, built.nodes, assign.spent
        )
        self.journal: Optional[Journal] = None
        if isinstance(self.spec, ControllerSpec) and assign.journal:
            self.journal = Journal(Path(assign.journal))
        self.history: NoHistory = NoHistory()
        if assign.history:
            header = Header(VERSION, "real", built.name, built.seed, None, self.name, packed=True)
            self.history = FileHistory(Path(assign.history), header)
        self.epoch: int = 0
        self.later: List[Tuple[int, int, Callable[[], None]]] = []
        self.count: int = 0
        self.overtaken: Dict[str, List[Wire]] = {}
        self.copies: List[CopyRecord] = []
        self.booted: bool = False
        self.over: bool = False  # the run has ended: what happens from now on is not part of it
        self.early: List[m.Input] = []  # given before its Boot: a fault may strike while others are still booted
        self.inputs: int = 0
        parts.engine.begin()
        self.effects: Dict[Any, Callable[[Any], None]] = {
            m.Send: self._send,
            m.StartCopy: self._start_copy,
            m.AbortCopy: lambda effect: parts.transfer.abort(effect.rid),
            m.StartFill: self._start_task,
            m.StartRead: self._start_task,
            m.CloseWindow: lambda effect: parts.transfer.close_window(effect.peer, effect.epoch),
            m.Journal: self._journal,
            m.Note: self._note,
        }

    # ---- time
    def now(self) -> int:
        return time.monotonic_ns() - self.base_ns

    def next_due(self) -> Optional[int]:
        """When something must be done unasked, ns of the run's clock; None: never."""
        timer = self.machine.timers.next()
        due = timer[0] if timer is not None else None
        if self.later and (due is None or self.later[0][0] < due):
            due = self.later[0][0]
        copy = self.parts.transfer.next_deadline()
        if copy is not None and (due is None or copy - self.base_ns < due):
            due = copy - self.base_ns
        return due

    def run_due(self) -> None:
        """Whatever is due by now: delayed messages and inputs, late copies, the machine's timers."""
        now = self.now()
        self.parts.transfer.expire(now + self.base_ns)
        while self.later and self.later[0][0] <= now:
            heapq.heappop(self.later)[2]()
        while True:
            timer = self.machine.timers.next()
            if timer is None or timer[0] > self.now():
                return
            self.give(m.TimerFired(timer[1]))

    def _after(self, delay_ns: int, what: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.later, (self.now() + delay_ns, self.count, what))

    # ---- inputs
    def receive(self, src: str, message: Wire) -> None:
        self.offer(m.Received(src, message))

    def calm(self) -> None:
        """The liveness phase: no fault any more; what one holds back comes out in its time."""
        self.faults.stop()

    def offer(self, item: m.Input) -> None:
        """An input that faults may drop, delay or double on its way to the machine."""
        if not (self.faults.active and self.faults.watches_inputs):
            self.give(item)
            return
        verdict = self._heeded(self.faults.input(self.now(), self.name, item))
        self._befall(verdict.actions)
        self._carry(verdict, lambda: self.give(item))

    def give(self, item: m.Input) -> None:
        """One input to the machine: logged, then its effects carried out in order."""
        machine = self.machine
        self.booted = True  # a life's first input is its Boot
        now = self.now()
        effects = machine.handle(now, item)
        self.inputs += 1
        if self.history.on:
            self.history.add(now, self.name, item, effects)
            self.history.flush()
        if isinstance(self.spec, WorkerSpec):
            epoch: int = machine.epoch  # type: ignore[attr-defined]
            if epoch != self.epoch:
                self.epoch = epoch
                self.parts.transfer.set_epoch(epoch)
        if self.faults.active:
            for effect in effects:
                self._judged(effect)
            slowness = self.faults.slowness(self.name)
            if slowness > 1.0:
                time.sleep((self.now() - now) / 1e9 * (slowness - 1.0))
        else:
            for effect in effects:
                self.effects[type(effect)](effect)
        if isinstance(item, m.Command) and item.what == "unmount" and item.args[1] == "on":
            self.wipe()

    def _judged(self, effect: m.Effect) -> None:
        """Ask the fault plan, then carry the effect out, as often and as late as it says, or not at all."""
        verdict = self._heeded(self.faults.effect(self.now(), self.name, effect))
        self._befall_others(verdict.actions)
        if verdict.reorder and not verdict.drop and isinstance(effect, m.Send):
            self._hold_back(effect, verdict.delay_ns)
        else:
            carry = self.effects[type(effect)]
            self._carry(verdict, lambda: carry(effect))
        self._befall_me(verdict.actions)

    def _carry(self, verdict: Verdict, what: Callable[[], None]) -> None:
        """As often and as late as the verdict says, or not at all."""
        for copy in range(0 if verdict.drop else verdict.copies):
            delay_ns = verdict.delay_ns + copy * verdict.copy_gap_ns
            if delay_ns > 0:
                self._after(delay_ns, what)
            else:
                what()

    def _heeded(self, verdict: Verdict) -> Verdict:
        """Whatever has fired is the runner's to know at once: this process may be killed at any time."""
        if verdict != FINE:
            self._tell_spent()
        return verdict

    def _tell_spent(self) -> None:
        self.parts.say(Spent(self.faults.spendings(), dict(self.faults.fired)))

    # ---- effects
    def _send(self, effect: m.Send) -> None:
        if not (self.faults.active and self.faults.blocked(self.name, effect.dst)):
            self.parts.network.send(effect.dst, effect.msg)
        if self.overtaken:
            for message in self.overtaken.pop(effect.dst, ()):
                self.parts.network.send(effect.dst, message)

    def _hold_back(self, effect: m.Send, limit_ns: int) -> None:
        """Let the next message to the same node overtake this one; without one it goes out after ``limit_ns``."""
        held = self.overtaken.setdefault(effect.dst, [])
        held.append(effect.msg)

        def give_up() -> None:
            if effect.msg in self.overtaken.get(effect.dst, ()):
                self.overtaken[effect.dst].remove(effect.msg)
                self.parts.network.send(effect.dst, effect.msg)

        self._after(limit_ns, give_up)

    def _fate(self, effect: Any) -> Fate:
        if not self.faults.active:
            return Fate()
        fate = self.faults.copy(self.now(), self.name, effect)
        if fate != GOOD_COPY:
            self._tell_spent()
        slow = fate.slow * self.faults.slowness(self.name)
        return Fate(fate.fail, fate.corrupt, fate.stuck, slow, fate.fraction, fate.delay_ns)

    def _start_copy(self, effect: m.StartCopy) -> None:
        endpoint = effect.endpoint or self.parts.network.data_endpoint(effect.peer)
        space = self._space(effect.location)
        block = space.block_tokens
        if block > 1:  # a transfer counts bytes by tokens: a partial chunk has those of whole blocks
            effect = msgspec.structs.replace(effect, lens=tuple([-(-n // block) * block for n in effect.lens]))
        config = self.built.config
        self.parts.transfer.start(
            Copy(
                effect, endpoint, self.epoch, space.bytes_per_token, config.copy_max_ns, self._fate(effect),
                config.progress_ns,
            )
        )  # fmt: skip

    def _start_task(self, effect: Any) -> None:
        fate = self._fate(effect)
        size = self._space(effect.location).bytes_per_token
        if fate.stuck:
            failed = m.FillDone(effect.fid, False) if isinstance(effect, m.StartFill) else m.ReadDone(effect.fid, False)
            self._after(self.built.config.copy_max_ns, lambda: self.offer(failed))
        elif isinstance(effect, m.StartRead) and effect.hold_ns > 0:
            # The bytes are read at the end of the hold: what they must outlive is the use, not its beginning.
            self._after(effect.hold_ns, lambda: self.parts.engine.start(effect, size, fate))
        elif fate.delay_ns:
            self._after(fate.delay_ns, lambda: self.parts.engine.start(effect, size, fate))
        else:
            self.parts.engine.start(effect, size, fate)

    def _space(self, location: str) -> Namespace:
        assert isinstance(self.spec, WorkerSpec)
        return self.spec.space(location)

    def _journal(self, effect: m.Journal) -> None:
        if self.journal is not None:
            self.journal.append(effect.record)

    def _note(self, effect: m.Note) -> None:
        if effect.kind in FORWARDED:
            self.parts.say(Noted(effect.kind, self.now(), effect.detail))

    # ---- answers of the parts
    def collect(self) -> None:
        """Hand the machine what transfers and engine have finished."""
        for item in self.parts.transfer.take():
            if isinstance(item, WindowShut):
                self.offer(m.WindowClosed(item.peer, item.epoch))
            elif isinstance(item, Progress):
                self.offer(m.CopyMoved(item.rid, item.num_tokens))
            else:
                self._copy_ended(item)
        for result in self.parts.engine.take():
            self.offer(result)

    def _copy_ended(self, item: Ended) -> None:
        base = self.base_ns
        self.copies.append(
            CopyRecord(
                self.name, item.rid, item.state, item.read, item.peer, item.transport, item.nbytes,
                item.asked_ns - base, item.began_ns - base, item.ended_ns - base, item.why,
            )
        )  # fmt: skip
        if item.state == "stopped":
            self.offer(m.CopyStopped(item.rid))
        else:
            self.offer(m.CopyDone(item.rid, item.state == "done", item.why, item.transport, item.chosen))

    # ---- faults of nodes
    def _befall(self, actions: Tuple[Action, ...]) -> None:
        """Of an input: all of it before the machine sees it, also what this node is told to do."""
        if actions:
            self.parts.report(actions, True, True)
        self._befall_me(actions)

    def _befall_others(self, actions: Tuple[Action, ...]) -> None:
        """Of an effect: what happens to other nodes has happened before a message sent at the anchor arrives."""
        if actions:
            self.parts.report(actions, any(getattr(action, "node", "") != self.name for action in actions), False)

    def _befall_me(self, actions: Tuple[Action, ...]) -> None:
        """What happens to this node happens after the effect, and before what follows it."""
        for action in actions:
            self.faults.begin(action)
        for action in actions:
            if isinstance(action, Crash) and action.node == self.name:
                self.parts.network.send_off()  # what was sent before the crash was sent
                self.parts.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            elif isinstance(action, Pause) and action.node == self.name:
                self.parts.flush()
                os.kill(os.getpid(), signal.SIGSTOP)

    # ---- what others want to know
    def pending(self) -> List[str]:
        """Why this node is not quiet."""
        lines = self.machine.pending() + self.parts.transfer.pending()
        if self.later:
            lines.append(f"{len(self.later)} delayed messages or inputs")
        if self.parts.engine.open:
            lines.append(f"{self.parts.engine.open} engine tasks")
        return lines

    def wipe(self) -> Checked:
        """Overwrite every slot that held something and that nothing refers to any more."""
        keep = [(name, slot) for name, pool in self._pools().items() for slot in sorted(pool.refs)]
        return Checked(wiped_bytes=self.parts.memory.wipe(keep))

    def check(self) -> Checked:
        """Compare every visible chunk's bytes, in this process's own memory, with what its key stands for."""
        nbytes = chunks = 0
        spoiled: List[Spoiled] = []
        inventory = {}
        for name, pool in self._pools().items():
            here = [(key, entry.slot, entry.num_tokens) for key, entry in pool.index.items()]
            inventory[name] = [(key, tokens) for key, _, tokens in here]
            count, bad = check_all(self.parts.memory, name, here, self._space(name).bytes_per_token)
            nbytes += count
            chunks += len(here)
            spoiled += [Spoiled(name, slot, key, offset) for slot, key, offset in bad]
        operations = tuple(self.machine.operations) if isinstance(self.machine, Client) else ()
        engine = self.parts.engine
        counters = {
            **self.parts.network.counters,
            "inputs": self.inputs,
            "filled_bytes": engine.filled_bytes,
            "read_bytes": engine.read_bytes,
            "read_errors": engine.read_errors,
        }
        return Checked(0, nbytes, chunks, tuple(spoiled), inventory, tuple(self.copies), operations, counters)

    def _pools(self) -> Dict[str, Any]:
        return self.machine.pools if isinstance(self.spec, WorkerSpec) else {}  # type: ignore[attr-defined]

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
        self.history.close()
