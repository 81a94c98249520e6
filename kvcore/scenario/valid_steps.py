"""Steps and workload: whom and what they name must exist, and be long or early enough."""

from __future__ import annotations

import math
from typing import Dict, Final, Iterator, List, Optional, Sequence, Tuple

from kvcore.protocol.config import Config
from kvcore.scenario.mistake import Mistake, Path, choices, shown, unknown
from kvcore.scenario.schema import (
    STEP_KINDS,
    Arrival,
    Fill,
    Lengths,
    Move,
    Scenario,
    Status,
    Step,
    Wait,
    Workload,
    step_names,
)
from kvcore.scenario.units import Duration, Tokens

#: Kinds of step that have an event, so that cancel and status can name them.
EVENTFUL: Final[Tuple[str, ...]] = ("move", "pin", "clear")
MIX: Final[Tuple[str, ...]] = ("store", "use", "lookup", "move", "copy")
_OPERATIONS_MAX: Final = 10_000_000
_LENGTHS_MAX: Final = 1_000_000


# ---- what others ask too --------------------------------------------------------------------------------------------
def positions(scenario: Scenario) -> List[str]:
    """Every ``instance/location`` there is."""
    return [f"{name}/{place}" for name, instance in scenario.instances.items() for place in instance.locations]


def bad_position(scenario: Scenario, at: str) -> str:
    """Why ``at`` is not ``instance/location``, or ""."""
    name, slash, place = at.partition("/")
    instance = scenario.instances.get(name)
    if not slash or not name or not place:
        example = next(iter(positions(scenario)), "a/LocalCPUBackend")
        return f"found {shown(at)}, expected instance/location such as {example!r}"
    if instance is None:
        return unknown("instance", name, tuple(scenario.instances))
    if place not in instance.locations:
        return unknown(f"location of {name}", place, tuple(instance.locations))
    return ""


def prompt_lengths(scenario: Scenario) -> Dict[str, int]:
    """Tokens of each prompt that is declared, stored with its length by some step, or brought by a fill."""
    chunk = scenario.kv.chunk_tokens
    lengths = {
        name: prompt.tokens.count(chunk) if prompt.tokens is not None else len(prompt.ids)
        for name, prompt in scenario.prompts.items()
    }
    declared = {name for name, length in lengths.items() if length}
    for step in scenario.steps:
        if step.store is not None and step.store.prompt not in declared and step.store.tokens is not None:
            count = step.store.tokens.count(chunk)
            lengths[step.store.prompt] = max(count, lengths.get(step.store.prompt, 0))
    return {**filled_lengths(scenario), **lengths}


def filled_lengths(scenario: Scenario) -> Dict[str, int]:
    """Tokens of each prompt that a fill brings, by its name: ``prefix-N``."""
    chunk = scenario.kv.chunk_tokens
    lengths: Dict[str, int] = {}
    numbers: Dict[str, int] = {}
    for step in scenario.steps:
        fill = step.fill
        if fill is None:
            continue
        left = fill.tokens.count(chunk) if fill.tokens is not None else fill.slots * chunk
        each = fill.each.count(chunk)
        while each > 0 and left > 0:
            number = numbers[fill.prefix] = numbers.get(fill.prefix, 0) + 1
            lengths[f"{fill.prefix}-{number}"] = min(each, left)
            left -= each
    return lengths


def step_kinds(scenario: Scenario) -> Dict[str, str]:
    """What each step is called -> its kind."""
    return dict(zip(step_names(scenario.steps), [step.kind for step in scenario.steps]))


# ---- steps ----------------------------------------------------------------------------------------------------------
def step_mistakes(scenario: Scenario, config: Config) -> Iterator[Mistake]:
    for i, step in enumerate(scenario.steps):
        if not step.kind:
            yield Mistake(("steps", i), f"found no kind of step, expected {choices(STEP_KINDS)}")
            return
        kinds = [kind for kind in STEP_KINDS if getattr(step, kind) is not None]
        if len(kinds) > 1:
            yield Mistake(
                ("steps", i, kinds[1]), f"found {' and '.join(kinds)} in one step, expected one of them", True
            )
            return
    lengths = prompt_lengths(scenario)
    earlier: Dict[str, str] = {}
    for i, (step, name) in enumerate(zip(scenario.steps, step_names(scenario.steps))):
        path: Path = ("steps", i, step.kind)
        if name in earlier:
            at = (*path, "as") if step.body.name else path
            yield Mistake(at, f"there is a step {name!r} already, expected another name")
        elif "/" in name or not name.isprintable() or len(name) > 80:
            yield Mistake((*path, "as"), f"the name {shown(name)} will not do, expected letters, digits, '_' or '-'")
        yield from _step(scenario, config, path, step, lengths, earlier)
        earlier[name] = step.kind


