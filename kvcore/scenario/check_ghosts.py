"""What a checker remembers of events: what each has begun, promised, pinned, committed and deleted, and its riders.

A rider of an event is one (rank, key) of what its commit relies on. It stands on an entry (a key in one location of one
rank); it follows when another event's move takes that entry away, and it is excused when the entry is evicted, cleared
or dies with its process. Those three are the only legitimate losses.
"""

from __future__ import annotations

from typing import Any, Dict, Final, List, Optional, Tuple, final

from kvcore.protocol.messages import Inc, Key, MoveRequest, Pid

Place = Tuple[str, str]
"""(node, location)."""

Rider = Tuple[int, Key]
"""(rank, key)."""

EXCUSED: Final[Place] = ("", "excused")
LOST: Final[Place] = ("", "lost")

ALIVE: Final = "alive"
OVER: Final = "over"  #: End has come, the location was cleared, or the process has died
EARLY: Final = "early"  #: a driver without time has fired its timer before it was due
LAPSED: Final = "lapsed"  #: its time has run out, or its process has taken a new epoch, and e was not over

OVER_KEPT: Final = 65_536


@final
class PinSeen:
    """A live pin as it was when it appeared. ``late``: its event had been decided already."""

    def __init__(self, pid: Pid, slots: Tuple[int, ...], late: bool) -> None:
        self.pid: Pid = pid
        self.slots: Tuple[int, ...] = slots
        self.late: bool = late


@final
class Ghost:
    """One event."""

    def __init__(
        self,
        number: int,
        request: MoveRequest,
        src: Tuple[str, ...],
        dst: Tuple[str, ...],
    ) -> None:
        self.number: int = number
        self.src: Tuple[str, ...] = src
        self.dst: Tuple[str, ...] = dst
        self.src_location: str = request.src[1]
        self.dst_location: str = request.dst[1]
        self.keys: Tuple[Key, ...] = request.keys
        self.lens: Tuple[int, ...] = request.lens
        self.copy: bool = request.copy
        self.position: Dict[Key, int] = {key: i for i, key in enumerate(request.keys)}
        #: num_tokens of the first answer; -1: none yet
        self.replied: int = -1
        #: n as decided; -1: not decided
        self.decided: int = -1
        self.decided_tokens: int = -1
        self.state: str = ""
        self.pins: Dict[str, PinSeen] = {}
        #: node -> (inc, n, how many of keys[:n] were visible then) of its newest commit
        self.commits: Dict[str, Tuple[Inc, int, int]] = {}
        #: node -> chunks that the event has taken out of its index
        self.drops: Dict[str, int] = {}
        self.riders: Dict[Rider, Place] = {}
        #: destination -> what became of its retention
        self.retained: Dict[str, str] = {}

    @property
    def drain(self) -> bool:
        """It only sums what its children do."""
        return not self.keys

    def spent(self) -> bool:
        """Nothing of it is left that could still delete: over, unpinned, unretained."""
        return bool(self.state) and not self.pins and ALIVE not in self.retained.values()

    def summary(self) -> List[Any]:
        pins = [[node, pin.pid, pin.slots, pin.late] for node, pin in sorted(self.pins.items())]
        return [
            [self.number, self.replied, self.decided, self.state],
            pins,
            sorted(self.commits.items()),
            sorted(self.drops.items()),
            sorted(self.riders.items()),
            sorted(self.retained.items()),
        ]


