"""The hardware suite as people call it: its options, its header, its skips and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kvcore.scenario.units import Size
from tests.hardware.found import KINDS, LAYOUTS, WAYS, Asked, Case

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]


def suite(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "tests/hardware", "-p", "no:cacheprovider", *options]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "UCX_", "CI"))}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=100)


def test_a_few_cells_and_their_report(tmp_path: Path) -> None:
    out, junit = tmp_path / "suite.json", tmp_path / "suite.xml"
    done = suite(
        "--quick", "--transports", "socket,nixl over rdma", "--devices", "cpu,gpu", "--sizes", "1 MiB", "--ranks", "1",
        "-k", "test_between_instances and cpu and (read or gpu)", "--hardware-json", str(out), "--junitxml", str(junit),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    asked_for = "asked for: socket, nixl over rdma; cpu, gpu; sizes 1 MiB"
    for words in ("machine: ", "GPUs: ", "transports here: ", asked_for):
        assert words in done.stdout
    body = json.loads(out.read_text())
    assert body["what"] == "kvmove hardware suite" and body["machine"]["cores"] >= 1 and body["exit_status"] == 0
    assert body["asked"]["sizes"] == [1 << 20] and body["asked"]["quick"] is True
    tests = body["tests"]
    assert len(tests) == sum(body["counts"].values()) and body["counts"]["failed"] == 0
    (moved,) = [one for one in tests if "[socket, cpu to cpu, read, 1 MiB chunks, 1 rank, 1 MiB]" in one["test"]]
    (measured,) = moved["measured"]
    layout = LAYOUTS[0]
    nbytes = (256 + 85) * layout.bytes_per_token  # one chunk, and a third of one
    assert moved["outcome"] == "passed" and measured["bytes checked"] == nbytes + layout.bytes_per_token
    assert measured["carried by"] and measured["copy_ms"] > 0
    why = {one["why"] for one in tests if one["outcome"] == "skipped"}
    assert all(reason.partition(": ")[2] for reason in why), "a skip says what is missing"
    assert "skipped: gpu: there is no GPU" in " ".join(f"skipped: {one}" for one in why) or body["machine"]["gpus"]
    properties = [one.get("name") for one in ET.parse(junit).iter("property")]
    assert "hardware" in properties


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--transports", "smoke"), "--transports smoke: expected some of "),
        (("--devices", "cpu,tape"), "--devices tape: expected some of cpu, disk, gpu"),
        (("--sizes", "many"), "--sizes many: "),
        (("--ranks", "0"), "--ranks 0: expected whole numbers from 1 to 64"),
        (("--load-seconds", "long"), "--load-seconds long: expected a number of seconds"),
        (("--hardware-json", "/nowhere/x.json"), "there is no directory /nowhere"),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, ...], said: str) -> None:
    done = suite(*options, "--collect-only")
    assert done.returncode == 4 and said in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def asked(quick: bool) -> Asked:
    return Asked(("nixl", "socket", *WAYS), tuple(KINDS), (Size(1 << 20),), (1, 2, 4), quick, 1.0, "", "")


def test_all_of_it_is_each_with_each() -> None:
    cases = list(asked(False).moves())
    assert len(set(cases)) == len(cases) == 4 * 3 * 3 * 2 * len(LAYOUTS) * 3


def test_the_quick_form_has_one_of_each() -> None:
    """Each transport both ways, and over the first each pair of kinds, each layout and each number of ranks."""
    cases = list(asked(True).moves())
    assert {(case.transport, case.direction) for case in cases} == {
        (transport, direction) for transport in asked(True).transports for direction in ("read", "push")
    }
    first = [case for case in cases if case.transport == "nixl"]
    assert {(case.source, case.target) for case in first} == {(a, b) for a in KINDS for b in KINDS}
    assert {case.layout for case in first} == set(LAYOUTS) and {case.ranks for case in first} == {1, 2, 4}
    assert len(cases) < 30


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("size", [Size(1), Size(1 << 20), Size(100 << 20)], ids=str)
def test_the_last_chunk_is_a_partial_one(layout: object, size: Size) -> None:
    case = Case("nixl", "cpu", "cpu", "read", layout, 1, size)  # type: ignore[arg-type]
    assert 0 < case.tokens % case.layout.chunk_tokens < case.layout.chunk_tokens
    chunk_bytes = case.layout.chunk_tokens * case.layout.bytes_per_token
    assert size.bytes - chunk_bytes <= case.tokens * case.layout.bytes_per_token <= size.bytes + chunk_bytes
