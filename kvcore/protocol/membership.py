"""Who may speak for which place: registration, probes, belief, death, and the inventories that the view follows."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple, final

from kvcore.protocol.chunks import namespace_mismatch
from kvcore.protocol.config import Config, differences
from kvcore.protocol.coordinator import Coordinator
from kvcore.protocol.fanout import Fanouts
from kvcore.protocol.machine import Effect, EpochIssued, Journal, Note, Send, TimerName, Timers
from kvcore.protocol.messages import (
    Alive,
    Beat,
    Cleared,
    Delta,
    Expelled,
    PeerGone,
    Probe,
    Register,
    Registered,
    RegisterRefused,
    Resync,
    Snap,
    Suspect,
    event_id,
)
from kvcore.protocol.registry import Rank, Registry, View

VERSION = 1
MAX_RANKS = 1024
"""Of one instance: whoever claims more would make this machine count for as long as it says."""


@final
class Probing:
    """A second process claims a place: is the first one still there?"""

    def __init__(self, number: int, address: str, register: Register, known: Rank, until_ns: int) -> None:
        self.number: int = number
        self.address: str = address
        self.register: Register = register
        self.known: Rank = known
        self.until_ns: int = until_ns


@final
class Membership:
    def __init__(
        self, registry: Registry, moves: Coordinator, fanouts: Fanouts, timers: Timers, config: Config
    ) -> None:
        self.registry: Registry = registry
        self.moves: Coordinator = moves
        self.fanouts: Fanouts = fanouts
        self.timers: Timers = timers
        self.config: Config = config
        self.incarnation: int = 0
        self.epochs: int = 0
        self.probing: Dict[Tuple[str, int], Probing] = {}

    def on_register(self, now: int, src: str, m: Register, out: List[Effect]) -> None:
        if m.version != VERSION:
            self._refuse(src, m, "version", str(VERSION), str(m.version), out)
            return
        if not 0 <= m.rank < m.namespace.ranks <= MAX_RANKS:
            self._refuse(src, m, "ranks", f"at most {MAX_RANKS}", f"rank {m.rank} of {m.namespace.ranks}", out)
            return
        for one in m.locations:
            if one.namespace is not None and one.namespace.ranks != m.namespace.ranks:
                got = f"{one.name} with {one.namespace.ranks}"
                self._refuse(src, m, "ranks", f"{m.namespace.ranks} in all locations", got, out)
                return
        other = differences(self.config, m.constants)
        beat = next((theirs for name, _, theirs in other if name == "beat_ns"), 0)
        if 2 * beat > self.config.dead_ns:
            have = f"dead_ns={self.config.dead_ns}"
            self._refuse(src, m, "constants", have, f"beat_ns={beat}, of which two must fit into it", out)
            return
        known = self._known(m)
        difference = self._difference(m)
        if difference is not None:
            self._refuse(src, m, "mismatch", difference[0], difference[1], out)
        elif known is not None and known.register.nonce == m.nonce and known.address == src:
            out.append(Send(src, Registered(self.incarnation, m.nonce, known.epoch)))
        elif known is not None:
            self._probe(now, src, m, known, out)
        else:
            self._issue(now, src, m, out)

    def _known(self, m: Register) -> Optional[Rank]:
        """Who has that place: a believed process, or one that only the journal knows and that may still be there."""
        known = self.registry.ranks.get((m.instance, m.rank))
        if known is None:
            for rank in self.registry.waiting.get(self.registry.number(m), []):
                if rank.epoch < event_id(self.incarnation, 0) and rank.register.nonce != m.nonce:
                    known = rank
        return known

    def _difference(self, m: Register) -> Optional[Tuple[str, str]]:
        """All ranks of an instance have one namespace, and one in each location: both sides' values where another
        believed rank differs."""
        for rank in range(m.namespace.ranks):
            other = self.registry.ranks.get((m.instance, rank))
            if other is not None and rank != m.rank:
                spaces = [(other.register.namespace, m.namespace)]
                spaces += [(other.space(one.name), one.namespace) for one in m.locations if one.namespace is not None]
                return next((found for pair in spaces if (found := namespace_mismatch(*pair)) is not None), None)
        return None

    def _refuse(self, src: str, m: Register, why: str, have: str, got: str, out: List[Effect]) -> None:
        out.append(Send(src, RegisterRefused(self.incarnation, m.nonce, why, have, got)))
        out.append(Note("register_refused", 0, f"{m.instance} rank {m.rank} at {src}: {why}, have {have}, got {got}"))

    def _issue(self, now: int, src: str, m: Register, out: List[Effect]) -> None:
        for rank in self.registry.waiting.get(self.registry.number(m), []):
            if rank.address == src and rank.register.nonce == m.nonce and rank.epoch >> 32 == self.incarnation:
                out.append(Send(src, Registered(self.incarnation, m.nonce, rank.epoch)))
                return
        other = differences(self.config, m.constants)
        if other:
            text = ", ".join([f"{name} is {mine} here, {theirs} there" for name, mine, theirs in other])
            out.append(Note("constants_differ", 0, f"{m.instance} rank {m.rank} at {src}: {text}"))
        self.epochs += 1
        epoch = event_id(self.incarnation, self.epochs)
        rank = self.registry.issue(src, epoch, m, False)
        known = self.registry.ranks.get((m.instance, m.rank))
        rank.over = known.epoch if known is not None else 0
        out.append(Journal(EpochIssued(src, epoch, m)))
        out.append(Send(src, Registered(self.incarnation, m.nonce, epoch)))
        if not self.config.rules.h32:
            self._believe(now, rank, out)

    def _probe(self, now: int, src: str, m: Register, known: Rank, out: List[Effect]) -> None:
        who = (m.instance, m.rank)
        probing = self.probing.get(who)
        if probing is None:
            probing = Probing(known.number, src, m, known, now + 3 * self.config.retry_ns)
            self.probing[who] = probing
            self.timers.set(("probe", known.number, 0), probing.until_ns)
        if probing.address == src:
            out.append(Send(known.address, Probe(self.incarnation, m.nonce)))

    def on_alive(self, now: int, src: str, m: Alive, out: List[Effect]) -> None:
        for who, probing in list(self.probing.items()):
            if probing.register.nonce != m.nonce or probing.known.address != src:
                continue
            if m.epoch == probing.known.epoch:
                self._probed(who, probing)
                since = f"{src}, since {probing.known.register.since_ns} ns"
                self._refuse(probing.address, probing.register, "duplicate_id", since, probing.address, out)
            elif m.mine == probing.register.nonce:
                # The claimant itself answers at the known address: the one before it is gone.
                self._probed(who, probing)
                self._issue(now, probing.address, probing.register, out)

    def on_probe_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        for who, probing in list(self.probing.items()):
            if probing.number == name[1]:
                self._probed(who, probing)
                self._issue(now, probing.address, probing.register, out)

    def _probed(self, who: Tuple[str, int], probing: Probing) -> None:
        del self.probing[who]
        self.timers.cancel(("probe", probing.number, 0))

    def _believe(self, now: int, rank: Rank, out: List[Effect]) -> None:
        old = self.registry.ranks.get((rank.register.instance, rank.register.rank))
        if old is not None:
            # Under another address it may be another process, and the old one merely not heard of.
            self._out(now, old, "restarted" if old.address == rank.address else "replaced", out)
        who = (rank.register.instance, rank.register.rank)
        probing = self.probing.get(who)
        if probing is not None and probing.register.nonce == rank.register.nonce:
            # A double of the Register that it once sent: the claim is settled, and must not bring a second epoch.
            self._probed(who, probing)
        self.registry.believe(now, rank)
        self.fanouts.believed(rank.register.instance, rank.register.rank, rank.register.nonce, out)
        self.timers.set(("dead", rank.number, 0), now + self.config.dead_ns)
        out.append(Note("believed", rank.epoch, rank.address))

    def _out(self, now: int, rank: Rank, why: str, out: List[Effect]) -> None:
        """A process is not believed any more."""
        self.registry.drop(rank)
        self.timers.cancel(("dead", rank.number, 0))
        self.moves.participant_changed(now, rank.address, "", why, out)
        self.fanouts.participant_changed(now, rank.address, out)

    def on_dead_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        for rank in self.registry.ranks.values():
            if rank.number == name[1]:
                out.append(Note("dead", rank.epoch, rank.address))
                self._out(now, rank, "dead", out)
                return

    def on_restored_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        """Whoever the journal knew and who has not been heard since is not waited for any longer."""
        self.registry.forget_issued_before(event_id(self.incarnation, 0))

    def on_suspect(self, now: int, src: str, m: Suspect, out: List[Effect]) -> None:
        rank = self.registry.by_address.get(m.peer)
        if (rank is None or rank.epoch != m.epoch) and (m.peer, m.epoch) not in self.registry.issued:
            out.append(Send(src, PeerGone(self.incarnation, m.peer, m.epoch)))

    # ---- inventories
    def on_beat(self, now: int, src: str, m: Beat, out: List[Effect]) -> None:
        rank = self.registry.by_address.get(src)
        if rank is None or rank.epoch != m.epoch:
            issued = self.registry.issued.get((src, m.epoch))
            if issued is None or (rank is not None and rank.epoch > m.epoch):
                out.append(Send(src, Expelled(self.incarnation, m.epoch)))
                return
            if self._difference(issued.register) is not None or self._overtaken(issued):
                # Its mates were believed meanwhile and differ, or another process of its id was, which nobody has
                # probed: it learns why when it registers anew.
                self.registry.forget_issued(issued)
                out.append(Send(src, Expelled(self.incarnation, m.epoch)))
                return
            rank = issued
            self._believe(now, rank, out)
        else:
            rank.heard_ns = now
            self.timers.set(("dead", rank.number, 0), now + self.config.dead_ns)
        for item in m.locations:
            view = rank.views.get(item.location)
            if view is not None and item.inc > view.inc:
                self._new_inc(now, src, item.location, view, item.inc, out)
        for location in self.registry.beat(rank, m):
            out.append(Send(src, Resync(self.incarnation, location)))

    def _overtaken(self, issued: Rank) -> bool:
        """Has another process taken its place since it was issued?"""
        known = self.registry.ranks.get((issued.register.instance, issued.register.rank))
        return known is not None and known.address != issued.address and issued.over not in (-1, known.epoch)

    def _new_inc(self, now: int, src: str, location: str, view: View, inc: Tuple[int, int], out: List[Effect]) -> None:
        """The location has been cleared; or I have been restarted and hear of it for the first time."""
        known = view.inc[1] >= 0
        self.registry.reset(view, inc)
        if known:
            self.moves.participant_changed(now, src, location, "cleared", out)
            rank = self.registry.by_address.get(src)
            if rank is not None:
                self.fanouts.cleared((rank.register.instance, location), out)

    def _view(self, src: str, location: str, inc: Tuple[int, int]) -> Optional[View]:
        rank = self.registry.by_address.get(src)
        if rank is None or rank.epoch != inc[0]:
            return None
        return rank.views.get(location)

    def on_delta(self, now: int, src: str, m: Delta, out: List[Effect]) -> None:
        view = self._view(src, m.location, m.inc)
        if view is None:
            out.append(Note("stale_epoch", 0, f"Delta from {src}"))
            return
        if m.inc > view.inc:
            self._new_inc(now, src, m.location, view, m.inc, out)
        if not self.registry.delta(view, m):
            out.append(Send(src, Resync(self.incarnation, m.location)))

    def on_snap(self, now: int, src: str, m: Snap, out: List[Effect]) -> None:
        view = self._view(src, m.location, m.inc)
        if view is None:
            out.append(Note("stale_epoch", 0, f"Snap from {src}"))
            return
        if m.inc > view.inc:
            self._new_inc(now, src, m.location, view, m.inc, out)
        self.registry.snap(view, m)

    def on_cleared(self, now: int, src: str, m: Cleared, out: List[Effect]) -> None:
        view = self._view(src, m.location, m.inc)
        if view is not None and m.inc > view.inc:
            self._new_inc(now, src, m.location, view, m.inc, out)
        self.fanouts.on_cleared(now, src, m, out)
