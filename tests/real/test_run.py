"""Whole runs: the answers, the bytes, the log, and what is said when something is wrong."""

from __future__ import annotations

import signal
from pathlib import Path

import msgspec
import pytest

from kvcore.protocol.config import WorkerSpec
from kvcore.protocol.messages import Location
from kvcore.scenario.history import HistoryError, check_replay, read
from kvcore.scenario.result import Result
from kvreal.pool import Pool
from kvreal.run import RunError, run
from kvreal.transfer import TransferError, available
from tests.real.scenarios import MOVE, scenario

pytestmark = pytest.mark.real


def states(result: Result) -> dict[str, str]:
    return {operation.op: operation.state for operation in result.operations}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("direction", ["read", "push"])
def test_a_move_by_each_transport(
    transport: str, direction: str, ranks: int, pool: Pool, tcp_pool: Pool, socket_pool: Pool
) -> None:
    used = {"tcp": tcp_pool, "socket": socket_pool}.get(transport, pool)
    result = run(scenario(direction=direction, ranks=ranks), pool=used)
    assert result.clean and result.world == "real"
    assert states(result)["m"] == "done"
    assert result.placement == {"b/LocalCPUBackend": {"p": 200}}
    assert result.transport is not None and result.transport.startswith({"socket": "unix"}.get(transport, transport))
    assert result.metrics["bytes_checked"] == 200 * 1024
    assert result.metrics["chunks_checked"] == 13 * ranks
    assert int(result.metrics["bytes_overwritten"]) >= 200 * 1024
    (phases,) = result.phases
    assert phases.bytes == 200 * 1024 and min(phases.control_ns, phases.copy_ns + phases.queue_ns, phases.commit_ns) > 0
    found = result.operation("found")
    assert found is not None and [(f.instance, f.num_tokens) for f in found.found] == [("b", 200)]


def test_between_tiers_of_one_instance(pool: Pool) -> None:
    body = MOVE.replace("to: b/LocalCPUBackend", "to: a/LocalDiskBackend")
    result = run(scenario(body), pool=pool)
    assert result.clean and result.placement == {"a/LocalDiskBackend": {"p": 200}}
    assert result.transport == "file"


def test_disk_to_another_instance(pool: Pool) -> None:
    body = MOVE.replace("a/LocalCPUBackend", "a/LocalDiskBackend")
    result = run(scenario(body), pool=pool)
    assert result.clean and result.placement == {"b/LocalCPUBackend": {"p": 200}}


def test_there_and_back_and_copied(pool: Pool) -> None:
    body = """
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 200}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p}
  - move: {from: b/LocalCPUBackend, to: a/LocalCPUBackend, prompt: p}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, copy: true}
  - use: {at: b/LocalCPUBackend, prompt: p, tokens: 200, as: used}
"""
    result = run(scenario(body), pool=pool)
    assert result.clean and states(result)["used"] == "ok"
    assert result.placement == {"a/LocalCPUBackend": {"p": 200}, "b/LocalCPUBackend": {"p": 200}}
    assert result.metrics["bytes_checked"] == 2 * 200 * 1024


