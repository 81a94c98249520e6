"""Copies: what lands, what does not, and how each ends."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvcore.protocol.config import Config
from kvcore.protocol.machine import AbortCopy, CloseWindow, CopyDone, CopyStopped, Received, StartCopy, WindowClosed
from kvcore.protocol.messages import Reserved
from kvcore.scenario.build import build
from kvcore.scenario.history import read
from kvcore.scenario.loader import loads
from kvcore.scenario.profile import Profile
from kvcore.scenario.schema import CopyFault, Fault, When
from kvsim.run import run
from tests.sim.stubs import PROFILE, Stage, copy

RID = (1, 1)


def test_a_read_takes_its_time_and_lands_whole() -> None:
    profile = msgspec.structs.replace(PROFILE, transfer_ns=500, descriptor_ns=7)
    stage = Stage(profile=profile)
    stage.put("a/0", 3, b"x")
    stage.put("a/0", 4, b"y")
    start = stage.loop.now_ns
    stage.do("b/0", copy("a/0", (3, 4), (0, 1)))
    stage.loop.advance(10**9)
    # leaves after the service time; overhead; 2,000 bytes at 1 GB/s
    assert stage.puppet("b/0").seen == [(start + 100 + 500 + 2 * 7 + 2000, CopyDone(RID, True))]
    assert stage.has("b/0", 0, b"x") and stage.has("b/0", 1, b"y")


def test_a_push_lands_at_the_peer() -> None:
    stage = Stage()
    stage.put("a/0", 3, b"x")
    stage.do("a/0", copy("b/0", (0,), (3,), read=False))
    stage.loop.advance(10**9)
    assert stage.seen("a/0") == [CopyDone(RID, True)]
    assert stage.has("b/0", 0, b"x")


def test_the_bytes_are_those_that_the_source_holds_when_the_copy_ends() -> None:
    stage = Stage()
    stage.put("a/0", 3, b"x")
    stage.do("b/0", copy("a/0", (3,), (0,)))
    stage.loop.advance(stage.loop.now_ns + 500)
    stage.put("a/0", 3, b"other")
    stage.loop.advance(10**9)
    assert stage.seen("b/0") == [CopyDone(RID, True)]
    assert stage.has("b/0", 0, b"other") and not stage.has("b/0", 0, b"x")


def test_while_a_copy_runs_its_target_holds_nobodys_bytes() -> None:
    stage = Stage()
    stage.put("a/0", 3, b"x")
    stage.put("b/0", 0, b"old")
    stage.do("b/0", copy("a/0", (3,), (0,)))
    stage.loop.advance(stage.loop.now_ns + 500)
    assert not stage.has("b/0", 0, b"old") and not stage.has("b/0", 0, b"x")


def test_an_aborted_copy_has_landed_in_part_and_then_nothing_more() -> None:
    stage = Stage()
    for slot in range(4):
        stage.put("a/0", slot, b"%d" % slot)
    stage.do("b/0", copy("a/0", (0, 1, 2, 3), (0, 1, 2, 3)))
    stage.loop.advance(stage.loop.now_ns + 100 + 2500)
    stage.do("b/0", AbortCopy(RID))
    stage.loop.advance(stage.loop.now_ns + 1000)
    assert stage.seen("b/0") == [CopyStopped(RID)]
    assert [stage.has("b/0", slot, b"%d" % slot) for slot in range(4)] == [True, True, False, False]
    stage.put("b/0", 3, b"new")
    stage.loop.advance(10**9)
    assert stage.has("b/0", 3, b"new")
    assert not stage.cluster.fabric.flows and not stage.cluster.transfers.active


def test_a_chunk_half_written_when_its_copy_ends_is_nobodys_even_if_its_slot_had_a_new_owner() -> None:
    stage = Stage()
    for slot in range(2):
        stage.put("a/0", slot, b"%d" % slot)
    stage.do("b/0", copy("a/0", (0, 1), (0, 1)))
    stage.loop.advance(stage.loop.now_ns + 100 + 1500)
    stage.put("b/0", 1, b"new")
    stage.do("b/0", AbortCopy(RID))
    stage.loop.advance(stage.loop.now_ns + 1000)
    assert stage.has("b/0", 0, b"0") and not stage.has("b/0", 1, b"new")


def test_abort_of_what_is_not_there_is_answered_and_a_done_copy_wins_the_race() -> None:
    stage = Stage()
    stage.do("b/0", AbortCopy((9, 9)))
    stage.loop.advance(stage.loop.now_ns + 1000)
    assert stage.seen("b/0") == [CopyStopped((9, 9))]
    stage.put("a/0", 0, b"x")
    stage.do("b/0", copy("a/0", (0,), (0,)))
    stage.loop.advance(stage.loop.now_ns + 1090)
    stage.do("b/0")  # busy when the copy ends
    stage.loop.advance(stage.loop.now_ns + 10)
    assert stage.node("b/0").queue
    stage.cluster.transfers.abort(stage.node("b/0"), RID, stage.loop.now_ns)
    stage.loop.advance(10**9)
    assert stage.seen("b/0")[1:] == [CopyDone(RID, True)]


def test_a_peer_that_dies_fails_a_read() -> None:
    stage = Stage()
    stage.put("a/0", 0, b"x")
    stage.do("b/0", copy("a/0", (0,), (0,)))
    stage.loop.advance(stage.loop.now_ns + 500)
    stage.node("a/0").crash()
    died = stage.loop.now_ns
    stage.loop.advance(10**9)
    assert stage.puppet("b/0").seen == [(died + 50, CopyDone(RID, False, "peer is gone"))]
    assert not stage.has("b/0", 0, b"x")
    stage.do("b/0", copy("a/0", (0,), (0,)))
    stage.loop.advance(2 * 10**9)
    assert stage.seen("b/0")[1:] == [CopyDone(RID, False, "peer is gone")]


def test_a_reader_that_dies_takes_its_copies_with_it() -> None:
    stage = Stage()
    stage.put("a/0", 0, b"x")
    stage.do("b/0", copy("a/0", (0,), (0,)))
    stage.loop.advance(stage.loop.now_ns + 500)
    stage.node("b/0").crash()
    stage.node("b/0").boot()
    stage.loop.advance(10**9)
    assert stage.seen("b/0") == []
    assert not stage.has("b/0", 0, b"x")
    assert not stage.cluster.transfers.active


def test_a_paused_process_is_still_read_but_moves_no_bytes_itself() -> None:
    stage = Stage()
    stage.put("a/0", 0, b"x")
    stage.do("b/0", copy("a/0", (0,), (0,)))
    stage.loop.advance(stage.loop.now_ns + 600)
    stage.node("a/0").pause()
    stage.loop.advance(stage.loop.now_ns + 1000)
    assert stage.seen("b/0") == [CopyDone(RID, True)]
    stage.node("a/0").resume()
    stage.do("b/0", copy("a/0", (0,), (1,)))
    stage.loop.advance(stage.loop.now_ns + 600)
    stage.node("b/0").pause()
    stage.loop.advance(stage.loop.now_ns + 10**6)
    assert not stage.has("b/0", 1, b"x")
    resumed = stage.loop.now_ns
    stage.node("b/0").resume()
    stage.loop.advance(10**9)
    assert stage.puppet("b/0").seen[-1] == (resumed + 500, CopyDone(RID, True))
    assert stage.has("b/0", 1, b"x")


def test_a_paused_process_lets_no_copy_begin() -> None:
    stage = Stage()
    stage.put("a/0", 0, b"x")
    stage.node("a/0").pause()
    stage.do("b/0", copy("a/0", (0,), (0,)))
    stage.loop.advance(stage.loop.now_ns + 10**6)
    assert stage.seen("b/0") == []
    stage.node("a/0").resume()
    stage.loop.advance(stage.loop.now_ns + 10**6)
    assert stage.seen("b/0") == [CopyDone(RID, True)]
    assert stage.has("b/0", 0, b"x")


def test_a_write_addressed_to_an_old_epoch_never_lands() -> None:
    stage = Stage()
    stage.believe("b/0", 5)
    stage.put("a/0", 0, b"x")
    stage.do("a/0", copy("b/0", (0,), (0,), read=False, epoch=4))
    stage.loop.advance(stage.loop.now_ns + 5000)
    assert stage.seen("a/0") == [CopyDone(RID, False, "peer has another epoch")]
    stage.do("a/0", copy("b/0", (0,), (0,), read=False, epoch=5))
    stage.loop.advance(stage.loop.now_ns + 500)
    stage.believe("b/0", 6)  # expelled and registered anew while the bytes were on their way
    stage.loop.advance(10**9)
    assert stage.seen("a/0")[1:] == [CopyDone(RID, False, "peer has another epoch")]
    assert not stage.has("b/0", 0, b"x")


def test_nothing_lands_through_a_closed_window() -> None:
    stage = Stage()
    stage.believe("a/0", 3)
    stage.put("a/0", 0, b"x")
    stage.do("a/0", copy("b/0", (0,), (0,), read=False))
    stage.loop.advance(stage.loop.now_ns + 500)
    stage.do("b/0", CloseWindow("a/0", 3))
    stage.loop.advance(stage.loop.now_ns + 1000)
    assert stage.seen("b/0") == [WindowClosed("a/0", 3)]
    assert stage.seen("a/0") == [CopyDone(RID, False, "window closed")]
    stage.do("a/0", copy("b/0", (0,), (0,), read=False))
    stage.loop.advance(10**9)
    assert stage.seen("a/0")[1:] == [CopyDone(RID, False, "window closed")]
    assert not stage.has("b/0", 0, b"x")
    stage.believe("a/0", 4)
    stage.do("a/0", copy("b/0", (0,), (0,), read=False))
    stage.loop.advance(2 * 10**9)
    assert stage.has("b/0", 0, b"x")


def behind(first: int, number: int, slot: int) -> StartCopy:
    return msgspec.structs.replace(copy("a/0", (slot,), (slot,), rid=(1, number)), after=(1, first))


def test_copies_of_one_move_follow_one_another_with_nothing_between_them() -> None:
    profile = msgspec.structs.replace(PROFILE, transfer_ns=500, descriptor_ns=7)
    stage = Stage(profile=profile)
    start = stage.loop.now_ns
    effects = [copy("a/0", (0,), (0,)), behind(1, 2, 1), behind(2, 3, 2)]
    for effect in effects:
        stage.do("b/0", effect)
    stage.loop.advance(10**9)
    ends = [at for at, _ in stage.puppet("b/0").seen]
    # 1,000 bytes at 1 GB/s each; they get ready at the same time
    assert ends[0] == start + 100 + 500 + 7 + 1000
    assert [ends[1] - ends[0], ends[2] - ends[1]] == [1007, 1007]
    assert [one.rid for one in stage.seen("b/0")] == [(1, 1), (1, 2), (1, 3)]  # type: ignore[union-attr]


def test_a_copy_goes_when_the_one_before_it_is_aborted_and_is_skipped_when_it_is_aborted_itself() -> None:
    stage = Stage()
    for effect in (copy("a/0", (0,), (0,)), behind(1, 2, 1), behind(2, 3, 2)):
        stage.do("b/0", effect)
    stage.loop.advance(stage.loop.now_ns + 200)
    stage.do("b/0", AbortCopy((1, 2)))
    stage.do("b/0", AbortCopy(RID))
    stage.loop.advance(10**9)
    assert stage.seen("b/0") == [CopyStopped((1, 2)), CopyStopped(RID), CopyDone((1, 3), True)]
    assert not stage.cluster.fabric.flows and not stage.cluster.transfers.active


def test_a_copy_that_waits_behind_another_goes_on_when_its_process_does() -> None:
    stage = Stage()
    for effect in (copy("a/0", (0,), (0,)), behind(1, 2, 1)):
        stage.do("b/0", effect)
    stage.loop.advance(stage.loop.now_ns + 200)
    stage.cluster.nodes["a/0"].pause()
    stage.loop.advance(stage.loop.now_ns + 5000)
    assert stage.seen("b/0") == [CopyDone(RID, True)]  # the one behind it is not let in
    stage.cluster.nodes["a/0"].resume()
    stage.loop.advance(10**9)
    assert stage.seen("b/0") == [CopyDone(RID, True), CopyDone((1, 2), True)]


def faulty(**copy_fault: object) -> Stage:
    fault = Fault(copy=CopyFault(**copy_fault), when=When(started="StartCopy"))  # type: ignore[arg-type]
    stage = Stage(faults=(fault,), config=Config(copy_max_ns=10**6))
    for slot in range(4):
        stage.put("a/0", slot, b"%d" % slot)
    stage.do("b/0", copy("a/0", (0, 1, 2, 3), (0, 1, 2, 3)))
    return stage


def landed(stage: Stage) -> int:
    return sum(stage.has("b/0", slot, b"%d" % slot) for slot in range(4))


def test_a_failing_copy_fails_after_its_fraction() -> None:
    stage = faulty(fail=True, fraction=0.5)
    start = stage.loop.now_ns
    stage.loop.advance(10**9)
    assert stage.puppet("b/0").seen == [(start + 100 + 2000, CopyDone(RID, False, "injected failure"))]
    assert landed(stage) == 2


def test_a_corrupt_copy_says_done() -> None:
    stage = faulty(corrupt=True)
    stage.loop.advance(10**9)
    assert stage.seen("b/0") == [CopyDone(RID, True)]
    assert landed(stage) == 3


def test_a_slow_copy_takes_as_many_times_as_long() -> None:
    stage = faulty(slow=4.0)
    start = stage.loop.now_ns
    stage.loop.advance(10**9)
    assert stage.puppet("b/0").seen == [(start + 100 + 4 * 4000, CopyDone(RID, True))]
    assert landed(stage) == 4


def test_a_stuck_copy_ends_at_copy_max() -> None:
    stage = faulty(stuck=True, fraction=0.25)
    start = stage.loop.now_ns
    stage.loop.advance(10**9)
    assert stage.puppet("b/0").seen == [(start + 100 + 10**6, CopyDone(RID, False, "took longer than copy_max"))]
    assert landed(stage) == 1


def test_a_stuck_copy_can_be_aborted() -> None:
    stage = faulty(stuck=True, fraction=0.0)
    stage.loop.advance(stage.loop.now_ns + 50_000)
    stage.do("b/0", AbortCopy(RID))
    stage.loop.advance(10**9)
    assert stage.seen("b/0") == [CopyStopped(RID)]
    assert landed(stage) == 0


@pytest.mark.parametrize("count", [2, 5])
def test_copies_to_one_node_share_its_nic(count: int) -> None:
    stage = Stage()
    start = stage.loop.now_ns
    for i in range(count):
        stage.do("b/0", copy("a/0" if i % 2 else "c/0", (0,), (i,), rid=(1, i)))
    stage.loop.advance(10**9)
    ends = [now for now, _ in stage.puppet("b/0").seen]
    assert len(ends) == count
    # The last byte cannot be there before all have come through the one NIC.
    assert ends[-1] >= start + 100 + 1000 * count


def test_a_capped_copy_is_never_faster() -> None:
    text = """
