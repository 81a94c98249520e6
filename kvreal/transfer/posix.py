"""A disk's bytes by NIXL: through its POSIX backend between memory and files, through GDS between a GPU and files.

    by = Posix()                      # Unable, one line, where NIXL or that backend is not there
    by = Direct(gds, memory, gpu, 3)  # of one slot of a GPU's memory
    by.write(fd, data, start)         # as kvreal/store.py's own way does it
    by.read(fd, into, start)

What is written where, and what is believed of it, is the store's business (kvreal/store.py); this only carries bytes.
Each thread has an agent of its own, so that none waits for another's; a transfer is registered, made and forgotten.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from functools import lru_cache
from typing import Any, Final, List, Optional, Tuple

from kvreal.memory import Memory
from kvreal.slab import Bytes
from kvreal.store import Calls, Carries
from kvreal.transfer.frames import TransferError
from kvreal.transfer.nixl import load_nixl

log = logging.getLogger("kvmove.disk")

PIECE_BYTES: Final = 1 << 20
"""One descriptor: what the backend has under way at once is some of them."""
SLEEP_S: Final = 50e-6


class Unable(Exception):
    """Why a backend cannot be had here; one line."""


class Backend:
    """One of NIXL's backends for files. Any thread."""

    def __init__(self, backend: str) -> None:
        """Unable: it is not there, or does not start."""
        self.backend: str = backend
        self.own: threading.local = threading.local()
        try:
            self.api: Any = load_nixl()
        except ImportError as error:
            raise Unable(f"nixl is not installed: {error}") from error
        self._agent()

    def _agent(self) -> Any:
        agent = getattr(self.own, "agent", None)
        if agent is None:
            agent = self.api.nixl_agent(uuid.uuid4().hex, self.api.nixl_agent_config(backends=[]))
            there = agent.get_plugin_list()
            if self.backend not in there:
                raise Unable(f"nixl has no {self.backend} backend here, only {', '.join(sorted(there))}")
            try:
                agent.create_backend(self.backend)
            except Exception as error:
                raise Unable(f"nixl's {self.backend} backend does not start: {error}") from error
            self.own.agent = agent
        return agent

    def move(self, what: str, fd: int, start: int, kind: str, address: int, nbytes: int, device: int = 0) -> None:
        """``what``: WRITE or READ. OSError: not every byte was moved."""
        try:
            self._move(self._agent(), what, fd, start, kind, address, nbytes, device)
        except OSError:
            raise
        except Exception as error:  # whatever NIXL raises
            raise OSError(f"nixl's {self.backend}: {error}") from error

    def _move(
        self, agent: Any, what: str, fd: int, start: int, kind: str, address: int, nbytes: int, device: int
    ) -> None:
        with contextlib.ExitStack() as stack:
            for region, of in (((address, nbytes, device, ""), kind), ((start, nbytes, fd, ""), "FILE")):
                stack.callback(agent.deregister_memory, agent.register_memory([region], of))
            cuts = [(at, min(PIECE_BYTES, nbytes - at)) for at in range(0, nbytes, PIECE_BYTES)]
            rows: List[Tuple[int, int, int]] = [(address + at, size, device) for at, size in cuts]
            theirs = [(start + at, size, fd) for at, size in cuts]
            handle = agent.initialize_xfer(
                what, agent.get_xfer_descs(rows, kind), agent.get_xfer_descs(theirs, "FILE"), agent.name
            )
            stack.callback(agent.release_xfer_handle, handle)
            state = agent.transfer(handle)
            while state == "PROC":
                time.sleep(SLEEP_S)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise OSError(f"nixl's {self.backend} says {state}")


class Posix(Backend):
    """Between memory and files."""

    def __init__(self) -> None:
        super().__init__("POSIX")

    def write(self, fd: int, data: Bytes, start: int) -> None:
        if len(data):
            os.posix_fallocate(fd, start, len(data))  # a full disk says so by name, before anything is written
            self.move("WRITE", fd, start, "DRAM", int(data.ctypes.data), len(data))

    def read(self, fd: int, into: Bytes, start: int) -> bool:
        """False: the file is shorter."""
        if os.fstat(fd).st_size < start + len(into):
            return False
        if len(into):
            self.move("READ", fd, start, "DRAM", int(into.ctypes.data), len(into))
        return True


class Direct:
    """Between one slot of a GPU's memory and files, not through the machine's own; its sums are taken there all the
    same, of what the GPU has."""

    def __init__(self, gds: Backend, memory: Memory, location: str, slot: int) -> None:
        self.gds: Backend = gds
        self.memory: Memory = memory
        self.location: str = location
        self.slot: int = slot
        self.address: int = int(memory.addresses(location, [slot])[0])
        self.device: int = memory.places[location].device

    def write(self, fd: int, data: Bytes, start: int) -> None:
        """``data`` is what the slot holds, and goes instead where GDS cannot reach that file."""
        try:
            self.gds.move("WRITE", fd, start, "VRAM", self.address, len(data), self.device)
        except OSError as error:
            log.warning("%s; the bytes go by way of memory", error)
            Calls().write(fd, data, start)

    def read(self, fd: int, into: Bytes, start: int) -> bool:
        """``into`` gets what the slot has got. False: the file is shorter."""
        if os.fstat(fd).st_size < start + len(into):
            return False
        try:
            self.gds.move("READ", fd, start, "VRAM", self.address, len(into), self.device)
        except OSError as error:
            log.warning("%s; the bytes go by way of memory", error)
            if not Calls().read(fd, into, start):
                return False
            self.memory.put(self.location, self.slot, into)
        self.memory.fetch(self.location, self.slot, into)
        return True


@lru_cache(maxsize=1)
def gds() -> Optional[Backend]:
    """GDS, where it starts; else it is said once why not, and a GPU's bytes go to disks by way of memory."""
    try:
        return Backend("GDS")
    except Unable as error:
        log.info("between GPU memory and disks bytes go by way of memory: %s", error)
        return None


def named(word: str) -> Optional[Carries]:
    """What an instance's ``disk_io`` means, ``calls`` or ``posix``; none is the kernel's calls. TransferError if it
    cannot be had here."""
    try:
        return Posix() if word == "posix" else None
    except Unable as error:
        raise TransferError(f"disk_io {word}: {error}") from error
