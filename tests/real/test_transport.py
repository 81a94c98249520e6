"""Our transports through the conformance suite, and what is theirs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from kvreal.memory import Memory
from kvreal.spans import ints
from kvreal.transfer import TransferError, available, here, lacking, make, names, resolve
from kvreal.transfer.conformance import SLOT, Conformance, Pair
from kvreal.transfer.proof import Tables
from kvreal.transfer.sockets import batches

pytestmark = pytest.mark.real


class TestNixl(Conformance):
    transport = "nixl"


class TestMooncake(Conformance):
    transport = "mooncake"


class TestSocket(Conformance):
    transport = "socket"


class TestTcp(Conformance):
    transport = "tcp"


# ---- the suite finds what it is there to find -----------------------------------------------------------------------
def conformance(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvreal.transfer.conformance", *args, "-q", "-p", "no:cacheprovider"]
    paths = os.pathsep.join(path or "." for path in sys.path)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": paths, **env}
    )


@pytest.mark.parametrize(
    ("name", "finds"),
    [
        ("Short", "test_a_partial_chunk_moves_as_that_many_tokens"),
        ("Late", "test_what_is_done_has_landed"),
        ("Deaf", "test_a_window_closes_when_its_writer_has_stopped_and_stays_closed"),
    ],
)
def test_a_transport_with_a_planted_fault_does_not_pass(name: str, finds: str) -> None:
    found = conformance(f"tests.real.planted:{name}", "-k", finds, "-x")
    assert found.returncode == 1 and "FAILED" in found.stdout and finds in found.stdout, found.stdout + found.stderr


def test_one_without_it_passes() -> None:
    found = conformance("kvreal.transfer.sockets:SocketCarrier", "-k", "partial or landed or stays_closed")
    assert found.returncode == 0 and "failed" not in found.stdout, found.stdout + found.stderr


# ---- other packages' transports --------------------------------------------------------------------------------------
@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Where a package lies that brings transports: two that work, one named like ours, one that is not there."""
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvmove.transports]\ncourier = courier:Carrier\nsocket = courier:Carrier\ngone = nowhere:Carrier\n"
        "hollow = courier:hollow\n"
    )
    (tmp_path / "courier.py").write_text(
        "from kvreal.transfer.sockets import SocketCarrier\n"
        "class Carrier(SocketCarrier):\n    name = 'courier'\n"
        "def hollow(*_): return object()\n"
    )
    return tmp_path


def asked(folder: Path, text: str) -> str:
    paths = os.pathsep.join([str(folder), *(path or "." for path in sys.path)])
    begin = "from kvreal.memory import Memory\nfrom kvreal import transfer\nmemory = Memory()\nmemory.lay_out([], 0)\n"
    env = {**os.environ, "PYTHONPATH": paths}
    end = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)"  # threads may sit in a transport's C code
    command = [sys.executable, "-c", begin + text + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_package_brings_a_transport_by_its_entry_point(installed: Path) -> None:
    assert asked(installed, "print(*transfer.make('courier', memory).carriers)") == "courier socket"
    assert "courier gone hollow" in asked(installed, "print(*transfer.names())")
    assert asked(installed, "print(type(transfer.make('socket', memory).carriers['socket']).__module__)") == (
        "kvreal.transfer.sockets"
    )


def test_auto_has_them_too_and_says_which_do_not_start(installed: Path) -> None:
    found = asked(installed, "t = transfer.make('auto', memory)\nprint(*t.carriers, '|', *sorted(t.lacking.items()))")
    carriers, _, lacking = found.partition(" | ")
    assert carriers.split()[-2:] == ["courier", "socket"]
    assert "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'" in lacking
    assert "transport hollow: found object, expected a Carrier with a name" in lacking


def test_the_suite_runs_on_an_installed_transport_by_name(installed: Path) -> None:
    paths = os.pathsep.join([str(installed), *(path or "." for path in sys.path)])
    found = conformance("courier", "-k", "every_byte", PYTHONPATH=paths)
    assert found.returncode == 0 and "2 passed" in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize("name", ["smoke", "nixl2", ""])
def test_an_unknown_transport_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(TransferError, match="unknown transport .* expected one of auto, arena, nixl"):
        resolve(name)
    found = conformance(name or "''")
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["tests.real.planted:Nameless", "tests.real.planted:no_carrier", "nowhere:X"])
def test_what_is_no_transport_is_refused_in_one_line(name: str) -> None:
    memory = Memory()
    memory.lay_out([], 0)
    with pytest.raises(TransferError) as refused:
        make(name, memory)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_ours_have_names_that_no_package_can_take() -> None:
    assert list(here())[: len(available())] == available() and {*here(), "auto"} == set(names())
    assert not here()["socket"] and not here()["tcp"] and not here()["arena"] and not any(map(lacking, available()))
    assert set(available()) <= set(names()) and len(set(names())) == len(names())


