"""Disk locations: what a slot's file says of itself, what is never believed, and what is left when one is full."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
import pytest

from kvcore.protocol.machine import StartCopy, StartFill, StartRead
from kvreal import store as module
from kvreal.engines.thread import EngineThread
from kvreal.memory import Memory
from kvreal.slab import Slab, SlabError
from kvreal.spans import ints
from kvreal.store import PAGE, WHOLE, Calls, DiskError, Home, Store, files_in
from kvreal.transfer import Transfer, file, make
from kvreal.transfer import posix as module_posix
from kvreal.transfer.flow import Flow
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Copy, Ended, Fate, Job
from kvreal.transfer.posix import Posix, Unable, named
from kvreal.transfer.sockets import batches

CPU, DISK, GPU = "LocalCPUBackend", "LocalDiskBackend", "LocalGPUBackend"
SLOT = 3 * PAGE + 17
ONE, OTHER = b"\x01" * 32, b"\x02" * 32


def noise(seed: int, size: int = SLOT) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def got(store: Store, slot: int, key: bytes = b"", size: int = SLOT) -> Any:
    into = np.empty(size, dtype=np.uint8)
    store.read(slot, into, key)
    return into


def posix() -> Posix:
    try:
        return Posix()
    except Unable as why:
        pytest.skip(str(why))


@pytest.fixture(params=["named", "nameless", "named, by NIXL", "nameless, by NIXL"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    home = Home(str(tmp_path)) if request.param.startswith("named") else None
    made = Store(DISK, 4, SLOT, home, posix() if "NIXL" in request.param else None)
    yield made
    made.close()
    if home is not None:
        home.close()
        assert list(tmp_path.iterdir()) == []


def spoil(store: Store, slot: int, offset: int, turn: int = 0xFF) -> None:
    """Turn bits over in a slot's file, behind everybody's back."""
    if store.folder is not None:
        fd, start = os.open(store.folder / f"{slot:08d}{WHOLE}", os.O_RDWR), 0
    else:
        fd, start = os.dup(store.file.fileno()), slot * store.stride
    (byte,) = os.pread(fd, 1, start + offset)
    os.pwrite(fd, bytes([byte ^ turn]), start + offset)
    os.close(fd)


# ---- what a slot holds -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, SLOT])
def test_what_is_written_is_read_again(store: Store, size: int) -> None:
    for slot in (3, 0):
        store.write(slot, noise(slot, size), ONE)
    assert (got(store, 3, ONE, size) == noise(3, size)).all() and (got(store, 0, b"", size) == noise(0, size)).all()
    store.write(3, noise(9, size), OTHER)
    assert (got(store, 3, OTHER, size) == noise(9, size)).all()
    assert (got(store, 0, ONE, size) == noise(0, size)).all() and store.wrong == 0


def test_a_part_of_a_chunk_is_checked_as_the_whole(store: Store) -> None:
    store.write(1, noise(1), ONE)
    assert (got(store, 1, ONE, 100) == noise(1)[:100]).all()
    spoil(store, 1, PAGE + SLOT - 1)
    with pytest.raises(DiskError, match="checksum"):
        got(store, 1, ONE, 100)


def test_another_prompts_bytes_are_never_given(store: Store) -> None:
    store.write(1, noise(1), ONE)
    with pytest.raises(DiskError, match="slot 1 holds chunk 0101010101010101, not 0202020202020202"):
        got(store, 1, OTHER)
    if store.folder is not None:  # even if a file takes another's place
        store.write(2, noise(2), OTHER)
        os.replace(store.folder / f"{2:08d}{WHOLE}", store.folder / f"{1:08d}{WHOLE}")
        with pytest.raises(DiskError, match="holds chunk"):
            got(store, 1, ONE)
    assert store.wrong >= 1


@pytest.mark.parametrize("offset", [0, 7, 8, 20, 40, 90, PAGE, PAGE + SLOT // 2, PAGE + SLOT - 1])
def test_any_changed_byte_is_found(store: Store, offset: int) -> None:
    store.write(1, noise(1), ONE)
    spoil(store, 1, offset, 1)
    with pytest.raises(DiskError):
        got(store, 1, ONE)
    with pytest.raises(DiskError):
        got(store, 1)
    assert store.wrong == 2


def test_nothing_is_there_before_or_after(store: Store) -> None:
    for _ in range(2):
        with pytest.raises(DiskError, match="slot 2 holds nothing"):
            got(store, 2, ONE)
        store.write(2, noise(2), ONE)
        got(store, 2, ONE)
        store.drop([2, 3])


def test_a_file_that_was_cut_is_found(tmp_path: Path) -> None:
    home = Home(str(tmp_path))
    store = Store(DISK, 4, SLOT, home)
    for size in (0, 10, PAGE - 1, PAGE, PAGE + SLOT - 1):
        store.write(0, noise(0), ONE)
        os.truncate(files_in(home.folder)[0], size)
        with pytest.raises(DiskError):
            got(store, 0, ONE)
    home.close()


def test_more_than_it_holds_is_refused(store: Store) -> None:
    store.write(0, noise(0, 100), ONE)
    with pytest.raises(DiskError, match="holds 100 bytes, not 101"):
        got(store, 0, ONE, 101)


# ---- a disk that does not take it ------------------------------------------------------------------------------------
@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The disk has room for so many more bytes."""
    real = os.pwrite

    def begin(room: int) -> None:
        left = [room]

        def pwrite(fd: int, data: Any, start: int) -> int:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = real(fd, memoryview(data)[: left[0]], start)
            left[0] -= done
            return done

        monkeypatch.setattr(module.os, "pwrite", pwrite)

    return begin


