"""The connector's side in a vLLM worker: starts this worker's rank, and copies between its slots and KV blocks.

Stores run in a thread of their own, while the next steps run; so do large loads. A load counts only if the rank still
held its slots when the copy was over. Whatever fails is a prompt that is not stored, or blocks that vLLM is told of.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import uuid
from typing import Any, Callable, Dict, Final, Optional, Set, Tuple

import msgspec

from kvcore.protocol.messages import Namespace
from kvreal.engines.vllm.blocks import Paged, Rows, Slots, copier
from kvreal.engines.vllm.link import Failed, Filled, Late, Link, LinkError, Loaded, Store, receive_ready
from kvreal.engines.vllm.plan import Load, Plan, Save
from kvreal.engines.vllm.tally import Counts, Tally

log = logging.getLogger("kvmove.engine")

START_S: Final = 120.0
ANSWER_S: Final = 2.0
"""How long a copy's end waits for the rank's word."""
HANDS_S: Final = 2.0
"""How long blocks that are to change hands are waited for; what is read from them after that is not believed."""
AGAIN_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""How long after its end a rank is started again, and again; the last one for ever."""


class StartError(Exception):
    """The rank's process does not start; one line."""


class LoadFailed(Exception):
    """``reason``: one word, for the metrics."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason: str = reason


class Child:
    """The rank's process. It ends when this one does, or hangs up. ``address``: where it listens (abstract)."""

    def __init__(self, config: str, space: Namespace, rank: int, address: str) -> None:
        """StartError."""
        self.sock, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", "kvreal.engines.vllm.rank", "--rank", str(rank), "--parent", str(os.getpid()),
            "--address", address, "--config", config, "--space", msgspec.json.encode(space).decode(),
        ]  # fmt: skip
        with theirs:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(command, stdin=theirs.fileno())
        try:
            said, fds = receive_ready(self.sock, START_S)
            if isinstance(said, Failed):
                raise StartError(said.why)
            self.slots: Slots = Slots(said.places, fds)
        except (LinkError, OSError) as error:
            raise StartError(f"rank {rank}: {error}") from None
        finally:
            if not hasattr(self, "slots"):
                self.stop()
        for fd in fds:
            os.close(fd)

    def stop(self) -> None:
        self.sock.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Speaker:
    """A link that is opened when it is needed, and anew after it broke. One thread uses it."""

    def __init__(self, address: str) -> None:
        self.address: str = address
        self.link: Optional[Link] = None

    def ask(self, frame: Any) -> Any:
        """LinkError. A link that is found broken was to a rank that has ended: there may be another by now."""
        used = self.link is not None
        while True:
            if self.link is None:
                self.link = Link(self.address)
            try:
                return self.link.ask(frame, ANSWER_S)
            except LinkError as error:
                self.link.close()
                self.link = None
                if not used or isinstance(error, Late):
                    raise
                used = False