def _step(
    scenario: Scenario, config: Config, path: Path, step: Step, lengths: Dict[str, int], earlier: Dict[str, str]
) -> Iterator[Mistake]:
    body = step.body
    at = getattr(body, "at", None)
    why = bad_position(scenario, at) if at is not None else ""
    if why:
        yield Mistake((*path, "at"), why)
    if step.move is not None:
        yield from _move(scenario, path, step.move)
    if step.fill is not None:
        yield from _fill(scenario, path, step.fill)
    elif getattr(body, "prompt", "") or (hasattr(body, "prompt") and step.move is None):
        yield from _prompt(scenario, path, str(getattr(body, "prompt", "")), getattr(body, "tokens", None), lengths)
    if step.cancel is not None:
        yield from _refers(path, "op", step.cancel.op, earlier, ("move",))
    if step.unpin is not None:
        yield from _refers(path, "pin", step.unpin.pin, earlier, ("pin",))
    if step.status is not None:
        yield from _status(path, step.status, earlier)
    if step.wait is not None:
        yield from _wait(path, step.wait, earlier)
    if step.sleep is not None and step.sleep.duration.ns(config) <= 0:
        yield Mistake((*path, "for"), f"found {step.sleep.duration}, expected a duration above 0")
    if body.window < 0:
        yield Mistake((*path, "window"), f"found {body.window}, expected 0 or more")
    for name in ("timeout", "lease", "deadline"):
        value = getattr(body, name, None)
        if isinstance(value, Duration) and value.ns(config) <= 0:
            yield Mistake((*path, name), f"found {value}, expected a duration above 0")


def _move(scenario: Scenario, path: Path, move: Move) -> Iterator[Mistake]:
    for name, at in (("from", move.src), ("to", move.dst)):
        why = bad_position(scenario, at)
        if why:
            yield Mistake((*path, name), why)
    if move.all and (move.prompt or move.tokens is not None):
        name = "prompt" if move.prompt else "tokens"
        yield Mistake((*path, "all"), f"found all: true and a {name}, expected one of them")
    elif not move.all and not move.prompt:
        yield Mistake(path, "found no prompt, expected 'prompt: NAME', or 'all: true' for all that is there")
    if move.granularity == "prefix" and move.all:
        yield Mistake((*path, "granularity"), "found prefix and all: true, expected a prompt that has prefixes")
    if move.step is not None and move.granularity != "prefix":
        yield Mistake((*path, "step"), "found a step of a move that goes all at once, expected granularity: prefix")
    elif move.step is not None and move.step.number < 1:
        yield Mistake((*path, "step"), f"found {move.step}, expected 1 token or more")


def _prompt(
    scenario: Scenario, path: Path, name: str, tokens: Optional[Tokens], lengths: Dict[str, int]
) -> Iterator[Mistake]:
    length = lengths.get(name)
    if length is None:
        near = unknown("prompt", name, tuple(lengths))
        hint = "; or give its tokens where it is stored" if path[-1] == "store" else ""
        yield Mistake((*path, "prompt"), near + hint)
    elif tokens is not None:
        count = tokens.count(scenario.kv.chunk_tokens)
        if not 1 <= count <= length:
            yield Mistake((*path, "tokens"), f"found {count}, expected 1 to {length}, all of prompt {name}")


def _fill(scenario: Scenario, path: Path, fill: Fill) -> Iterator[Mistake]:
    chunk = scenario.kv.chunk_tokens
    if (fill.slots != 0) == (fill.tokens is not None):
        found = "both slots and tokens" if fill.slots else "neither slots nor tokens"
        yield Mistake(path, f"found {found}, expected one of them such as 'slots: 16'")
    elif fill.slots < 0 or (fill.tokens is not None and fill.tokens.count(chunk) < 1):
        name = "slots" if fill.slots else "tokens"
        yield Mistake((*path, name), "expected a number above 0")
    elif not 1 <= fill.each.count(chunk) <= (fill.tokens.count(chunk) if fill.tokens else fill.slots * chunk):
        yield Mistake((*path, "each"), f"found {fill.each}, expected 1 token up to all that is filled")


def _refers(path: Path, field: str, name: str, earlier: Dict[str, str], kinds: Sequence[str]) -> Iterator[Mistake]:
    """``name`` must be an earlier step of one of ``kinds``."""
    kind = earlier.get(name)
    if kind is None:
        known = [step for step, kind in earlier.items() if kind in kinds]
        yield Mistake((*path, field), unknown("earlier step", name, known))
    elif kind not in kinds:
        yield Mistake((*path, field), f"{name} is a {kind}, expected a {choices(kinds)}")


