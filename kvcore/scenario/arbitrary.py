"""Whole scenarios out of a stream of choices: topology, steps and faults, small enough to be read and to run quickly.

``scenario_from(draw)`` is a pure function of the integers that ``draw`` gives. A seed gives them to a swarm
(``seeded``), hypothesis gives them to tests: there the smallest integers mean the simplest scenario (two instances, one
rank, one store, one move, no fault), so that a failing example shrinks to a file that a person can read.
"""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Callable, Dict, Final, Iterator, List, Literal, Optional, Sequence, Tuple, TypeVar

import msgspec

from kvcore.scenario.arbitrary_faults import FaultDrawer
from kvcore.scenario.schema import (
    Constants,
    Instance,
    Kv,
    LocationSpec,
    Prompt,
    Scenario,
    Step,
    step_names,
)
from kvcore.scenario.steps import (
    Cancel,
    Clear,
    Fill,
    Lookup,
    Move,
    Settle,
    Sleep,
    Status,
    Store,
    Unpin,
    Use,
    UserPin,
    Wait,
)
from kvcore.scenario.units import ChunkTokens, Duration, Size, Tokens

T = TypeVar("T")
Way = Literal["read", "push"]

CHUNK_TOKENS: Final = 16
INSTANCES: Final = ("a", "b", "c", "d")
PROMPTS: Final = ("p", "q", "r")
LOCATIONS: Final = ("LocalCPUBackend", "LocalDiskBackend")


