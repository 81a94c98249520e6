"""Copies whole blocks, raw, between vLLM's paged KV tensors and chunk slots.

Inside a block the bytes lie as this build of vLLM packs them (on CPUs by instruction set), so nothing smaller than a
block has a meaning of its own, and equal packing is part of the namespace. A slot holds block after block of its
chunk; a block's bytes are layer after layer, each layer's in the order in which its tensor has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import weakref
from typing import Any, Dict, Final, List, Sequence, Tuple

import numpy as np

from kvreal.engines.vllm.link import Shared

log = logging.getLogger("kvmove.engine")

SMALLEST_BATCH: Final = 64
"""Blocks that a device copies at a time, at least."""


class LayoutError(Exception):
    """These tensors are not made of whole blocks; the message says which."""


class Run:
    """The part of one layer that is one contiguous run of ``nbytes`` in every block: block b's begins at
    ``address + b * stride``."""

    def __init__(self, address: int, stride: int, nbytes: int) -> None:
        self.address: int = address
        self.stride: int = stride
        self.nbytes: int = nbytes


class Paged:
    """vLLM's KV: by blocks. ``block_bytes``: of all layers."""

    def __init__(self, caches: Dict[str, Any], num_blocks: int) -> None:
        """``caches``: layer -> tensor, as vLLM registers them. LayoutError."""
        self.tensors: List[Tuple[Any, int]] = []
        self.runs: List[Run] = []
        seen: List[Tuple[int, Tuple[int, ...]]] = []
        self.form: str = ""
        for layer, tensor in caches.items():
            if not hasattr(tensor, "data_ptr"):
                raise LayoutError(f"{layer} has no single KV tensor: {type(tensor).__name__}")
            if (tensor.data_ptr(), tuple(tensor.shape)) in seen:
                continue  # layers that share their KV
            seen.append((tensor.data_ptr(), tuple(tensor.shape)))
            axis = _block_axis(layer, tensor, num_blocks)
            self.tensors.append((tensor, axis))
            self.runs += _runs(layer, tensor, axis)
            form = _form(tensor, axis)
            if self.form and form != self.form:
                raise LayoutError(f"{layer} has blocks of {form}, other layers of {self.form}")
            self.form = form
        if not self.runs:
            raise LayoutError("no KV tensors")
        self.num_blocks: int = num_blocks
        self.layers: int = len(self.tensors)
        self.block_bytes: int = sum(run.nbytes for run in self.runs)
        self.device: str = str(self.tensors[0][0].device.type)
        self.dtype: str = str(self.tensors[0][0].dtype).removeprefix("torch.")


def _block_axis(layer: str, tensor: Any, num_blocks: int) -> int:
    for axis, size in enumerate(tensor.shape):
        if size == num_blocks:
            return axis
    raise LayoutError(f"{layer} has KV of shape {tuple(tensor.shape)}, expected an axis of {num_blocks} blocks")


def _runs(layer: str, tensor: Any, axis: int) -> List[Run]:
    """By strides: what lies within a block's stride must be dense; each combination of what lies beyond it is a run."""
    item = tensor.element_size()
    step = tensor.stride(axis)
    others = [d for d in range(tensor.dim()) if d != axis and tensor.shape[d] > 1]
    outer = [d for d in others if tensor.stride(d) > step]
    dense = 1
    for d in sorted([d for d in others if d not in outer], key=tensor.stride):
        if tensor.stride(d) != dense:
            raise LayoutError(
                f"{layer} has KV of shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}: its blocks are "
                "not contiguous"
            )
        dense *= tensor.shape[d]
    found = []
    for where in np.ndindex(*[tensor.shape[d] for d in outer]):
        offset = sum(i * tensor.stride(d) for d, i in zip(outer, where))
        found.append(Run(tensor.data_ptr() + offset * item, step * item, dense * item))
    return found


def _form(tensor: Any, axis: int) -> str:
    """Sizes but that of the block axis, and in which order they lie in memory: ``4x128x128`` or ``4x128x128/1.0.2``."""
    sizes = [n for d, n in enumerate(tensor.shape) if d != axis]
    strides = [n for d, n in enumerate(tensor.stride()) if d != axis]
    order = sorted(range(len(sizes)), key=lambda i: -strides[i])
    text = "x".join(str(n) for n in sizes)
    return text if order == sorted(order) else f"{text}/{'.'.join(str(i) for i in order)}"


class Slots:
    """The rank's slabs, mapped here."""

    def __init__(self, places: Sequence[Shared], fds: Sequence[int]) -> None:
        self.maps: List[mmap.mmap] = [mmap.mmap(fd, 0) for fd in fds]
        self.bases: List[int] = [_address(one) for one in self.maps]
        self.places: Dict[str, Shared] = {place.name: place for place in places}

    def address(self, location: str, slot: int) -> int:
        place = self.places[location]
        if not 0 <= slot < place.slots:
            raise LayoutError(f"{location} has {place.slots} slots, not {slot}")
        return self.bases[place.slab] + place.start + slot * place.slot_bytes


def _address(one: mmap.mmap) -> int:
    return int(np.frombuffer(one, dtype=np.uint8).ctypes.data)


