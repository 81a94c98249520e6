"""Copies: from one process's slots to another's, over the fabric, with everything that may happen on the way.

What a driver owes (kvcore/protocol/machine.py): CopyDone(ok) only after the last byte; every copy ends; nothing lands
after CopyStopped, CopyDone or WindowClosed; a write addressed to an old epoch never lands. The bytes that land are what
the source's slots hold *when the copy ends*, so that a missing fence really gives wrong ones; from a copy's start to
its end its target slots hold nobody's bytes.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, Dict, Final, List, Optional, Tuple, final

from kvcore.protocol.machine import CopyDone, CopyMoved, CopyStopped, StartCopy, WindowClosed
from kvcore.protocol.messages import Rid
from kvcore.scenario.faults import CopyFate
from kvcore.scenario.topology import kind_of
from kvsim.costs import CopyCost, Copying, bytes_per_s
from kvsim.memory import TORN, Memory, copy_slots
from kvsim.network import Path, Site

if TYPE_CHECKING:
    from kvsim.cluster import Cluster
    from kvsim.node import Node

PEER_GONE: Final = "peer is gone"
OTHER_EPOCH: Final = "peer has another epoch"
WINDOW_CLOSED: Final = "window closed"
TIMED_OUT: Final = "took longer than copy_max"
INJECTED: Final = "injected failure"
NOWHERE: Final[Path] = ((), 0, 0.0)


@final
class Transfer:
    """One copy under way. ``owner`` is who asked for it: the reader, or the writer of a push."""

    __slots__ = (
        "before",
        "behind",
        "cost",
        "crossed",
        "effect",
        "ended",
        "epoch",
        "fate",
        "fid",
        "knocking",
        "nbytes",
        "owner",
        "path",
        "peer",
        "queue_ns",
        "start_ns",
        "told",
    )

    def __init__(self, owner: Node, peer: Node, effect: StartCopy, nbytes: int, start_ns: int) -> None:
        self.owner: Node = owner
        self.peer: Node = peer
        self.effect: StartCopy = effect
        self.epoch: int = owner.epoch()
        self.nbytes: int = nbytes
        self.start_ns: int = start_ns
        self.path: Path = NOWHERE
        self.cost: Optional[CopyCost] = None  # where the profile has measured such copies
        self.queue_ns: int = 0  # what it takes until its first byte, of which cost knows
        self.fate: Optional[CopyFate] = None
        self.fid: int = 0  # 0: no bytes are moving
        self.crossed: float = 0.0  # the fraction of the bytes that earlier flows of this copy have carried
        self.told: int = 0  # how many tokens it was last said to have moved
        self.ended: bool = False
        self.knocking: bool = False  # its peer is stopped, and cannot let it in
        self.before: Optional[Transfer] = None  # of the same move: its bytes cross first
        self.behind: Optional[Transfer] = None  # and this one's is the one that waits for mine

    def target(self) -> Memory:
        return self.owner.memory if self.effect.read else self.peer.memory

    def crosses(self) -> Tuple[Site, str, Site, str]:
        """Whence and whither its bytes go."""
        effect = self.effect
        if effect.read:
            return self.peer.site, effect.peer_location, self.owner.site, effect.location
        return self.owner.site, effect.location, self.peer.site, effect.peer_location

    def solo_rate(self) -> float:
        """Bytes a nanosecond, if it were alone on its links."""
        links, _, cap = self.path
        rate = cap / 1e9
        for link in links:
            if rate == 0.0 or link.capacity < rate:
                rate = link.capacity
        return rate


@final
class Transfers:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster: Cluster = cluster
        self.active: Dict[Rid, Transfer] = {}  # a reservation's id holds an epoch: no two are alike. Oldest first
        self.count: int = 0
        self.bytes: int = 0
        self.watching: bool = False
        self.telling: bool = False
        self.met: Dict[Tuple[str, int, str, int], None] = {}  # processes that have had a copy with another

    # ---- effects ----------------------------------------------------------------------------------------------------
    def start(self, owner: Node, effect: StartCopy, at_ns: int) -> None:
        """The owner's StartCopy leaves it at ``at_ns``."""
        cluster = self.cluster
        peer = cluster.nodes[effect.peer]
        self.count += 1
        transfer = Transfer(owner, peer, effect, sum(effect.lens) * owner.bytes_per_token[effect.location], at_ns)
        self.active[effect.rid] = transfer
        if not self.watching:
            self.watching = True
            cluster.loop.at(at_ns + cluster.copy_max_ns, self._watch)
        if not self.telling:
            self.telling = True
            cluster.loop.at(at_ns + cluster.progress_ns, self._tell)
        fate: Optional[CopyFate] = None
        if cluster.plan_active:
            fate = transfer.fate = cluster.plan.copy(cluster.loop.now_ns, owner.name, effect)
        if peer.epoch() != effect.peer_epoch or not peer.alive or peer.closed:
            refused = self._refusal(transfer)
            if refused:
                late_ns = cluster.profile.peer_death_ns + (fate.delay_ns if fate is not None else 0)
                cluster.loop.at(at_ns + late_ns, self._fail, transfer, refused)
                return
        if effect.read:
            owner.memory.tear(effect.location, effect.slots)
        else:
            peer.memory.tear(effect.peer_location, effect.peer_slots)
        transfer.path = cluster.network.path(*transfer.crosses())
        if cluster.copying is not None:
            self._price(transfer, cluster.copying)
        before = self.active.get(effect.after)
        if before is not None and before.owner is owner and before.behind is None:
            transfer.before = before
            before.behind = transfer
        elif peer.paused:
            transfer.knocking = True
        else:
            self._begin(transfer, at_ns - cluster.loop.now_ns)

    def _price(self, transfer: Transfer, copying: Copying) -> None:
        """As the profile has measured it; what a scenario says of its network holds in any case."""
        _, source, _, target = transfer.crosses()
        cost = transfer.cost = copying.cost(source, target, transfer.owner is transfer.peer, not transfer.effect.read)
        host = self.cluster.network.host
        if cost is not None:
            transfer.queue_ns = cost.queue_ns
            ends = (transfer.owner.name, transfer.owner.life, transfer.peer.name, transfer.peer.life)
            if ends not in self.met:
                self.met[ends] = None
                transfer.queue_ns += cost.first_ns
        if cost is not None and host is not None:
            links, latency_ns, _ = transfer.path
            own = copying.links(cost, transfer.owner.name)
            slower = tuple([link for link in links if link is not host])
            transfer.path = (own + slower, latency_ns, bytes_per_s(cost, transfer.nbytes))

    def _overhead_ns(self, transfer: Transfer) -> int:
        """What it takes besides its bytes' time."""
        count = len(transfer.effect.slots)
        if transfer.cost is not None:
            more_ns = transfer.queue_ns - transfer.cost.queue_ns
            return transfer.path[1] + transfer.cost.overhead_ns(count) + more_ns + 2 * self._sums_ns(transfer)
        return transfer.path[1] + self.cluster.profile.transfer_overhead_ns(count) + 2 * self._sums_ns(transfer)

    def _sums_ns(self, transfer: Transfer) -> int:
        """Before its first byte at its source, and after its last at its destination."""
        cluster = self.cluster
        if cluster.checksums == "off" or not _summed(transfer.effect):
            return 0
        return cluster.profile.sums_ns(len(transfer.effect.slots), transfer.nbytes, cluster.checksums)

    def _refusal(self, transfer: Transfer) -> str:
        peer = transfer.peer
        effect = transfer.effect
        if not peer.alive:
            return PEER_GONE
        if peer.epoch() != effect.peer_epoch:
            return OTHER_EPOCH
        if not effect.read and (transfer.owner.name, transfer.epoch) in peer.closed:
            return WINDOW_CLOSED
        return ""

    def _begin(self, transfer: Transfer, after_ns: int) -> None:
        """Its peer lets it in: as far as the fault plan lets it go, if that was asked."""
        links, latency_ns, cap = transfer.path
        nbytes = transfer.nbytes
        overhead_ns = self._overhead_ns(transfer)
        terms = transfer.effect.terms
        if terms is not None and terms.cap_bytes_per_s:
            cap = min(cap, terms.cap_bytes_per_s) if cap else terms.cap_bytes_per_s
            transfer.path = (links, latency_ns, cap)
        fate = transfer.fate
        if fate is not None:
            if fate.fail or fate.stuck:
                nbytes = int(nbytes * fate.fraction)
            if fate.slow > 1.0:
                cap = transfer.solo_rate() * 1e9 / fate.slow
                transfer.path = (links, latency_ns, cap)
                overhead_ns = round(overhead_ns * fate.slow)
            after_ns += fate.delay_ns
        self._flow(transfer, nbytes, after_ns + overhead_ns)

    def _flow(self, transfer: Transfer, nbytes: int, after_ns: int) -> None:
        links, _, cap = transfer.path
        terms = transfer.effect.terms
        if terms is not None and not terms.priority and terms.weight == 1:
            terms = None  # only capped
        transfer.fid = self.cluster.fabric.start(
            links, nbytes, self._crossed, transfer, cap, after_ns, transfer.owner, terms
        )

    def abort(self, owner: Node, rid: Rid, at_ns: int) -> None:
        """AbortCopy: whatever has crossed by now has landed; nothing will after CopyStopped."""
        transfer = self.active.get(rid)
        if transfer is None or transfer.owner is not owner:
            if owner.has_queued(CopyDone, rid):
                return  # it has won the race
        else:
            self._stop(transfer)
        cluster = self.cluster
        cluster.loop.at(at_ns + cluster.profile.abort_ns, owner.give, CopyStopped(rid), owner.life)

    def close_window(self, owner: Node, peer: str, epoch: int, at_ns: int) -> None:
        """Nothing that process (peer, epoch) writes lands at ``owner`` from now on."""
        cluster = self.cluster
        owner.closed[(peer, epoch)] = None
        for transfer in self.active.values():
            if transfer.peer is owner and _writes(transfer, peer, epoch):
                self._halt(transfer)
                cluster.loop.at(cluster.loop.now_ns, self._fail, transfer, WINDOW_CLOSED)
        cluster.loop.at(at_ns + cluster.profile.window_ns, owner.give, WindowClosed(peer, epoch), owner.life)

    # ---- what happens to nodes --------------------------------------------------------------------------------------
    def crashed(self, node: Node) -> None:
        """The node's own copies end with it, silently; those of others with it fail when they notice."""
        cluster = self.cluster
        for transfer in list(self.active.values()):
            if transfer.owner is node:
                self._stop(transfer)
            elif transfer.peer is node:
                self._halt(transfer)
                cluster.loop.at(cluster.loop.now_ns + cluster.profile.peer_death_ns, self._fail, transfer, PEER_GONE)

    def paused(self, node: Node) -> None:
        """A stopped process moves no bytes, and lets nobody in; what others have begun with it goes on."""
        for transfer in self.active.values():
            if transfer.owner is node:
                self._halt(transfer)

    def resumed(self, node: Node) -> None:
        for transfer in self.active.values():
            begun = transfer.path is not NOWHERE and transfer.before is None
            if transfer.knocking:
                self._let_in(transfer)
            elif transfer.owner is node and transfer.fid == 0 and begun and not _is_stuck(transfer):
                self._flow(transfer, int(transfer.nbytes * (1.0 - transfer.crossed)), 0)

    def _next(self, transfer: Transfer) -> None:
        """Its bytes are over: those that wait behind them go, all that comes before a first byte being done by now."""
        waiting = transfer.behind
        transfer.behind = None
        if waiting is None or waiting.ended:
            return
        waiting.before = None
        if waiting.peer.paused or waiting.owner.paused:
            waiting.knocking = True
        else:
            ready_ns = waiting.start_ns + self._ready_ns(waiting)
            self._begin(waiting, max(0, ready_ns - self.cluster.loop.now_ns) - self._ready_ns(waiting))

    def _ready_ns(self, transfer: Transfer) -> int:
        """How long it takes a copy to be where its first byte can move."""
        own_ns = self.cluster.profile.transfer_ns if transfer.cost is None else transfer.queue_ns
        return transfer.path[1] + own_ns + self._sums_ns(transfer)

    def _let_in(self, transfer: Transfer) -> None:
        if not transfer.owner.paused and not transfer.peer.paused:
            transfer.knocking = False
            self._begin(transfer, 0)

    # ---- ends -------------------------------------------------------------------------------------------------------
    def _crossed(self, transfer: Transfer) -> None:
        """The last byte of the flow is over."""
        transfer.fid = 0
        fate = transfer.fate
        if transfer.behind is not None:
            self._next(transfer)
        if fate is not None and (fate.fail or fate.stuck):
            transfer.crossed = fate.fraction
            if fate.fail:
                self._fail(transfer, INJECTED)
            return
        effect = transfer.effect
        if not effect.read and transfer.peer.epoch() != effect.peer_epoch:
            self._fail(transfer, OTHER_EPOCH)
            return
        if fate is not None and fate.corrupt and self.cluster.checksums == "all" and _summed(effect):
            transfer.fate = None  # found, and made once more
            self._begin(transfer, 0)
            return
        self._land(transfer, 1.0)
        if fate is not None and fate.corrupt:
            transfer.target().tear(*_first_slot(effect))
        transfer.ended = True
        del self.active[effect.rid]
        self.bytes += transfer.nbytes
        cluster = self.cluster
        if cluster.queued is not None:
            waited_ns = transfer.queue_ns
            if transfer.cost is None:  # all that others have made it wait; a real driver counts until the first byte
                solo_ns = self._overhead_ns(transfer) + ceil(transfer.nbytes / transfer.solo_rate())
                waited_ns = max(0, cluster.loop.now_ns - transfer.start_ns - solo_ns)
            cluster.queued(effect.rid, waited_ns)
        transfer.owner.on_arrival(CopyDone(effect.rid, True), None)

    def _fail(self, transfer: Transfer, why: str) -> None:
        if transfer.ended:
            return
        self._stop(transfer)
        transfer.owner.on_arrival(CopyDone(transfer.effect.rid, False, why), None)

    def _stop(self, transfer: Transfer) -> None:
        """End it where it is: what has crossed has landed."""
        self._halt(transfer)
        if transfer.crossed > 0.0:
            self._land(transfer, transfer.crossed)
        self._end(transfer)

    def _halt(self, transfer: Transfer) -> None:
        if transfer.fid:
            part = self.cluster.fabric.cancel(transfer.fid)
            transfer.crossed += (1.0 - transfer.crossed) * part
            transfer.fid = 0

    def _end(self, transfer: Transfer) -> None:
        transfer.ended = True
        del self.active[transfer.effect.rid]
        if transfer.before is not None:
            transfer.before.behind = transfer.behind
            if transfer.behind is not None:
                transfer.behind.before = transfer.before
        elif transfer.behind is not None:
            self._next(transfer)

    def _land(self, transfer: Transfer, fraction: float) -> None:
        effect = transfer.effect
        if not effect.read and (not transfer.peer.alive or transfer.peer.epoch() != effect.peer_epoch):
            return  # addressed to an old life
        ours = transfer.owner.memory.slots[effect.location]
        theirs = transfer.peer.memory.slots[effect.peer_location]
        lens = effect.lens
        if fraction < 1.0:
            whole = int(fraction * len(lens))
            lens = lens[:whole]
            if whole < len(effect.lens):
                self._tear_at(transfer, whole)
        if effect.read:
            copy_slots(theirs, effect.peer_slots, ours, effect.slots, lens)
        else:
            copy_slots(ours, effect.slots, theirs, effect.peer_slots, lens)
        landed = self.cluster.on_landed
        if landed is not None:
            if effect.read:
                landed(transfer.owner, effect.location, effect.slots)
            else:
                landed(transfer.peer, effect.peer_location, effect.peer_slots)

    def _tear_at(self, transfer: Transfer, index: int) -> None:
        """The chunk that was being written when the copy ended: whatever stood there is half overwritten."""
        effect = transfer.effect
        if effect.read:
            transfer.owner.memory.slots[effect.location][effect.slots[index]] = TORN
        else:
            transfer.peer.memory.slots[effect.peer_location][effect.peer_slots[index]] = TORN

    def _tell(self, _: Any, __: Any) -> None:
        """How far copies are that have run for a while: one alarm for all of them."""
        cluster = self.cluster
        now = cluster.loop.now_ns
        for transfer in list(self.active.values()):
            if transfer.start_ns + cluster.progress_ns > now:
                break
            if not transfer.ended and not transfer.owner.paused:
                here = transfer.crossed
                if transfer.fid:
                    here += (1.0 - here) * cluster.fabric.progress(transfer.fid)
                num_tokens = int(here * sum(transfer.effect.lens))
                if num_tokens > transfer.told:
                    transfer.told = num_tokens
                    transfer.owner.on_arrival(CopyMoved(transfer.effect.rid, num_tokens), None)
        self.telling = bool(self.active)
        if self.telling:
            cluster.loop.at(now + cluster.progress_ns, self._tell)

    def _watch(self, _: Any, __: Any) -> None:
        """Every copy ends within copy_max: one alarm, for the oldest."""
        cluster = self.cluster
        now = cluster.loop.now_ns
        for transfer in list(self.active.values()):
            if transfer.start_ns + cluster.copy_max_ns > now:
                cluster.loop.at(transfer.start_ns + cluster.copy_max_ns, self._watch)
                return
            self._fail(transfer, TIMED_OUT)
        self.watching = False


def _writes(transfer: Transfer, writer: str, epoch: int) -> bool:
    return not transfer.effect.read and transfer.owner.name == writer and transfer.epoch == epoch


def _summed(effect: StartCopy) -> bool:
    """Whether its bytes are compared; disks have sums of their own."""
    return "disk" not in (kind_of(effect.location), kind_of(effect.peer_location))


def _is_stuck(transfer: Transfer) -> bool:
    return transfer.fate is not None and transfer.fate.stuck


def _first_slot(effect: StartCopy) -> Tuple[str, List[int]]:
    if effect.read:
        return effect.location, [effect.slots[0]]
    return effect.peer_location, [effect.peer_slots[0]]
