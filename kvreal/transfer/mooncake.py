"""Mooncake's transfer engine: one-sided reads and writes between slabs, for clusters that run it anyway.

It is taken where it is named, never by ``auto``: what it has begun it ends, and nothing can stop it. While its peer is
frozen a copy stays where it is, past its deadline too, until the peer goes on or dies; its window stays open all the
while, so that no slot is used again before. A write is acknowledged by the target once it is in its memory. Batches are
small for what a call of it blocks, and of few descriptors: it refuses a call of thousands, and every call after that.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import select
import socket
from typing import Any, Dict, Final, List, Tuple

from kvreal.memory import Memory
from kvreal.slab import Slab
from kvreal.spans import Slots, runs
from kvreal.transfer.carrier import Carrier, Link
from kvreal.transfer.flow import Flow
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Job
from kvreal.transfer.line import parse
from kvreal.transfer.nixl import _batches, _descriptors
from kvreal.transfer.window import REVOKE, Window

DESCRIPTORS: Final = 256
"""Of one call. Some thousands fail."""
HINT: Final = "pip install mooncake-transfer-engine-non-cuda; on Debian also: apt install libibverbs1 libnl-3-200"


class MooncakeCarrier(Carrier):
    name = "mooncake"

    def __init__(self, memory: Memory, process: str, flow: Flow, host: str = "127.0.0.1") -> None:
        """``host``: where peers reach this process."""
        super().__init__(memory, process, flow)
        try:
            engine = importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise TransferError(f"mooncake does not load here: {error} ({HINT})") from error
        self.protocol: str = "rdma" if glob.glob("/sys/class/infiniband/*") else "tcp"
        self.engine: Any = engine.TransferEngine()
        if self.engine.initialize(host, "P2PHANDSHAKE", self.protocol, ""):
            raise TransferError(f"mooncake does not start here over {self.protocol}")
        self.registered: Dict[int, Slab] = {}
        self.memory_changed()

    def memory_changed(self) -> None:
        now = {slab.address: slab for slab in self.memory.slabs() if slab.tensor is None}
        for address, slab in list(self.registered.items()):
            if now.get(address) is not slab:
                self.engine.unregister_memory(address)
                del self.registered[address]
        for address, slab in now.items():
            if address not in self.registered:
                if self.engine.register_memory(address, slab.nbytes):
                    raise TransferError(f"mooncake does not take {slab.nbytes} bytes of memory")
                self.registered[address] = slab

    def card(self) -> str:
        return f"{self.protocol}/{self.engine.get_rpc_port()}"

    def reaches(self, card: str, mine: str, theirs: str) -> bool:
        return mine == theirs == "cpu" and card.partition("/")[0] == self.protocol

    # ---- the side whose memory is touched
    def prepare(self, window: Window) -> Slots:
        return self.memory.addresses(window.hello.location, window.slots) if len(window.slots) else ()

    def revoke(self, window: Window) -> None:
        with contextlib.suppress(OSError):
            window.sock.send(REVOKE, socket.MSG_DONTWAIT)

    # ---- the side that moves the bytes
    def carry(self, job: Job, link: Link) -> str:
        effect = job.copy.effect
        endpoint = parse(job.copy.endpoint)
        peer = f"{endpoint.host}:{(endpoint.card(self.name) or '').partition('/')[2]}"
        mine = self.memory.addresses(effect.location, job.spans.mine)
        here, there, sizes = runs(mine, link.at, job.spans.sizes, self.flow.batch(job))
        poller = select.poll()
        poller.register(link.line.sock, select.POLLIN)
        job.began()
        for first, last in self._calls(job, here, sizes):
            if poller.poll(0):
                job.check()
                raise TransferError(f"{effect.peer} closed its window after {job.moved} bytes")
            nbytes = int(sizes[first:last].sum())
            self.flow.turn(job, nbytes)
            try:
                job.check()
                self._move(job, peer, here[first:last].tolist(), there[first:last].tolist(), sizes[first:last].tolist())
            finally:
                self.flow.done()
            job.moved += nbytes
        if job.corrupt and not effect.read:
            self._spoil(job, peer, link.at.tolist())
        return f"mooncake/{self.protocol}"

    def _calls(self, job: Job, here: Any, sizes: Any) -> List[Tuple[int, int]]:
        """(first run, last + 1) of each call."""
        found: List[Tuple[int, int]] = []
        for first, last, _ in _batches(_descriptors(here, sizes, 0), self.flow.batch(job)):
            found += [(at, min(at + DESCRIPTORS, last)) for at in range(first, last, DESCRIPTORS)]
        return found

    def _move(self, job: Job, peer: str, here: List[int], there: List[int], sizes: List[int]) -> None:
        """Blocks, without the interpreter lock."""
        engine = self.engine
        move = engine.batch_transfer_sync_read if job.copy.effect.read else engine.batch_transfer_sync_write
        if move(peer, here, there, sizes):
            job.check()
            raise TransferError(f"mooncake could not move {sum(sizes)} bytes, {len(sizes)} runs of them")

    def _spoil(self, job: Job, peer: str, at: List[int]) -> None:
        """Turn a byte over in what was written."""
        middle = len(job.spans) // 2
        slot, _, size = job.spans[middle]
        self.memory.scratch_bytes()[0] = self.memory.get(job.copy.effect.location, slot, size)[size // 2] ^ 0xFF
        self._move(job, peer, [self.memory.scratch()], [at[middle] + size // 2], [1])

    def stop(self) -> None:
        for address in self.registered:
            self.engine.unregister_memory(address)
        self.registered = {}
