"""Who is there, under which epoch, and what each holds (the view).

An epoch is issued at Register and believed at its first Beat, so that a late Register of a dead process is never
believed (H32). The view follows inventories by (inc, seq): a gap is asked for anew, a repeated Delta changes nothing.
"""

from __future__ import annotations

from typing import Collection, Dict, List, Optional, Sequence, Tuple, final

from kvcore.protocol.config import Config
from kvcore.protocol.messages import Beat, Delta, Entry, Found, Inc, Key, Namespace, Position, Register, Snap
from kvcore.protocol.pool import FEW


@final
class Place:
    """One location of one instance: how many of its ranks hold a key decides whether the key is visible there."""

    def __init__(self, instance: str, location: str, ranks: int) -> None:
        self.instance: str = instance
        self.location: str = location
        self.ranks: int = ranks


@final
class View:
    """One location of one rank, as its Deltas and Snaps say."""

    def __init__(self, place: Place, inc: Inc) -> None:
        self.place: Place = place
        self.inc: Inc = inc
        self.seq: int = 0
        self.entries: Dict[Key, Entry] = {}


def space_of(register: Register, location: str) -> Namespace:
    """What KV lies in a location of a process."""
    for one in register.locations:
        if one.namespace is not None and one.name == location:
            return one.namespace
    return register.namespace


@final
class Rank:
    """One process: a rank of an instance under one epoch."""

    def __init__(self, number: int, address: str, epoch: int, register: Register, clears: int) -> None:
        self.number: int = number
        self.address: str = address
        self.epoch: int = epoch
        self.register: Register = register
        #: how often its locations have been cleared when I first hear of it; -1: unknown
        self.clears: int = clears
        #: the epoch that had its place when it was issued, and may be displaced; 0: none had, -1: any may
        self.over: int = -1
        self.heard_ns: int = 0
        self.views: Dict[str, View] = {}

    def space(self, location: str) -> Namespace:
        """What KV lies there."""
        return space_of(self.register, location)

    def spaces(self) -> List[Namespace]:
        """Of all its locations."""
        return list({self.space(one.name): None for one in self.register.locations})


