"""A scenario that fails, made smaller for as long as it still fails: what is left is what it takes.

First whole faults and steps go (delta debugging: halves, then quarters, down to single ones), then what remains is made
plainer field by field, until nothing can be made plainer any more. Every candidate is a valid scenario.
"""

from __future__ import annotations

from typing import Any, Callable, Final, Iterator, Sequence, Tuple, TypeVar

import msgspec

from kvcore.scenario.schema import (
    FAULT_KINDS,
    Fault,
    Instance,
    Kv,
    Prompt,
    Scenario,
    Step,
)
from kvcore.scenario.units import Size, Tokens
from kvcore.scenario.valid import mistakes

T = TypeVar("T")
Fails = Callable[[Scenario], bool]

#: Runs that a shrinking may take.
BUDGET: Final = 3000
#: Slots of a place whose size does not matter.
ROOMY: Final = 8
#: Fields of a step that are left out if they can be.
_STEP_FIELDS: Final = (
    "background",
    "after",
    "window",
    "timeout",
    "tokens",
    "copy",
    "idem",
    "deadline",
    "if_room",
    "hold",
    "lease",
    "wait",
)
#: The same of a fault's parts.
_PART_FIELDS: Final = ("duration", "one_way", "restart_after", "fraction", "slow")
_WHEN_FIELDS: Final = ("by", "to", "nth")


def shrink(scenario: Scenario, fails: Fails, budget: int = BUDGET) -> Scenario:
    """The plainest scenario found that still ``fails``, in at most ``budget`` further runs. ``scenario`` must fail."""
    return _Shrinker(scenario, fails, budget).run()


class _Shrinker:
    def __init__(self, scenario: Scenario, fails: Fails, budget: int) -> None:
        self.best: Scenario = scenario
        self.fails: Fails = fails
        self.left: int = budget

    def run(self) -> Scenario:
        before = None
        while before is not self.best and self.left > 0:
            before = self.best
            self._fewer("faults")
            self._fewer("steps")
            self._plainer()
        return self.best

    def _try(self, candidate: Scenario) -> bool:
        """Keep it if it is valid, another one, and still fails."""
        if self.left <= 0 or candidate == self.best or next(mistakes(candidate), None) is not None:
            return False
        self.left -= 1
        if not self.fails(candidate):
            return False
        self.best = candidate
        return True

    def _fewer(self, field: str) -> None:
        """Leave out runs of items, long ones first."""
        size = len(getattr(self.best, field))
        while size >= 1:
            at = 0
            while at < len(getattr(self.best, field)):
                items = getattr(self.best, field)
                fewer = items[:at] + items[at + size :]
                if not self._try(_with(self.best, **{field: fewer})):
                    at += size
            size //= 2

    def _plainer(self) -> None:
        """One change at a time, again from the start after each that is kept."""
        going = True
        while going and self.left > 0:
            going = any(self._try(candidate) for candidate in _plainer(self.best))


def _with(struct: T, **changes: Any) -> T:
    return msgspec.structs.replace(struct, **changes)  # type: ignore[type-var]


# ---- candidates ------------------------------------------------------------------------------------------------------
def _plainer(scenario: Scenario) -> Iterator[Scenario]:
    """Scenarios that are plainer by one change each."""
    for number, fault in enumerate(scenario.faults):
        for plainer in _plainer_faults(fault):
            yield _with(scenario, faults=_replaced(scenario.faults, number, plainer))
    for number, step in enumerate(scenario.steps):
        for kinder in _plainer_steps(step):
            yield _with(scenario, steps=_replaced(scenario.steps, number, kinder))
    yield from _plainer_tops(scenario)
    yield from _fewer_prompts(scenario)
    yield from _fewer_instances(scenario)


def _replaced(items: Sequence[T], number: int, item: T) -> Tuple[T, ...]:
    return (*items[:number], item, *items[number + 1 :])


