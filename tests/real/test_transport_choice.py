"""Which transport ``auto`` takes, and what it says of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict

import pytest

from kvcore.protocol.machine import StartCopy
from kvcore.scenario.profile import CopyCost, Made, Profile
from kvreal.facts import cores, cpu_model, host_id
from kvreal.memory import Memory
from kvreal.pool import Pool
from kvreal.transfer import TransferError, make, nixl
from kvreal.transfer.carrier import Carrier
from kvreal.transfer.choice import VARIABLE, choose, profile_from
from kvreal.transfer.flow import Flow
from kvreal.transfer.job import Copy, Job
from kvreal.transfer.line import Endpoint

CPU, DISK = "LocalCPUBackend", "LocalDiskBackend"
MIB = 1 << 20


class Stub(Carrier):
    def __init__(self, name: str, disks: bool = True) -> None:
        super().__init__(Memory(), "x", Flow())
        self.name = name
        self.disks = disks

    def reaches(self, card: str, mine: str, theirs: str) -> bool:
        return card != "far" and (self.disks or "disk" not in (mine, theirs))


def carriers(*names: str) -> Dict[str, Carrier]:
    return {name: Stub(name, name == "socket") for name in names}


def peer(*names: str, **cards: str) -> Endpoint:
    return Endpoint("127.0.0.1", 1, "p", tuple((name, cards.get(name, "")) for name in names))


def job(nbytes: int = MIB, read: bool = True, mine: str = CPU, theirs: str = CPU) -> Job:
    effect = StartCopy((1, 1), read, "b/0", 1, theirs, (0,), mine, (0,), (nbytes,))
    return Job(Copy(effect, "", 1, 1, 1 << 60))


def measured(*rates: tuple[str, str, str, float], queue_ns: int = 0) -> Profile:
    return Profile(
        name="here",
        copies=tuple(
            CopyCost(transport=name, source=source, target=target, rates=((MIB, rate),), queue_ns=queue_ns)
            for name, source, target, rate in rates
        ),
    )


def test_without_a_profile_the_first_of_those_that_both_ends_have() -> None:
    mine = carriers("arena", "nixl", "socket")
    chosen = choose(job(), mine, peer("nixl", "socket"), None)
    assert chosen == (mine["nixl"], "nixl: first of those both ends have: nixl, socket")
    chosen = choose(job(), mine, peer("socket", "nixl", "arena", nixl="far"), None)
    assert chosen.why == "arena: first of those both ends have: arena, socket"
    assert choose(job(mine=DISK), mine, peer("nixl", "socket"), None).why == (
        "socket: the only one that both ends have and that reaches both"
    )


@pytest.mark.parametrize("profile", [None, "fastest"])
def test_a_read_between_hosts_that_could_take_the_source_along_goes_another_way(
    monkeypatch: pytest.MonkeyPatch, profile: Any
) -> None:
    monkeypatch.setattr(nixl, "_host", lambda: "aa")
    fast = measured(("nixl", "cpu", "cpu", 9e9), ("socket", "cpu", "cpu", 1e9)) if profile else None
    bare: Any = nixl.NixlCarrier.__new__(nixl.NixlCarrier)
    mine: Dict[str, Carrier] = {"nixl": bare, "socket": Stub("socket")}

    def by(card: str, devices: frozenset[str] = frozenset(), **how: Any) -> str:
        monkeypatch.setattr(nixl, "hardware", lambda: devices)
        auto = how.pop("auto", True)
        return choose(job(**how), mine, peer("nixl", "socket", nixl=card), fast, auto).why

    assert by("bb").startswith("socket: not nixl, whose reads over TCP can take the source's process along")
    assert by("aa").startswith("nixl: ")
    assert by("bb", read=False).startswith("nixl: ")
    assert by("bb+rdma").startswith("socket: ") and by("bb", frozenset({"rdma"})).startswith("socket: ")
    assert by("bb+rdma", frozenset({"rdma"})).startswith("nixl: ")
    assert by("bb", auto=False).startswith("nixl: ")
    only = {"nixl": mine["nixl"]}
    assert choose(job(), only, peer("nixl", nixl="bb"), fast).carrier is bare


@pytest.mark.parametrize(
    ("names", "near"),
    [(None, True), ("^posix,sysv", True), ("cma,tcp", True), ("all", True), ("tcp", False), ("^cma", False)],
)
def test_who_may_not_read_beside_is_on_a_host_of_its_own(
    monkeypatch: pytest.MonkeyPatch, names: str | None, near: bool
) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    if names is not None:
        monkeypatch.setenv("UCX_TLS", names)
    assert bool(nixl._host.__wrapped__()) == near


def test_none_is_said_with_what_each_end_has() -> None:
    with pytest.raises(TransferError) as refused:
        choose(job(theirs=DISK), carriers("nixl"), peer("nixl", "mooncake"), None)
    assert str(refused.value) == "no transport between cpu memory here (nixl) and disk memory of b/0 (nixl, mooncake)"


def test_by_a_profile_the_fastest_in_that_direction() -> None:
    mine, theirs = carriers("nixl", "mooncake", "socket"), peer("nixl", "socket")
    profile = measured(("nixl", "cpu", "cpu", 2e9), ("socket", "cpu", "cpu", 3e9), ("mooncake", "cpu", "cpu", 9e9))
    chosen = choose(job(), mine, theirs, profile)
    assert chosen == (mine["socket"], "socket: fastest of nixl 2.0 GB/s, socket 3.0 GB/s by profile here")
    assert choose(job(), mine, theirs, measured(("nixl", "cpu", "cpu", 2e9))).why == (
        "nixl: fastest of nixl 2.0 GB/s, socket not measured by profile here"
    )
    one_way = measured(("socket", "gpu", "cpu", 9e9), ("nixl", "gpu", "cpu", 1e9), ("nixl", "cpu", "gpu", 1e9))
    reach = {name: Stub(name) for name in ("nixl", "socket")}
    gpu = "LocalGPUBackend"
    found: Dict[str, Any] = {
        "read": choose(job(read=True, mine=CPU, theirs=gpu), reach, theirs, one_way).carrier.name,  # type: ignore[arg-type]
        "push": choose(job(read=False, mine=CPU, theirs=gpu), reach, theirs, one_way).carrier.name,  # type: ignore[arg-type]
    }
    assert found == {"read": "socket", "push": "nixl"}


def test_what_moves_no_byte_needs_no_measurement() -> None:
    profile = measured(("socket", "cpu", "cpu", 1e12))
    assert choose(job(), carriers("arena", "socket"), peer("arena", "socket"), profile).carrier.name == "arena"


# ---- profiles --------------------------------------------------------------------------------------------------------
BODY = """name: {name}
made: {{date: 2026-01-01, cpu: "{cpu}", cores: {cores}, host: "{host}"}}
copies:
- {{transport: socket, rates: [[1048576, 9e9]]}}
- {{transport: nixl, rates: [[1048576, 1e9]]}}
"""


def written(path: Path, cpu: str = "", host: str = "") -> str:
    file = path / "p.yaml"
    file.write_text(BODY.format(name="mine", cpu=cpu or cpu_model(), cores=cores(), host=host or host_id()))
    return str(file)


def test_auto_reads_the_profile_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, written(tmp_path))
    found = profile_from()
    assert found is not None and found.name == "mine"
    assert Made(cpu=cpu_model(), cores=cores(), host=host_id()).elsewhere(cpu_model(), cores(), host_id()) == ""


def test_a_profile_of_another_machine_is_told_of_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert profile_from(written(tmp_path, cpu="another kind")) is None
    (record,) = caplog.records
    assert "is not used: it is of another kind with" in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("text", ["copies: 7", "[", "nonsense: 1", None])
def test_a_profile_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.yaml"
    if text is not None:
        file.write_text(text)
    memory = Memory()
    memory.lay_out([], 0)
    with pytest.raises(TransferError) as refused:
        make("auto", memory, profile=str(file))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_why_is_logged_once_for_each_peer_and_kept_with_each_copy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kvmove.transfer")
    sides = []
    for address in ("a/0", "b/0"):
        memory = Memory()
        memory.lay_out([(CPU, 2)], 4096)
        transfer = make("socket", memory)
        transfer.begin("a run", address)
        transfer.set_epoch(1)
        sides.append(transfer)
    a, b = sides
    for at in range(2):
        effect = StartCopy((1, at), True, "b/0", 1, CPU, (0,), CPU, (0,), (4096,))
        a.start(Copy(effect, b.endpoint(), 1, 1, 60_000_000_000))
        ended: Any = []
        while not ended:
            ended = a.take()
        assert ended[0].state == "done" and ended[0].transport == "unix"
        assert ended[0].chosen == "socket: the only one that both ends have and that reaches both"
    lines = [record.getMessage() for record in caplog.records if record.name == "kvmove.transfer"]
    assert lines == [f"copies between {CPU} and {CPU} of b/0: {ended[0].chosen}"]
    for side in sides:
        side.stop()


def test_a_profile_that_is_not_there_is_one_line_to_who_runs_a_scenario(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "nope.yaml"
    monkeypatch.setenv("KVMOVE_PROFILE", str(path))
    with pytest.raises(TransferError) as refused, Pool("auto") as pool:
        pool.take(1)
    assert str(refused.value) == f"profile {path}: cannot be read: No such file or directory"
