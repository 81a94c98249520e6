"""From what a scenario file says to what both drivers take: the spec of every node, keys hashed, durations in ns.

``build`` is a function of its arguments alone. ``Built`` survives the wire and a log (``encode``, ``decode``).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Container, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import msgspec

from kvcore.protocol.config import Config, ConfigError, ControllerSpec, WorkerSpec
from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import Machine
from kvcore.protocol.messages import Key, Location, Namespace
from kvcore.protocol.worker import Worker
from kvcore.scenario.client import Client, ClientSpec
from kvcore.scenario.compile import BuildError, Compiler
from kvcore.scenario.generate import expand
from kvcore.scenario.profile import AUTO, Profile, load_profile
from kvcore.scenario.prompts import PromptError, PromptKeys, Prompts, PromptText
from kvcore.scenario.schema import CLIENT, CONTROLLER, Expect, Fault, Instance, Network, Scenario, config_of
from kvcore.scenario.units import dec_hook, enc_hook

AnySpec = Union[ControllerSpec, WorkerSpec, ClientSpec]

__all__ = [
    "AnySpec",
    "BuildError",
    "Built",
    "as_measured",
    "build",
    "decode",
    "encode",
    "make_machine",
    "placement",
    "with_measured",
]


class Built(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Everything a driver needs. ``specs``: the controller, the workers in the scenario's order, the client."""

    name: str
    order: str
    seed: int
    config: Config
    specs: Tuple[AnySpec, ...]
    deadline_ns: int
    """A run that is not quiet by then hangs. Since the workload's start."""
    instances: Dict[str, Instance] = {}
    network: Network = Network()
    faults: Tuple[Fault, ...] = ()
    expect: Dict[str, Expect] = {}
    prompts: Dict[str, PromptKeys] = {}
    """Every prompt that a step names (not a fill's), under the namespace that most instances have."""
    own_prompts: Dict[str, Dict[str, PromptKeys]] = {}
    """The same under the namespace of an instance, or of a location (``a/Draft``), that has another one."""
    needs: Tuple[str, ...] = ()
    about: str = ""

    @property
    def nodes(self) -> Tuple[str, ...]:
        """All addresses, in the order of ``specs``."""
        return tuple([spec.name for spec in self.specs])

    @property
    def bytes_per_token(self) -> Dict[str, int]:
        """Worker and location, ``a/0/LocalCPUBackend`` -> bytes of one token there."""
        workers = [spec for spec in self.specs if isinstance(spec, WorkerSpec)]
        return {f"{w.name}/{place.name}": w.space(place.name).bytes_per_token for w in workers for place in w.locations}

    def ranks(self, instance: str) -> Tuple[str, ...]:
        """The addresses of an instance's ranks."""
        return addresses(instance, self.instances[instance].ranks)


def encode(built: Built) -> bytes:
    """As JSON. Quantities of the scenario are written as people write them."""
    return msgspec.json.encode(built, enc_hook=enc_hook)


def decode(data: bytes) -> Built:
    return msgspec.json.decode(data, type=Built, dec_hook=dec_hook)


def addresses(instance: str, ranks: int) -> Tuple[str, ...]:
    return tuple([f"{instance}/{rank}" for rank in range(ranks)])


def make_machine(spec: AnySpec) -> Machine:
    """A fresh machine for one life of a node; its first input is Boot."""
    if isinstance(spec, WorkerSpec):
        return Worker(spec)
    if isinstance(spec, ControllerSpec):
        return Controller(spec)
    return Client(spec)


def build(scenario: Scenario, seed: Optional[int] = None) -> Built:
    """Compile; a workload's steps are drawn first. ``seed`` replaces the scenario's. BuildError (one line) for what
    cannot be."""
    try:
        config = config_of(scenario)
        return _build(expand(scenario, seed), scenario.seed if seed is None else seed, config)
    except (ConfigError, PromptError) as error:
        raise BuildError(f"{scenario.name}: {error}") from error


def with_measured(built: Built, profile: Profile, transport: str = AUTO) -> Built:
    """``built`` with workers that know what ``profile`` says of their transport, so that they can be moved between in
    the direction that is quicker. Both worlds are to be given the same."""
    measured = profile.measured(() if transport == AUTO else (transport,))
    if measured is None:
        return built
    specs = [msgspec.structs.replace(s, measured=measured) if isinstance(s, WorkerSpec) else s for s in built.specs]
    return msgspec.structs.replace(built, specs=tuple(specs))


def as_measured(built: Built, transport: str = AUTO) -> Built:
    """``with_measured``, by the profile that its network names. ProfileError for a wrong one."""
    if not built.network.profile or any(isinstance(s, WorkerSpec) and s.measured for s in built.specs):
        return built
    return with_measured(built, load_profile(Path(built.network.profile)), transport)