def _plainer_faults(fault: Fault) -> Iterator[Fault]:
    if len(fault.kinds) > 1:
        for kind in fault.kinds:
            yield _with(fault, **{kind: _usual(fault, kind)})
    if fault.times > 1:
        yield _with(fault, times=1)
    if isinstance(fault.drop, int) and fault.drop > 1:
        yield _with(fault, drop=1)
    if fault.duplicate > 1:
        yield _with(fault, duplicate=1)
    if fault.when is not None:
        for when in _without_fields(fault.when, _WHEN_FIELDS):
            yield _with(fault, when=when)
        if fault.when.nth > 2:
            yield _with(fault, when=_with(fault.when, nth=fault.when.nth - 1))
    for kind in FAULT_KINDS:
        part = getattr(fault, kind)
        if isinstance(part, msgspec.Struct):
            for plainer in _without_fields(part, _PART_FIELDS):
                yield _with(fault, **{kind: plainer})


def _plainer_steps(step: Step) -> Iterator[Step]:
    for body in _without_fields(step.body, _STEP_FIELDS):
        yield _with(step, **{step.kind: body})


def _without_fields(struct: T, names: Sequence[str]) -> Iterator[T]:
    """With one of those fields as usual."""
    for name in names:
        if name in struct.__struct_fields__:  # type: ignore[attr-defined]
            usual = _usual(struct, name)
            if usual is not msgspec.NODEFAULT and getattr(struct, name) != usual:
                yield _with(struct, **{name: usual})


def _usual(struct: Any, name: str) -> Any:
    """A field's default; NODEFAULT if it has none."""
    for field in msgspec.structs.fields(struct):
        if field.name == name:
            return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    return msgspec.NODEFAULT


def _plainer_tops(scenario: Scenario) -> Iterator[Scenario]:
    if scenario.kv.direction != "read":
        yield _with(scenario, kv=_with(scenario.kv, direction="read"))
    if scenario.seed:
        yield _with(scenario, seed=0)
    if len(scenario.without) > 1:
        for rule in scenario.without:
            yield _with(scenario, without=tuple([one for one in scenario.without if one != rule]))


def _fewer_prompts(scenario: Scenario) -> Iterator[Scenario]:
    prompts = scenario.prompts
    chunk = scenario.kv.chunk_tokens
    for name, prompt in prompts.items():
        yield _with(scenario, prompts={other: what for other, what in prompts.items() if other != name})
        if prompt.shares:
            yield _with(scenario, prompts={**prompts, name: _with(prompt, shares={})})
        tokens = prompt.tokens.count(chunk) if prompt.tokens is not None else 0
        for fewer in (chunk, tokens - chunk, tokens // chunk * chunk):
            if 0 < fewer < tokens:
                yield _with(scenario, prompts={**prompts, name: _shorter(prompt, fewer)})


def _shorter(prompt: Prompt, tokens: int) -> Prompt:
    return _with(prompt, tokens=Tokens(tokens), shares={name: min(n, tokens) for name, n in prompt.shares.items()})


def _fewer_instances(scenario: Scenario) -> Iterator[Scenario]:
    instances = scenario.instances
    for name, instance in instances.items():
        yield _with(scenario, instances={other: what for other, what in instances.items() if other != name})
        if instance.ranks > 1:
            yield _of_ranks(scenario, 1)
        for plainer in _plainer_instances(instance, scenario.kv):
            yield _with(scenario, instances={**instances, name: plainer})


def _of_ranks(scenario: Scenario, ranks: int) -> Scenario:
    """Ranks of one instance alone would be another namespace."""
    return _with(scenario, instances={name: _with(one, ranks=ranks) for name, one in scenario.instances.items()})


def _plainer_instances(instance: Instance, kv: Kv) -> Iterator[Instance]:
    places = instance.locations
    chunk = kv.chunk_tokens * kv.token_bytes
    for name, place in places.items():
        yield _with(instance, locations={other: what for other, what in places.items() if other != name})
        if place.slot is not None:
            fewer = Size(place.size.bytes // place.slot.bytes * chunk)
            yield _with(instance, locations={**places, name: _with(place, size=fewer, slot=None)})
        elif place.size.bytes < ROOMY * chunk:
            yield _with(instance, locations={**places, name: _with(place, size=Size(ROOMY * chunk))})