def _status(path: Path, status: Status, earlier: Dict[str, str]) -> Iterator[Mistake]:
    if bool(status.op) == bool(status.idem):
        found = "both op and idem" if status.op else "neither op nor idem"
        yield Mistake(path, f"found {found}, expected one of them")
    elif status.op:
        yield from _refers(path, "op", status.op, earlier, EVENTFUL)


def _wait(path: Path, wait: Wait, earlier: Dict[str, str]) -> Iterator[Mistake]:
    for i, name in enumerate(wait.ops):
        if name not in earlier:
            at = (*path, "op") if isinstance(wait.op, str) else (*path, "op", i)
            yield Mistake(at, unknown("earlier step", name, tuple(earlier)))


# ---- workload -------------------------------------------------------------------------------------------------------
def workload_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    work = scenario.workload
    if work is None:
        return
    if (work.moves != 0) == (work.requests != 0):
        found = "both moves and requests" if work.moves else "neither moves nor requests"
        yield Mistake(("workload",), f"found {found}, expected one of them such as 'moves: 100'")
    for name, count in (("moves", work.moves), ("requests", work.requests), ("prompts", work.prompts)):
        if not 0 <= count <= _OPERATIONS_MAX:
            yield Mistake(("workload", name), f"found {count}, expected a number up to {_OPERATIONS_MAX}")
    if not (math.isfinite(work.zipf) and work.zipf >= 0):
        yield Mistake(("workload", "zipf"), f"found {work.zipf}, expected an exponent of 0 or more")
    yield from _arrival(work.arrival)
    yield from _lengths(work.prompt_tokens, scenario.kv.chunk_tokens)
    yield from _mix(work)
    yield from _where(scenario, work)
    shared = work.shared_prefix
    if shared is not None and shared.groups < 1:
        yield Mistake(("workload", "shared_prefix", "groups"), f"found {shared.groups}, expected 1 or more")


def _arrival(arrival: Arrival) -> Iterator[Mistake]:
    path: Path = ("workload", "arrival")
    given = [name for name in Arrival.__struct_fields__ if getattr(arrival, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of poisson, constant and closed"
        yield Mistake(path, f"found {found}, expected one of them such as 'poisson: 50'")
        return
    value = getattr(arrival, given[0])
    if not (math.isfinite(value) and value > 0):
        what = "how many at a time" if given[0] == "closed" else "operations a second"
        yield Mistake((*path, given[0]), f"found {value}, expected {what}, above 0")


def _lengths(lengths: Lengths, chunk: int) -> Iterator[Mistake]:
    path: Path = ("workload", "prompt_tokens")
    given = [name for name in Lengths.__struct_fields__ if getattr(lengths, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "no distribution"
        yield Mistake(path, f"found {found}, expected one of {choices(Lengths.__struct_fields__)}")
        return
    spread = getattr(lengths, given[0])
    if lengths.fixed is not None:
        if lengths.fixed.count(chunk) < 1:
            yield Mistake((*path, "fixed"), f"found {lengths.fixed}, expected a number of tokens above 0")
        return
    low, high = spread.least.count(chunk), spread.most.count(chunk)
    if not 1 <= low <= high:
        yield Mistake((*path, given[0]), f"found min {low} and max {high} tokens, expected 1 <= min <= max")
    elif lengths.zipf is not None and high // low > _LENGTHS_MAX:
        yield Mistake((*path, "zipf"), f"max is {high // low} times min, expected at most {_LENGTHS_MAX} times")
    for name in ("exponent", "sigma"):
        value = getattr(spread, name, 0.0)
        if not (math.isfinite(value) and 0 <= value <= 100):
            yield Mistake((*path, given[0], name), f"found {value}, expected a number of 0 to 100")


def _mix(work: Workload) -> Iterator[Mistake]:
    path: Path = ("workload", "mix")
    if work.mix and work.moves:
        yield Mistake(path, "found a mix for moves, expected it with requests", True)
    for name, weight in work.mix.items():
        if name not in MIX:
            yield Mistake((*path, name), unknown("operation", name, MIX), True)
        elif not (math.isfinite(weight) and weight >= 0):
            yield Mistake((*path, name), f"found {weight}, expected a weight of 0 or more")
    if work.mix and not sum(weight for weight in work.mix.values() if weight > 0) > 0:
        yield Mistake(path, "all weights are 0, expected one above 0")


def _where(scenario: Scenario, work: Workload) -> Iterator[Mistake]:
    places = [instance.locations for instance in scenario.instances.values()]
    if work.location:
        names = sorted({place for locations in places for place in locations})
        if work.location not in names:
            yield Mistake(("workload", "location"), unknown("location", work.location, names))
            return
        places = [locations for locations in places if work.location in locations]
    moving = work.moves or work.mix.get("move", 0) > 0 or work.mix.get("copy", 0) > 0
    if moving and len(places) < 2:
        yield Mistake(("workload",), f"moves need two instances with that location, found {len(places)}")
