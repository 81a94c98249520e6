"""However a run ends, nothing is left: no process, no listening port, no file, no shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, Set

import pytest

from kvreal.pool import HostError, Pool
from kvreal.run import run
from kvreal.transfer import TransferError
from tests.real.scenarios import scenario

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]


def children(parent: int) -> Set[int]:
    """The hosts that a process has started and that exist (zombies too)."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(stat[1]) == parent and (b"kvreal.host" in command or stat[0] == "Z"):
                found.add(int(entry.name))
    return found


def hosts_of(parent: int) -> Set[int]:
    """Hosts by the parent that they were told, whoever has adopted them."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"kvreal.host" in words and str(parent).encode() in words:
                found.add(int(entry.name))
    return found


def eventually(true: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    until = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def shared_memory() -> Set[str]:
    """Segments that UCX or we could leave lying about: POSIX ones by name, System V ones whose creator has gone."""
    names = {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(("ucx", "nixl", "kvreal"))}
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        creator = line.split()[4]
        if not Path(f"/proc/{creator}").exists():
            names.add(f"System V {line.split()[1]}")
    return names


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = shared_memory()
    hosts = children(os.getpid())
    yield
    assert children(os.getpid()) <= hosts
    assert os.listdir(tmp_path) == []
    assert eventually(lambda: shared_memory() <= before), shared_memory()  # others' come and go


def test_a_run_of_its_own_leaves_nothing(nothing_left: None, transport: str) -> None:
    assert run(scenario(), transport=transport).clean


def test_an_exception_halfway_leaves_nothing(nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvreal.session import Session

    def burst(self: Session, seen: int = -1) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(Session, "settle", burst)
    with pytest.raises(ZeroDivisionError):
        run(scenario(), transport="tcp")


def test_a_stopped_host_is_reaped_too(nothing_left: None) -> None:
    built = scenario(faults="  - {when: {sent: Pinned, by: a}, pause: {node: a}}")
    assert run(built, transport="tcp", timeout_s=0.3).hung


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from tests.real.scenarios import scenario
from kvreal.run import run
built = scenario(faults="  - {{copy: {{stuck: true}}}}\\n  - {{when: {{sent: Pinned, by: a}}, pause: {{node: a}}}}")
print("going", flush=True)
run(built, transport="tcp", timeout_s=60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_runner_that_is_ended_takes_its_processes_along(number: signal.Signals) -> None:
    """Among them one that is stopped, which can hear nothing."""
    before = shared_memory()
    with tempfile.TemporaryDirectory() as folder:
        runner = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(root=str(ROOT))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
        )
        try:
            assert runner.stdout is not None and runner.stdout.readline() == b"going\n"
            assert eventually(lambda: any(_stopped(pid) for pid in children(runner.pid)), 30), "it did not come so far"
            started = hosts_of(runner.pid)
            assert len(started) == 4
            runner.send_signal(number)
            runner.wait(30)
            assert eventually(lambda: not hosts_of(runner.pid)), hosts_of(runner.pid)
            if number == signal.SIGINT:
                assert os.listdir(folder) == []
        finally:
            runner.kill()
            runner.wait()
            if runner.stdout is not None:
                runner.stdout.close()
    assert eventually(lambda: shared_memory() <= before), shared_memory()


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def test_hosts_live_on_when_the_thread_that_asked_for_them_ends() -> None:
    """The kernel kills a child when the thread that started it ends: a pool starts them from a thread of its own."""
    import threading

    with Pool("tcp") as pool:
        asker = threading.Thread(target=pool.warm, args=(1,))
        asker.start()
        asker.join()
        time.sleep(0.1)
        assert pool.idle[0].process.poll() is None


def test_a_host_that_died_in_the_pool_is_replaced() -> None:
    with Pool("tcp") as pool:
        pool.warm(2)
        dead = pool.idle[-1]
        dead.process.kill()
        dead.process.wait()
        (host,) = pool.take(1)
        assert host is not dead and dead not in pool.all
        (other,) = pool.take(1)
        assert other is not host


def test_a_closed_pool_starts_nothing() -> None:
    pool = Pool("tcp")
    pool.close()
    with pytest.raises(HostError, match="closed"):
        pool.take(1)
    pool.close()


def test_a_child_that_cannot_make_its_transport_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("tcp", env={"PYTHONPATH": "x"})
    pool.transport = "smoke"
    with pytest.raises(TransferError, match="unknown transport 'smoke'"):
        pool.take(1)
    assert not pool.all
    pool.close()


def test_a_host_without_a_runner_ends_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvreal.host", "--transport", "tcp", "--parent", "1"],
        cwd=ROOT,
        timeout=30,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