class Draw:
    """A stream of choices. ``integer(least, most)``: both included; smaller is simpler."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.integer: Callable[[int, int], int] = integer

    def choice(self, items: Sequence[T]) -> T:
        """The first is the simplest."""
        return items[self.integer(0, len(items) - 1)]

    def once_in(self, times: int) -> bool:
        """True once in so many times; False is simpler."""
        return self.integer(0, times - 1) == times - 1

    def times(self, least: int, most: int) -> Iterator[int]:
        """0, 1, 2 ..: at least and at most so many; fewer are simpler. Each has its own choice, so that one in the
        middle can be left out."""
        for number in range(most):
            if number >= least and self.integer(0, 2) == 0:
                return
            yield number


def seeded(seed: int) -> Draw:
    """A stream that follows from a number alone, on every machine."""
    uniform = random.Random(seed).random

    def integer(least: int, most: int) -> int:
        return least + int(uniform() * (most - least + 1))

    return Draw(integer)


class Space(msgspec.Struct, frozen=True):
    """How large scenarios become, and how quick: ``constants`` are short where real processes must wait for them."""

    instances: Tuple[int, int] = (2, 4)
    ranks: int = 2
    locations: int = 2
    slots: int = 8
    chunks: int = 4
    prompts: int = 3
    steps: Tuple[int, int] = (1, 6)
    """Without the stores in the beginning."""
    moves_only: bool = False
    faults: Tuple[int, int] = (0, 3)
    constants: Constants = Constants()
    without: Tuple[str, ...] = ()
    must: str = ""
    """A kind of fault that is among them, such as ``crash`` or ``copy stuck``."""


def _duration(text: str) -> Duration:
    return Duration.parse(text)


#: Milliseconds in place of seconds, but what other work on the machine may delay is never below 0.5 s. No two of them,
#: nor one and a fault's duration, are alike: who is first would be a matter of microseconds.
QUICK: Final = Constants(
    scale=0.05, dead=_duration("1250 ms"), copy_max=_duration("700 ms"), deadline=_duration("1700 ms")
)
#: Time costs nothing in simulation but the beats and retries in it: few of them to a lease.
SPARSE: Final = Constants(
    retry=_duration("1 s"),
    lease=_duration("3 s"),
    renew=_duration("1 s"),
    retain=_duration("9 s"),
    beat=_duration("3 s"),
    dead=_duration("6 s"),
    release_give_up=_duration("5 s"),
    copy_max=_duration("5 s"),
    deadline=_duration("8 s"),
)
WHOLE: Final = Space(constants=QUICK)
#: A swarm's: three instances, two moves, one or two faults.
TINY: Final = Space(
    instances=(3, 3),
    ranks=1,
    locations=1,
    slots=4,
    chunks=2,
    prompts=2,
    steps=(2, 2),
    moves_only=True,
    faults=(1, 2),
    constants=SPARSE,
)
#: No run lasts that long: each step has a timeout of its own. One that is still not quiet then hangs.
DEADLINE: Final = _duration("20 deadlines")
LEASES: Final = (_duration("1 lease"), _duration("2 leases"))
PAUSES: Final = (_duration("1 retry"), _duration("3 retries"), _duration("1 lease"))
HOLDS: Final = (_duration("1 retry"), Duration(Decimal("0.5"), "lease"), _duration("2 leases"))
SETTLE: Final = Step(settle=Settle())


def scenario_from(draw: Draw, space: Space = WHOLE, name: str = "generated", seed: int = 0) -> Scenario:
    """A valid scenario. ``order`` is strict only where nothing can race: then every step settles before the next."""
    drawer = _Drawer(draw, space)
    instances = drawer.topology()
    prompts = drawer.prompts()
    racing = bool(space.must) or not draw.once_in(3)
    steps = drawer.steps(racing)
    places = {place: instances[place.partition("/")[0]].ranks for place in drawer.places}
    moves = tuple([name for name, step in zip(step_names(steps), steps) if step.move is not None])
    faults = FaultDrawer(draw, places, moves, drawer.ways, racing).faults(space.faults, space.must)
    corrupt = any(fault.copy is not None and fault.copy.corrupt for fault in faults)
    return Scenario(
        name=name,
        order="racing" if racing or corrupt else "strict",
        seed=seed,
        kv=Kv(
            chunk=ChunkTokens(CHUNK_TOKENS),
            bytes_per_token=Size(drawer.token_bytes),
            direction=drawer.ways[0],
        ),
        constants=space.constants,
        without=space.without,
        prompts=prompts,
        instances=instances,
        steps=steps,
        faults=faults,
        deadline=DEADLINE,
    )


class _Drawer:
    """What there is and what is asked."""

    def __init__(self, draw: Draw, space: Space) -> None:
        self.draw: Draw = draw
        self.space: Space = space
        #: who moves the bytes, as most instances have it, and as others do
        self.ways: Tuple[Way, ...] = ("push", "read") if draw.once_in(2) else ("read", "push")
        if not draw.once_in(2):
            self.ways = self.ways[:1]
        self.token_bytes: int = draw.choice((64, 256, 1024)) if space.ranks > 1 else 64
        self.places: List[str] = []
        self.lengths: Dict[str, int] = {}
        #: prompt -> where it was stored or moved to, newest last
        self.homes: Dict[str, List[str]] = {}
        self.done: List[Step] = []
        self.moves: List[str] = []
        self.open: bool = False  # a step may still run in the background
        self.pins: List[str] = []
        self.fills: int = 0

    # ---- what there is
    def topology(self) -> Dict[str, Instance]:
        draw, space = self.draw, self.space
        least, most = space.instances
        ranks = draw.choice((1, 1, space.ranks)) if space.ranks > 1 else 1
        found: Dict[str, Instance] = {}
        for number in draw.times(least, most):
            name = INSTANCES[number]
            locations: Dict[str, LocationSpec] = {}
            for place in range(1 if space.locations == 1 or not draw.once_in(4) else space.locations):
                slots = space.slots - draw.integer(0, space.slots - 1)
                chunk = CHUNK_TOKENS * self.token_bytes
                slot = 3 * chunk if draw.once_in(6) else chunk
                room = LocationSpec(size=Size(slots * slot), slot=Size(slot) if slot != chunk else None)
                locations[LOCATIONS[place]] = room
                self.places.append(f"{name}/{LOCATIONS[place]}")
            # Other ranks are another namespace: whatever is moved between the two is refused.
            own = 3 - ranks if space.ranks > 1 and number >= 2 and draw.once_in(12) else ranks
            other = len(self.ways) > 1 and draw.once_in(2)
            found[name] = Instance(ranks=own, locations=locations, direction=self.ways[1] if other else "")
        return found

    def prompts(self) -> Dict[str, Prompt]:
        draw = self.draw
        found: Dict[str, Prompt] = {}
        for number in draw.times(1, self.space.prompts):
            name = PROMPTS[number]
            tokens = CHUNK_TOKENS * draw.integer(1, self.space.chunks)
            if draw.once_in(4):
                tokens -= draw.integer(1, CHUNK_TOKENS - 1)  # the last chunk is a short one
            shares: Dict[str, int] = {}
            if number and draw.once_in(2):
                other = PROMPTS[draw.integer(0, number - 1)]
                common = min(tokens, self.lengths[other])
                shares = {other: CHUNK_TOKENS * draw.integer(1, max(1, common // CHUNK_TOKENS))}
                shares = {name: min(common, count) for name, count in shares.items()}
            self.lengths[name] = tokens
            found[name] = Prompt(tokens=Tokens(tokens), shares=shares)
        return found

    # ---- what is asked
    def steps(self, racing: bool) -> Tuple[Step, ...]:
        draw, space = self.draw, self.space
        for prompt in self.lengths:
            self._store(prompt)
        if not racing or draw.once_in(2):
            self.done.append(SETTLE)
        kinds: Sequence[Callable[[bool], Step]] = (self._move,) if space.moves_only else self._kinds()
        if racing and draw.once_in(4):
            self._cross()
        for _ in draw.times(*space.steps) if len(self.moves) < 2 or not space.moves_only else ():
            self.done.append(draw.choice(kinds)(racing))
            if not racing:
                self.done.append(SETTLE)
        if space.must == "cancel" and not self.moves:
            self.done.append(self._move(racing))
        if self.open and draw.once_in(2):
            self.done.append(Step(wait=Wait()))
        if not space.moves_only:
            if self.done[-1] is not SETTLE:
                self.done.append(SETTLE)
            self.done.append(Step(lookup=Lookup(prompt=PROMPTS[0], name="found")))
        return tuple(self.done)

    def _kinds(self) -> Sequence[Callable[[bool], Step]]:
        return (
            *[self._move] * 7,
            *[self._later_store] * 2,
            *[self._use] * 2,
            self._lookup,
            self._drain,
            self._pin,
            self._unpin,
            self._clear,
            self._cancel,
            self._status,
            self._fill,
            self._sleep,
        )

    def _store(self, prompt: str) -> Step:
        place = self.draw.choice(self.places)
        self.homes.setdefault(prompt, []).append(place)
        step = Step(store=Store(at=place, prompt=prompt))
        self.done.append(step)
        return step

    def _later_store(self, racing: bool) -> Step:
        self._store(self._prompt())
        return self.done.pop()

    def _prompt(self) -> str:
        return self.draw.choice(tuple(self.lengths))

    def _home(self, prompt: str) -> str:
        """Where it is, most likely: its newest place or, sometimes, any."""
        homes = self.homes[prompt]
        if self.draw.once_in(3):
            return self.draw.choice(self.places if self.draw.once_in(2) else homes)
        return homes[-1]

    def _elsewhere(self, src: str) -> str:
        """The place that a move goes to: another instance's first, if any; seldom its own."""
        others = [place for place in self.places if place != src]
        return self.draw.choice((*others, src) if self.draw.once_in(10) else tuple(others))

    def _part(self, prompt: str) -> Optional[Tokens]:
        return Tokens(self.draw.integer(1, self.lengths[prompt])) if self.draw.once_in(5) else None

    def _background(self, racing: bool) -> bool:
        going = racing and self.draw.once_in(2)
        self.open = self.open or going
        return going

    def _move(self, racing: bool) -> Step:
        draw = self.draw
        prompt = self._prompt()
        src = self._home(prompt)
        dst = self._elsewhere(src)
        self.homes[prompt].append(dst)
        self.moves.append(f"m{len(self.moves) + 1}")
        step = Tokens(draw.integer(1, 2), True) if draw.once_in(3) else None
        return Step(
            move=Move(
                src=src,
                dst=dst,
                prompt=prompt,
                tokens=self._part(prompt),
                copy=draw.once_in(4),
                if_room=draw.once_in(8),
                idem="same" if draw.once_in(12) else "",
                deadline=draw.choice(PAUSES) if racing and draw.once_in(16) else None,
                priority=draw.choice((0, 0, 0, 1)),
                weight=draw.choice((1, 1, 1, 3)),
                background=self._background(racing),
                name=self.moves[-1],
                granularity="move" if step is None else "prefix",
                step=step,
            )
        )

    def _cross(self) -> None:
        """Two moves of one prompt at a time, against each other; it may be at both ends from the start."""
        draw = self.draw
        prompt = self._prompt()
        src = self._home(prompt)
        dst = self._elsewhere(src)
        if draw.once_in(2):
            self.done.append(Step(store=Store(at=dst, prompt=prompt)))
        if draw.once_in(2):
            self.done.append(SETTLE)
        for one, other, background in ((src, dst, True), (dst, src, draw.once_in(2))):
            self.homes[prompt].append(other)
            self.moves.append(f"m{len(self.moves) + 1}")
            move = Move(src=one, dst=other, prompt=prompt, background=background, name=self.moves[-1])
            self.done.append(Step(move=move))
        self.open = True

    def _drain(self, racing: bool) -> Step:
        src = self.draw.choice(self.places)
        dst = self._elsewhere(src)
        for homes in self.homes.values():
            if src in homes:
                homes.append(dst)
        self.moves.append(f"m{len(self.moves) + 1}")
        return Step(move=Move(src=src, dst=dst, all=True, background=self._background(racing), name=self.moves[-1]))

    def _use(self, racing: bool) -> Step:
        draw = self.draw
        prompt = self._prompt()
        hold = draw.choice(HOLDS) if draw.once_in(2) else None
        use = Use(at=self._home(prompt), prompt=prompt, hold=hold, background=self._background(racing))
        return Step(use=use)

    def _lookup(self, racing: bool) -> Step:
        return Step(lookup=Lookup(prompt=self._prompt()))

    def _pin(self, racing: bool) -> Step:
        prompt = self._prompt()
        self.pins.append(f"pin{len(self.pins) + 1}")
        pin = UserPin(at=self._home(prompt), prompt=prompt, lease=self.draw.choice(LEASES), name=self.pins[-1])
        return Step(pin=pin)

    def _unpin(self, racing: bool) -> Step:
        return Step(unpin=Unpin(pin=self.draw.choice(self.pins))) if self.pins else self._pin(racing)

    def _clear(self, racing: bool) -> Step:
        return Step(clear=Clear(at=self.draw.choice(self.places), background=self._background(racing)))

    def _cancel(self, racing: bool) -> Step:
        return Step(cancel=Cancel(op=self.draw.choice(self.moves))) if self.moves else self._move(racing)

    def _status(self, racing: bool) -> Step:
        if not self.moves:
            return self._move(racing)
        return Step(status=Status(op=self.draw.choice(self.moves), wait=self.draw.once_in(2)))

    def _fill(self, racing: bool) -> Step:
        self.fills += 1
        slots = self.draw.integer(1, self.space.slots)
        return Step(fill=Fill(at=self.draw.choice(self.places), slots=slots, prefix=f"fill{self.fills}"))

    def _sleep(self, racing: bool) -> Step:
        return Step(sleep=Sleep(duration=self.draw.choice(PAUSES)))