def test_the_log_explains_the_run(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history.jsonl"
    result = run(scenario(), pool=pool, history=path)
    assert result.history == str(path)
    header, lines = read(path)
    assert header.world == "real" and header.built == scenario()
    report = check_replay(header, lines)
    assert report.equal, report.first
    assert report.nodes == 4 and report.lines == result.metrics["inputs"]


def test_a_wrong_byte_is_found_and_named(pool: Pool) -> None:
    result = run(scenario(faults="  - {copy: {corrupt: true}}"), pool=pool)
    assert [v.property for v in result.violations] == ["byte"]
    assert result.violations[0].node == "b/0" and "slot" in result.violations[0].text


def test_faults_can_be_left_out(pool: Pool) -> None:
    result = run(scenario(faults="  - {copy: {corrupt: true}}"), pool=pool, faults=False)
    assert result.clean and not result.fired


def test_a_hang_is_ended_at_its_deadline_and_says_who(pool: Pool) -> None:
    before = len(pool.all)
    built = scenario(faults="  - {copy: {stuck: true}}")
    result = run(built, pool=pool, timeout_s=1.0)
    assert not result.clean
    assert any(line.startswith("b/0: ") and "copying" in line for line in result.hung), result.hung
    assert any(line.startswith("client: ") for line in result.hung), result.hung
    assert len(pool.all) <= before + 4 and all(host.process.poll() is None for host in pool.all)
    assert run(scenario(), pool=pool).clean, "the pool is as good as before"


def test_a_node_that_is_stopped_for_good_is_named(pool: Pool) -> None:
    built = scenario(faults="  - {when: {sent: Pinned, by: a}, pause: {node: a}}")
    result = run(built, pool=pool, timeout_s=0.3)  # before the controller gives it up
    assert any("a/0" in line and "paused" in line for line in result.hung), result.hung


def test_a_process_that_dies_by_itself_is_a_violation(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvreal.session import Session

    play = Session.play

    def shoot(self: Session) -> None:
        host = self.seats["b/0"].host
        assert host is not None
        host.process.send_signal(signal.SIGSEGV)
        play(self)

    monkeypatch.setattr(Session, "play", shoot)
    result = run(scenario(), pool=pool)
    assert [(v.property, v.node) for v in result.violations] == [("node died", "b/0")]
    assert "-11" in result.violations[0].text


def test_a_node_that_cannot_go_on_is_not_waited_for(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its journal's disk is full: its process lives on and says nothing more; the others are still looked at.
    """
    from kvcore.protocol.machine import Command
    from kvreal import control
    from kvreal.session import Session

    play, verify = Session.play, Session.verify
    checked: list[list[str]] = []

    def upset(self: Session) -> None:
        self.seats["b/0"].say(control.Give(Command("nothing that a worker knows")))
        play(self)

    def watch(self: Session, wipe: bool) -> None:
        verify(self, wipe)  # HostError if somebody was waited for in vain
        checked.append([seat.name for seat in self.seats.values() if seat.checked])

    monkeypatch.setattr(Session, "play", upset)
    monkeypatch.setattr(Session, "verify", watch)
    result = run(scenario(), pool=pool)
    assert [v.node for v in result.violations] == ["b/0"]
    assert checked == [["ctl", "a/0", "client"]]


def test_a_full_disk_for_the_history_is_one_line(pool: Pool) -> None:
    with pytest.raises(HistoryError, match="/dev/full: cannot write the history: No space left"):
        run(scenario(), pool=pool, history=Path("/dev/full"))
    assert run(scenario(), pool=pool).clean


def test_a_history_that_cannot_be_there_is_one_line(pool: Pool) -> None:
    with pytest.raises((HistoryError, RunError), match="cannot write the history"):
        run(scenario(), pool=pool, history=Path("/proc/nowhere/h.jsonl"))


def test_a_profile_of_another_machine_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the run, and not by each of its processes besides; all of them leave it unused."""
    path = tmp_path / "far.yaml"
    path.write_text('made: {date: "2026-01-02", cpu: another, cores: 4096}\n')
    monkeypatch.setenv("KVMOVE_PROFILE", str(path))
    result = run(scenario(), transport="auto")
    assert result.clean
    told = [one.getMessage() for one in caplog.records if "is not used: it is of another" in one.getMessage()]
    assert len(told) == 1 and told[0].startswith(f"profile {path}")
    assert "is not used" not in capfd.readouterr().err  # what the processes themselves say


def test_a_profile_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMOVE_PROFILE", str(tmp_path / "none.yaml"))
    with pytest.raises(TransferError, match=r"^profile .*none.yaml: cannot be read: No such file"):
        run(scenario(), transport="auto")


def test_too_much_memory_is_one_line(pool: Pool) -> None:
    built = scenario()
    specs = tuple(
        msgspec.structs.replace(spec, locations=(Location("LocalCPUBackend", 64, slot_bytes=1 << 50),))
        if isinstance(spec, WorkerSpec)
        else spec
        for spec in built.specs
    )
    huge = msgspec.structs.replace(built, specs=specs)
    with pytest.raises(RunError, match="ask for .* GiB, this machine has"):
        run(huge, pool=pool)
    assert run(scenario(), pool=pool).clean


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(TransferError, match="unknown transport 'rdma', expected one of auto, arena, nixl, mooncake"):
        run(scenario(), transport="rdma")


def test_nixl_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available() == ["socket"]
    with pytest.raises(TransferError, match="nixl is not installed"):
        run(scenario(), transport="nixl")


def test_one_run_after_the_other_takes_milliseconds(pool: Pool) -> None:
    """A pooled run is fast enough for generated scenarios. The bound is generous: it must hold on a busy machine."""
    import time

    built = scenario()
    run(built, pool=pool)
    begun = time.monotonic()
    for _ in range(5):
        assert run(built, pool=pool).clean
    assert (time.monotonic() - begun) / 5 < 0.5