def _build(scenario: Scenario, seed: int, config: Config) -> Built:
    if not scenario.instances:
        raise BuildError(f"{scenario.name}: instances: none, expected one at least")
    own = {name: _namespace(scenario, name) for name in scenario.instances}
    common = Counter(own.values()).most_common(1)[0][0]
    for name, instance in scenario.instances.items():
        own.update({f"{name}/{place}": _located(scenario, name, place, own[name]) for place in instance.locations})
    prompts = _prompts(scenario)
    compiler = Compiler(scenario, config, own, common, prompts)
    ops = compiler.ops()
    workers = _workers(scenario, config, own)
    named = compiler.named_prompts()
    return Built(
        name=scenario.name,
        order=scenario.order,
        seed=seed,
        config=config,
        specs=(ControllerSpec(CONTROLLER, config), *workers, ClientSpec(CLIENT, config, ops)),
        deadline_ns=scenario.deadline.ns(config),
        instances=scenario.instances,
        network=scenario.network,
        faults=scenario.faults,
        expect=scenario.expect,
        prompts=prompts.all(common, named),
        own_prompts={
            at: prompts.all(space, named)
            for at, space in own.items()
            if space != own.get(at.partition("/")[0], common) or ("/" not in at and space != common)
        },
        needs=scenario.needs,
        about=scenario.about,
    )


def _namespace(scenario: Scenario, instance: str, address: str = "") -> Namespace:
    """What an instance's keys are hashed under; of one rank, if ``address``: a fault may give it another one."""
    kv = scenario.kv
    spec = scenario.instances[instance]
    try:
        token_bytes = kv.token_bytes
    except KeyError:
        raise BuildError(
            f"{scenario.name}: kv.model: {kv.model!r} is not known, so bytes_per_token is needed"
        ) from None
    if spec.ranks < 1:
        raise BuildError(f"{scenario.name}: instances.{instance}.ranks: {spec.ranks}, expected 1 or more")
    if token_bytes < 1 or token_bytes % spec.ranks:
        raise BuildError(
            f"{scenario.name}: instances.{instance}.ranks: {spec.ranks} ranks cannot share {token_bytes} bytes a token"
        )
    space = Namespace(kv.model, kv.weights, kv.dtype, kv.layout, kv.chunk_tokens, spec.ranks, token_bytes // spec.ranks)
    changes = dict(spec.namespace)
    for fault in scenario.faults:
        if fault.namespace is not None and fault.namespace.node in (instance, address):
            changes.update(fault.namespace.changes())
    return _changed(scenario, instance, space, changes)


def _located(scenario: Scenario, instance: str, location: str, space: Namespace) -> Namespace:
    """What lies in one location of an instance (or a rank) of that namespace."""
    changes = scenario.instances[instance].locations[location].namespace
    return _changed(scenario, f"{instance}/{location}", space, changes) if changes else space


def _changed(scenario: Scenario, where: str, space: Namespace, changes: Mapping[str, Union[str, int]]) -> Namespace:
    for name, value in changes.items():
        if name not in Namespace.__struct_fields__ or type(value) is not type(getattr(space, name)):
            raise BuildError(f"{scenario.name}: namespace of {where}: {name}: {value!r} is not possible")
    return msgspec.structs.replace(space, **changes)


def _workers(scenario: Scenario, config: Config, own: Mapping[str, Namespace]) -> List[WorkerSpec]:
    workers: List[WorkerSpec] = []
    for name, spec in scenario.instances.items():
        own_config = msgspec.structs.replace(config, direction=spec.direction) if spec.direction else config
        for rank, address in enumerate(addresses(name, spec.ranks)):
            space = _namespace(scenario, name, address)
            places: List[Location] = []
            for location, what in spec.locations.items():
                where = f"{scenario.name}: instances.{name}.locations.{location}"
                there = _located(scenario, name, location, space)
                chunk = there.chunk_tokens * there.bytes_per_token
                slot = what.slot.bytes // spec.ranks if what.slot is not None else chunk
                if slot < chunk:
                    text = f"slots of {slot} bytes are smaller than a chunk of {chunk} at each of {spec.ranks} ranks"
                    raise BuildError(f"{where}: {text}")
                slots = what.size.bytes // spec.ranks // slot
                if slots < 1:
                    raise BuildError(
                        f"{where}: {what.size} is less than one chunk of {there.chunk_tokens} tokens at each of"
                        f" {spec.ranks} ranks"
                    )
                other = there if there != space else None
                places.append(Location(location, slots, slot if slot != chunk else 0, other))
            workers.append(WorkerSpec(address, spec.id or name, rank, CONTROLLER, space, tuple(places), own_config))
    return workers


def _prompts(scenario: Scenario) -> Prompts:
    texts: Dict[str, PromptText] = {}
    for name, prompt in scenario.prompts.items():
        tokens = prompt.tokens.count(scenario.kv.chunk_tokens) if prompt.tokens is not None else 0
        texts[name] = PromptText(tokens, prompt.ids, tuple(prompt.shares.items()), prompt.adapter, prompt.salt)
    return Prompts(texts)


def placement(built: Built, visible: Mapping[str, Mapping[str, Container[Key]]]) -> Dict[str, Dict[str, int]]:
    """``"instance/location" -> prompt -> tokens``: the longest prefix that every rank holds; nothing is left out.

    ``visible``: worker address -> location -> the keys in its index. A missing worker is dead: it holds nothing.
    """
    result: Dict[str, Dict[str, int]] = {}
    for name, instance in built.instances.items():
        for location in instance.locations:
            own = built.own_prompts.get(f"{name}/{location}", built.own_prompts.get(name))
            prompts = built.prompts if own is None else own
            ranks: Sequence[Container[Key]] = [
                visible.get(address, {}).get(location, ()) for address in built.ranks(name)
            ]
            held = {prompt: min([keys.held(has) for has in ranks]) for prompt, keys in prompts.items()}
            held = {prompt: tokens for prompt, tokens in held.items() if tokens}
            if held:
                result[f"{name}/{location}"] = held
    return result
