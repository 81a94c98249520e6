"""NIXL over UCX: one-sided reads and writes between slabs, no progress thread.

* One agent a process, named after it: a new life is a new process and so a new name, and nothing addressed to the old
  one reaches it. Metadata comes through the window's grant, as bytes from a peer of the same run.
* Copies run in their own threads and hold the agent's lock for one batch at a time: on one host UCX's ``transfer``
  is a synchronous system call of up to 25 ms a batch, during which others wait their turn but the loop does not.
* Over tcp UCX emulates one-sided operations, and even with CMA a copy of several descriptors ends with a flush over an
  ordinary lane: the *target* must make progress. It does so while a window is open, often from when it is told that
  somebody waits for it.
* Releasing a handle does not stop a transfer. A copy told to stop posts nothing more and ends when what it has posted
  has ended; past its deadline the connection is torn down.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import importlib
import importlib.util
import os
import select
import socket
import threading
import time
from collections import deque
from typing import Any, Deque, Dict, Final, List, Optional, Tuple

import numpy as np
import numpy.typing as npt

from kvreal.memory import Memory
from kvreal.slab import Place, Slab
from kvreal.spans import Ints, Slots, Spans, runs
from kvreal.transfer.carrier import Carrier, Link
from kvreal.transfer.flow import Flow
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Job, Stopped
from kvreal.transfer.line import Endpoint, parse
from kvreal.transfer.proof import Tables
from kvreal.transfer.window import END, REVOKE, Hello, Info, Window
from kvreal.ucx import hardware

IN_FLIGHT: Final = 8
LOOKS: Final = 8
"""At a small copy just posted, before its thread sleeps and its peer is asked for progress."""
FEW: Final = 16
"""Chunks of a copy that are laid out one by one rather than as arrays."""
RDMA: Final = "+rdma"
NEAR_WAYS: Final = ("cma", "sm", "shm", "all")
"""What UCX_TLS calls the ways into the memory of a process beside."""
SHORTEST_SLEEP_S: Final = 20e-6
LONGEST_SLEEP_S: Final = 100e-6
"""Between two looks at what needs our progress. An emulated copy moves only while somebody looks."""
IDLE_SLEEP_S: Final = 20e-3
NUDGE: Final = b"P"
"""From who moves to who is touched: what I have posted is not done yet, and may need your progress."""

Descriptors = npt.NDArray[np.uint64]
"""N x 3: address, bytes, device."""


def load_nixl() -> Any:
    """NIXL's Python API. Older choosers import torch to ask for a CUDA version (0.6 s): without a GPU there is none.

    UCX's shared-memory message lanes cannot tell that a peer has failed, so NIXL never uses them; left on, they make
    segments, and a process that is killed at that moment leaves one behind.
    """
    os.environ.setdefault("UCX_TLS", "^posix,sysv")
    _leave_without_destructors()
    if not glob.glob("/dev/nvidia[0-9]*"):
        for name in ("nixl_cu13", "nixl_cu12"):
            with contextlib.suppress(ImportError):
                return importlib.import_module(f"{name}._api")
    _load_cuda_runtime()
    return importlib.import_module("nixl._api")


def _leave_without_destructors() -> None:
    """UCX brings a libnl of its own. Where libibverbs is installed the system's is loaded beside it, and the destructor
    of one of them crashes, so that a process that has done all its work ends with SIGSEGV. The C library ends it with
    its own status before that, once Python has ended and what is buffered is written. (Last registered, first called.)
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        libc.on_exit(libc._exit, None)
        libc.on_exit(libc.fcloseall, None)


def _load_cuda_runtime() -> None:
    """UCX's CUDA modules want libcudart, which torch brings along, but not to where the loader looks for it."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        for path in glob.glob(f"{folder}/*/lib/libcudart.so.*"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


@functools.lru_cache(1)
def _host() -> str:
    """Of two processes with the same one UCX reads the one's memory from the other (CMA). Empty: it is told not to."""
    names = os.environ.get("UCX_TLS", "^").lower()
    if any(one in names.strip("^").split(",") for one in NEAR_WAYS) == names.startswith("^"):
        return ""
    with open("/proc/sys/kernel/random/boot_id") as file:
        where = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return hashlib.blake2b(where.encode(), digest_size=6, person=b"kvmove").hexdigest()


class Peer:
    """What is known of another process's agent."""

    def __init__(self, info: Info) -> None:
        self.agent: str = info.agent
        self.layout: int = info.layout
        self.generation: int = info.generation
        self.places: Dict[str, Place] = {place.name: place for place in info.places}
        self.scratch: int = info.scratch