@final
class Ghosts:
    """All events, and which riders stand where."""

    def __init__(self) -> None:
        self.open: Dict[int, Ghost] = {}
        #: events of which nothing is left: (state, num_tokens, how many had ended before)
        self.over: Dict[int, Tuple[str, int, int]] = {}
        self.ends: int = 0
        self.ended: Dict[int, Tuple[str, int, int]] = {}
        self.standing: Dict[Place, Dict[Key, Dict[Tuple[int, int], None]]] = {}

    def begin(self, ghost: Ghost) -> None:
        """A number that is used twice (H24) begins anew: what was committed under it was another event's."""
        old = self.open.pop(ghost.number, None)
        if old is not None:
            self._unseat_all(old)
        self.over.pop(ghost.number, None)
        self.ended.pop(ghost.number, None)
        self.open[ghost.number] = ghost

    def end(self, number: int, state: str, num_tokens: int) -> None:
        if number not in self.ended and number not in self.over:
            self.ended[number] = (state, num_tokens, self.ends)
            self.ends += 1

    def outcome(self, number: int) -> Optional[Tuple[str, int, int]]:
        """(state, num_tokens, how many events had ended before it) of an event that is over."""
        found = self.ended.get(number)
        return found if found is not None else self.over.get(number)

    def forget_if_spent(self, number: int) -> None:
        ghost = self.open.get(number)
        if ghost is None or not ghost.spent():
            return
        del self.open[number]
        self._unseat_all(ghost)
        self.over[number] = self.ended.pop(number)
        if len(self.over) > OVER_KEPT:
            del self.over[next(iter(self.over))]

    # ---- riders
    def seat(self, ghost: Ghost, rank: int, key: Key, place: Place) -> None:
        """A rider now stands on an entry, is excused, or is lost."""
        rider = (rank, key)
        old = ghost.riders.get(rider)
        if old is not None:
            self._unseat(ghost.number, rider, old)
        ghost.riders[rider] = place
        if place[0]:
            self.standing.setdefault(place, {}).setdefault(key, {})[(ghost.number, rank)] = None

    def _unseat(self, number: int, rider: Rider, place: Place) -> None:
        entries = self.standing.get(place)
        if entries is None or rider[1] not in entries:
            return
        riders = entries[rider[1]]
        riders.pop((number, rider[0]), None)
        if not riders:
            del entries[rider[1]]

    def _unseat_all(self, ghost: Ghost) -> None:
        for rider, place in ghost.riders.items():
            self._unseat(ghost.number, rider, place)

    def on(self, place: Place, key: Key) -> List[Tuple[Ghost, int]]:
        """The (event, rank) of the riders that stand on an entry."""
        entries = self.standing.get(place)
        riders = entries.get(key) if entries is not None else None
        return [(self.open[number], rank) for number, rank in riders] if riders else []

    def excuse_node(self, node: str) -> None:
        """A process has died, and with it all that it held."""
        for place in [place for place in self.standing if place[0] == node]:
            for key in list(self.standing[place]):
                for ghost, rank in self.on(place, key):
                    self.seat(ghost, rank, key, EXCUSED)
            del self.standing[place]
        for ghost in list(self.open.values()):
            ghost.pins.pop(node, None)
            if node in ghost.retained:
                ghost.retained[node] = OVER
            self.forget_if_spent(ghost.number)

    def taken_away(self, place: Place, key: Key, mover: Optional[Ghost], rank: int) -> None:
        """A move has deleted an entry: its riders stand where the mover's own rider stands."""
        target = mover.riders.get((rank, key), LOST) if mover is not None else LOST
        for ghost, r in self.on(place, key):
            self.seat(ghost, r, key, LOST if target == place else target)

    def evicted(self, place: Place, key: Key) -> None:
        """Excuses whoever stood there, unless it is an event whose retention is alive, or ended before the event."""
        for ghost, rank in self.on(place, key):
            held = ghost.retained.get(ghost.dst[rank], OVER)
            self.seat(ghost, rank, key, LOST if held in (ALIVE, LAPSED) else EXCUSED)

    def cleared(self, place: Place, key: Key) -> None:
        for ghost, rank in self.on(place, key):
            self.seat(ghost, rank, key, EXCUSED)

    def summary(self) -> List[Any]:
        return [
            [self.open[number].summary() for number in sorted(self.open)],
            sorted((number, ended[0], ended[1]) for number, ended in self.over.items()),
        ]