class Worker:
    def __init__(self, config: str, space: Namespace, rank: int, paged: Paged) -> None:
        """StartError."""
        self.rank: int = rank
        self.paged: Paged = paged
        self.block: int = space.block_tokens
        self.per_chunk: int = space.chunk_tokens // space.block_tokens
        self.address: str = f"kvmove-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.start: Callable[[], Child] = lambda: Child(config, space, rank, self.address)
        self.child: Child = self.start()
        self.copier: Any = copier(paged, self.child.slots)
        self.closing: threading.Event = threading.Event()
        self.lock: threading.Lock = threading.Lock()
        self.tally: Tally = Tally()
        self.errors: Set[int] = set()
        self.received: Set[str] = set()
        self.saving: Dict[str, int] = {}
        """Request -> saves under way; 0: none any more, and its end has not been told."""
        self.ended: Set[str] = set()
        """Requests that have finished, and whose blocks are still read from."""
        self.idle: threading.Condition = threading.Condition(self.lock)
        self.taken: int = 0
        """How often blocks changed hands although saves from them had not ended."""
        self.here: Speaker = Speaker(self.address)
        self.load_queue: queue.SimpleQueue[Tuple[Load, Any]] = queue.SimpleQueue()
        self.save_queue: queue.SimpleQueue[Tuple[Save, Any, int]] = queue.SimpleQueue()
        threads = (("kvmove load", self._loads), ("kvmove store", self._saves), ("kvmove rank", self._keep))
        for name, work in threads:
            threading.Thread(target=work, name=name, daemon=True).start()

    def _keep(self) -> None:
        """Start the rank again whenever it ends unasked: as a new process, which holds nothing."""
        tries = 0
        while True:
            began = time.monotonic()
            status = self.child.process.wait()
            if self.closing.is_set() or status == 0:  # the engine ends
                return
            tries = 0 if time.monotonic() - began > 60 else tries
            pause_s = AGAIN_S[min(tries, len(AGAIN_S) - 1)]
            tries += 1
            log.error("rank %d has ended with status %d; started again in %.1f s", self.rank, status, pause_s)
            if self.closing.wait(pause_s):
                return
            try:
                self.child = child = self.start()
                self.copier = copier(self.paged, child.slots)
            except (StartError, OSError) as error:
                log.error("rank %d does not start: %s", self.rank, error)
            if self.closing.is_set():
                self.child.stop()

    # ---- a step
    def preempted(self, plan: Plan) -> None:
        """Blocks change hands: wait until no save reads from any."""
        if plan.preempted:
            with self.idle:
                if not self.idle.wait_for(lambda: not any(self.saving.values()), timeout=HANDS_S):
                    self.taken += 1
                    log.error("blocks are taken from requests while rank %d has not ended their saves: those are void",
                              self.rank)  # fmt: skip

    def start_loads(self, plan: Plan) -> None:
        for load in plan.loads:
            if load.sync:
                self._load(load, self.copier.mark(), self.here)
            else:
                self.load_queue.put((load, self.copier.mark()))

    def fail(self, loads: Tuple[Load, ...]) -> None:
        """None of these is loaded."""
        with self.lock:
            for load in loads:
                self.errors.update(load.blocks)
                if not load.sync:
                    self.received.add(load.request)

    def start_saves(self, plan: Plan) -> None:
        """A prompt of which a block was not loaded in this step is not sound yet: it is said to be saved once more."""
        mark = self.copier.mark() if plan.saves else None
        for save in plan.saves:
            with self.lock:
                sound = self.errors.isdisjoint(save.blocks)
                self.saving[save.request] = self.saving.get(save.request, 0) + sound
            if sound:
                self.save_queue.put((save, mark, self.taken))

    def skip_saves(self, plan: Plan) -> None:
        """vLLM waits to be told of the end of each, also of those that will not be."""
        with self.lock:
            for save in plan.saves:
                self.saving.setdefault(save.request, 0)

    def finished(self, requests: Set[str]) -> Tuple[Set[str], Set[str]]:
        """(requests whose blocks are not read from any more, requests whose loads have ended)."""
        with self.lock:
            self.ended |= {request for request in requests if request in self.saving}
            sent = {request for request in self.ended if not self.saving[request]}
            self.ended -= sent
            for request in sent:
                del self.saving[request]
            received, self.received = self.received, set()
        return sent, received

    def take_errors(self) -> Set[int]:
        with self.lock:
            errors, self.errors = self.errors, set()
        return errors

    def take_counts(self) -> Counts:
        with self.lock:
            return self.tally.take()

    # ---- loads
    def _loads(self) -> None:
        on_all_cores()
        speaker = Speaker(self.address)
        while True:
            load, mark = self.load_queue.get()
            self._load(load, mark, speaker)
            with self.lock:
                self.received.add(load.request)

    def _load(self, load: Load, mark: Any, speaker: Speaker) -> None:
        began = time.monotonic()
        mode = "sync" if load.sync else "async"
        rows = Rows(self.child.slots, self.paged.block_bytes, self.per_chunk)
        good = 0
        try:
            try:
                self.copy_in(load, rows, mark)
            finally:
                told = speaker.ask(Loaded(load.name))
                good = rows.done if told.ok else 0
            if not told.ok:
                raise LoadFailed(told.why, "the rank did not hold it until the end")
        except Exception as error:
            reason = error.reason if isinstance(error, LoadFailed) else type(error).__name__
            log.error("load of %d tokens for %s failed (%s): %s%s", load.num_tokens, load.request, reason, error,
                      f"; moved here by event {load.event}" if load.event else "",
                      extra={"event": load.event})  # fmt: skip
            with self.lock:
                self.errors.update(load.blocks[good:])
                self.tally.add("load_failures", 1, reason)
                if not self.rank:
                    self.tally.add("failed_load_tokens", load.num_tokens - good * self.block, reason)
            return
        with self.lock:
            if not self.rank:  # each rank has loaded its part of the same tokens
                tier = load.found[0][0]
                for source, count in (("moved", load.moved), ("stored", load.num_tokens - load.moved)):
                    if count:
                        self.tally.add("loaded_tokens", count, source, tier)
                self.tally.add("loads", 1, mode)
                self.tally.add("load_seconds", time.monotonic() - began, mode)

    def copy_in(self, load: Load, rows: Rows, mark: Any) -> None:
        location, slots = load.found[self.rank]
        for i, block in enumerate(load.blocks):
            chunk, index = divmod(load.first + i, self.per_chunk)
            rows.add(block, location, slots[chunk], index)
        self.copier.load(rows, mark)

    # ---- saves
    def _saves(self) -> None:
        on_all_cores()
        speaker = Speaker(self.address)
        while True:
            save, mark, taken = self.save_queue.get()
            began = time.monotonic()
            why = ""
            stored: Tuple[int, str] = (0, "")
            try:
                stored, why = self._save(save, mark, taken, speaker)
            except Exception as error:
                why = type(error).__name__
                log.error("the prompt of %s is not stored: %s: %s", save.request, why, error)
            with self.idle:
                self.saving[save.request] -= 1
                self.idle.notify_all()
                if why:
                    self.tally.add("store_short", 1, why)
                if stored[0] and not self.rank:
                    self.tally.add("stored_tokens", stored[0], stored[1])
                    self.tally.add("stores", 1)
                    self.tally.add("store_seconds", time.monotonic() - began)

    def _save(self, save: Save, mark: Any, taken: int, speaker: Speaker) -> Tuple[Tuple[int, str], str]:
        """((tokens stored, where), why not all of them)."""
        room = speaker.ask(Store(save.name, save.prompt))
        if not room.chunks:
            return (0, room.location), room.why
        ok = False
        try:
            self.copy_out(save, room.location, room.chunks, room.slots, mark)
            ok = taken == self.taken
        finally:
            with contextlib.suppress(LinkError) if not ok else contextlib.nullcontext():
                told = speaker.ask(Filled(save.name, ok))
        return ((told.num_tokens, room.location), told.why) if ok else ((0, room.location), "preempted")

    def copy_out(self, save: Save, location: str, chunks: Tuple[int, ...], slots: Tuple[int, ...], mark: Any) -> None:
        rows = Rows(self.child.slots, self.paged.block_bytes, self.per_chunk)
        for chunk, slot in zip(chunks, slots):
            first = chunk * self.per_chunk
            for index, block in enumerate(save.blocks[first : first + self.per_chunk]):
                rows.add(block, location, slot, index)
        self.copier.store(rows, mark)

    def close(self) -> None:
        self.closing.set()
        self.child.stop()


def on_all_cores() -> None:
    """This thread, where vLLM has bound a CPU worker to cores that it computes on."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