name: capped
kv: {bytes_per_token: 1 MiB, chunk: 16 tokens}
instances:
  a: {locations: {LocalCPUBackend: 1 GiB}}
  b: {locations: {LocalCPUBackend: 1 GiB}}
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 256}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, copy: true, as: free}
  - clear: {at: b/LocalCPUBackend}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, cap: 256 MiB/s, as: capped}
"""
    result = run(build(loads(text, "capped")))
    copies = {phases.op: phases.copy_ns for phases in result.phases}
    assert copies["free"] < 500_000_000 < 1_000_000_000 <= copies["capped"] < 1_010_000_000


@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("granularity", ["move", "prefix"])
def test_a_long_move_says_how_far_it_is(tmp_path: Path, direction: str, granularity: str) -> None:
    scenario = loads(
        f"""
        name: far
        about: A second of copying.
        kv: {{bytes_per_token: 1 MiB, chunk: 16 tokens, direction: {direction}}}
        instances:
          a: {{locations: {{cpu: 256 MiB}}}}
          b: {{locations: {{cpu: 256 MiB}}}}
        network: {{links: {{a-b: {{bandwidth: 128 MiB/s, latency: 1 ms}}}}}}
        steps:
          - store: {{at: a/cpu, prompt: p, tokens: 128}}
          - move: {{from: a/cpu, to: b/cpu, prompt: p, granularity: {granularity}, as: m, background: true}}
          - sleep: 500 ms
          - status: {{op: m, as: half}}
        """
    )
    path = tmp_path / "far.jsonl"
    result = run(build(scenario), history=path)
    assert not result.violations
    inputs = [line.input for line in read(path)[1] if line.node == "ctl"]
    said = [item.msg for item in inputs if isinstance(item, Received) and isinstance(item.msg, Reserved)]
    here = [message.here for message in said]
    assert here == sorted(here) and len(here) >= 4 and 48 <= here[-1] <= 128


TERMS = """
name: terms
kv: {{bytes_per_token: 1 MiB, chunk: 16 tokens}}
instances:
  a: {{locations: {{cpu: 256 MiB}}}}
  b: {{locations: {{cpu: 256 MiB}}}}
