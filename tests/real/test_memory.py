"""Slabs and slots: what lies where, and what an earlier run leaves behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from kvreal.memory import Memory, kind_of
from kvreal.slab import POISON, SlabError, gib, physical_bytes


def test_slots_do_not_overlap_and_neighbours_touch() -> None:
    memory = Memory()
    memory.lay_out([("cpu one", 4), ("cpu two", 3)], 4096)
    slots = [("cpu one", 0), ("cpu one", 1), ("cpu one", 2), ("cpu one", 3), ("cpu two", 0), ("cpu two", 2)]
    spans = sorted(int(memory.view(name, slot, 4096).ctypes.data) for name, slot in slots)
    assert all(b - a >= 4096 for a, b in zip(spans, spans[1:]))
    assert memory.places["cpu one"].address + 4096 == int(memory.view("cpu one", 1, 1).ctypes.data)
    assert memory.scratch() < spans[0]


def test_a_second_run_uses_the_same_slab_and_finds_nothing_of_the_first() -> None:
    memory = Memory()
    assert memory.lay_out([("cpu", 4)], 4096)
    memory.soil("cpu", [2])
    memory.view("cpu", 2, 4096)[:] = 7
    slab = memory.cpu
    assert not memory.lay_out([("cpu", 8)], 2048), "it fits, so nothing need be registered anew"
    assert memory.cpu is slab
    assert not (memory.view("cpu", 4, 2048) == 7).any() and not (memory.view("cpu", 5, 2048) == 7).any()


def test_a_larger_run_gets_a_larger_slab_and_peers_can_tell() -> None:
    memory = Memory()
    memory.lay_out([("cpu", 1)], 4096)
    before = memory.generation, memory.layout
    assert memory.lay_out([("cpu", 32)], 4 << 20)
    assert memory.generation > before[0] and memory.layout > before[1]


def test_every_layout_is_new_to_peers() -> None:
    memory = Memory()
    memory.lay_out([("cpu", 4)], 4096)
    before = memory.layout
    memory.lay_out([("cpu", 4)], 1024)
    assert memory.layout > before


def test_wipe_overwrites_all_but_what_is_kept() -> None:
    memory = Memory()
    memory.lay_out([("cpu", 3)], 4096)
    memory.soil("cpu", [0, 1])
    memory.view("cpu", 0, 4096)[:] = 1
    memory.view("cpu", 1, 4096)[:] = 2
    assert memory.wipe([("cpu", 1)]) == 4096
    assert (memory.view("cpu", 0, 4096) == POISON).all() and (memory.view("cpu", 1, 4096) == 2).all()
    assert memory.wipe() == 4096


def test_poison_spoils_a_slot_that_held_something() -> None:
    memory = Memory()
    memory.lay_out([("cpu", 1)], 1 << 20)
    memory.soil("cpu", [0], poison=True)
    memory.view("cpu", 0, 1 << 20)[:] = 1
    memory.soil("cpu", [0], poison=True)
    assert (memory.view("cpu", 0, 1 << 20)[:64] == POISON).all() and memory.view("cpu", 0, 1 << 20)[-1] == POISON


@pytest.mark.parametrize(("location", "slot", "nbytes"), [("cpu", 3, 1), ("cpu", -1, 1), ("cpu", 0, 4097), ("?", 0, 1)])
def test_no_slot_no_view(location: str, slot: int, nbytes: int) -> None:
    memory = Memory()
    memory.lay_out([("cpu", 3)], 4096)
    with pytest.raises(SlabError):
        memory.view(location, slot, nbytes)


def test_a_disk_location_is_a_file_that_has_no_name_and_no_view() -> None:
    memory = Memory()
    memory.lay_out([("LocalDiskBackend", 2)], 4096)
    memory.put("LocalDiskBackend", 1, np.full(4096, 5, dtype=np.uint8), b"key")
    assert (memory.get("LocalDiskBackend", 1, 4096, b"key") == 5).all()
    assert not memory.mapped("LocalDiskBackend") and not memory.on_gpu("LocalDiskBackend")
    with pytest.raises(SlabError, match="LocalDiskBackend is on a disk"):
        memory.view("LocalDiskBackend", 1, 4096)
    files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [name for name in files if name.startswith(tempfile.gettempdir()) and name.endswith(" (deleted)")]


def test_what_an_engines_process_maps_too_is_a_mapped_file() -> None:
    memory = Memory(shared=True)
    memory.lay_out([("LocalDiskBackend", 2)], 4096)
    memory.view("LocalDiskBackend", 1, 4096)[:] = 5
    assert memory.mapped("LocalDiskBackend") and not memory.on_disk("LocalDiskBackend")


def test_what_a_name_says() -> None:
    kinds = [kind_of(name) for name in ("LocalCPUBackend", "LocalDiskBackend", "GPU", "cpu")]
    assert kinds == ["cpu", "disk", "gpu", "cpu"]
    assert np.uint8(POISON) == POISON


def test_a_pool_larger_than_memory_is_refused_with_both_figures() -> None:
    memory = Memory()
    with pytest.raises(SlabError, match=f"ask for {gib(1 << 60)}, this machine has {gib(physical_bytes())}"):
        memory.lay_out([("LocalCPUBackend", 1 << 40)], 1 << 20)
    assert not memory.places


def test_gpu_memory_without_a_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def lacks(*_: object, **__: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "zeros", lacks)
    with pytest.raises(SlabError, match="cannot get .* bytes of gpu memory: Torch not compiled with CUDA"):
        Memory().lay_out([("LocalGPUBackend", 1)], 4096)
