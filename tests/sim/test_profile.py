"""What a measured profile says, and what the simulator makes of it: curves, shared links, chunks, wake-ups."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import msgspec
import pytest

from kvcore.protocol.machine import CopyDone, Received, Send
from kvcore.protocol.messages import Delta, Entry, Fence, Pin
from kvcore.scenario.build import build
from kvcore.scenario.loader import ScenarioError, load, loads
from kvcore.scenario.profile import CopyCost, Made, Profile, ProfileError, load_profile
from kvcore.scenario.schema import Instance, Network
from kvsim.costs import chunks_ns
from kvsim.run import run
from tests.sim.stubs import PROFILE, Stage, copy

ROOT = Path(__file__).parents[2]

#: 1 GB/s up to 1,000 bytes, 2 GB/s at 10,000 and beyond.
FAST = CopyCost(transport="fast", queue_ns=300, copy_ns=500, descriptor_ns=7, rates=((1_000, 1e9), (10_000, 2e9)))
SLOW = CopyCost(transport="slow", copy_ns=5_000, rates=((1, 1e8),))
MEASURED = msgspec.structs.replace(PROFILE, copies=(FAST, SLOW))


def on_one_host(profile: Profile, instances: str = "ab") -> Stage:
    return Stage(profile=profile, instances={name: Instance() for name in instances}, network=Network())


# ---- what it says
def test_times_are_interpolated_between_the_sizes_that_were_measured() -> None:
    assert FAST.bytes_ns(500) == 500 and FAST.bytes_ns(1_000) == 1_000
    assert FAST.bytes_ns(10_000) == 5_000 and FAST.bytes_ns(20_000) == 10_000
    assert FAST.bytes_ns(5_500) == pytest.approx(3_000)  # half way between the two in bytes, and so in time
    assert FAST.overhead_ns(3) == 300 + 500 + 21


def test_auto_takes_the_first_that_there_is() -> None:
    within = CopyCost(transport="memcpy", target="disk", inside=True, rates=((1, 1e9),))
    profile = Profile(copies=(SLOW, FAST, within))
    assert profile.cost("auto", "cpu", "cpu") == SLOW and profile.cost("fast", "cpu", "cpu") == FAST
    assert profile.cost("auto", "cpu", "disk") is None and profile.cost("auto", "cpu", "disk", True) == within
    assert profile.cost("other", "cpu", "cpu") is None
    assert profile.cost("fast", "cpu", "disk", True) == within, "within a process no transport is needed"


def test_a_rate_counts_everything() -> None:
    profile = Profile(copies=(FAST,))
    assert profile.rate("fast", "cpu", "cpu", 10_000, 2) == pytest.approx(10_000 * 1e9 / (300 + 500 + 14 + 5_000))
    assert profile.rate("fast", "cpu", "cpu", 1) < profile.rate("fast", "cpu", "cpu", 10**9) < 2e9
    assert profile.rate("fast", "cpu", "gpu", 10_000) == profile.rate("other", "cpu", "cpu", 10_000) == 0.0


def test_a_profile_knows_its_machine() -> None:
    made = Made(cpu="this", cores=2, host="abc")
    assert made.elsewhere("this", 2, "abc") == ""
    assert made.elsewhere("that", 2, "abc") == "this with 2 cores; this is that with 2"
    assert made.elsewhere("this", 4, "abc") == "this with 2 cores; this is this with 4"
    assert made.elsewhere("this", 2, "xyz") == "another this"
    assert Made(cpu="this", cores=2).elsewhere("this", 2, "xyz") == "", "of its kind: any such machine will do"
    assert Made().elsewhere("that", 9, "xyz") == ""


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("copies: [{transport: x}]", "rates"),
        ("copies: [{transport: x, rates: []}]", "rates: expected at least one pair"),
        ("copies: [{transport: x, rates: [[10, 1.0], [5, 1.0]]}]", "[5, 1]: expected larger sizes after smaller ones"),
        ("copies: [{transport: x, rates: [[10, 1.0], [20, 5.0]]}]", "taking no less time"),
        ("copies: [{transport: x, rates: [[10, -1.0]]}]", "rates: [10, -1]"),
        ("copies: [{transport: x, from: tape, rates: [[10, 1.0]]}]", "from is tape, expected one of cpu, disk, gpu"),
        ("copies: [{transport: x, queue_ns: -3, rates: [[10, 1.0]]}]", "queue_ns is -3"),
        ("copies: [{transport: x, host_bytes_per_s: -3, rates: [[10, 1.0]]}]", "host_bytes_per_s is -3"),
        ("copies: [{transport: x, rate: [[10, 1.0]]}]", "rate"),
        ("made: {when: today}", "when"),
        ("wake_ns: -1", "wake_ns is -1"),
    ],
)
def test_a_mistake_is_one_line_with_the_file_and_the_field(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises((ProfileError, ScenarioError)) as caught:
        load_profile(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:") and what in said and "\n" not in said


def test_every_profile_that_we_bring_can_be_read() -> None:
    paths = sorted((ROOT / "profiles").glob("*.yaml"))
    assert [path.name for path in paths][:1] == ["default.yaml"]
    for path in paths:
        assert load_profile(path).name == path.stem


# ---- what the simulator makes of it
def test_a_copy_costs_what_was_measured() -> None:
    stage = on_one_host(MEASURED)
    waited = []
    stage.cluster.queued = lambda rid, ns: waited.append((rid, ns))
    stage.put("a/0", 3, b"x")
    start = stage.loop.now_ns
    stage.do("b/0", copy("a/0", (3, 4), (0, 1)))
    stage.loop.advance(10**9)
    took_ns = 300 + 500 + 2 * 7 + ceil(FAST.bytes_ns(2_000))
    assert stage.puppet("b/0").seen == [(start + 100 + took_ns, CopyDone((1, 1), True))]
    assert waited == [((1, 1), 300)], "what it waited before its first byte is queueing"


def test_the_first_copy_of_a_process_with_another_takes_longer() -> None:
    cost = CopyCost(transport="t", queue_ns=200, first_ns=5_000, rates=((1, 1e9),))
    stage = on_one_host(msgspec.structs.replace(PROFILE, copies=(cost,)), "abc")
    took = []
    for number, (owner, peer) in enumerate([("b/0", "a/0"), ("b/0", "a/0"), ("b/0", "c/0"), ("a/0", "b/0")], 1):
        start = stage.loop.now_ns
        stage.do(owner, copy(peer, (0,), (0,), rid=(1, number)))
        stage.loop.advance(start + 100_000)
        took.append(stage.puppet(owner).seen[-1][0] - start - 100 - 1_000)
    assert took == [5_200, 200, 5_200, 5_200]


def test_the_transport_that_is_asked_for_counts() -> None:
    text = "name: t\nkv: {bytes_per_token: 4 KiB, chunk: 64 tokens}\ninstances:\n"
    text += "  a: {locations: {LocalCPUBackend: 8 MiB}}\n  b: {locations: {LocalCPUBackend: 8 MiB}}\nsteps:\n"
    text += "  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 256}\n  - settle\n"
    text += "  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: m}\n"
    built = build(loads(text))
    took = {}
    for name in ("auto", "fast", "slow", "none"):
        took[name] = run(built, profile=MEASURED, transport=name).phases[0].copy_ns
    assert took["auto"] == took["fast"] < took["slow"]
    assert took["slow"] == pytest.approx(5_000 + (1 << 20) * 10, rel=0.01)
    assert took["none"] == pytest.approx((1 << 20) / 5, rel=0.01), "nobody has measured it: the plain numbers hold"


def test_copies_of_one_process_and_of_one_host_share_what_was_measured() -> None:
    alone = msgspec.structs.replace(PROFILE, copies=(CopyCost(transport="t", rates=((1, 1e9),)),))
    shared = msgspec.structs.replace(
        PROFILE, copies=(CopyCost(transport="t", rates=((1, 1e9),), process_bytes_per_s=1e9, host_bytes_per_s=1.5e9),)
    )
    took = {}
    for name, profile in (("alone", alone), ("shared", shared)):
        stage = on_one_host(profile, "abcd")
        start = stage.loop.now_ns
        stage.do("b/0", copy("a/0", (0,), (0,)), copy("a/0", (1,), (1,), rid=(1, 2)))
        stage.do("c/0", copy("d/0", (0,), (0,), rid=(2, 1)))
        stage.loop.advance(10**9)
        took[name] = [at - start - 100 for where in ("b/0", "c/0") for at, _ in stage.puppet(where).seen]
    assert took["alone"] == [1_000, 1_100, 1_000], "the second is heard of once the first has been dealt with"
    # three copies at 0.5 GB/s each: the host is full, and the one process with two of them is, too
    assert took["shared"] == [2_000, 2_100, 2_000]


def test_chunks_that_messages_name_cost_at_either_end() -> None:
    profile = Profile(key_ns=10, index_ns=1_000)
    pin = Pin(1, 1, "l", (b"k",) * 5, True, 10**9)
    fence = Fence((1, 1), (1, 1))
    delta = Delta("l", 1, 1, adds=(Entry(b"k", 4), Entry(b"k2", 4)))
    assert chunks_ns(profile, Received("x", pin), []) == 50
    assert chunks_ns(profile, Received("x", fence), [Send("a", pin), Send("b", pin)]) == 100
    assert chunks_ns(profile, CopyDone((1, 1), True), [Send("ctl", delta)]) == 2 * 10 + 2 * 1_000
    assert chunks_ns(profile, Received("x", delta), []) == 20


def test_nodes_that_are_told_at_once_hear_it_one_after_the_other() -> None:
    heard = {}
    for wake_ns in (0, 400):
        stage = on_one_host(msgspec.structs.replace(PROFILE, wake_ns=wake_ns), "abc")
        fence, pin = Fence((1, 1), (1, 1)), Pin(1, 1, "l", (b"k",), True, 10**9)
        start = stage.loop.now_ns
        sends = [Send("a/0", fence), Send("b/0", fence), Send("a/0", fence), Send("b/0", pin), Send("c/0", fence)]
        stage.do("ctl", *sends)
        stage.loop.advance(10**9)
        heard[wake_ns] = [[at - start for at, _ in stage.puppet(f"{name}/0").seen] for name in "abc"]
    assert heard[0] == [[1_100, 1_200], [1_100, 1_200], [1_100]]
    assert heard[400] == [[1_100, 1_200], [1_500, 1_600], [1_900]]


def test_what_is_sent_later_never_overtakes_however_many_are_told() -> None:
    stage = on_one_host(msgspec.structs.replace(PROFILE, wake_ns=10_000), "ab")
    first, second = Fence((1, 1), (1, 1)), Fence((2, 2), (2, 2))
    stage.do("ctl", Send("a/0", first), Send("b/0", first))
    stage.do("ctl", Send("b/0", second))
    stage.loop.advance(10**9)
    assert stage.seen("b/0") == [Received("ctl", first), Received("ctl", second)]


@pytest.mark.parametrize("name", ["tensor-parallel", "restart", "copy-and-lookup"])
def test_detailed_costs_change_no_answer_and_two_runs_are_one(name: str) -> None:
    built = build(load(ROOT / f"scenarios/smoke/{name}.yaml"))
    detailed = Profile(key_ns=500, index_ns=2_000, wake_ns=80_000, copies=(FAST,))
    plain, one, other = run(built), run(built, profile=detailed), run(built, profile=detailed)
    assert one.clean and one.placement == plain.placement
    assert [(op.op, op.state, op.num_tokens) for op in one.operations] == [
        (op.op, op.state, op.num_tokens) for op in plain.operations
    ]
    assert msgspec.json.encode(one.to_json()) == msgspec.json.encode(other.to_json())
    assert [op.end_ns for op in one.operations] != [op.end_ns for op in plain.operations]
