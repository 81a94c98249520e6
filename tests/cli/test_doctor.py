"""``kvmove doctor``: what is here is found, what works is tried, what is missing has its command."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmove.cli import call
from kvreal import doctor, transfer
from kvreal.facts import Gpu, Machine, can_read, listed, machine

PLAIN = Machine(
    host="0" * 12,
    system="Linux",
    cpu="some processor",
    cores=2,
    numa_nodes=1,
    memory_bytes=16 << 30,
    memory_free_bytes=8 << 30,
    shm_bytes=8 << 30,
    shm_free_bytes=8 << 30,
    memlock_bytes=8 << 20,
    huge_pages=0,
    huge_pages_free=0,
    transparent_huge_pages="madvise",
    ptrace_scope=-1,
    cma=True,
    user_namespaces=True,
    versions=dict.fromkeys(doctor.PACKAGES, "1"),
)


def without(name: str) -> dict[str, str]:
    return {one: "1" for one in doctor.PACKAGES if one != name}


def wants(here: Machine, *tried: doctor.Tried) -> dict[str, str]:
    """What is missing -> the command."""
    return {lack.what: lack.command for lack in doctor.missing(here, tried)}


# ---- for real -------------------------------------------------------------------------------------------------------
@pytest.mark.real
def test_every_transport_is_tried_between_all_kinds_of_location(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report["works"] is True
    tried = {one["transport"]: one for one in report["transports"]}
    assert sorted(tried) == sorted(name for name in transfer.names() if name != "auto")
    for name in transfer.available():
        assert tried[name]["works"], tried[name]
        assert {"cpu to cpu", "cpu to disk", "disk to cpu"} <= set(tried[name]["pairs"]), name
        assert not tried[name]["failed"]
    assert report["kinds"]["cpu"] == report["kinds"]["disk"] == "works"
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    if "nixl" in transfer.available():
        assert "tcp" in report["machine"]["ucx_transports"] and "UCX" in report["machine"]["nixl_plugins"]


@pytest.mark.real
def test_a_profile_that_cannot_be_read_is_no_fault_of_a_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMOVE_PROFILE", "/nowhere.yaml")
    assert doctor.try_transport("socket").works
    assert "/nowhere.yaml" in doctor._directions()[0]


@pytest.mark.real
def test_in_a_pipe_it_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["doctor"]) == 0
    out, _ = capsys.readouterr()
    assert "\x1b" not in out
    for heading in ("this machine", "what works", "what is missing"):
        assert f"{heading}\n" in out
    assert all(f"transport {name}" in out for name in transfer.available())
    assert "Traceback" not in out


def test_by_a_profile_it_says_who_moves_the_bytes_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = doctor._auto()[0]
    rows = [f"- {{transport: {name}, push: {push}, rates: [[1048576, {rate}]]}}" for push, rate in
            (("false", 1e9), ("true", 3e9))]  # fmt: skip
    (tmp_path / "p.yaml").write_text("\n".join(["name: mine", "copies:", *rows, ""]))
    monkeypatch.setattr(doctor, "try_transport", lambda name: doctor.Tried(name, True))
    monkeypatch.delenv("KVMOVE_PROFILE", raising=False)
    assert call(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr()[0])
    assert (found["directions"], "KVMOVE_PROFILE" in found["measured"]) == ({}, True)
    monkeypatch.setenv("KVMOVE_PROFILE", str(tmp_path / "p.yaml"))
    assert call(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr()[0])
    assert found["directions"] == {"cpu to cpu": "push: 3 GB/s, read 1 by profile mine"}
    (tmp_path / "p.yaml").write_text("\n".join(["name: mine", "copies:", rows[0], ""]))
    assert call(["doctor"]) == 0
    assert "no copy was measured both ways" in " ".join(capsys.readouterr()[0].split())
    monkeypatch.setenv("KVMOVE_PROFILE", str(tmp_path / "none.yaml"))
    assert call(["doctor"]) == 0
    assert "none.yaml" in capsys.readouterr()[0]


def test_a_sibling_s_memory_is_really_read() -> None:
    proof = ctypes.create_string_buffer(b"kvmove", 8)
    other = ctypes.create_string_buffer(b"other!", 8)
    here = machine()
    assert can_read(os.getpid(), ctypes.addressof(proof)) or not here.cma
    assert not can_read(os.getpid(), ctypes.addressof(other)), "the bytes are compared, not only fetched"
    assert not can_read(os.getpid(), 8), "an address that is nowhere is no traceback"


# ---- where something is missing ------------------------------------------------------------------------------------
def test_where_nothing_works_the_exit_status_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> doctor.Tried:
        return doctor.Tried(name, False, why="[broken] on purpose")

    monkeypatch.setattr(doctor, "try_transport", broken)
    monkeypatch.setattr(doctor, "machine", lambda: PLAIN)
    assert call(["doctor"]) == 1
    out, _ = capsys.readouterr()
    assert "does not" in out and "[broken] on purpose" in out
    assert call(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr()[0])["works"] is False


def test_without_zeromq_nothing_real_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)  # as if it were not there
    monkeypatch.setattr(doctor, "machine", lambda: msgspec.structs.replace(PLAIN, versions=without("pyzmq")))
    assert call(["doctor"]) == 1
    out, _ = capsys.readouterr()
    assert "pyzmq not installed" in out and "pip install 'kvmove[real]'" in out


def test_a_transport_whose_processes_fail_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **more: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("kvreal.run.run", fails)
    assert doctor.tried_here("any") == doctor.Tried("any", False, why="first line")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import os; os.abort()", "its process ended with status -6"),
        ("raise SystemExit(3)", "its process ended with status 3"),
        ("import time; time.sleep(60)", "it did not end within 1 s"),
    ],
)
def test_a_transport_that_takes_its_process_down_or_hangs_says_so(
    program: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run

    def instead(command: list[str], **more: Any) -> subprocess.CompletedProcess[bytes]:
        return real([sys.executable, "-c", program], **more)

    monkeypatch.setattr(doctor, "PROCESS_TIMEOUT_S", 1.0)
    monkeypatch.setattr("kvreal.doctor.subprocess.run", instead)
    assert doctor.try_transport("any") == doctor.Tried("any", False, why=why)


def test_what_is_missing_has_its_command() -> None:
    replace = msgspec.structs.replace
    assert wants(PLAIN) == {"a GPU": "", "an RDMA device": ""}
    assert wants(replace(PLAIN, versions=without("nixl")))["nixl"] == "pip install 'kvmove[real]'"
    assert wants(replace(PLAIN, versions=without("fastapi")))["fastapi"] == "pip install 'kvmove[service]'"
    locked = replace(PLAIN, cma=False, ptrace_scope=1)
    assert wants(locked)["CMA (process_vm_readv)"] == "sudo sysctl kernel.yama.ptrace_scope=0"
    assert "size=8G /dev/shm" in wants(replace(PLAIN, shm_bytes=64 << 20))["room in /dev/shm"]
    rdma = replace(PLAIN, rdma=("mlx5_0",), gpus=(Gpu("some GPU", 80 << 30),))
    assert wants(rdma) == {"a memlock limit above 1 GiB": "ulimit -l unlimited"}
    lacks = doctor.Tried("other", False, why="the package x is not installed (pip install x)")
    assert wants(rdma, lacks)["transport other"] == "pip install x"


def test_ucx_is_taken_at_its_word() -> None:
    said = "x UCX  WARN  transport 'asked' is not available, please use one or more of: cma, rc_mlx5, tcp\n"
    assert listed(said) == ("cma", "rc_mlx5", "tcp")
    assert listed("nothing of the kind") == ()