class NixlCarrier(Carrier):
    name = "nixl"

    def __init__(self, memory: Memory, process: str, flow: Flow) -> None:
        super().__init__(memory, process, flow)
        self.tables: Tables = Tables()
        self.agent_lock: threading.Lock = threading.Lock()
        self.peers: Dict[str, Peer] = {}
        self.registered: List[Tuple[Slab, Any]] = []
        api = load_nixl()
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent: Any = api.nixl_agent(self.process, config)
        if "UCX" not in self.agent.backends:
            raise TransferError("nixl has no UCX backend here")
        self.memory_changed()

    def ucx_prints_to(self, fd: int) -> None:
        self.tables.fd = fd

    def card(self) -> str:
        """Which host this is, as far as another process's memory can be read there, and whether it has RDMA."""
        return f"{_host()}{RDMA if 'rdma' in hardware() else ''}"

    def shuns(self, card: str, read: bool) -> str:
        if not read or (_host() and card.removesuffix(RDMA) == _host()):
            return ""
        if card.endswith(RDMA) and self.card().endswith(RDMA):
            return ""
        return "whose reads over TCP can take the source's process along when their destination dies"

    def reaches(self, card: str, mine: str, theirs: str) -> bool:
        return "disk" not in (mine, theirs)  # files have no addresses that a peer could reach

    def memory_changed(self) -> None:
        """Register the slabs that are new and drop those that are gone; a slab is registered whole, once."""
        now = self.memory.slabs()
        with self.agent_lock:
            for slab, descriptors in self.registered:
                if slab not in now:
                    self.agent.deregister_memory(descriptors)
            kept = [item for item in self.registered if item[0] in now]
            known = [slab for slab, _ in kept]
            for slab in now:
                if slab not in known:
                    region = [(slab.address, slab.nbytes, 0, "")]
                    kept.append((slab, self.agent.register_memory(region, slab.nixl_kind)))
            self.registered = kept

    def prepare(self, window: Window) -> Slots:
        location = window.hello.location
        place = self.memory.places.get(location)
        return () if place is None or place.ordered else self.memory.addresses(location, window.slots)

    def info(self, hello: Hello) -> Optional[Info]:
        memory = self.memory
        if hello.layout == memory.layout:
            return None
        with self.agent_lock:
            metadata = self.agent.get_agent_metadata()
        return Info(
            memory.layout, memory.generation, self.process, metadata, tuple(memory.places.values()), memory.scratch()
        )

    # ---- the side whose memory is touched
    def serve(self, window: Window) -> bool:
        """Make progress now and then; often once the other side says that it waits for us."""
        sleep_s = IDLE_SLEEP_S
        poller = select.poll()
        poller.register(window.sock, select.POLLIN)
        word = NUDGE
        while True:
            if poller.poll(0 if sleep_s < IDLE_SLEEP_S else sleep_s * 1e3):
                word = window.sock.recv(1)
                if word != NUDGE:
                    break
                sleep_s = SHORTEST_SLEEP_S
            with self.agent_lock:
                self.agent.get_new_notifs()
            if sleep_s < IDLE_SLEEP_S:
                time.sleep(sleep_s)
                sleep_s = min(sleep_s * 1.1, LONGEST_SLEEP_S)
        if window.hello.kind != "read":
            self._drain()
        return word == END

    def _drain(self) -> None:
        """Take in what a writer that has gone had sent before (emulated writes only; CMA and RDMA leave nothing)."""
        for _ in range(3):
            with self.agent_lock:
                self.agent.get_new_notifs()

    def revoke(self, window: Window) -> None:
        with contextlib.suppress(OSError):
            window.sock.send(REVOKE, socket.MSG_DONTWAIT)

    # ---- the side that moves the bytes
    def layout(self, endpoint: Endpoint) -> int:
        peer = self.peers.get(endpoint.process)
        return peer.layout if peer is not None else -1

    def carry(self, job: Job, link: Link) -> str:
        copy = job.copy
        process = link.line.process
        peer = self.peers.get(process)
        if link.grant.info is not None:
            peer = self._meet(process, link.grant.info)
        if peer is None:
            raise TransferError(f"{copy.effect.peer} did not say how to reach its memory")
        mine, theirs = self._descriptors(job, peer, link.at)
        self._move(job, peer, link.line.sock, mine, theirs)
        if job.corrupt and not copy.effect.read:
            self._spoil_theirs(job, peer, theirs)
        operation = "read" if copy.effect.read else "write"
        return f"nixl/ucx/{self.tables.lanes(operation, int(theirs[:, 1].max()))}"

    def _meet(self, process: str, info: Info) -> Peer:
        """Load a peer's metadata, in place of an older one's."""
        if info.agent != process:
            raise TransferError(f"the endpoint says {process}, the process says {info.agent}")
        known = self.peers.get(process)
        if known is None or known.generation != info.generation:
            with self.agent_lock:
                if known is not None:
                    self.agent.remove_remote_agent(process)
                self.agent.add_remote_agent(info.metadata)
        self.tables.forget()
        peer = self.peers[process] = Peer(info)
        return peer

    def forget(self, process: str) -> None:
        with self.agent_lock:
            if self.peers.pop(process, None) is not None:
                with contextlib.suppress(Exception):
                    self.agent.remove_remote_agent(process)

    def _descriptors(self, job: Job, peer: Peer, at: Ints) -> Tuple[Descriptors, Descriptors]:
        """(mine, theirs): one row a run of chunks that are neighbours on both sides, none above a batch."""
        effect = job.copy.effect
        there = peer.places.get(effect.peer_location)
        if there is None:
            raise TransferError(f"{effect.peer} has no location {effect.peer_location}")
        here = self.memory.places[effect.location]
        spans = job.spans
        if len(spans) <= FEW and here.ordered and not len(at):
            return _few(spans, here, there, self.flow.batch(job))
        mine = self.memory.addresses(effect.location, spans.mine)
        theirs = at if len(at) else there.address + spans.theirs * there.slot_bytes
        sizes = spans.sizes
        if (mine[1:] < mine[:-1]).any():  # slots that were freed from the tail are taken in that order
            order = np.argsort(mine)
            mine, theirs, sizes = mine[order], theirs[order], sizes[order]
        rows = runs(mine, theirs, sizes, self.flow.batch(job))
        return _descriptors(rows[0], rows[2], here.device), _descriptors(rows[1], rows[2], there.device)

    def _move(self, job: Job, peer: Peer, sock: socket.socket, mine: Descriptors, theirs: Descriptors) -> None:
        """Post batch after batch, several in flight where the transport is asynchronous; wait for them all."""
        flying: List[Tuple[Any, int]] = []
        batches = _batches(mine, self.flow.batch(job))
        kinds = self._kinds(job, peer)
        sleep_s = SHORTEST_SLEEP_S
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        revoked = nudged = False
        try:
            job.began()
            while batches or flying:
                if poller.poll(0) and not job.aborted.is_set():
                    revoked = True  # revoked, or the peer has gone
                if revoked or job.aborted.is_set():
                    batches.clear()
                elif batches and len(flying) < self.flow.room(job, IN_FLIGHT):
                    first, last, nbytes = batches[0]
                    if not self.flow.turn(job, nbytes, wait=not flying):
                        self._poll(job, flying)
                        continue
                    batches.popleft()
                    try:
                        handle, done = self._post(job, peer, kinds, mine[first:last], theirs[first:last])
                    finally:
                        self.flow.done()
                    if done:
                        job.moved += nbytes
                    else:
                        flying.append((handle, nbytes))
                        nudged = nudged or _nudge(sock)
                    continue
                if flying:
                    landed = self._poll(job, flying)
                    sleep_s = SHORTEST_SLEEP_S if landed else min(sleep_s * 1.1, LONGEST_SLEEP_S)
                    if not landed:
                        if job.expired and time.monotonic_ns() > job.deadline_ns + 100_000_000:
                            self._tear_down(job, flying)
                        time.sleep(sleep_s)
        finally:
            with self.agent_lock:
                for handle, _ in flying:
                    with contextlib.suppress(Exception):
                        self.agent.release_xfer_handle(handle)
        job.check()
        if revoked:
            raise TransferError(f"{job.copy.effect.peer} closed its window after {job.moved} bytes")

    def _kinds(self, job: Job, peer: Peer) -> Tuple[str, str]:
        effect = job.copy.effect
        return self.memory.places[effect.location].kind, peer.places[effect.peer_location].kind

    def _post(
        self, job: Job, peer: Peer, kinds: Tuple[str, str], mine: Descriptors, theirs: Descriptors
    ) -> Tuple[Any, bool]:
        agent = self.agent
        operation = "READ" if job.copy.effect.read else "WRITE"
        with self.agent_lock:
            here = agent.get_xfer_descs(mine, kinds[0])
            there = agent.get_xfer_descs(theirs, kinds[1])
            handle = agent.initialize_xfer(operation, here, there, peer.agent)
            try:
                state = agent.transfer(handle)
                looks = LOOKS if len(mine) <= FEW else 0
                while state == "PROC" and looks:  # most of what one host copies ends in these microseconds
                    looks -= 1
                    state = agent.check_xfer_state(handle)
            except BaseException:
                with contextlib.suppress(Exception):
                    agent.release_xfer_handle(handle)
                raise
            if state == "DONE":
                agent.release_xfer_handle(handle)
        if state == "ERR":
            raise TransferError("nixl says ERR")
        return handle, state == "DONE"

    def _poll(self, job: Job, flying: List[Tuple[Any, int]]) -> bool:
        """Take out what has landed; True if something has."""
        landed = False
        with self.agent_lock:
            for item in list(flying):
                handle, nbytes = item
                state = self.agent.check_xfer_state(handle)
                if state == "PROC":
                    continue
                flying.remove(item)
                self.agent.release_xfer_handle(handle)
                if state != "DONE":
                    raise TransferError(f"nixl says {state}")
                job.moved += nbytes
                landed = True
        return landed

    def _tear_down(self, job: Job, flying: List[Tuple[Any, int]]) -> None:
        """The deadline has passed and something is still in flight: end the connection under it."""
        self.forget(parse(job.copy.endpoint).process)
        raise Stopped

    def _spoil_theirs(self, job: Job, peer: Peer, theirs: Descriptors) -> None:
        """Turn a byte over in what was written: write one byte that differs from the source's."""
        effect = job.copy.effect
        slot, _, size = job.spans[len(job.spans) // 2]
        offset = size // 2
        self.memory.scratch_bytes()[0] = self.memory.get(effect.location, slot, size)[offset] ^ 0xFF
        place = peer.places[effect.peer_location]
        target = place.address + job.spans[len(job.spans) // 2][1] * place.slot_bytes + offset
        here = np.array([(self.memory.scratch(), 1, 0)], dtype=np.uint64)
        there = np.array([(target, 1, place.device)], dtype=np.uint64)
        handle, done = self._post(job, peer, ("DRAM", place.kind), here, there)
        flying = [] if done else [(handle, 0)]
        while flying:
            self._poll(job, flying)
            time.sleep(SHORTEST_SLEEP_S)

    # ---- first contact
    def introduce(self, endpoint: Endpoint, link: Link) -> None:
        """Load a peer's metadata and read one word of its scratch page: the first copy then finds its connection made
        (3 to 26 ms)."""
        if link.grant.info is None:
            return  # met before
        peer = self._meet(endpoint.process, link.grant.info)
        there = np.array([(peer.scratch + 64, 8, 0)], dtype=np.uint64)
        here = np.array([(self.memory.scratch() + 128, 8, 0)], dtype=np.uint64)
        with self.agent_lock:
            agent = self.agent
            handle = agent.initialize_xfer(
                "READ", agent.get_xfer_descs(here, "DRAM"), agent.get_xfer_descs(there, "DRAM"), peer.agent
            )
            state = agent.transfer(handle)
        _nudge(link.line.sock)
        until = time.monotonic() + 5.0
        while state == "PROC" and time.monotonic() < until:
            time.sleep(SHORTEST_SLEEP_S * 10)
            with self.agent_lock:
                state = agent.check_xfer_state(handle)
        with self.agent_lock:
            agent.release_xfer_handle(handle)

    def stop(self) -> None:
        with self.agent_lock:
            for _, descriptors in self.registered:
                with contextlib.suppress(Exception):
                    self.agent.deregister_memory(descriptors)
            self.registered = []


def _nudge(sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        sock.send(NUDGE, socket.MSG_DONTWAIT)
    return True


def _few(spans: Spans, here: Place, there: Place, limit: int) -> Tuple[Descriptors, Descriptors]:
    """``runs`` of a few, without the cost of a dozen array operations."""
    mine: List[Tuple[int, int, int]] = []
    theirs: List[Tuple[int, int, int]] = []
    for slot, peer_slot, size in spans:
        a = here.address + slot * here.slot_bytes
        b = there.address + peer_slot * there.slot_bytes
        if mine and mine[-1][0] + mine[-1][1] == a and theirs[-1][0] + mine[-1][1] == b and mine[-1][1] + size <= limit:
            mine[-1] = (mine[-1][0], mine[-1][1] + size, here.device)
            theirs[-1] = (theirs[-1][0], theirs[-1][1] + size, there.device)
            continue
        for start in range(0, size, limit):
            part = min(limit, size - start)
            mine.append((a + start, part, here.device))
            theirs.append((b + start, part, there.device))
    return np.array(mine, dtype=np.uint64), np.array(theirs, dtype=np.uint64)


def _descriptors(addresses: Ints, sizes: Ints, device: int) -> Descriptors:
    return np.column_stack((addresses, sizes, np.full(len(sizes), device))).astype(np.uint64)


def _batches(rows: Descriptors, limit: int) -> Deque[Tuple[int, int, int]]:
    """(first row, last + 1, bytes) of runs of rows, each of at most ``limit`` bytes or of one row."""
    found: Deque[Tuple[int, int, int]] = deque()
    if len(rows) == 1:
        return deque([(0, 1, int(rows[0, 1]))])
    total = np.concatenate(([0], np.cumsum(rows[:, 1].astype(np.int64))))
    first = 0
    while first < len(rows):
        last = max(first + 1, int(np.searchsorted(total, total[first] + limit, side="right")) - 1)
        found.append((first, last, int(total[last] - total[first])))
        first = last
    return found
