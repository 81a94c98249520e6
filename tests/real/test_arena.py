"""The arena: what is shared, what is not, and what becomes of it when processes die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Iterator, List

import numpy as np
import pytest

from kvreal.arena import ARENAS, Arena, ArenaError, Changed, Member, join
from kvreal.memory import Memory
from kvreal.slab import SlabError
from kvreal.transfer.conformance import Conformance, Pair

pytestmark = [pytest.mark.real, pytest.mark.skipif(not os.access(ARENAS, os.W_OK), reason=f"no {ARENAS} to write to")]
SLOT = 8192
TWO = """
name: two
kv: {bytes_per_token: 1 KiB, chunk: 16 tokens}
instances:
  a: {locations: {LocalCPUBackend: 64 KiB}}
  b: {locations: {LocalCPUBackend: 64 KiB}}
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 32}
"""


@pytest.fixture
def folder() -> Iterator[str]:
    where = f"{ARENAS}/kvmove-test-{uuid.uuid4().hex[:8]}"
    yield where
    assert not Path(where).exists(), "whoever leaves last takes the arena away"


@pytest.fixture
def two(folder: str) -> Iterator[List[Member]]:
    both = [join(folder, name, SLOT, 8 * SLOT) for name in ("a", "b")]
    for one in both:
        one.lay_out(4)
    yield both
    for one in both:
        one.leave()


def write(member: Member, index: int, value: int) -> None:
    member.own([index])
    member._slot(int(member.row[index]))[:] = value


def read(member: Member, index: int) -> int:
    (value,) = set(member._slot(int(member.row[index])).tolist())
    return int(value)


def agree(arena: Arena) -> None:
    """The counts are what the rows say."""
    used = arena.rows[arena.rows >= 0]
    assert (np.bincount(used, minlength=arena.slots) == arena.refs).all()


def test_handing_over_copies_nothing_and_both_see_it(two: List[Member]) -> None:
    a, b = two
    write(a, 0, 1)
    write(a, 1, 2)
    b.take(a.number, [1, 0], [2, 3])
    assert [read(b, 2), read(b, 3)] == [2, 1]
    assert int(b.row[2]) == int(a.row[1]) and int(a.arena.refs[a.row[1]]) == 2
    agree(a.arena)


def test_whoever_writes_has_slots_of_its_own_first(two: List[Member]) -> None:
    a, b = two
    write(a, 0, 1)
    b.take(a.number, [0], [0])
    write(a, 0, 9)  # freed there, and used again
    assert (read(a, 0), read(b, 0)) == (9, 1)
    a.give(b.number, [0], [0])
    b.own([0], keep=True)
    assert read(b, 0) == 9 and int(b.row[0]) != int(a.row[0])
    agree(a.arena)


def test_what_nobody_refers_to_any_more_is_overwritten_and_free(two: List[Member]) -> None:
    a, b = two
    write(a, 0, 1)
    b.take(a.number, [0], [0])
    physical = int(a.row[0])
    a.drop([0])
    assert read(b, 0) == 1
    b.drop([0])
    assert a.arena.refs[physical] == 0 and set(a._slot(physical).tolist()) == {0xDB}


def test_a_slot_that_holds_nothing_is_not_handed_over(two: List[Member]) -> None:
    a, b = two
    with pytest.raises(ArenaError, match="holds nothing"):
        b.take(a.number, [3], [0])
    agree(a.arena)


def test_a_row_that_means_something_else_is_not_taken_from(two: List[Member]) -> None:
    a, b = two
    write(a, 0, 1)
    a.renew()
    mark = b.mark(a.number)
    b.take(a.number, [0], [0], mark)
    a.renew()
    with pytest.raises(Changed):
        b.take(a.number, [0], [1], mark)
    mark = b.mark(a.number)
    a.lay_out(4)
    with pytest.raises(Changed):
        b.take(a.number, [0], [1], mark)
    assert int(b.row[1]) == -1
    agree(a.arena)


def test_no_more_is_laid_out_than_there_is(two: List[Member]) -> None:
    a, _ = two
    with pytest.raises(ArenaError, match="8 slots, 4 of them laid out by others: no room for 5"):
        a.lay_out(5)


def test_another_shape_is_refused_with_both(two: List[Member], folder: str) -> None:
    with pytest.raises(ArenaError, match=f"has 8 slots of {SLOT} bytes, this process asks for 9 of {SLOT}"):
        join(folder, "c", SLOT, 9 * SLOT)


def test_an_arena_larger_than_memory_is_refused_and_leaves_nothing(folder: str) -> None:
    memory = Memory(arena=folder, arena_bytes=1 << 60)
    with pytest.raises(SlabError, match="does not fit into .* [GM]iB are free there"):
        memory.lay_out([("LocalCPUBackend", 2)], SLOT)
    assert not Path(folder).exists()
    memory.leave_arena()


DYING = """
import os, signal, sys
from kvreal.arena import join
me = join(sys.argv[1], "dying", {slot}, 8 * {slot})
me.lay_out(4)
me.own([0, 1])
if sys.argv[2] == "changing":
    me.arena.head[3] = 1            # in the middle of a change: counts and rows do not agree
    me.arena.refs[me.row[0]] += 3