# ---- what carried the bytes ------------------------------------------------------------------------------------------
@pytest.fixture(params=["nixl", "mooncake", "socket", "tcp"])
def begun(request: pytest.FixtureRequest) -> Iterator[Pair]:
    try:
        resolve(request.param)
    except TransferError as error:
        pytest.skip(str(error))
    pair = Pair(request.param, {})
    pair.begin(tokens=4096, slots=4)
    yield pair
    pair.close()


@pytest.mark.parametrize("read", [True, False], ids=["read", "push"])
def test_the_transport_named_is_the_one_that_carried(begun: Pair, read: bool, request: pytest.FixtureRequest) -> None:
    """Against the kernel's own count of what went through this process's TCP sockets."""
    mover = begun.mover(read)
    begun.copy(read, [(0, 0)])
    mover.ended()
    before = mover.ask("tcp_bytes")
    begun.copy(read, [(1, 1), (2, 2)])
    (ended,) = mover.ended()
    through_tcp = mover.ask("tcp_bytes") - before
    transport = request.node.callspec.params["begun"]
    assert ended["state"] == "done"
    if transport == "tcp":
        assert ended["transport"] == "tcp" and through_tcp >= ended["nbytes"]
    elif transport == "socket":
        assert ended["transport"] == "unix" and through_tcp == 0
    elif transport == "mooncake":
        assert ended["transport"] == "mooncake/tcp" and through_tcp >= ended["nbytes"]
    elif "tcp" in ended["transport"]:
        assert through_tcp >= ended["nbytes"]
    else:
        assert ended["transport"].startswith("nixl/ucx/") and "unknown" not in ended["transport"]
        assert through_tcp < ended["nbytes"] // 10


@pytest.mark.parametrize("tls", ["", "tcp"], ids=["default", "tcp"])
def test_ucx_counts_what_we_name(tls: str) -> None:
    """Two agents whose UCX prints, at its end, how often it used which protocol: the same lanes as we read."""
    if "nixl" not in available():
        pytest.skip("transport nixl is not installed here")
    env = {"UCX_TLS": tls} if tls else {}
    found: Dict[str, Any] = {}
    for info in ("*remote memory*", "used"):
        pair = Pair("nixl", {**env, "UCX_PROTO_INFO": info})
        try:
            pair.begin()
            for read in (True, False):
                pair.copy(read, [(0, 0)])
                (ended,) = pair.mover(read).ended()
                assert ended["state"] == "done"
                if info != "used":
                    found["read" if read else "write"] = ended["transport"].rpartition("/")[2]
            if info == "used":
                for read in (True, False):
                    tables = Tables()
                    tables.feed(pair.mover(read).ask("quit"))
                    what = "read" if read else "write"
                    assert tables.lanes(what, SLOT) == found[what]
            if tls:
                assert set(found.values()) == {tls}
        finally:
            pair.close()


@pytest.mark.parametrize("fill", [True, False])
def test_a_greeting_names_no_location_and_moves_nothing(fill: bool) -> None:
    assert list(batches(Memory(), "", ints(()), ints(()), SLOT, fill=fill)) == []
