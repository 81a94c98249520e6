"""Scenarios written as YAML: the same when read again, whatever is in them; and every file in scenarios/ is good."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.scenario.build import build
from kvcore.scenario.faults import FaultPlan
from kvcore.scenario.loader import dump, load, loads
from kvcore.scenario.schema import (
    Arrival,
    Between,
    Cancel,
    Clear,
    Constants,
    CopyFault,
    CrashFault,
    Expect,
    Fault,
    Fill,
    FullFault,
    Instance,
    Kv,
    Lengths,
    Link,
    LocationSpec,
    LogNormal,
    Lookup,
    Move,
    NamespaceFault,
    Network,
    PartitionFault,
    PauseFault,
    Prompt,
    Scenario,
    Settle,
    SharedPrefix,
    Sleep,
    SlowFault,
    Status,
    Step,
    Store,
    Switch,
    Unpin,
    Use,
    UserPin,
    Wait,
    When,
    Workload,
)
from kvcore.scenario.units import ChunkTokens, Duration, Rate, Size, Tokens
from kvcore.scenario.valid_faults import MESSAGES

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(ROOT.glob("scenarios/*/*.yaml"))

texts = st.text(st.characters(codec="utf-8"), max_size=30)
durations = st.one_of(
    st.integers(1, 10**15).map(Duration.of_ns),
    st.sampled_from(["2 leases", "1 lease", "0.25 retries", "3 beats", "1.5 give_ups"]).map(Duration.parse),
)
tokens = st.one_of(st.none(), st.integers(1, 512).map(Tokens), st.integers(1, 8).map(lambda n: Tokens(n, chunks=True)))
flags = st.booleans()


@st.composite
def bodies(draw: st.DrawFn, number: int) -> Dict[str, Any]:
    """What every step may say."""
    said: Dict[str, Any] = {"name": f"op{number}"}
    if draw(flags):
        said["after"] = draw(durations)
        said["timeout"] = draw(st.none() | durations)
    if draw(flags):
        said["background"] = True
        said["window"] = draw(st.integers(0, 9))
    return said


@st.composite
def one_step(draw: st.DrawFn, number: int, places: List[str], earlier: List[str]) -> Step:
    body = draw(bodies(number))
    at = draw(st.sampled_from(places))
    kinds = ["store", "move", "drain", "lookup", "use", "pin", "clear", "settle", "sleep", "fill", "idem", "wait"]
    kind = draw(st.sampled_from([*kinds, "cancel", "status"] if earlier else kinds))
    some = {"prompt": "p", "tokens": draw(tokens), **body}
    to = draw(st.sampled_from(places))
    if kind == "store":
        return Step(store=Store(at=at, **some))
    if kind == "move":
        some.update(copy=draw(flags), if_room=draw(flags), idem=draw(st.sampled_from(["", "k"])))
        return Step(move=Move(src=at, dst=to, deadline=draw(st.none() | durations), **some))
    if kind == "drain":
        return Step(move=Move(src=at, dst=to, all=True, **body))
    if kind == "lookup":
        return Step(lookup=Lookup(**some))
    if kind == "use":
        return Step(use=Use(at=at, hold=draw(st.none() | durations), **some))
    if kind == "pin":
        return Step(pin=UserPin(at=at, lease=draw(st.none() | durations), **some))
    if kind == "clear":
        return Step(clear=Clear(at=at, **body))
    if kind == "sleep":
        return Step(sleep=Sleep(duration=draw(durations), **body))
    if kind == "fill":
        return Step(fill=Fill(at=at, slots=draw(st.integers(1, 9)), **body))
    if kind == "idem":
        return Step(status=Status(idem="k", wait=draw(flags), **body))
    if kind == "wait":
        return Step(wait=Wait(op=draw(st.lists(st.sampled_from(earlier)).map(tuple)) if earlier else (), **body))
    if kind == "cancel":
        return Step(cancel=Cancel(op=draw(st.sampled_from(earlier)), **body))
    if kind == "status":
        return Step(status=Status(op=draw(st.sampled_from(earlier)), **body))
    return Step(settle=Settle(**(body if draw(flags) else {})))


@st.composite
def some_steps(draw: st.DrawFn, places: List[str]) -> List[Step]:
    steps = [
        Step(store=Store(at=places[0], prompt="p", tokens=Tokens(512))),
        Step(pin=UserPin(at=places[0], prompt="p", name="held")),
        Step(unpin=Unpin(pin="held")),
    ]
    moves: List[str] = []
    for number in range(draw(st.integers(0, 5))):
        steps.append(draw(one_step(number, places, moves)))
        if steps[-1].move is not None:
            moves.append(f"op{number}")
    return steps


@st.composite
def one_fault(draw: st.DrawFn, nodes: List[str], places: List[str], moves: List[str]) -> Fault:
    kind = draw(st.sampled_from(["message", "node", "copy", "namespace"]))
    node = draw(st.sampled_from(nodes))
    if kind == "namespace":
        return Fault(
            namespace=NamespaceFault(node=nodes[0], dtype=draw(texts), ranks=draw(st.none() | st.integers(1, 9)))
        )
    if kind == "copy":
        when = draw(st.sampled_from([None, When(started="StartCopy", by=node), When(started="StartFill", nth=2)]))
        bad = draw(st.sampled_from([CopyFault(fail=True, fraction=0.5), CopyFault(corrupt=True), CopyFault(slow=2.5)]))
        return Fault(when=when, copy=bad, times=draw(st.integers(1, 3)))
    by = draw(st.sampled_from(["", *nodes]))
    sent = When(sent=draw(st.sampled_from(MESSAGES)), by=by, nth=draw(st.integers(1, 5)))
    if kind == "message":
        if draw(flags):
            return Fault(when=sent, drop=draw(st.sampled_from([1, 2, "all"])), times=draw(st.integers(1, 3)))
        return Fault(when=sent, delay=draw(durations), duplicate=draw(st.integers(0, 2)), reorder=draw(flags))
    when = draw(
        st.sampled_from([sent, When(at=Duration.parse("2 leases")), When(received="Pin"), When(ended="CopyDone")])
    )
    until = draw(st.none() | durations)
    return Fault(
        when=when,
        crash=draw(st.sampled_from([None, CrashFault(node=node), CrashFault(node=node, restart_after=until)])),
        pause=draw(st.sampled_from([None, PauseFault(node=node), PauseFault(node=node, duration=until)])),
        slow=draw(st.sampled_from([None, SlowFault(node=node, factor=2.0, duration=until)])),
        partition=draw(st.sampled_from([None, PartitionFault(between=node, others=(node, "ctl"), one_way=True)])),
        full=FullFault(at=places[0], duration=until),
        cancel=draw(st.sampled_from(["", *moves])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Scenarios in which everything that can be said is said now and then."""
    names = draw(st.lists(st.sampled_from(["a", "b", "c-1", "x.y", "on"]), min_size=1, max_size=3, unique=True))
    instances: Dict[str, Instance] = {}
    for name in names:
        size = Size(draw(st.integers(1, 64)) * 2**20)
        locations = {"cpu": LocationSpec(size=size), "disk": LocationSpec(size=size, bandwidth=Rate(8 * 10**9))}
        nic = draw(st.none() | st.just(Link(latency=Duration.parse("5 us"))))
        instances[name] = Instance(ranks=draw(st.sampled_from([1, 2])), locations=locations, nic=nic, id=draw(texts))
    places = [f"{name}/{place}" for name in names for place in ("cpu", "disk")]
    steps = draw(some_steps(places))
    moves = [step.move.name for step in steps if step.move is not None]
    links = {f"{names[0]}-{names[1]}": Link(bandwidth=Rate(10**9))} if len(names) > 1 else {}
    switches = draw(st.sampled_from([{}, {"top": Switch(), "leaf": Switch(uplink="top", bandwidth=Rate(8))}]))
    states: Any = st.sampled_from([None, "done", ("done", "failed")])
    expect = {name: Expect(state=draw(states), num_tokens=draw(st.none() | st.integers(0, 9))) for name in moves}
    for step in steps:
        if step.lookup is not None:
            expect[step.lookup.name] = Expect(found={places[0]: draw(st.integers(0, 5))} if draw(flags) else {})
    return Scenario(
        name=draw(texts),
        about=draw(texts),
        order=draw(st.sampled_from(["strict", "racing"])),
        seed=draw(st.integers(0, 2**63 - 1)),
        needs=draw(st.sampled_from([(), ("gpu", "disk")])),
        kv=Kv(chunk=ChunkTokens(64), bytes_per_token=Size(1024), direction=draw(st.sampled_from(["read", "push"]))),
        constants=draw(st.sampled_from([Constants(), Constants(scale=0.05, dead=Duration.parse("1 s"))])),
        without=draw(st.sampled_from([(), ("h03",)])),
        violates=draw(st.sampled_from([(), ("Loss",)])),
        prompts={"q": Prompt(ids=(1, 2, 3)), "r": Prompt(tokens=Tokens(64), shares={"q": 2}, salt=draw(texts))},
        instances=instances,
        network=Network(profile=draw(texts), links=links, switches=switches),
        workload=draw(st.none() | workloads()),
        steps=tuple(steps),
        faults=tuple(draw(st.lists(one_fault([*names, f"{names[0]}/0"], places, moves), max_size=3))),
        expect=expect,
        deadline=draw(durations),
    )


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    shapes = [
        Lengths(fixed=Tokens(5)),
        Lengths(uniform=Between(least=Tokens(1), most=Tokens(9))),
        Lengths(lognormal=LogNormal(median=Tokens(2, chunks=True), sigma=0.5)),
    ]
    return Workload(
        requests=draw(st.integers(1, 99)),
        arrival=draw(st.sampled_from([Arrival(poisson=2.5), Arrival(constant=1.0), Arrival(closed=3)])),
        prompt_tokens=draw(st.sampled_from(shapes)),
        shared_prefix=draw(st.sampled_from([None, SharedPrefix(groups=2, tokens=Tokens(1, chunks=True))])),
        zipf=draw(st.sampled_from([0.0, 1.1])),
        mix=draw(st.sampled_from([{}, {"store": 1.0, "use": 2.0}])),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(scenarios())
def test_what_is_written_is_read_again(scenario: Scenario) -> None:
    text = dump(scenario)
    assert loads(text) == scenario
    assert dump(loads(text)) == text


def test_what_is_written_is_for_people() -> None:
    scenario = load(ROOT / "scenarios/smoke/restart.yaml")
    lines = dump(scenario).splitlines()
    assert "constants: {scale: 0.05, dead: 1 s}" in lines
    assert "  a: {locations: {LocalCPUBackend: 64 MiB}}" in lines
    assert "- settle" in lines
    assert "- move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: first}" in lines
    assert "- when: {sent: Committed, by: b}" in lines
    assert "  between: {a/LocalCPUBackend: 1024}" in lines
    assert max(map(len, lines)) <= 120


# ---- the files that people read first
def test_there_are_files() -> None:
    assert len([f for f in FILES if f.parent.name == "smoke"]) >= 5
    assert len([f for f in FILES if f.parent.name == "faults"]) >= 50


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_is_good(path: Path) -> None:
    text = path.read_text()
    scenario = load(path)
    assert scenario.name == path.stem
    assert scenario.expect, "a scenario says what must come of it"
    assert text.startswith("# "), "a comment says what to look at"
    assert loads(dump(scenario)) == scenario
    built = build(scenario)
    assert FaultPlan(built.faults, built.config, built.nodes) is not None
    slabs = [spec.size.bytes for instance in scenario.instances.values() for spec in instance.locations.values()]
    assert sum(slabs) <= 4 * 2**30, "small enough for a laptop"


def test_every_kind_of_fault_has_a_file() -> None:
    """And so has the loss of each message of the move, in both directions."""
    faults = [fault for path in FILES if path.parent.name == "faults" for fault in load(path).faults]
    kinds = {kind for fault in faults for kind in fault.kinds}
    assert kinds == {
        *("drop", "delay", "duplicate", "reorder", "partition", "crash", "pause", "slow"),
        *("copy", "full", "unmount", "cancel", "namespace"),
    }
    dropped = {fault.when.sent for fault in faults if fault.when is not None and fault.drop is not None}
    engine = {"LookupRequest", "PinRequest", "UnpinRequest", "ClearRequest", "CancelRequest", "StatusRequest"}
    assert set(MESSAGES) - dropped == engine | {"StoreRequest", "UseRequest"}
