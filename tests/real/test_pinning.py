"""Memory where there is a GPU, with a CUDA runtime that only counts: what is page-locked when, and what is let go."""

from __future__ import annotations

import gc
import sys
import types
from typing import Any

import numpy as np
import pytest

from kvreal.memory import Memory
from kvreal.slab import SlabError


class Cudart:
    def __init__(self) -> None:
        self.locked: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.locked.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    """A module that stands for torch, once something has imported it."""
    found = Cudart()
    torch: Any = types.ModuleType("torch")
    torch.uint8 = "uint8"
    torch.cuda = types.SimpleNamespace(is_available=lambda: True, cudart=lambda: found)

    def zeros(nbytes: int, **_: Any) -> Any:
        if nbytes > 1 << 30:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot.\nmore about it")
        memory = np.zeros(nbytes, np.uint8)
        return types.SimpleNamespace(data_ptr=lambda: memory.ctypes.data, memory=memory)

    torch.zeros = zeros
    monkeypatch.setitem(sys.modules, "torch", torch)
    return found


def test_cpu_memory_is_locked_beside_a_gpus(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the slab was there before anything had loaded CUDA; not where no GPU's memory is."""
    torch = sys.modules.pop("torch")
    memory = Memory()
    memory.lay_out([("LocalCPUBackend", 2)], 4096)
    assert memory.cpu is not None and not memory.cpu.pinned and not cudart.locked
    monkeypatch.setitem(sys.modules, "torch", torch)
    memory.lay_out([("LocalCPUBackend", 2), ("LocalGPUBackend", 2)], 4096)
    assert memory.cpu.pinned and cudart.locked == [memory.cpu.address]
    memory.lay_out([("LocalCPUBackend", 2), ("LocalGPUBackend", 2)], 4096)
    assert cudart.locked == [memory.cpu.address]  # once


def test_a_slab_that_goes_is_unlocked(cudart: Cudart) -> None:
    memory = Memory()
    memory.lay_out([("LocalCPUBackend", 2)], 4096)
    assert memory.cpu is not None
    first = memory.cpu.address
    memory.lay_out([("LocalCPUBackend", 20_000)], 4096)  # more than it has: another slab
    gc.collect()
    assert first not in cudart.locked and cudart.locked == [memory.cpu.address]


def test_a_gpu_without_room_says_so_in_a_line(cudart: Cudart) -> None:
    with pytest.raises(SlabError, match="cannot get 2147483648 bytes of gpu memory: CUDA out of memory") as told:
        Memory().lay_out([("LocalGPUBackend", 1 << 19)], 4096)
    assert len(str(told.value).splitlines()) == 1
