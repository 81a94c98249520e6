"""Scenario files: what is read; every mistake is one line with file, line, column, field, and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.scenario.loader import BYTES_MAX, ScenarioError, load, loads
from kvcore.scenario.schema import Scenario

GOOD = """\
name: the destination dies with its commit unheard
about: What to look at, and the incident it comes from (prior-art 1).
order: strict
seed: 7
kv: {model: llama-3.1-8b, chunk: 256 tokens}
instances:
  a: {ranks: 1, locations: {LocalCPUBackend: 2 GiB}}
  b: {ranks: 1, locations: {LocalCPUBackend: 2 GiB, LocalDiskBackend: 8 GiB}}
network:
  profile: profiles/this-machine.yaml
  links: {a-b: {bandwidth: 25 Gbit/s, latency: 20 us}}
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 4096}
  - move:  {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: m}
  - settle:
  - lookup: {prompt: p, as: found}
faults:
  - when: {sent: Committed, by: b, nth: 1}
    drop: all
    crash: {node: b, restart_after: 2 leases}
expect:
  m: {state: failed, reason: destination restarted}
  found: {a/LocalCPUBackend: 4096}
"""


def fails(text: str, *overrides: str) -> ScenarioError:
    with pytest.raises(ScenarioError) as caught:
        loads(text, "x.yaml", overrides)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_the_example_is_read() -> None:
    scenario = loads(GOOD, "x.yaml")
    assert scenario.seed == 7
    assert scenario.instances["b"].locations["LocalDiskBackend"].size.bytes == 8 * 2**30
    assert [step.kind for step in scenario.steps] == ["store", "move", "settle", "lookup"]
    assert scenario.faults[0].kinds == ("drop", "crash")
    assert scenario.expect["found"].found == {"a/LocalCPUBackend": 4096}


A = "ranks: 1, locations: {LocalCPUBackend: 2 GiB}}"
CPU = "instances.a.locations.LocalCPUBackend"

#: (what is replaced, by what, line, column, field, what must be said)
MISTAKES = [
    # names that are not known, with the nearest
    ("order: strict", "ordr: strict", 3, 1, "ordr", "unknown field 'ordr'"),
    (A, "rank: 1}", 7, 7, "instances.a.rank", "(did you mean 'ranks'?)"),
    ("- move:", "- mov:", 14, 5, "steps[1].mov", "unknown kind of step 'mov'"),
    ("drop: all", "dropp: all", 19, 5, "faults[0].dropp", "unknown kind of fault 'dropp'"),
    ("at: a/", "at: aa/", 13, 17, "steps[0].store.at", "unknown instance 'aa', expected a or b (did you mean 'a'?)"),
    ("at: a/LocalCPU", "at: a/LocaCPU", 13, 17, "steps[0].store.at", "(did you mean 'LocalCPUBackend'?)"),
    ("at: a/LocalCPUBackend", "at: a", 13, 17, "steps[0].store.at", "expected instance/location"),
    ("lookup: {prompt: p", "lookup: {prompt: q", 16, 22, "steps[3].lookup.prompt", "unknown prompt 'q'"),
    ("Committed", "Comitted", 18, 18, "faults[0].when.sent", "(did you mean 'Committed'?)"),
    ("by: b,", "by: bb,", 18, 33, "faults[0].when.by", "unknown node 'bb'"),
    ("by: b,", "by: b/1,", 18, 33, "faults[0].when.by", "instance b has no rank '1', expected 0 to 0"),
    ("{node: b", "{node: c", 20, 19, "faults[0].crash.node", "unknown node 'c'"),
    ("  found: {", "  fund: {", 23, 3, "expect.fund", "unknown step 'fund'"),
    ("found: {a/", "found: {c/", 23, 11, "expect.found.c/LocalCPUBackend", "unknown instance 'c'"),
    ("state: failed", "state: faild", 22, 14, "expect.m.state", "(did you mean 'failed'?)"),
    ("a-b:", "a-c:", 11, 11, "network.links.a-c", "unknown link 'a-c', expected a-b"),
    ("llama-3.1-8b", "llama-3.1-8", 5, 13, "kv.model", "; or else give bytes_per_token"),
    ("order: strict", "order: stric", 3, 8, "order", "expected strict or racing (did you mean 'strict'?)"),
    ("seed: 7", "without: [h99]", 4, 11, "without[0]", "unknown rule 'h99'"),
    ("seed: 7", "violates: [byte]", 4, 12, "violates[0]", "(did you mean 'Byte'?)"),
    # quantities
    ("256 tokens", "256", 5, 34, "kv.chunk", "without a unit, expected a number of tokens"),
    ("2 GiB}}", "2}}", 7, 46, CPU, "without a unit"),
    ("2 GiB}}", "-2 GiB}}", 7, 46, CPU, "is negative"),
    ("2 GiB}}", "2 Gib}}", 7, 46, CPU, "(did you mean 'GiB'?)"),
    ("2 GiB}}", "9 MiB}}", 7, 46, CPU, "less than one chunk"),
    ("25 Gbit/s", "25 Gbits/s", 11, 28, "network.links.a-b.bandwidth", "(did you mean 'Gbit/s'?)"),
    ("2 leases", "2 leasess", 20, 37, "faults[0].crash.restart_after", "(did you mean 'leases'?)"),
    ("tokens: 4096", "tokens: 4096 Mi", 13, 55, "steps[0].store.tokens", "expected tokens or chunks"),
    # types
    (A, "ranks: x, locations: {L: 2 GiB}}", 7, 14, "instances.a.ranks", "found 'x', expected a whole number"),
    (A, "ranks: 0, locations: {L: 2 GiB}}", 7, 14, "instances.a.ranks", "found 0, expected 1 to 64"),
    (A, "ranks: 3, locations: {L: 2 GiB}}", 7, 14, "instances.a.ranks", "3 ranks cannot share 131072 bytes"),
    ("drop: all", "drop: al", 19, 11, "faults[0].drop", "expected a whole number or all"),
    ("drop: all", "drop: 0", 19, 11, "faults[0].drop", "found 0, expected 1 or more"),
    ("seed: 7", "seed: '7'", 4, 7, "seed", "found '7', expected a whole number"),
    ("seed: 7", "seed:", 4, 6, "seed", "found nothing, expected a whole number"),
    ("seed: 7", "seed: -7", 4, 7, "seed", "expected a whole number of 0 or more"),
    ("order: strict", "prompts: {p: {ids: 5}}", 3, 20, "prompts.p.ids", "found 5, expected a list"),
    ("order: strict", "prompts: {p: {ids: [1, -1]}}", 3, 24, "prompts.p.ids[1]", "found -1, expected a token id"),
    ("prompt: p, as: m", "prompt: 5, as: m", 14, 69, "steps[1].move.prompt", "found 5, expected text (quote it)"),
    # what is missing, twice, or too much
    ("from: a/LocalCPUBackend, ", "", 14, 12, "steps[1].move.from", "missing, expected instance/location"),
    (
        "  - settle:", "  - settle:\n    lookup: {prompt: p}", 15, 5,
        "steps[2].settle", "found lookup and settle in one step",
    ),
    ("  - settle:", "  - {}", 15, 5, "steps[2]", "found no kind of step"),
    ("  - settle:", "  - as: x\n    settle:", 15, 5, "steps[2].as", "belongs inside the step"),
    ("as: found", "as: m", 16, 29, "steps[3].lookup.as", "there is a step 'm' already"),
    (", prompt: p, as: m", ", as: m", 14, 12, "steps[1].move", "found no prompt"),
    (", prompt: p, as: m", ", prompt: p, all: true, as: m", 14, 77, "steps[1].move.all", "expected one of them"),
    ("seed: 7", "seed: 7\nseed: 8", 5, 1, "seed", "is given twice, first in line 4"),
    ("prompt: p, tokens: 4096}", "prompt: p}", 13, 44, "steps[0].store.prompt", "give its tokens where it is stored"),
    (
        "    drop: all\n    crash: {node: b, restart_after: 2 leases}\n", "", 18, 5,
        "faults[0]", "found no kind of fault",
    ),
    ("when: {sent: Committed, by: b, nth: 1}\n    drop", "drop", 18, 5, "faults[0]", "found drop without a when"),
    ("sent: Committed, by: b, nth: 1", "at: 1 lease", 19, 5, "faults[0].drop", "expected a message"),
    (
        "sent: Committed, by: b, nth: 1", "sent: Pin, at: 1 lease", 18, 11,
        "faults[0].when", "found sent and at, expected one of",
    ),
    ("nth: 1", "nth: 0", 18, 41, "faults[0].when.nth", "found 0, expected 1 or more"),
    # steps that name others
    ("  - settle:", "  - cancel: x", 15, 13, "steps[2].cancel", "unknown earlier step 'x', expected m"),
    ("  - settle:", "  - cancel: store-1", 15, 13, "steps[2].cancel", "store-1 is a store, expected a move"),
    ("  - settle:", "  - cancel: found", 15, 13, "steps[2].cancel", "unknown earlier step 'found'"),
    ("  - settle:", "  - wait: [m, n]", 15, 15, "steps[2].wait[1]", "unknown earlier step 'n'"),
    ("  - settle:", "  - unpin: m", 15, 12, "steps[2].unpin", "m is a move, expected a pin"),
    ("  - settle:", "  - fill: {at: b/LocalCPUBackend}", 15, 11, "steps[2].fill", "neither slots nor tokens"),
    ("  - settle:", "  - sleep: 0 s", 15, 12, "steps[2].sleep", "expected a duration above 0"),
    ("lookup: {prompt: p", "lookup: {prompt: p, tokens: 5000", 16, 33, "steps[3].lookup.tokens", "expected 1 to 4096"),
    # the topology
    ("a: {ranks: 1, locations: {LocalCPUBackend: 2 GiB}}", "a: {}", 7, 6, "instances.a.locations", "found none"),
    ("  a: {ranks", "  ctl: {ranks", 7, 3, "instances.ctl", "is the controller's"),
    ("  a: {ranks", "  a/0: {ranks", 7, 3, "instances.a/0", "will not do"),
    (
        "  links:", "  switches: {s: {uplink: t}, t: {uplink: s}}\n  links:", 11, 26,
        "network.switches.s.uplink", "in a circle: s -> t -> s",
    ),
    ("  links:", "  switches: {s: {uplink: s}}\n  links:", 11, 26, "network.switches.s.uplink", "in a circle: s -> s"),
    ("  links:", "  switches: {s: {}, t: {}}\n  links:", 11, 21, "network.switches.t", "expected one top"),
    ("  links:", "  switches: {s: {uplink: x}}\n  links:", 11, 26, "network.switches.s.uplink", "unknown switch 'x'"),
    ("  a: {", "  a: {switch: s, ", 7, 15, "instances.a.switch", "unknown switch 's'"),
    # constants
    (
        "seed: 7", "constants: {renew: 9 s}", 4, 20,
        "constants.renew", "3 renew_ns = 27000000000 ns must not be above lease_ns",
    ),
    ("seed: 7", "constants: {beat: 3 s}", 4, 19, "constants.beat", "must not be above dead_ns"),
    ("seed: 7", "constants: {lease: 2 leases}", 4, 20, "constants.lease", "expected a time"),
    # other kinds of fault
    ("drop: all", "copy: {fail: true}", 19, 5, "faults[0].copy", "expected 'when: {started: StartCopy or StartFill}'"),
    ("    drop: all", "    namespace: {node: b, dtype: x}", 18, 5, "faults[0].when", "differs from the start"),
    ("    drop: all", "    slow: {node: b, factor: 0.5}", 19, 29, "faults[0].slow.factor", "expected 1 or more"),
    ("    drop: all", "    full: b/Nowhere", 19, 11, "faults[0].full", "unknown location of b 'Nowhere'"),
    ("    drop: all", "    cancel: found", 19, 13, "faults[0].cancel", "found is a lookup, expected a move"),
    (
        "    drop: all", "    partition: {between: b, and: [ctl, x]}", 19, 40,
        "faults[0].partition.and[1]", "unknown node 'x'",
    ),
    ("    drop: all", "    partition: {between: b}", 19, 16, "faults[0].partition.and", "missing"),
    ("    drop: all", "    delay: 0 s", 19, 12, "faults[0].delay", "expected a duration above 0"),
    # workload
    ("seed: 7", "workload: {}", 4, 11, "workload", "neither moves nor requests"),
    ("seed: 7", "workload: {moves: 5, arrival: {}}", 4, 31, "workload.arrival", "expected one of them"),
    ("seed: 7", "workload: {moves: 5, arrival: {closed: 0}}", 4, 40, "workload.arrival.closed", "above 0"),
    ("seed: 7", "workload: {requests: 5, mix: {mov: 1}}", 4, 31, "workload.mix.mov", "(did you mean 'move'?)"),
    ("seed: 7", "workload: {moves: 5, location: X}", 4, 32, "workload.location", "unknown location 'X'"),
    (
        "seed: 7", "workload: {moves: 5, prompt_tokens: {uniform: {min: 5, max: 4}}}", 4, 47,
        "workload.prompt_tokens.uniform", "min <= max",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "column", "field", "said"), MISTAKES, ids=lambda v: str(v)[:30])
def test_a_mistake_is_one_line_with_its_place(
    old: str, new: str, line: int, column: int, field: str, said: str
) -> None:
    assert old in GOOD
    error = fails(GOOD.replace(old, new, 1))
    assert said in error.text
    assert (error.field, error.line, error.column) == (field, line, column)
    assert str(error) == f"x.yaml:{line}:{column}: {field}: {error.text}"


#: (text, line, column, what must be said)
NOT_SCENARIOS = [
    ("", 1, 1, "is empty"),
    ("# only a comment\n", 1, 1, "is empty"),
    ("just text", 1, 1, "found 'just text', expected a scenario"),
    ("[1, 2]", 1, 1, "found a list, expected a scenario"),
    ("name: [1", 1, 9, "not YAML"),
    ("name: x\n\tinstances: {}", 2, 1, "not YAML"),
    ("name: x\nname: {a: b", 2, 12, "not YAML"),
    ("--- \nname: x\n---\nname: y\n", 3, 1, "not YAML"),
    ("name: \x01", 1, 7, "U+0001"),
    ("name: &a x\nabout: *a\n", 1, 7, "anchor or alias"),
    ("name: *a\n", 1, 7, "anchor or alias"),
    ("a: &a [x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", 1, 4, "anchor or alias"),
    ("name: " + "[" * 100 + "]" * 100, 1, 26, "nested more than"),
    ("name: !!python/object/apply:os.system [x]", 1, 7, "unknown tag"),
    ("name: !x y", 1, 7, "unknown tag"),
    ("name: !!int x", 1, 7, "unknown tag"),
    ("1: x", 1, 1, "found 1 as a name"),
    ("[a]: x", 1, 1, "found a list or mapping as a name"),
    (": x", 1, 1, "not YAML"),
    ("name: x", 1, 1, "instances: missing, expected at least one instance"),
    ("name: x\ninstances: {}", 2, 12, "found none, expected at least one instance"),
    ("name: x\ninstances: [a]", 2, 12, "found a list, expected a mapping"),
    ("name: x\nseed: " + "9" * 5000 + "\ninstances: {}", 2, 7, "a number of 5000 digits"),
    ("name: x\nzipf: 1e999\ninstances: {}", 2, 7, "expected a number"),
]


@pytest.mark.parametrize(("text", "line", "column", "said"), NOT_SCENARIOS, ids=lambda v: repr(v)[:30])
def test_what_is_no_scenario(text: str, line: int, column: int, said: str) -> None:
    error = fails(text)
    assert said in str(error)
    assert (error.line, error.column) == (line, column)


def test_yaml_1_1_does_not_surprise() -> None:
    """``on`` and ``no`` are text; ``1:30`` is no sixty-based number; ``1e3`` is a number."""
    text = "name: on\nabout: 'no'\ninstances: {off: {id: no, locations: {cpu: 1 GiB}}}\nconstants: {scale: 1e1}\n"
    scenario = loads(text)
    assert (scenario.name, scenario.about) == ("on", "no")
    assert scenario.instances["off"].id == "no"
    assert scenario.constants.scale == 10.0
    assert loads(text.replace("name: on", "name: 1:30")).name == "1:30"


def test_short_forms() -> None:
    text = GOOD + "  short-4: done\n"
    text = text.replace(
        "  - settle:", "  - settle\n  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: n}"
    )
    text = text.replace("  short-4: done\n", "  n: done\n").replace("seed: 7", "prompts: {q: 64}")
    scenario = loads(text)
    assert scenario.steps[2].kind == "settle"
    assert scenario.expect["n"].state == "done"
    assert scenario.prompts["q"].tokens is not None


# ---- overrides
def test_overrides() -> None:
    scenario = loads(
        GOOD,
        "x.yaml",
        (
            "kv.chunk=128 tokens",
            "instances.a.ranks=2",
            "faults.0.when.nth=2",
            "faults[0].drop=3",
            "network.links.a-b.latency=1 ms",
            "instances.b.locations.LocalDiskBackend=1 GiB",
            "constants.lease=10 s",
            "expect.found.a/LocalCPUBackend=12",
            "needs=[gpu]",
            "steps.0.store.tokens=12",
        ),
    )
    assert scenario.kv.chunk_tokens == 128
    assert scenario.instances["a"].ranks == 2
    assert scenario.faults[0].when is not None and scenario.faults[0].when.nth == 2
    assert scenario.faults[0].drop == 3
    assert str(scenario.network.links["a-b"].latency) == "1 ms"
    assert scenario.instances["b"].locations["LocalDiskBackend"].size.bytes == 2**30
    assert scenario.expect["found"].found == {"a/LocalCPUBackend": 12}
    assert scenario.needs == ("gpu",)


@pytest.mark.parametrize(
    ("override", "field", "said"),
    [
        ("kv.chunk=128", "kv.chunk", "without a unit"),
        ("instances.a.rank=2", "instances.a.rank", "unknown field 'rank'"),
        ("faults.3.when=1", "faults", "has no item '3', expected 0 to 0"),
        ("faults.x.when=1", "faults", "has no item 'x'"),
        ("name.x=2", "name", "has no fields"),
        ("foo", "", "expected path=value"),
        ("=3", "", "expected path=value"),
        ("seed=[1", "seed", "not YAML"),
        ("instances={}", "instances", "found none"),
        ("constants.renew=9 s", "constants.renew", "must not be above lease_ns"),
        ("kvv.chunk=128 tokens", "kvv", "unknown field 'kvv'"),
        ("steps.1.move.to=b/X", "steps[1].move.to", "unknown location of b 'X'"),
    ],
)
def test_a_mistake_in_an_override_names_it(override: str, field: str, said: str) -> None:
    error = fails(GOOD, "seed=8", override)
    assert str(error).startswith(f"--set {override!r}: ")
    assert said in error.text
    assert (error.field, error.line) == (field, 0)


def test_a_mistake_that_an_override_does_not_make_keeps_its_line() -> None:
    error = fails(GOOD.replace("order: strict", "order: stric"), "seed=8")
    assert (error.file, error.line) == ("x.yaml", 3)


# ---- files
def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert load(path) == loads(GOOD)
    assert load(str(path), ["seed=9"]).seed == 9


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: x\nabout: \xff\xfe\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (BYTES_MAX + 1))
    for path, said in (
        (tmp_path / "absent.yaml", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (binary, "not text in UTF-8: the byte 0xFF"),
        (large, "is larger than"),
    ):
        with pytest.raises(ScenarioError) as caught:
            load(path)
        assert str(caught.value).startswith(str(path))
        assert said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ScenarioError, match=r"binary.yaml:2:8: "):
        load(binary)
    with pytest.raises(ScenarioError, match="cannot be read"):
        load("a\0b")


# ---- whatever is typed, it is a scenario or one line
@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.text(max_size=4))
def test_any_edit_is_read_or_refused_in_one_line(at: int, cut: int, put: str) -> None:
    text = GOOD[:at] + put + GOOD[at + cut :]
    try:
        assert isinstance(loads(text, "x.yaml"), Scenario)
    except ScenarioError as error:
        assert str(error).startswith(("x.yaml:", "x.yaml: "))
        assert len(str(error).splitlines()) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(GOOD.split()).map(lambda word: word.strip("{}:,")),
    st.sampled_from([0, -1, "", None, True, [], {}, [1], {"x": 1}, "x", 1.5]),
)
def test_any_value_anywhere_is_read_or_refused(word: str, value: object) -> None:
    text = GOOD.replace(f" {word}", f" {value!r}".replace("None", "null").replace("True", "true"))
    try:
        loads(text, "x.yaml")
    except ScenarioError as error:
        assert len(str(error).splitlines()) == 1