print(me.number, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["idle", "changing"])
def test_a_dead_process_has_no_references(folder: str, moment: str) -> None:
    mine = join(folder, "a", SLOT, 8 * SLOT)
    mine.lay_out(4)
    child = subprocess.Popen(
        [sys.executable, "-c", DYING.format(slot=SLOT), folder, moment],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        number = int(child.stdout.readline())
        mine.take(number, [0], [0])
        with pytest.raises(ArenaError, match="no room for 5"):
            mine.lay_out(5)
    finally:
        child.kill()
        child.wait()
    join(folder, "next", SLOT, 8 * SLOT).leave()  # whoever looks next drops what the dead one had
    agree(mine.arena)
    assert int(mine.arena.refs.sum()) == 1 and int(mine.arena.refs[mine.row[0]]) == 1
    mine.lay_out(8)
    mine.leave()


def test_when_all_are_dead_the_next_one_begins_anew(folder: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", DYING.format(slot=SLOT), folder, "changing"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    mine = join(folder, "a", SLOT, 16 * SLOT)  # of another size, too
    mine.lay_out(16)
    agree(mine.arena)
    mine.leave()


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[None]:
    """Where the suite's processes have theirs; what killed ones leave is the folder."""
    where = f"{ARENAS}/kvmove-test-{uuid.uuid4().hex[:8]}"
    TestArena.env["KVMOVE_ARENA"] = where
    yield
    import shutil

    shutil.rmtree(where, ignore_errors=True)


class TestArena(Conformance):
    transport = "arena"
    env = {}


def test_a_large_hand_over_moves_no_bytes() -> None:
    """By identity: what the source's process then writes into the shared slot is what the destination's reads."""
    pair = Pair("arena", dict(TestArena.env))
    try:
        pair.begin(tokens=1024, slots=8)
        pair.copy(True, [(i, i) for i in range(8)])
        (ended,) = pair.mover(True).ended()
        assert (ended["state"], ended["transport"], ended["nbytes"]) == ("done", "arena", 8 << 20)
        assert pair.check_all([(i, i) for i in range(8)]) == [-1] * 8
    finally:
        pair.close()


def test_once_it_is_known_where_the_source_has_its_slots_a_read_asks_it_nothing() -> None:
    pair = Pair("arena", dict(TestArena.env))
    try:
        pair.begin(tokens=1024, slots=8)
        pair.copy(True, [(0, 0)])
        assert pair.b.ended()[0]["state"] == "done"
        pair.a.freeze()
        try:
            pair.copy(True, [(3, 5), (1, 2)])
            (ended,) = pair.b.ended()
        finally:
            os.kill(pair.a.process.pid, signal.SIGCONT)
        assert (ended["state"], ended["transport"], ended["nbytes"]) == ("done", "arena", 2 << 20)
        assert pair.check_all([(5, 3), (2, 1)]) == [-1, -1]
    finally:
        pair.close()


def test_a_run_whose_processes_are_all_killed_leaves_no_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from kvcore.scenario.build import build
    from kvcore.scenario.loader import loads
    from kvreal.run import run

    taken: List[str] = []
    remove = shutil.rmtree

    def watched(path: object, *args: object, **more: object) -> None:
        if str(path).startswith(f"{ARENAS}/kvmove-"):
            taken.append(str(path))
        remove(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", watched)
    assert run(build(loads(TWO + "  - sleep: {for: 60 s}\n", "stuck.yaml")), transport="arena", timeout_s=0.5).hung
    assert len(taken) == 1 and not Path(taken[0]).exists()


def test_processes_that_have_been_other_nodes_before_leave_no_arena() -> None:
    """One that had a part in an arena is kept, and is the controller, or nobody, in the next run."""
    from kvcore.scenario.build import build
    from kvcore.scenario.loader import loads
    from kvreal.pool import Pool
    from kvreal.run import run

    move = "  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p}\n"
    before = set(os.listdir(ARENAS))
    with Pool("arena") as pool:
        for _ in range(4):
            assert run(build(loads(TWO + move, "moved.yaml")), pool=pool).clean

    def hollow() -> List[str]:
        """Arenas without memory; those of other tests are that for a moment only."""
        new = [name for name in set(os.listdir(ARENAS)) - before if name.startswith("kvmove-")]
        return [name for name in new if not any(Path(ARENAS, name).rglob("pool"))]

    until = time.monotonic() + 5
    while hollow() and time.monotonic() < until:
        pass
    assert hollow() == []