@pytest.mark.parametrize("room", [0, 100, PAGE, PAGE + 100, 2 * PAGE + 100])
def test_a_disk_full_halfway_leaves_nothing_half_done(
    store: Store, full: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    if not isinstance(store.by, Calls):
        pytest.skip("the full disk of this test is one of the kernel's calls; a file that may not grow is another test")
    store.write(1, noise(1), ONE)
    full(room)
    with pytest.raises(DiskError) as refused:
        store.write(2, noise(2), OTHER)
    assert str(refused.value) == f"{DISK}: slot 2 cannot be written: No space left on device"
    monkeypatch.undo()
    if store.folder is not None:
        assert [file.name for file in files_in(store.folder)] == [f"{1:08d}{WHOLE}"]
    with pytest.raises(DiskError, match="slot 2"):
        got(store, 2)
    assert (got(store, 1, ONE) == noise(1)).all()
    store.write(2, noise(2), OTHER)  # there is room again
    assert (got(store, 2, OTHER) == noise(2)).all()


LIMITED = """
import resource, sys
import numpy as np
from kvreal.store import DiskError, Home, Store, files_in
from kvreal.transfer.posix import named
by = named(sys.argv[2])
home = Home(sys.argv[1])
store = Store("d", 4, 1 << 20, home, by)
big, small = np.ones(1 << 20, dtype=np.uint8), np.ones(1000, dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.write(0, big, b"one")
except DiskError as error:
    print(error)
store.write(1, small, b"two")
into = np.empty(1000, dtype=np.uint8)
store.read(1, into, b"two")
print([file.name for file in files_in(home.folder)], int(into.sum()))
home.close()
"""


@pytest.mark.parametrize("by", ["calls", "posix"])
def test_a_file_that_may_not_grow_is_refused_whichever_way_bytes_go(tmp_path: Path, by: str) -> None:
    if by == "posix":
        posix()
    paths = os.pathsep.join(path or "." for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), by], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": paths, "NIXL_LOG_LEVEL": "FATAL"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "NIXL" not in line]
    assert told == ["d: slot 0 cannot be written: File too large", f"['{1:08d}{WHOLE}'] 1000"]


