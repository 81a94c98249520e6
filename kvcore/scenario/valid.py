"""What must hold between the fields of a scenario: what is named exists, choices exclude each other, sizes fit.

``mistakes`` yields them in the order of the file; a path is that of the field in the file.
"""

from __future__ import annotations

import re
from typing import Dict, Final, Iterator, List, Mapping, Optional, Tuple, Union

from kvcore.protocol.config import ConfigError, Rules
from kvcore.protocol.messages import Namespace
from kvcore.scenario.mistake import Mistake, Path, choices, shown, unknown
from kvcore.scenario.schema import (
    CLIENT,
    CONTROLLER,
    MODELS,
    NAMESPACE_FIELDS,
    Constants,
    Prompt,
    Scenario,
    config_of,
)
from kvcore.scenario.valid_faults import expect_mistakes, fault_mistakes
from kvcore.scenario.valid_steps import step_mistakes, workload_mistakes

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*\Z", re.ASCII)
_RANKS_MAX: Final = 64
#: What checks.py evaluates, by the names that its violations have.
PROPERTIES: Final[Tuple[str, ...]] = (
    *("Byte", "Loss", "Known", "Shared", "Clear", "Free", "Truth", "Retention", "Instance"),
    *("Ends", "Leak", "View"),
)
_TOKEN_ID_MAX: Final = 2**32 - 1


def mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Every mistake that spans fields; those without which the rest means nothing come first, and alone."""
    first = [*_kv(scenario), *_constants(scenario), *_instances(scenario)]
    yield from first
    if first:
        return
    config = config_of(scenario)
    yield from _network(scenario)
    yield from _prompts(scenario)
    yield from step_mistakes(scenario, config)
    yield from workload_mistakes(scenario)
    yield from fault_mistakes(scenario, config)
    yield from expect_mistakes(scenario)
    for i, name in enumerate(scenario.violates):
        if name not in PROPERTIES:
            yield Mistake(("violates", i), unknown("property", name, PROPERTIES))
    if scenario.deadline.ns(config) <= 0:
        yield Mistake(("deadline",), f"found {scenario.deadline}, expected a duration above 0")
    if not 0 <= scenario.seed < 2**63:
        yield Mistake(("seed",), f"found {scenario.seed}, expected a whole number of 0 or more, below 2**63")


def bad_name(name: str) -> str:
    """Why ``name`` cannot name something, or ""."""
    if _NAME.match(name) and len(name) <= 80:
        return ""
    return f"the name {shown(name)} will not do, expected letters, digits, '_', '-', '.' or ':', at most 80"


# ---- kv and constants -----------------------------------------------------------------------------------------------
def _kv(scenario: Scenario) -> Iterator[Mistake]:
    kv = scenario.kv
    if kv.bytes_per_token is None:
        if kv.model not in MODELS:
            yield Mistake(("kv", "model"), unknown("model", kv.model, tuple(MODELS)) + "; or else give bytes_per_token")
    elif kv.bytes_per_token.bytes == 0:
        yield Mistake(("kv", "bytes_per_token"), "found 0 B, expected a size above 0 such as '128 KiB'")


def _constants(scenario: Scenario) -> Iterator[Mistake]:
    known = Rules.__struct_fields__
    for i, rule in enumerate(scenario.without):
        if rule not in known:
            yield Mistake(("without", i), unknown("rule", rule, known))
            return
    try:
        config_of(scenario)
    except ConfigError as error:
        yield Mistake(_constant_path(scenario.constants, str(error)), str(error))


def _constant_path(constants: Constants, text: str) -> Path:
    """The constant in the file that a ConfigError speaks of: the last that is named and given."""
    given = [n for n in Constants.__struct_fields__ if getattr(constants, n) not in (None, 1.0)]
    said = [n for n in given if re.search(rf"\b{n}(_ns)?\b", text)]
    return ("constants", max(said, key=lambda n: text.rfind(n))) if said else ("constants",)


# ---- instances and network ------------------------------------------------------------------------------------------
def _instances(scenario: Scenario) -> Iterator[Mistake]:
    if not scenario.instances:
        yield Mistake(("instances",), "found none, expected at least one instance with a location")
    for name, instance in scenario.instances.items():
        path: Path = ("instances", name)
        why = bad_name(name)
        if why or name in (CONTROLLER, CLIENT):
            yield Mistake(path, why or f"the name {name!r} is the {_role(name)}'s", True)
        if not 1 <= instance.ranks <= _RANKS_MAX:
            yield Mistake((*path, "ranks"), f"found {instance.ranks}, expected 1 to {_RANKS_MAX}")
        elif _token_bytes(scenario) % instance.ranks:
            text = f"{instance.ranks} ranks cannot share {_token_bytes(scenario)} bytes a token evenly"
            yield Mistake((*path, "ranks"), text)
        elif not instance.locations:
            yield Mistake((*path, "locations"), "found none, expected at least one such as 'LocalCPUBackend: 2 GiB'")
        else:
            yield from _locations(scenario, name)
        yield from _namespace(("instances", name), instance.namespace)


def _role(name: str) -> str:
    return "controller" if name == CONTROLLER else "client"


def _token_bytes(scenario: Scenario) -> int:
    kv = scenario.kv
    return kv.bytes_per_token.bytes if kv.bytes_per_token is not None else MODELS.get(kv.model, 0)


def _locations(scenario: Scenario, name: str) -> Iterator[Mistake]:
    ranks = scenario.instances[name].ranks
    for place, spec in scenario.instances[name].locations.items():
        path: Path = ("instances", name, "locations", place)
        why = bad_name(place)
        if why:
            yield Mistake(path, why, True)
        wrong = list(_namespace(path, spec.namespace))
        if "ranks" in spec.namespace:
            text = "found ranks, which are the whole instance's, expected none here"
            wrong.append(Mistake((*path, "namespace", "ranks"), text, True))
        yield from wrong
        if wrong:
            continue
        tokens = int(spec.namespace.get("chunk_tokens", scenario.kv.chunk_tokens))
        size = int(spec.namespace.get("bytes_per_token", 0)) * ranks or _token_bytes(scenario)
        chunk = tokens * size
        if spec.slot is not None and spec.slot.bytes < chunk:
            yield Mistake((*path, "slot"), f"{spec.slot} is less than one chunk of {chunk} bytes")
        elif spec.size.bytes < chunk:
            text = f"{spec.size} is less than one chunk: {tokens} tokens of {size} bytes are {chunk} bytes"
            yield Mistake((*path, "size"), text)
        elif spec.slot is not None and spec.size.bytes < spec.slot.bytes:
            yield Mistake((*path, "size"), f"{spec.size} is less than one slot of {spec.slot}")


def _namespace(at: Path, changes: Mapping[str, Union[str, int]]) -> Iterator[Mistake]:
    for key, value in changes.items():
        path: Path = (*at, "namespace", key)
        if key not in NAMESPACE_FIELDS:
            yield Mistake(path, unknown("namespace field", key, NAMESPACE_FIELDS), True)
            continue
        kind = type(getattr(Namespace(), key))
        if type(value) is not kind:
            yield Mistake(path, f"found {shown(value)}, expected {'text' if kind is str else 'a whole number'}")


def _network(scenario: Scenario) -> Iterator[Mistake]:
    switches = scenario.network.switches
    for name, instance in scenario.instances.items():
        if instance.switch and instance.switch not in switches:
            yield Mistake(("instances", name, "switch"), unknown("switch", instance.switch, tuple(switches)))
    roots: List[str] = []
    for name, switch in switches.items():
        path: Path = ("network", "switches", name)
        why = bad_name(name)
        if why or name in scenario.instances:
            yield Mistake(path, why or f"{name!r} is an instance, expected another name", True)
        if not switch.uplink:
            roots.append(name)
        elif switch.uplink not in switches:
            yield Mistake((*path, "uplink"), unknown("switch", switch.uplink, tuple(switches)))
    circle = _circle({name: switch.uplink for name, switch in switches.items()})
    if circle:
        path = ("network", "switches", circle[0], "uplink")
        yield Mistake(path, f"goes in a circle: {' -> '.join([*circle, circle[0]])}, expected a tree with one top")
    elif len(roots) > 1:
        yield Mistake(("network", "switches", roots[1]), f"{choices(roots)} has no uplink, expected one top", True)
    for link in scenario.network.links:
        ends = link_ends(link, (*scenario.instances, *switches))
        if ends is None:
            both = tuple([f"{a}-{b}" for a in scenario.instances for b in scenario.instances if a < b])
            yield Mistake(("network", "links", link), unknown("link", link, both), True)
        elif f"{ends[1]}-{ends[0]}" in scenario.network.links and ends[0] > ends[1]:
            yield Mistake(
                ("network", "links", link), f"is the same link as {ends[1]}-{ends[0]}, expected one of them", True
            )


def link_ends(link: str, names: Tuple[str, ...]) -> Optional[Tuple[str, str]]:
    """The two different ends of a link called ``a-b``; None if there are no such two. Names may have a ``-`` inside."""
    parts = link.split("-")
    for cut in range(1, len(parts)):
        one, other = "-".join(parts[:cut]), "-".join(parts[cut:])
        if one in names and other in names and one != other:
            return one, other
    return None


def _circle(up: Dict[str, str]) -> List[str]:
    """The members of a circle in a map to the next one, or none."""
    for start in up:
        walk: List[str] = []
        name = start
        while name in up and name not in walk:
            walk.append(name)
            name = up[name]
        if name in walk:
            return walk[walk.index(name) :]
    return []


# ---- prompts --------------------------------------------------------------------------------------------------------
def _prompts(scenario: Scenario) -> Iterator[Mistake]:
    prompts = scenario.prompts
    stored = {step.store.prompt for step in scenario.steps if step.store is not None and step.store.tokens is not None}
    for name, prompt in prompts.items():
        path: Path = ("prompts", name)
        why = bad_name(name)
        if why:
            yield Mistake(path, why, True)
        yield from _prompt(scenario, path, prompt, name in stored)
        for other, count in prompt.shares.items():
            where: Path = (*path, "shares", other)
            if other not in prompts:
                yield Mistake(where, unknown("prompt", other, [p for p in prompts if p != name]), True)
            elif count < 1:
                yield Mistake(where, f"found {count}, expected a number of tokens above 0")
            elif prompts[other].ids and count > len(prompts[other].ids):
                yield Mistake(where, f"found {count}, but prompt {other} has {len(prompts[other].ids)} token ids")
    for other in prompts:
        circle = _sharing(prompts, other, [])
        if circle:
            text = f"sharing goes in a circle: {' -> '.join(circle)}"
            yield Mistake(("prompts", other, "shares"), text)
            return


def _prompt(scenario: Scenario, path: Path, prompt: Prompt, stored: bool) -> Iterator[Mistake]:
    count = prompt.tokens.count(scenario.kv.chunk_tokens) if prompt.tokens is not None else None
    if count is None and not prompt.ids and not stored:
        yield Mistake(path, "found neither tokens nor ids, expected how long it is: 'tokens: 4096'")
    if count is not None and prompt.ids and count != len(prompt.ids):
        yield Mistake((*path, "tokens"), f"found {count} tokens and {len(prompt.ids)} ids, expected one of the two")
    elif count is not None and count < 1:
        yield Mistake((*path, "tokens"), f"found {count}, expected a number of tokens above 0")
    for i, token in enumerate(prompt.ids):
        if not 0 <= token <= _TOKEN_ID_MAX:
            yield Mistake((*path, "ids", i), f"found {token}, expected a token id of 0 to {_TOKEN_ID_MAX}")
            return


def _sharing(prompts: Dict[str, Prompt], name: str, walk: List[str]) -> List[str]:
    if name in walk:
        return [*walk[walk.index(name) :], name]
    for other in prompts[name].shares if name in prompts else ():
        circle = _sharing(prompts, other, [*walk, name])
        if circle:
            return circle
    return []


def check(scenario: Scenario) -> Optional[Mistake]:
    """The first mistake, or None."""
    return next(mistakes(scenario), None)