class Rows:
    """Which block goes with which place: block ``blocks[i]`` and ``addresses[i]``, ``block_bytes`` each."""

    def __init__(self, slots: Slots, block_bytes: int, blocks_per_chunk: int) -> None:
        self.slots: Slots = slots
        self.block_bytes: int = block_bytes
        self.per_chunk: int = blocks_per_chunk
        self.blocks: List[int] = []
        self.addresses: List[int] = []
        self.done: int = 0
        """How many have been copied, first to last: what is right even if a later one fails."""

    def add(self, block: int, location: str, slot: int, index: int) -> None:
        """``index``: the block's place within its chunk."""
        self.blocks.append(block)
        self.addresses.append(self.slots.address(location, slot) + index * self.block_bytes)


class HostCopier:
    """KV in this process's own memory. Each copy releases the interpreter lock."""

    def __init__(self, paged: Paged, slots: Slots) -> None:
        self.runs: List[Run] = paged.runs

    def mark(self) -> Any:
        """Now: what is to be stored has been computed by then. Called by the thread that computes."""
        return None

    def store(self, rows: Rows, mark: Any) -> None:
        move = ctypes.memmove
        for block, address in zip(rows.blocks, rows.addresses):
            for run in self.runs:
                move(address, run.address + block * run.stride, run.nbytes)
                address += run.nbytes

    def load(self, rows: Rows, mark: Any) -> None:
        move = ctypes.memmove
        for block, address in zip(rows.blocks, rows.addresses):
            for run in self.runs:
                move(run.address + block * run.stride, address, run.nbytes)
                address += run.nbytes
            rows.done += 1


class DeviceCopier:
    """KV in a device's memory: blocks are gathered there, and cross the bus in one piece a batch, from page-locked
    memory where CUDA can lock it, on a stream of their own."""

    def __init__(self, paged: Paged, slots: Slots) -> None:
        import torch

        self.torch: Any = torch
        self.tensors: List[Tuple[Any, int]] = paged.tensors
        self.block_bytes: int = paged.block_bytes
        self.device: Any = paged.tensors[0][0].device
        self.stream: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self.stream is not None:
            with torch.cuda.device(self.device):  # a rank that is started again comes by another thread
                lock_pages(torch.cuda.cudart(), slots)

    def _host(self, address: int, nbytes: int) -> Any:
        return self.torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)))

    def _batches(self, rows: Rows) -> List[Tuple[int, int]]:
        step = max(SMALLEST_BATCH, (64 << 20) // self.block_bytes)
        return [(i, min(i + step, len(rows.blocks))) for i in range(0, len(rows.blocks), step)]

    def _parts(self, staged: Any) -> List[Any]:
        """``staged`` (blocks x bytes): each layer's columns."""
        found = []
        first = 0
        for tensor, axis in self.tensors:
            size = tensor.numel() // tensor.shape[axis] * tensor.element_size()
            found.append(staged[:, first : first + size])
            first += size
        return found

    def mark(self) -> Any:
        if self.stream is None:
            return None
        event = self.torch.cuda.Event()
        event.record(self.torch.cuda.current_stream(self.device))
        return event

    def store(self, rows: Rows, mark: Any) -> None:
        torch = self.torch
        with self._on_stream(mark):
            for first, last in self._batches(rows):
                ids = torch.tensor(rows.blocks[first:last], device=self.device)
                staged = torch.empty((last - first, self.block_bytes), dtype=torch.uint8, device=self.device)
                for (tensor, axis), part in zip(self.tensors, self._parts(staged)):
                    taken = tensor.index_select(axis, ids).movedim(axis, 0).contiguous()
                    part.copy_(taken.view(torch.uint8).reshape(last - first, -1))
                for i in range(first, last):
                    self._host(rows.addresses[i], self.block_bytes).copy_(staged[i - first], non_blocking=True)
                self._wait()

    def load(self, rows: Rows, mark: Any) -> None:
        torch = self.torch
        with self._on_stream(mark):
            for first, last in self._batches(rows):
                ids = torch.tensor(rows.blocks[first:last], device=self.device)
                staged = torch.empty((last - first, self.block_bytes), dtype=torch.uint8, device=self.device)
                for i in range(first, last):
                    staged[i - first].copy_(self._host(rows.addresses[i], self.block_bytes), non_blocking=True)
                for (tensor, axis), part in zip(self.tensors, self._parts(staged)):
                    shape = [last - first, *[n for d, n in enumerate(tensor.shape) if d != axis]]
                    tensor.index_copy_(axis, ids, part.contiguous().view(tensor.dtype).view(shape).movedim(0, axis))
                self._wait()
                rows.done = last

    def _on_stream(self, mark: Any) -> Any:
        if self.stream is None:
            return contextlib.nullcontext()
        if mark is not None:
            self.stream.wait_event(mark)
        return self.torch.cuda.stream(self.stream)

    def _wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def lock_pages(runtime: Any, slots: Slots) -> None:
    """For as long as ``slots`` is there. ``runtime``: CUDA's. It must be told before pages are unmapped: else it takes
    what is mapped there next, a new rank's slab, for the old one's."""
    for base, one in zip(slots.bases, slots.maps):
        code = int(runtime.cudaHostRegister(base, len(one), 0))
        if code:
            log.warning("CUDA does not lock %d bytes of KV memory (error %d): copies will be slower", len(one), code)
        else:
            weakref.finalize(slots, runtime.cudaHostUnregister, base).atexit = False


def copier(paged: Paged, slots: Slots) -> Any:
    return HostCopier(paged, slots) if paged.device == "cpu" else DeviceCopier(paged, slots)