def test_a_way_to_write_that_is_not_there_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> None:
        raise ImportError("No module named 'nixl'")

    monkeypatch.setattr("kvreal.transfer.posix.load_nixl", lacking)
    with pytest.raises(TransferError, match="^disk_io posix: nixl is not installed: No module named 'nixl'$"):
        named("posix")
    assert named("calls") is None


def test_a_path_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    memory = Memory()
    memory.disk_path = str(blocked / "below")
    with pytest.raises(SlabError) as refused:
        memory.lay_out([(DISK, 4)], SLOT)
    assert "cannot keep chunks under" in str(refused.value) and "\n" not in str(refused.value)


def test_a_small_disk_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Store(DISK, 1 << 40, SLOT, None).close()
    assert "would be needed to fill it" in caplog.text


# ---- lives -----------------------------------------------------------------------------------------------------------
LIFE = """
import sys, signal
import numpy as np
from kvreal.store import Home, Store
home = Home(sys.argv[1])
store = Store("LocalDiskBackend", 4, 100, home)
for slot in range(3):
    store.write(slot, np.zeros(100, dtype=np.uint8), b"key")
(store.folder / "00000003.part").write_bytes(b"half of it")
print("there", flush=True)
signal.pause()
"""


@pytest.fixture
def life(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    paths = os.pathsep.join(path or "." for path in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-c", LIFE, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "there\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_leftovers_of_a_killed_process_are_dropped_and_said(
    life: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "kvmove-mine.txt").write_text("not of this kind")
    (tmp_path / "kvmove-folder").mkdir()
    Home(str(tmp_path)).close()
    assert len(files_in(tmp_path)) == 4, "its process lives"
    assert caplog.records == []
    life.send_signal(signal.SIGKILL)
    life.wait()
    home = Home(str(tmp_path))
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: dropped what 1 ended processes left: 3 chunks and 1 half-written"
    )
    assert files_in(tmp_path) == []
    home.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kvmove-folder", "kvmove-mine.txt"]


# ---- copies and tasks ------------------------------------------------------------------------------------------------
class Node:
    """A process's memory and transport, named and in its first epoch."""

    def __init__(self, address: str, path: Optional[Path], slots: int = 6) -> None:
        self.memory: Memory = Memory()
        self.memory.disk_path = str(path) if path is not None else ""
        self.memory.lay_out([(CPU, slots), (DISK, slots)], 4096)
        self.transfer: Transfer = make("socket", self.memory)
        self.transfer.begin("a run", address)
        self.transfer.set_epoch(1)
        self.rid = 0

    def copy(
        self, peer: Node, read: bool, mine: str, theirs: str, keys: Any, slots: Any, bpt: int = 4096, **fate: Any
    ) -> Ended:
        self.rid += 1
        effect = StartCopy(
            (1, self.rid), read, peer.transfer.address, 1, theirs, tuple(slots), mine, tuple(slots), (1,) * len(slots),
            keys=tuple(keys),
        )  # fmt: skip
        self.transfer.start(Copy(effect, peer.transfer.endpoint(), 1, bpt, 60_000_000_000, Fate(**fate)))
        until = threading.Event()
        for _ in range(1000):
            for item in self.transfer.take():
                assert isinstance(item, Ended)
                return item
            until.wait(0.01)
        raise AssertionError("no end")

    def close(self) -> None:
        self.transfer.stop()
        self.memory.close()


KEYS = [bytes([at]) * 32 for at in range(6)]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    a, b = Node("a/0", tmp_path / "a"), Node("b/0", tmp_path / "b")
    for slot in range(6):
        a.memory.put(CPU, slot, noise(slot, 4096))
    yield a, b
    a.close()
    b.close()
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("read", [True, False], ids=["read", "push"])
@pytest.mark.parametrize("mine", [CPU, DISK])
def test_any_to_any_between_two_processes_with_keys(nodes: tuple[Node, Node], read: bool, mine: str) -> None:
    a, b = nodes
    assert a.copy(a, True, DISK, CPU, KEYS, range(6)).transport == "file"
    mover, peer = (b, a) if read else (a, b)
    for target in (CPU, DISK):
        here, there = (target, mine) if read else (mine, target)
        ended = mover.copy(peer, read, here, there, KEYS, range(6))
        assert (ended.state, ended.why, ended.nbytes) == ("done", "", 6 * 4096)
        for slot in range(6):
            assert (b.memory.get(target, slot, 4096, KEYS[slot] if target == DISK else b"") == noise(slot, 4096)).all()
            if target == DISK:
                with pytest.raises(DiskError, match="holds chunk"):
                    b.memory.get(target, slot, 4096, KEYS[slot - 1])


@pytest.mark.parametrize("read", [True, False], ids=["read", "push"])
def test_a_spoilt_chunk_fails_its_copy_wherever_it_goes(
    nodes: tuple[Node, Node], read: bool, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = nodes
    assert a.copy(a, True, DISK, CPU, KEYS, range(6)).state == "done"
    spoil(a.memory.stores[DISK], 3, PAGE + 5)
    within = a.copy(a, True, CPU, DISK, KEYS, range(6))
    assert within.state == "failed" and "slot 3 is not what was written" in within.why
    ended = b.copy(a, True, CPU, DISK, KEYS, range(6)) if read else a.copy(b, False, DISK, CPU, KEYS, range(6))
    assert ended.state == "failed"
    if read:  # whose disk it is says it; the other hears the end of the connection
        assert "slot 3 is not what was written" in caplog.text and "a/0 hung up" in ended.why
    else:
        assert "slot 3 is not what was written" in ended.why
    assert a.memory.stores[DISK].wrong == 2
    again = b.copy(a, True, CPU, DISK, KEYS[:3], range(3))
    assert again.state == "done", "the node goes on"


def test_a_read_of_another_prompts_slot_fails(nodes: tuple[Node, Node]) -> None:
    a, b = nodes
    assert a.copy(a, True, DISK, CPU, KEYS, range(6)).state == "done"
    wrong = [KEYS[1], KEYS[0], *KEYS[2:]]
    for ended in (a.copy(a, True, CPU, DISK, wrong, range(6)), b.copy(a, True, CPU, DISK, wrong, range(6))):
        assert ended.state == "failed"
    assert a.memory.stores[DISK].wrong >= 2


@pytest.mark.parametrize("peer", ["itself", "another"])
def test_a_copy_onto_a_full_disk_fails_in_one_line_and_leaves_nothing(
    nodes: tuple[Node, Node], full: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, peer: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    a, b = nodes
    full(2 * (PAGE + 4096) + 5000)
    if peer == "itself":
        ended = a.copy(a, True, DISK, CPU, KEYS, range(6))
        assert ended.why.endswith("cannot be written: No space left on device"), ended
    else:
        ended = a.copy(b, False, CPU, DISK, KEYS, range(6))
        assert ended.why.startswith("the target says: "), ended
        assert ended.why.endswith("cannot be written: No space left on device"), ended
        assert "cannot be written: No space left on device" in caplog.text
    assert ended.state == "failed"
    monkeypatch.undo()
    memory = (a if peer == "itself" else b).memory
    assert memory.home is not None and files_in(memory.home.folder) == [], "neither halves nor what nobody knows of"
    assert (a if peer == "itself" else b).copy(a, True, DISK, CPU, KEYS, range(6)).state == "done"


def test_a_corrupt_copy_is_wrong_and_yet_whole(nodes: tuple[Node, Node]) -> None:
    """An injected fault spoils what arrives, not how it is kept: the checkers must see wrong bytes."""
    a, _ = nodes
    ended = a.copy(a, True, DISK, CPU, KEYS, range(6), corrupt=True)
    assert ended.state == "done"
    differ = [(a.memory.get(DISK, slot, 4096, KEYS[slot]) != noise(slot, 4096)).sum() for slot in range(6)]
    assert sorted(differ) == [0, 0, 0, 0, 0, 1]


def test_a_fill_and_a_use_of_a_disk(
    tmp_path: Path, full: Callable[[int], None], monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node("a/0", tmp_path)
    engine = EngineThread(node.memory)

    def done(task: Any) -> bool:
        engine.start(task, 64, Fate())
        until = threading.Event()
        for _ in range(1000):
            for result in engine.take():
                return result.ok
            until.wait(0.01)
        raise AssertionError("no end")

    assert done(StartFill(1, DISK, (0, 1), (ONE, OTHER), (64, 10)))
    assert done(StartRead(2, DISK, (0, 1), (ONE, OTHER), (64, 10)))
    assert not done(StartRead(3, DISK, (1, 0), (ONE, OTHER), (10, 10))), "each other's"
    full(2 * PAGE)
    assert not done(StartFill(4, DISK, (2, 3), (ONE, OTHER), (64, 64)))
    (warned,) = [record.getMessage() for record in caplog.records if "StartFill" in record.getMessage()]
    assert warned == f"StartFill 4 failed: DiskError: {DISK}: slot 3 cannot be written: No space left on device"
    assert [file.name for file in files_in(tmp_path)] == [f"{slot:08d}{WHOLE}" for slot in (0, 1)]
    monkeypatch.undo()
    assert done(StartFill(5, DISK, (2,), (ONE,), (64,))) and done(StartRead(6, DISK, (2,), (ONE,), (64,)))
    node.close()


def test_moving_a_large_disk_location_takes_a_few_slots_of_memory() -> None:
    """1 GiB there and back through 8 MiB slots; measured in a process of its own."""
    text = """
import resource, sys
sys.argv = ["x"]
from tests.real.test_store import CPU, DISK, KEYS
from kvreal.memory import Memory
import numpy as np
memory = Memory()
slots, size = 128, 8 << 20
memory.lay_out([("a" + CPU, 4), (DISK, slots), ("b" + DISK, slots)], size)
chunk = np.arange(size, dtype=np.uint8)
memory.put(DISK, 0, chunk, b"0"); memory.get(DISK, 0, size, b"0")
from kvreal.transfer import file
from kvreal.transfer.flow import Flow
from kvreal.transfer.job import Copy, Job
from kvcore.protocol.machine import StartCopy
for slot in range(slots):
    memory.put(DISK, slot, chunk, b"0")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = tuple(range(slots))
effect = StartCopy((1, 1), True, "a", 1, DISK, ids, "b" + DISK, ids, (1,) * slots, keys=(b"0",) * slots)
job = Job(Copy(effect, "", 1, size, 1 << 60))
flow = Flow()
flow.enter(job)
file.carry(job, memory, flow, "b" + DISK, DISK)
assert job.moved == slots * size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    paths = os.pathsep.join(path or "." for path in sys.path)
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=110, env=env)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 6 * (8 << 10), "KiB"


# ---- a GPU and a disk ------------------------------------------------------------------------------------------------
class Gds:
    """What NIXL's GDS backend does, with plain calls, on "GPU memory" that is the machine's own."""

    def __init__(self, able: bool) -> None:
        self.able = able
        self.moved: list[str] = []

    def move(self, what: str, fd: int, start: int, kind: str, address: int, nbytes: int, device: int = 0) -> None:
        if not self.able:
            raise OSError("nixl's GDS says ERR")
        assert kind == "VRAM"
        self.moved.append(what)
        memory = (ctypes.c_char * nbytes).from_address(address)
        if what == "WRITE":
            assert os.pwrite(fd, memory, start) == nbytes
        else:
            assert os.preadv(fd, [memory], start) == nbytes


@pytest.mark.parametrize("able", [True, False], ids=["by GDS", "which GDS does not reach"])
def test_between_a_gpu_and_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch")

    def on_gpu(slab: Slab) -> None:
        slab.tensor = torch.zeros(slab.nbytes, dtype=torch.uint8)
        slab.address, slab.bytes = int(slab.tensor.data_ptr()), np.empty(0, dtype=np.uint8)

    gds = Gds(able)
    monkeypatch.setattr(Slab, "_on_gpu", on_gpu)
    monkeypatch.setattr(Slab, "pin", lambda slab: None)
    monkeypatch.setattr(module_posix, "gds", lambda: gds)
    memory = Memory()
    memory.disk_path = str(tmp_path)
    memory.lay_out([(GPU, 4), (DISK, 4)], SLOT)

    def copy(to: str, fro: str, keys: Any) -> None:
        slots = (1, 2)
        effect = StartCopy((1, 1), True, "a", 1, fro, slots, to, slots, (SLOT, 100), keys=keys)
        job = Job(Copy(effect, "", 1, 1, 1 << 60))
        flow = Flow()
        flow.enter(job)
        file.carry(job, memory, flow, to, fro)

    for slot in (1, 2):
        memory.put(GPU, slot, noise(slot))
    copy(DISK, GPU, (ONE, OTHER))
    assert (memory.get(DISK, 1, SLOT, ONE) == noise(1)).all()
    for slot in (1, 2):
        memory.put(GPU, slot, np.zeros(SLOT, dtype=np.uint8))
    copy(GPU, DISK, (ONE, OTHER))
    assert (memory.get(GPU, 1, SLOT) == noise(1)).all() and (memory.get(GPU, 2, 100) == noise(2)[:100]).all()
    assert sorted(gds.moved) == (["READ", "READ", "WRITE", "WRITE"] if able else [])
    assert ("go by way of memory" in caplog.text) != able
    with pytest.raises(DiskError, match="holds chunk"):
        copy(GPU, DISK, (OTHER, ONE))
    spoil(memory.stores[DISK], 1, PAGE + 5)
    with pytest.raises(DiskError, match="checksum"):
        copy(GPU, DISK, (ONE, OTHER))
    memory.close()


# ---- staged for another process --------------------------------------------------------------------------------------
class Gate:
    """In place of one of a memory's methods: it begins when called and ends when let."""

    def __init__(self, memory: Memory, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.real: Any = getattr(memory, method)
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.ended: list[int] = []
        self.let = [threading.Event() for _ in range(4)]
        monkeypatch.setattr(memory, method, self)

    def __call__(self, location: str, slot: int, data: Any, key: bytes = b"") -> None:
        self.begun.put(slot)
        assert self.let[slot].wait(30)
        self.real(location, slot, data, key)
        self.ended.append(slot)


SPANS = ints(range(4)), ints([4096] * 4)
"""Slots, and bytes of each."""


def test_the_next_chunk_is_read_while_one_is_sent(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = nodes
    assert a.copy(a, True, DISK, CPU, KEYS, range(6)).state == "done"
    gate = Gate(a.memory, monkeypatch, "fetch")
    gate.let[0].set()
    found = batches(a.memory, DISK, *SPANS, 1 << 20, fill=True, keys=KEYS)
    first = next(found)
    assert {gate.begun.get(timeout=30), gate.begun.get(timeout=30)} == {0, 1} and gate.ended == [0]
    assert (first.views[0] == noise(0, 4096)).all()
    for let in gate.let:
        let.set()
    found.close()
    assert gate.ended == [0, 1], "what has begun has ended, and nothing more begins"


def test_a_chunk_is_written_while_the_next_is_received_and_all_are_at_the_end(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = nodes
    gate = Gate(a.memory, monkeypatch, "put")
    found = batches(a.memory, DISK, SPANS[0][:2], SPANS[1][:2], 1 << 20, fill=False, keys=KEYS)
    for slot in (0, 1):  # the second is received although the first is not written
        batch = next(found)
        batch.views[0][:] = noise(slot, 4096)
        batch.store()
    assert gate.begun.get(timeout=30) in (0, 1) and gate.ended == []
    for let in gate.let:
        let.set()
    assert next(found, None) is None and sorted(gate.ended) == [0, 1]
    monkeypatch.undo()
    for slot in (0, 1):
        assert (a.memory.get(DISK, slot, 4096, KEYS[slot]) == noise(slot, 4096)).all()