@final
class Registry:
    def __init__(self, config: Config) -> None:
        self.config: Config = config
        #: believed processes
        self.ranks: Dict[Tuple[str, int], Rank] = {}
        self.by_address: Dict[str, Rank] = {}
        #: (address, epoch) -> who was issued that epoch and has not been heard under it yet
        self.issued: Dict[Tuple[str, int], Rank] = {}
        #: the same by rank number
        self.waiting: Dict[int, List[Rank]] = {}
        self.places: Dict[Position, Place] = {}
        #: key -> place -> number of its ranks that hold the key. A table is never changed, but replaced: keys that came
        #: together share one.
        self.holders: Dict[Key, Dict[Place, int]] = {}
        self.numbers: Dict[Tuple[str, int], int] = {}

    # ---- processes
    def issue(self, address: str, epoch: int, register: Register, restored: bool) -> Rank:
        """``restored``: from the journal, so how often its locations were cleared since is not known."""
        number = self.number(register)
        rank = Rank(number, address, epoch, register, -1 if restored else 0)
        self.issued[(address, epoch)] = rank
        self.waiting.setdefault(number, []).append(rank)
        return rank

    def number(self, register: Register) -> int:
        return self.numbers.setdefault((register.instance, register.rank), len(self.numbers) + 1)

    def believe(self, now: int, rank: Rank) -> None:
        """From its first Beat on; whoever had the place before is out (its caller has seen to that)."""
        register = rank.register
        self._keep_issued(rank.number, rank.epoch)
        rank.heard_ns = now
        self.ranks[(register.instance, register.rank)] = rank
        self.by_address[rank.address] = rank
        for location in register.locations:
            position = (register.instance, location.name)
            place = self.places.get(position)
            if place is None:
                place = self.places[position] = Place(register.instance, location.name, register.namespace.ranks)
            rank.views[location.name] = View(place, (rank.epoch, rank.clears))

    def forget_issued_before(self, epoch: int) -> None:
        for number in list(self.waiting):
            self._keep_issued(number, epoch - 1)

    def forget_issued(self, rank: Rank) -> None:
        self._keep_issued(rank.number, rank.epoch)

    def _keep_issued(self, number: int, above_epoch: int) -> None:
        waiting = self.waiting.pop(number, [])
        left = [rank for rank in waiting if rank.epoch > above_epoch]
        if left:
            self.waiting[number] = left
        for rank in waiting:
            if rank.epoch <= above_epoch:
                del self.issued[(rank.address, rank.epoch)]

    def drop(self, rank: Rank) -> None:
        """Not believed any more: nothing that it held is there."""
        register = rank.register
        if self.ranks.get((register.instance, register.rank)) is rank:
            del self.ranks[(register.instance, register.rank)]
        if self.by_address.get(rank.address) is rank:
            del self.by_address[rank.address]
        for view in rank.views.values():
            self._empty(view)

    def instance(self, name: str) -> Optional[List[Rank]]:
        """All ranks of an instance, or None if it is unknown or not whole."""
        first = self.ranks.get((name, 0))
        if first is None:
            return None
        ranks = [first]
        for number in range(1, first.register.namespace.ranks):
            rank = self.ranks.get((name, number))
            if rank is None:
                return None
            ranks.append(rank)
        return ranks

    def instances(self) -> List[str]:
        return sorted({name: None for name, _ in self.ranks})

    def inc(self, address: str, location: str) -> Optional[Inc]:
        """The incarnation in which I believe that location to be."""
        rank = self.by_address.get(address)
        view = rank.views.get(location) if rank is not None else None
        return view.inc if view is not None else None

    def place(self, position: Position) -> Tuple[Optional[List[Rank]], str, str]:
        """(ranks, reason, detail): the ranks of a position, or why there are none, naming what is known."""
        ranks = self.instance(position[0])
        if ranks is None:
            known = ", ".join(self.instances())
            return None, "unknown_instance", f"{position[0]!r} is not here; known: {known or 'none'}"
        for rank in ranks:
            if position[1] not in rank.views:
                known = ", ".join(rank.views)
                return None, "unknown_location", f"{position[1]!r} is not at {position[0]}; known: {known}"
        return ranks, "", ""

    # ---- the view
    def _add(self, view: View, entries: Sequence[Entry]) -> None:
        added = {entry.key: entry for entry in entries}
        held = view.entries
        new = added if held.keys().isdisjoint(added) else [key for key in added if key not in held]
        self._count(view.place, new, 1)
        held.update(added)

    def _remove(self, view: View, keys: Sequence[Key]) -> None:
        pop = view.entries.pop
        self._count(view.place, [key for key in keys if pop(key, None) is not None], -1)

    def _count(self, place: Place, keys: Collection[Key], by: int) -> None:
        """So many more of a place's ranks hold each of these keys."""
        holders = self.holders
        if len(keys) >= FEW:
            before = list(map(holders.get, keys))
            table = _counted(before[0], place, by)
            if table and before.count(before[0]) == len(before):  # they came together, and change together
                holders.update(dict.fromkeys(keys, table))
                return
        for key in keys:
            table = _counted(holders.get(key), place, by)
            if table:
                holders[key] = table
            else:
                del holders[key]

    def _empty(self, view: View) -> None:
        self._remove(view, list(view.entries))

    def reset(self, view: View, inc: Inc) -> None:
        """The location has begun a new incarnation, empty as far as I know."""
        self._empty(view)
        view.inc = inc
        view.seq = 0

    def delta(self, view: View, m: Delta) -> bool:
        """Apply one step of an inventory. False: there is a gap, ask for a Snap."""
        if m.inc != view.inc or m.seq <= view.seq:
            return m.inc <= view.inc
        if m.seq != view.seq + 1:
            return False
        view.seq = m.seq
        if m.drops:
            self._remove(view, m.drops)
        if m.adds:
            self._add(view, m.adds)
        return True

    def snap(self, view: View, m: Snap) -> None:
        if m.inc != view.inc or m.seq < view.seq:
            return
        new = {entry.key: None for entry in m.entries}
        self._remove(view, [key for key in view.entries if key not in new])
        self._add(view, m.entries)
        view.seq = m.seq

    def beat(self, rank: Rank, m: Beat) -> List[str]:
        """Locations whose inventory is not what the view has (H29)."""
        stale: List[str] = []
        for item in m.locations:
            view = rank.views.get(item.location)
            if view is not None and (view.inc != item.inc or (view.seq != item.seq and self.config.rules.h29)):
                stale.append(item.location)
        return stale

    # ---- questions
    def lookup(self, keys: Sequence[Key], lens: Sequence[int]) -> Tuple[Found, ...]:
        """The longest prefix each place holds, the minimum over its ranks, in tokens."""
        holders = self.holders
        first = holders.get(keys[0]) if keys else None
        if first is None:
            return ()
        found: List[Found] = []
        for place, count in first.items():
            if count < place.ranks:
                continue
            n = 1
            tokens = lens[0]
            while n < len(keys):
                held = holders.get(keys[n])
                if held is None or held.get(place, 0) < place.ranks:
                    break
                tokens += lens[n]
                n += 1
            found.append(Found(place.instance, place.location, tokens))
        found.sort(key=lambda f: (f.instance, f.location))
        return tuple(found)

    def count(self, position: Position) -> int:
        """How many chunks any rank of a place holds."""
        keys: Dict[Key, None] = {}
        for rank in self.instance(position[0]) or []:
            keys.update(dict.fromkeys(rank.views[position[1]].entries))
        return len(keys)

    def chains(self, position: Position) -> List[Tuple[Tuple[Key, ...], Tuple[int, ...]]]:
        """All that a place holds, as root-to-leaf chains of (keys, lens), hottest leaf first. What some rank lacks is
        not there; what has lost an ancestor cannot be reached and is left out. The list is fixed here, once (H26)."""
        place = self.places.get(position)
        ranks = self.instance(position[0])
        if place is None or ranks is None:
            return []
        entries = ranks[0].views[position[1]].entries
        whole = {
            key: entry
            for key, entry in entries.items()
            if self.holders[key].get(place, 0) >= place.ranks or not self.config.rules.h26
        }
        parents = {entry.parent: None for entry in whole.values()}
        leaves = sorted(
            (entry for key, entry in whole.items() if key not in parents), key=lambda e: (-e.last_use_ns, e.key)
        )
        chains: List[Tuple[Tuple[Key, ...], Tuple[int, ...]]] = []
        for leaf in leaves:
            chain: List[Entry] = [leaf]
            while chain[-1].parent and chain[-1].parent in whole:
                chain.append(whole[chain[-1].parent])
            if not chain[-1].parent:
                chain.reverse()
                chains.append((tuple(e.key for e in chain), tuple(e.num_tokens for e in chain)))
        return chains


def _counted(held: Optional[Dict[Place, int]], place: Place, by: int) -> Dict[Place, int]:
    """A new table: ``held``, with so many more of a place's ranks."""
    if held is None:
        return {place: by}
    left = held.get(place, 0) + by
    if not left and len(held) == 1:
        return {}
    table = {**held, place: left}
    if not left:
        del table[place]
    return table
