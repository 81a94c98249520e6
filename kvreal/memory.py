"""A node's own memory: one slab a location, cut into slots of one size, made once and registered once.

A host keeps its CPU slab from one run to the next unless a larger one is asked for, so that a pooled
process neither faults its pages in nor registers them again. Disk locations are files (store.py), whose bytes cannot be
looked at in place; only what an engine's process maps too is a file that is mapped. GPU locations are torch tensors.
"""

from __future__ import annotations

import contextlib
import os
from typing import Dict, Final, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from kvcore.scenario.topology import kind_of as kind_of
from kvreal.arena import ArenaError, Member, join
from kvreal.slab import HUGE, PAGE, POISON, POISON_STRIDE, Bytes, Place, Slab, SlabError, gib, physical_bytes
from kvreal.spans import Ints, Slots, firsts, ints
from kvreal.store import Carries, DiskError, Home, Store

_NONE: Final[Mapping[str, int]] = {}
_NO_ROOMS: Final[Mapping[int, int]] = {}


class Memory:
    """The locations of one node. ``generation`` rises whenever a slab is made or dropped, ``layout`` whenever a
    location may lie elsewhere: peers that know an older one ask again."""

    def __init__(self, shared: bool = False, arena: str = "", arena_bytes: int = 0) -> None:
        """``shared``: its slabs can be mapped by another process, the engine's. ``arena``: the folder of the memory in
        which all instances of this host keep their CPU locations (arena.py)."""
        self.shared: bool = shared
        self.arena: str = arena
        self.arena_bytes: int = arena_bytes
        self.arena_rooms: Mapping[int, int] = _NO_ROOMS
        """Bytes of a slot -> of the arena of such slots, where that is not ``arena_bytes``."""
        self.members: Dict[int, Member] = {}
        """This process's part of the arena, by bytes of a slot."""
        self.rows: Dict[str, Tuple[Member, int]] = {}
        """Locations in the arena -> what part they lie in, and where their slots begin in its row."""
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
        self.dirty: Dict[str, npt.NDArray[np.bool_]] = {}
        """Which slots hold, or held, something: what must be wiped before other hands use them."""

    def lay_out(
        self,
        locations: Sequence[Tuple[str, int]],
        slot_bytes: int,
        touch_slots: int = 0,
        other_bytes: Mapping[str, int] = _NONE,
    ) -> bool:
        """Give each (name, slots) its place. True if a slab was made or dropped, so that it must be registered anew.
        The first ``touch_slots`` slots of each, which are used first, are faulted in. ``other_bytes``: of a slot, in
        locations whose slots are not of ``slot_bytes``.

        What an earlier run left is overwritten first: it must never pass for this run's bytes.
        """
        self.wipe()
        changed = bool(self.others)
        self.others = []
        self.homes = {}
        self.rows = {}
        self._close_stores()
        size_of = {name: other_bytes.get(name, slot_bytes) for name, _ in locations}
        if self.arena:
            changed = self._into_arena(locations, size_of) or changed
        wanted = sum(slots * size_of[name] for name, slots in locations if kind_of(name) == "cpu" and not self.arena)
        if wanted > physical_bytes():  # the kernel would promise it, and kill whoever takes it at its word
            raise SlabError(f"the CPU locations ask for {gib(wanted)}, this machine has {gib(physical_bytes())}")
        if self.cpu is None or self.cpu.nbytes < wanted + PAGE:
            self.cpu = None
            self.cpu = Slab("cpu", _round(wanted + PAGE), self.shared)
            changed = True
        self.places = {}
        offset = PAGE  # the first page is the scratch page
        for name, slots in locations:
            kind = kind_of(name)
            slot_bytes = size_of[name]
            if name in self.rows:
                slab = self.homes[name][0]
                self.places[name] = Place(name, "DRAM", slab.address, slots, slot_bytes, ordered=False)
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
        self.dirty = {name: np.zeros(slots, dtype=np.bool_) for name, slots in locations}
        self.generation += changed
        self.layout += 1
        return changed

    def _into_arena(self, locations: Sequence[Tuple[str, int]], size_of: Mapping[str, int]) -> bool:
        """Lay the CPU locations out in the arena, those with slots of one size beside each other. True if it is mapped
        anew."""
        wanted: Dict[int, Dict[str, int]] = {}
        for name, slots in locations:
            if kind_of(name) == "cpu":
                wanted.setdefault(size_of[name], {})[name] = slots
        if wanted:
            self.leave_arena(keep=[size for size in wanted if self._joined(size)])
        for size, named in wanted.items():
            try:
                room = self.arena_rooms.get(size, self.arena_bytes)
                if size not in self.members:
                    self.members[size] = join(self.arena, f"{os.getpid()}", size, room)
                member = self.members[size]
                member.lay_out(sum(named.values()))
            except ArenaError as error:
                raise SlabError(str(error)) from error
            slab = Slab.over(member.arena.bytes)
            self.others.append(slab)
            row = 0
            for name, slots in named.items():
                self.rows[name] = (member, row)
                self.homes[name] = (slab, 0)
                row += slots
        return bool(wanted)

    def _joined(self, slot_bytes: int) -> bool:
        """Whether this process has a part of the arena that is named now."""
        member = self.members.get(slot_bytes)
        return member is not None and str(member.arena.folder.parent) == self.arena

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

    def share(self, source: str, out: Slots, target: str, into: Slots) -> bool:
        """Make slots of ``target`` what those of ``source`` are, if both lie in the arena."""
        member = self.member(source)
        if member is None or self.member(target) is not member:
            return False
        self.note(target, into)
        member.take(member.number, self.row(source, out), self.row(target, into))
        return True

    def member(self, location: str) -> Optional[Member]:
        """The part of the arena that it lies in; None: in none."""
        found = self.rows.get(location)
        return found[0] if found is not None else None

    def alone(self, location: str, slot: int) -> None:
        """A slot is about to be changed in place: nobody else's view of it may change."""
        member = self.member(location)
        if member is not None:
            member.own(self.row(location, [slot]), keep=True)

    def note(self, location: str, slots: Slots) -> None:
        """These slots come to hold something."""
        self.dirty[location][ints(slots)] = True

    def leave_arena(self, keep: Sequence[int] = ()) -> None:
        """Let go of all that this process has there. ``keep``: but for what has slots of these sizes."""
        for size in [size for size in self.members if size not in keep]:
            member = self.members.pop(size)
            self.rows = {name: row for name, row in self.rows.items() if row[0] is not member}
            member.leave()

    def row(self, location: str, slots: Slots) -> Ints:
        """What slots are called in the arena."""
        return ints(slots) + self.rows[location][1]

    def start(self, location: str, slot: int) -> int:
        """Where a slot begins in its slab's bytes."""
        if location in self.rows:
            member, first = self.rows[location]
            return member.offset(first + slot)
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

    def check_all(self, location: str, slots: Ints, sizes: Ints) -> None:
        """``check`` of many; SlabError for negative sizes too."""
        if len(sizes):
            largest = int(sizes.max())
            for slot in (int(slots.min()), int(slots.max())):
                self.check(location, slot, largest)
            if int(sizes.min()) < 0:
                raise SlabError(f"{location}: no slots of {int(sizes.min())} bytes")

    def addresses(self, location: str, slots: Slots) -> Ints:
        """Where these slots begin, in this process's address space or its GPU's."""
        place = self.places[location]
        member = self.member(location)
        if not place.ordered and member is not None:
            return place.address + member.offsets(self.row(location, slots))
        return place.address + ints(slots) * place.slot_bytes

    def ranges(self, location: str, slots: Slots, sizes: Slots) -> List[Bytes]:
        """Views of the first so many bytes of each slot, in order; those that lie one after another are one. SlabError
        for what ``check`` and ``view`` refuse."""
        slots, sizes = ints(slots), ints(sizes)
        self.check_all(location, slots, sizes)
        if not len(sizes):
            return []
        data, _ = self._in_place(location)
        starts = self.starts(location, slots)
        begin = firsts(starts, sizes)
        ends = starts[begin] + np.add.reduceat(sizes, begin)
        return [data[start:end] for start, end in zip(starts[begin].tolist(), ends.tolist())]

    def starts(self, location: str, slots: Ints) -> Ints:
        """Where slots begin in their slab's bytes."""
        member = self.member(location)
        if member is not None:
            return member.offsets(self.row(location, slots))
        return self.homes[location][1] + slots * self.places[location].slot_bytes

    def view(self, location: str, slot: int, nbytes: int) -> Bytes:
        """The first ``nbytes`` bytes of a slot, not a copy. GPU memory and disks have none: see ``put`` and ``get``."""
        self.check(location, slot, nbytes)
        data, _ = self._in_place(location)
        first = self.start(location, slot)
        return data[first : first + nbytes]

    def _in_place(self, location: str) -> Tuple[Bytes, int]:
        """The bytes of the slab in which it lies, and where in them it begins."""
        if not self.mapped(location):
            what = "on a disk" if self.on_disk(location) else "GPU memory"
            raise SlabError(f"{location} is {what}: its bytes cannot be looked at in place")
        slab, first = self.homes[location]
        return slab.bytes, first

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

    def soil(self, location: str, slots: Slots, poison: bool = False) -> None:
        """Note that these slots are about to be written; ``poison`` spoils what they hold, every MiB, so that a
        copy which did not happen cannot be taken for one that did. In the arena they are nobody else's from now on."""
        member = self.member(location)
        if member is not None:
            member.own(self.row(location, slots))
        slots = ints(slots)
        used = slots[self.dirty[location][slots]]
        self.note(location, slots)
        if not len(used):
            return
        if location in self.stores:
            self.stores[location].drop(used.tolist())
        elif poison and not self.on_gpu(location):
            self._poison(location, used)

    def forget(self, location: str, slots: Slots) -> None:
        """What was written there has come to nothing: a disk keeps none of it."""
        if location in self.stores:
            with contextlib.suppress(OSError):
                self.stores[location].drop(ints(slots).tolist())

    def _poison(self, location: str, slots: Ints) -> None:
        """Slots that lie one after another at once: a copy may have thousands."""
        size = self.places[location].slot_bytes
        for run in self.ranges(location, slots, np.full(len(slots), size)):
            run[:64] = run[-64:] = POISON
            if len(run) > size >= 64:  # the end of one slot and the beginning of the next are one piece
                run[size - 64 : -64].reshape(-1, size)[:, :128] = POISON
            if size > POISON_STRIDE:
                run.reshape(-1, size)[:, ::POISON_STRIDE] = POISON

    def wipe(self, keep: Sequence[Tuple[str, int]] = ()) -> int:
        """Overwrite every slot that was ever written and is not in ``keep``; returns how many bytes."""
        count = 0
        for location, dirty in self.dirty.items():
            held = [slot for name, slot in keep if name == location and dirty[slot]]
            dirty[held] = False
            slots = np.flatnonzero(dirty)
            if len(slots):
                self._wipe(location, slots)
                count += len(slots) * self.places[location].slot_bytes
            dirty[:] = False
            dirty[held] = True
        return count

    def _wipe(self, location: str, slots: Ints) -> None:
        size = self.places[location].slot_bytes
        member = self.member(location)
        if member is not None:
            member.drop(self.row(location, slots))
        elif location in self.stores:
            self.stores[location].drop(slots.tolist())
        elif self.on_gpu(location):
            for slot in slots.tolist():
                self.put(location, slot, np.full(size, POISON, dtype=np.uint8))
        else:
            for run in self.ranges(location, slots, np.full(len(slots), size)):
                run[:] = POISON


def _round(nbytes: int) -> int:
    """To a whole number of huge pages, at least 64 MiB: small runs that follow one another then share one slab."""
    return max(64 << 20, -(-nbytes // HUGE) * HUGE)
