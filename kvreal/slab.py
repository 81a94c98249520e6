"""One piece of memory: anonymous and pinned where CUDA is there, shared with an engine's process, a nameless file, or a
GPU's. What lies where in it is memory.py's to know."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import mmap
import os
import sys
import tempfile
from typing import Any, Final, Optional, Tuple

import msgspec
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

PAGE: Final = 4096
HUGE: Final = 2 << 20
POISON: Final = 0xDB
POISON_STRIDE: Final = 1 << 20
MADV_POPULATE_WRITE: Final = 23
PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


class SlabError(Exception):
    """The memory that a location asks for cannot be had; the message says which and how much."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a location lies in its process's address space; plain integers, so that peers can compute with it."""

    name: str
    kind: str
    """DRAM, VRAM or FILE: NIXL's words for it."""
    address: int
    slots: int
    slot_bytes: int
    device: int = 0
    ordered: bool = True
    """Slot i lies at ``address + i * slot_bytes``; otherwise whoever grants a window says where its slots lie."""


class Slab:
    """Page-aligned memory: anonymous (pinned where CUDA is there), a nameless file, or a GPU's."""

    def __init__(self, kind: str, nbytes: int, shared: bool = False) -> None:
        """``shared``: another process may map it too, by ``fd``."""
        self.kind: str = kind
        self.fd: int = -1
        self.nbytes: int = max(PAGE, -(-nbytes // PAGE) * PAGE)
        self.map: Optional[mmap.mmap] = None
        self.tensor: Any = None
        self.bytes: Bytes
        self.address: int
        self.pinned: bool = False
        if kind == "gpu":
            self._on_gpu()
            return
        try:
            if kind == "disk" or shared:
                self.map = self._file(shared)
            else:
                self.map = mmap.mmap(-1, self.nbytes, flags=PRIVATE)
        except (OSError, ValueError, OverflowError) as error:
            raise SlabError(f"cannot get {self.nbytes} bytes of {kind} memory: {error}") from error
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)
        if kind == "cpu":
            with contextlib.suppress(OSError, AttributeError):
                self.map.madvise(mmap.MADV_HUGEPAGE)
            self.pin()

    def pin(self) -> None:
        """Page-lock it, if there is a CUDA runtime by now and it is not locked yet."""
        self.pinned = self.pinned or _pin(self.address, self.nbytes)

    def __del__(self) -> None:
        if getattr(self, "pinned", False):
            with contextlib.suppress(Exception):
                sys.modules["torch"].cuda.cudart().cudaHostUnregister(self.address)

    @staticmethod
    def over(data: Bytes) -> Slab:
        """Memory that is mapped already."""
        slab = Slab.__new__(Slab)
        slab.kind, slab.fd, slab.nbytes, slab.map, slab.tensor = "cpu", -1, len(data), None, None
        slab.bytes = data
        slab.address = int(data.ctypes.data)
        slab.pinned = _pin(slab.address, slab.nbytes)
        return slab

    def _file(self, shared: bool) -> mmap.mmap:
        """A file without a name: in the folder of temporary files, or one that is memory."""
        if self.kind == "disk":
            with tempfile.TemporaryFile(prefix="kvreal-") as file:
                fd = os.dup(file.fileno())
        else:
            fd = os.memfd_create("kvreal-slab", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.nbytes)
            return mmap.mmap(fd, self.nbytes)
        finally:
            if shared:
                self.fd = fd
            else:
                os.close(fd)

    def touch(self, start: int, size: int) -> None:
        """Fault these pages in (they stay as they are), so that no copy pays for it."""
        if self.map is None or size <= 0:
            return
        start -= start % PAGE
        try:
            self.map.madvise(MADV_POPULATE_WRITE, start, size)
        except OSError:  # an older kernel
            self.bytes[start : start + size : PAGE] |= 0

    def _on_gpu(self) -> None:
        try:
            import torch

            self.tensor = torch.zeros(self.nbytes, dtype=torch.uint8, device="cuda")
        except (ImportError, RuntimeError, AssertionError) as error:  # the last: a torch without CUDA
            why = str(error).partition("\n")[0]
            raise SlabError(f"cannot get {self.nbytes} bytes of gpu memory: {why}") from error
        self.address = int(self.tensor.data_ptr())
        self.bytes = np.empty(0, dtype=np.uint8)

    @property
    def nixl_kind(self) -> str:
        return "VRAM" if self.kind == "gpu" else "DRAM"


def _pin(address: int, nbytes: int) -> bool:
    """Page-lock it where a CUDA runtime is loaded already; a machine without one has nothing to pin for."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0


def gib(nbytes: int) -> str:
    """``23.5 GiB``: as people ask for memory."""
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


def physical_bytes() -> int:
    """Memory that this process can have: the machine's, or less where a container has a limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            return min(total, int(file.read()))
    return total


def provides() -> Tuple[str, ...]:
    """What a scenario may need (``needs:``) that nodes on this machine have: disk always, gpu where torch sees one."""
    return ("disk", "gpu") if _gpu() else ("disk",)


def _gpu() -> bool:
    """Without importing torch where there is no device that it could find."""
    if not glob.glob("/dev/nvidia[0-9]*"):
        return False
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """memcpy between addresses of this process; releases the interpreter lock."""
    ctypes.memmove(target, source, nbytes)
