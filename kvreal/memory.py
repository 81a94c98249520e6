"""A node's own memory: one slab a location, cut into slots of one chunk, made once and registered once.

A host keeps its CPU slab from one run to the next unless a larger one is asked for, so that a pooled
process neither faults its pages in nor registers them again. Disk locations are files (store.py), whose bytes cannot be
looked at in place; only what an engine's process maps too is a file that is mapped. GPU locations are torch tensors.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np

from kvcore.scenario.topology import kind_of as kind_of
from kvreal.arena import ArenaError, Member, join
from kvreal.slab import HUGE, PAGE, POISON, POISON_STRIDE, Bytes, Place, Slab, SlabError, Words, physical_bytes
from kvreal.store import Carries, DiskError, Home, Store


class Memory:
    """The locations of one node. ``generation`` rises whenever a slab is made or dropped, ``layout`` whenever a
    location may lie elsewhere: peers that know an older one ask again."""

    def __init__(self, shared: bool = False, arena: str = "", arena_bytes: int = 0) -> None:
        """``shared``: its slabs can be mapped by another process, the engine's. ``arena``: the folder of the memory in
        which all instances of this host keep their CPU locations (arena.py)."""
        self.shared: bool = shared
        self.arena: str = arena
        self.arena_bytes: int = arena_bytes
        self.member: Optional[Member] = None
        self.rows: Dict[str, int] = {}
        """Locations in the arena -> where their slots begin in this process's row."""
        self.disk_path: str = ""
        """Where disk locations keep their files; none: where temporary files are, without a name."""
        self.disk_by: Optional[Carries] = None
        """What carries bytes into those files and back; none: the kernel's calls. Set before ``lay_out``."""
        self.home: Optional[Home] = None
        self.stores: Dict[str, Store] = {}
        self.cpu: Optional[Slab] = None
        self.others: List[Slab] = []
        self.places: Dict[str, Place] = {}
        self.homes: Dict[str, Tuple[Slab, int]] = {}
        self.generation: int = 0
        self.layout: int = 0
        self.dirty: Set[Tuple[str, int]] = set()
        """Slots that hold, or held, something: what must be wiped before other hands use them."""

    def lay_out(self, locations: Sequence[Tuple[str, int]], slot_bytes: int, touch_slots: int = 0) -> bool:
        """Give each (name, slots) its place. True if a slab was made or dropped, so that it must be registered anew.
        The first ``touch_slots`` slots of each, which are used first, are faulted in.

        What an earlier run left is overwritten first: it must never pass for this run's bytes.
        """
        self.wipe()
        changed = bool(self.others)
        self.others = []
        self.rows = {}
        self._close_stores()
        if self.arena:
            changed = self._into_arena(locations, slot_bytes) or changed
        wanted = sum(slots * slot_bytes for name, slots in locations if kind_of(name) == "cpu" and not self.arena)
        if wanted > physical_bytes():  # the kernel would promise it, and kill whoever takes it at its word
            raise SlabError(f"the CPU locations ask for {wanted} bytes, this machine has {physical_bytes()}")
        if self.cpu is None or self.cpu.nbytes < wanted + PAGE:
            self.cpu = None
            self.cpu = Slab("cpu", _round(wanted + PAGE), self.shared)
            changed = True
        self.places = {}
        self.homes = {}
        offset = PAGE  # the first page is the scratch page
        for name, slots in locations:
            kind = kind_of(name)
            if name in self.rows:
                self.homes[name] = (self.others[0], 0)
                self.places[name] = Place(name, "DRAM", self.others[0].address, slots, slot_bytes, ordered=False)
                continue
            if kind == "disk" and not self.shared:
                self.stores[name] = self._store(name, slots, slot_bytes)
                self.places[name] = Place(name, "FILE", 0, slots, slot_bytes, ordered=False)
                continue
            if kind == "cpu":
                slab, start = self.cpu, offset
                offset += slots * slot_bytes
            else:
                slab, start = Slab(kind, slots * slot_bytes, self.shared), 0
                self.others.append(slab)
                changed = True
            slab.touch(start, min(slots, touch_slots) * slot_bytes)
            self.homes[name] = (slab, start)
            self.places[name] = Place(name, slab.nixl_kind, slab.address + start, slots, slot_bytes)
        if any(slab.kind == "gpu" for slab in self.others):
            self.cpu.pin()  # the CUDA runtime is there since the GPU's slab was made
        self.generation += changed
        self.layout += 1
        return changed

    def _into_arena(self, locations: Sequence[Tuple[str, int]], slot_bytes: int) -> bool:
        """Lay the CPU locations out in the arena. True if it is mapped anew."""
        wanted = [(name, slots) for name, slots in locations if kind_of(name) == "cpu"]
        if not wanted:
            return False
        try:
            now = self.member.arena if self.member is not None else None
            if now is None or (now.slot_bytes, str(now.folder.parent)) != (slot_bytes, self.arena):
                self.leave_arena()
                self.member = join(self.arena, f"{os.getpid()}", slot_bytes, self.arena_bytes)
            assert self.member is not None
            self.member.lay_out(sum(slots for _, slots in wanted))
        except ArenaError as error:
            raise SlabError(str(error)) from error
        row = 0
        for name, slots in wanted:
            self.rows[name] = row
            row += slots
        self.others.append(Slab.over(self.member.arena.bytes))
        return True

    def _store(self, name: str, slots: int, slot_bytes: int) -> Store:
        try:
            if self.disk_path and self.home is None:
                self.home = Home(self.disk_path)
            return Store(name, slots, slot_bytes, self.home, self.disk_by)
        except DiskError as error:
            raise SlabError(str(error)) from error

    def _close_stores(self) -> None:
        for store in self.stores.values():
            store.close()
        self.stores = {}

    def close(self) -> None:
        """The process ends: what it keeps on disks goes."""
        self._close_stores()
        if self.home is not None:
            self.home.close()
            self.home = None

    def share(self, source: str, out: Sequence[int], target: str, into: Sequence[int]) -> bool:
        """Make slots of ``target`` what those of ``source`` are, if both lie in the arena."""
        if self.member is None or source not in self.rows or target not in self.rows:
            return False
        self.note(target, into)
        self.member.take(self.member.number, self.row(source, out), self.row(target, into))
        return True

    def alone(self, location: str, slot: int) -> None:
        """A slot is about to be changed in place: nobody else's view of it may change."""
        if location in self.rows and self.member is not None:
            self.member.own(self.row(location, [slot]), keep=True)

    def note(self, location: str, slots: Sequence[int]) -> None:
        """These slots come to hold something."""
        self.dirty.update((location, slot) for slot in slots)

    def leave_arena(self) -> None:
        """Let go of all that this process has there."""
        if self.member is not None:
            self.member.leave()
            self.member = None

    def row(self, location: str, slots: Sequence[int]) -> List[int]:
        """What slots are called in the arena."""
        first = self.rows[location]
        return [first + slot for slot in slots]

    def start(self, location: str, slot: int) -> int:
        """Where a slot begins in its slab's bytes."""
        if location in self.rows and self.member is not None:
            return self.member.offset(self.rows[location] + slot)
        return self.homes[location][1] + slot * self.places[location].slot_bytes

    def slabs(self) -> List[Slab]:
        return [*([self.cpu] if self.cpu is not None else []), *self.others]

    def scratch(self) -> int:
        """Address of a page that belongs to no location."""
        assert self.cpu is not None
        return self.cpu.address

    def scratch_bytes(self) -> Bytes:
        assert self.cpu is not None
        return self.cpu.bytes[:PAGE]

    def check(self, location: str, slot: int, nbytes: int) -> Place:
        """SlabError if there is no such slot, or if it is smaller."""
        place = self.places.get(location)
        if place is None:
            raise SlabError(f"no location {location} here, only {', '.join(self.places)}")
        if not 0 <= slot < place.slots or nbytes > place.slot_bytes:
            raise SlabError(f"{location}: no slot {slot} of {nbytes} bytes among {place.slots} of {place.slot_bytes}")
        return place

    def check_all(self, location: str, spans: Sequence[Tuple[int, int]]) -> None:
        """``check`` of many (slot, bytes)."""
        if spans:
            largest = max(size for _, size in spans)
            for slot in (min(slot for slot, _ in spans), max(slot for slot, _ in spans)):
                self.check(location, slot, largest)

    def addresses(self, location: str, slots: Sequence[int]) -> Words:
        """Where these slots begin, in this process's address space or its GPU's."""
        place = self.places[location]
        if not place.ordered and self.member is not None:
            return np.uint64(place.address) + self.member.offsets(self.row(location, slots))
        return np.uint64(place.address) + np.array(slots, dtype=np.uint64) * np.uint64(place.slot_bytes)

    def view(self, location: str, slot: int, nbytes: int) -> Bytes:
        """The first ``nbytes`` bytes of a slot, not a copy. GPU memory and disks have none: see ``put`` and ``get``."""
        self.check(location, slot, nbytes)
        if not self.mapped(location):
            what = "on a disk" if self.on_disk(location) else "GPU memory"
            raise SlabError(f"{location} is {what}: its bytes cannot be looked at in place")
        slab, _ = self.homes[location]
        first = self.start(location, slot)
        return slab.bytes[first : first + nbytes]

    def mapped(self, location: str) -> bool:
        """Whether its bytes lie in this process's address space, so that ``view`` can show them."""
        return location in self.homes and self.homes[location][0].tensor is None

    def on_gpu(self, location: str) -> bool:
        return location in self.homes and self.homes[location][0].tensor is not None

    def on_disk(self, location: str) -> bool:
        """Whether it consists of files."""
        return location in self.stores

    def put(self, location: str, slot: int, data: Bytes, key: bytes = b"") -> None:
        """Write ``data`` to the beginning of a slot, wherever it lies. ``key``: what chunk it is, which a disk keeps
        beside it. DiskError: it cannot be written."""
        self.check(location, slot, len(data))
        if location in self.stores:
            self.stores[location].write(slot, data, key)
            return
        slab, start = self.homes[location]
        if slab.tensor is None:
            self.view(location, slot, len(data))[:] = data
            return
        import torch

        first = start + slot * self.places[location].slot_bytes
        slab.tensor[first : first + len(data)].copy_(torch.from_numpy(data))

    def get(self, location: str, slot: int, nbytes: int, key: bytes = b"") -> Bytes:
        """The bytes of a slot: a view where there can be one, else a copy. DiskError: a disk does not have them as they
        were written there, or has another chunk's than ``key``."""
        if location in self.stores:
            self.check(location, slot, nbytes)
            data: Bytes = np.empty(nbytes, dtype=np.uint8)
            self.stores[location].read(slot, data, key)
            return data
        slab, start = self.homes[location]
        if slab.tensor is None:
            return self.view(location, slot, nbytes)
        self.check(location, slot, nbytes)
        first = start + slot * self.places[location].slot_bytes
        copy: Bytes = slab.tensor[first : first + nbytes].cpu().numpy()
        return copy

    def fetch(self, location: str, slot: int, into: Bytes, key: bytes = b"") -> None:
        """``get`` into memory that is there already."""
        if location in self.stores:
            self.check(location, slot, len(into))
            self.stores[location].read(slot, into, key)
        elif self.on_gpu(location):
            import torch

            place = self.check(location, slot, len(into))
            slab, start = self.homes[location]
            first = start + slot * place.slot_bytes
            torch.from_numpy(into).copy_(slab.tensor[first : first + len(into)])
        else:
            into[:] = self.get(location, slot, len(into), key)

    def soil(self, location: str, slots: Sequence[int], poison: bool = False) -> None:
        """Note that these slots are about to be written; ``poison`` spoils what they hold, every MiB, so that a
        copy which did not happen cannot be taken for one that did. In the arena they are nobody else's from now on."""
        if location in self.rows and self.member is not None:
            self.member.own(self.row(location, slots))
        used = [slot for slot in slots if (location, slot) in self.dirty]
        self.note(location, slots)
        if not used:
            return
        if location in self.stores:
            self.stores[location].drop(used)
        elif poison and not self.on_gpu(location):
            self._poison(location, used)

    def forget(self, location: str, slots: Sequence[int]) -> None:
        """What was written there has come to nothing: a disk keeps none of it."""
        if location in self.stores:
            with contextlib.suppress(OSError):
                self.stores[location].drop(slots)

    def _poison(self, location: str, slots: Sequence[int]) -> None:
        """All of them at once: a copy may have thousands."""
        place = self.places[location]
        slab, first = self.homes[location]
        if place.ordered:
            rows = slab.bytes[first : first + place.slots * place.slot_bytes].reshape(place.slots, place.slot_bytes)
            index: Any = np.asarray(slots, dtype=np.int64)
            rows[index, :64] = POISON
            rows[index, -64:] = POISON
            rows[index, ::POISON_STRIDE] = POISON
            return
        for slot in slots:
            view = self.view(location, slot, place.slot_bytes)
            view[:64] = POISON
            view[-64:] = POISON
            view[::POISON_STRIDE] = POISON

    def wipe(self, keep: Sequence[Tuple[str, int]] = ()) -> int:
        """Overwrite every slot that was ever written and is not in ``keep``; returns how many bytes."""
        kept = set(keep)
        count = 0
        gone: Dict[str, List[int]] = {}
        for location, slot in sorted(self.dirty - kept):
            place = self.places[location]
            if location in self.rows:
                gone.setdefault(location, []).append(slot)
            elif location in self.stores:
                self.stores[location].drop([slot])
            elif self.on_gpu(location):
                self.put(location, slot, np.full(place.slot_bytes, POISON, dtype=np.uint8))
            else:
                self.view(location, slot, place.slot_bytes)[:] = POISON
            count += place.slot_bytes
        for location, slots in gone.items():
            if self.member is not None:
                self.member.drop(self.row(location, slots))
        self.dirty &= kept
        return count


def _round(nbytes: int) -> int:
    """To a whole number of huge pages, at least 64 MiB: small runs that follow one another then share one slab."""
    return max(64 << 20, -(-nbytes // HUGE) * HUGE)