network: {{links: {{a-b: {{bandwidth: 256 MiB/s, latency: 1 us}}}}}}
steps:
  - store: {{at: a/cpu, prompt: p, tokens: 64}}
  - store: {{at: a/cpu, prompt: q, tokens: 64}}
  - settle
  - move: {{from: a/cpu, to: b/cpu, prompt: p, as: one, background: true{one}}}
  - move: {{from: a/cpu, to: b/cpu, prompt: q, as: other, background: true{other}}}
  - settle
"""


@pytest.mark.parametrize(
    ("one", "other", "one_s", "other_s"),
    [
        ("", "", 0.5, 0.5),
        (", weight: 3", "", 1 / 3, 0.5),
        ("", ", priority: 1", 0.5, 0.25),
        (", cap: 64 MiB/s", "", 1.0, 1 / 3),
        (", cap: 64 MiB/s, priority: 9", ", weight: 5", 1.0, 1 / 3),
        (", granularity: prefix, step: 1 chunk, weight: 3", "", 1 / 3, 0.5),
    ],
)
def test_two_moves_share_a_link_on_their_terms(one: str, other: str, one_s: float, other_s: float) -> None:
    result = run(build(loads(TERMS.format(one=one, other=other))))
    took = [operation.duration_ns / 1e9 for operation in result.operations if operation.what == "move"]
    assert took == pytest.approx([one_s, other_s], rel=0.02)


def test_checksums_cost_what_they_read_at_both_ends() -> None:
    text = TERMS.replace("chunk: 16 tokens", "chunk: 16 tokens, checksums: MODE").format(one="", other="")
    took = {}
    for mode in ("off", "sample", "all"):
        result = run(build(loads(text.replace("MODE", mode))))
        took[mode] = next(one.duration_ns for one in result.operations if one.op == "one")
    each = [Profile().sums_ns(4, 64 << 20, mode) for mode in ("sample", "all")]
    assert each == [10_000 + round((32768 + (1 << 20)) * 1e9 / 17e9), 10_000 + round((64 << 20) * 1e9 / 17e9)]
    assert [took[mode] - took["off"] for mode in ("sample", "all")] == pytest.approx([2 * ns for ns in each], rel=0.01)
