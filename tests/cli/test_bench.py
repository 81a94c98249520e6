"""``kvmove bench``: a tiny matrix from end to end, and every mistake in one in a line."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

pytest.importorskip("zmq")

from kvmove.bench import matrix, measure, result
from kvmove.bench.matrix import Machine
from kvmove.bench.result import MOVE
from kvmove.cli import call
from kvmove.errors import UserError

TINY = """\
name: tiny
repeats: 5
warmup: 1
cells:
  - name: cell
    transports: [socket]
    sizes: [256 KiB]
    token: 16 KiB
    chunks: [64 KiB]
    beside: [memcpy, socket]
  - name: crowd
    transports: [socket]
    sizes: [64 KiB]
    token: 16 KiB
    chunks: [64 KiB]
    concurrency: [3]
scenarios:
  simulated: [faults/drop-pin.yaml, faults/crash-source.yaml]
  timed: [smoke/copy-and-lookup.yaml]
goals:
  - {say: a memcpy is faster, cell: cell, ratio: [move, memcpy], most: 1}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "matrix.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.real
def test_a_tiny_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(["bench", written(tmp_path, TINY), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(out / "bench.json")
    bench = result.read(out)
    assert bench.command == f"kvmove bench {tmp_path / 'matrix.yaml'} --out {out}"
    assert bench.machine["cores"] and bench.versions["python"]

    cell, crowd = bench.cells
    raw = [f"raw {family} x{streams}" for family in ("tcp", "unix") for streams in (1, 2)]
    assert [one.what for one in cell.series] == [MOVE, "copy", "memcpy", *raw]
    assert {len(one.seconds) for one in cell.series} == {5}  # in two rounds, and no sample of a warm-up among them
    assert (cell.nbytes, cell.tokens, cell.chunk_bytes, cell.carried) == (256 << 10, 16, 64 << 10, "unix")
    move, copy = (cell.of(name) for name in (MOVE, "copy"))
    assert move is not None and copy is not None
    assert all(part < whole for part, whole in zip(copy.seconds, move.seconds))
    for phases in cell.phases:  # the client's time is the controller's and the way there and back
        assert 0 < phases.control_s + phases.queue_s + phases.copy_s + phases.commit_s < phases.total_s
    assert cell.checked_bytes == 2 * cell.nbytes  # what each round has left, compared
    assert cell.predicted is not None and cell.predicted.copy_s > 0

    assert crowd.total_bytes == 3 * 64 << 10 and len(crowd.singles) == 15
    batch = crowd.of(MOVE)
    assert batch is not None and statistics.median(batch.seconds) > min(crowd.singles)
    assert [(one.world, one.good, sum(one.fired.values()) > 0) for one in bench.outcomes] == [("sim", True, True)] * 2
    assert {one.file for one in bench.timings} == {"smoke/copy-and-lookup.yaml"}
    assert all(one.predicted_s > 0 and one.measured_s > 0 for one in bench.timings)
    assert bench.failed == {}


@pytest.mark.real
def test_samples_as_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    text = TINY[: TINY.index("  - name: crowd")].replace("beside: [memcpy, socket]", "beside: [memcpy]")
    assert call(["bench", written(tmp_path, text), "--out", str(out), "--repeats", "2"]) == 0
    table = parquet.read_table(out / "samples.parquet").to_pylist()
    assert [(row["series"], row["repeat"]) for row in table] == [
        (name, number) for name in (MOVE, "copy", "memcpy") for number in range(2)
    ]
    seconds = {row["repeat"]: row["seconds"] for row in table if row["series"] == MOVE}
    move = result.read(out).cells[0].of(MOVE)
    assert move is not None and tuple(seconds.values()) == move.seconds
    assert all((row["copy_s"] is not None) == (row["series"] == MOVE) for row in table)


@pytest.mark.real
def test_services_without_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    monkeypatch.setenv("KVMOVE_REFERENCE_PYTHON", str(tmp_path / "nothing"))
    text = """\
name: services
repeats: 2
warmup: 1
services:
  - name: http
    transport: socket
    idle: 1 s
    memory: 2 MiB
    contention: {small: 12 tokens, large: 64 MiB}
    reference: [{name: few, tokens: 3 tokens, token: 4 KiB}]
"""
    out = tmp_path / "out"
    assert call(["bench", written(tmp_path, text), "--out", str(out)]) == 0
    bench = result.read(out)
    assert list(bench.skipped) == ["the reference"] and "No such file" in bench.skipped["the reference"]
    (cell,) = bench.cells
    assert (cell.name, cell.tokens, [one.what for one in cell.series]) == ("http: few", 3, [MOVE])
    assert all(0 < one.copy_s < one.total_s for one in cell.phases)
    names = {one.name.partition(": ")[2] for one in bench.figures}
    assert {"idle CPU of controller", "idle CPU of a", "idle CPU of b"} <= names
    assert {"growth of memory during a move", "small move alone"} <= names


@pytest.mark.real
def test_a_cell_that_cannot_be_measured_is_told_and_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = measure.measure

    def fails(point: matrix.Point, *rest: object) -> object:
        if point.name.endswith("64 KiB"):
            raise UserError("it cannot be")
        return real(point, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "measure", fails)
    text = TINY[: TINY.index("  - name: crowd")].replace("[256 KiB]", "[64 KiB, 32 KiB]")
    out = tmp_path / "out"
    assert call(["bench", written(tmp_path, text), "--out", str(out), "--repeats", "1"]) == 1
    assert "FAILED: cell: 64 KiB: it cannot be" in capsys.readouterr().out
    bench = result.read(out)
    assert [one.name for one in bench.cells] == ["cell: 32 KiB"] and list(bench.failed) == ["cell: 64 KiB"]


# ---- bad input ------------------------------------------------------------------------------------------------------
GIB = 1 << 30
HERE = Machine(transports=("socket",), known=("nixl", "socket"), available_bytes=8 * GIB, gpu=False)
BAD = [
    ("nme: x", "1:1: nme: unknown field 'nme'"),
    ("name: x\nrepeats: 0", "repeats: found 0, expected 1 or more"),
    ("name: x\nprofile: nowhere.yaml", "nowhere.yaml: there is no such file"),
    ("name: x\ncells: [{name: c}]", "cells[0]: moves nothing: expected sizes or tokens"),
    ("name: x\ncells: [{name: c, sizes: [1 MB]}]", "1 MB is no whole number of tokens of 128 KiB"),
    ("name: x\ncells: [{name: c, sizes: [1 Mb]}]", "unknown unit 'Mb'"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], chunks: [200 KiB]}]", "200 KiB is no whole number of tokens"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], transports: []}]", "transports: is empty"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], transports: [sokcet]}]", "did you mean 'socket'"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], transports: [nixl]}]", "transport nixl is not on this machine"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], beside: [nixl]}]", "beside: nixl is not installed here"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], beside: [luck]}]", "beside[0]: unknown value 'luck'"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], concurrency: [0]}]", "found 0, expected 1 to 64 moves at once"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], routes: [[a, b/LocalCPUBackend]]}]", "expected instance/location"),
    ("name: x\ncells: [{name: c, sizes: [1 MiB], routes: [[a/Attic, b/Attic]]}]", "unknown location 'Attic'"),
    (
        "name: x\ncells: [{name: c, sizes: [1 MiB], routes: [[a/LocalCPUBackend, b/LocalGPUBackend]]}]",
        "LocalGPUBackend: there is no GPU",
    ),
    (
        "name: x\ncells: [{name: c, sizes: [1 MiB], routes: [[a/LocalCPUBackend, a/LocalCPUBackend]]}]",
        "moves from a/LocalCPUBackend to itself",
    ),
    ("name: x\ncells:\n  - name: c\n    sizes: [1 MiB, 4 GiB]", "4:20: cells[0].sizes[1]: 4 GiB: both ends take 8 GiB"),
    (
        "name: x\ncells: [{name: c, sizes: [1 GiB], beside: [memcpy, socket], concurrency: [2]}]",
        "1 GiB, 2 at once: both ends and of 2 limits beside it take 12 GiB",
    ),
    ("name: x\nservices: [{name: s, memory: 9 GiB}]", "services[0].memory: 9 GiB: both ends take 18 GiB"),
    ("name: x\nservices: [{name: s, reference: [{name: r}]}]", "expected one of size and tokens"),
    (
        "name: x\nservices: [{name: s, reference: [{name: r, size: 132 KiB, token: 4 KiB}]}]",
        "services[0].reference[0].size: 132 KiB is no whole number of tokens of 32 KiB",
    ),
    ("name: x\nscenarios: {real: [faults/none-*.yaml]}", "no scenario file is called faults/none-*.yaml"),
    ("name: x\ncells: [{name: c, tokens: [1]}]\nservices: [{name: c}]", "'c' is the name of another part too"),
    ("name: x\ngoals: [{say: g, figure: f}]", "expected one of least and most"),
    ("name: x\ngoals: [{say: g, least: 1}]", "expected one of ratio, median and figure"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    from kvcore.scenario.loader import ScenarioError

    with pytest.raises(ScenarioError) as caught:
        matrix.load(written(tmp_path, text), HERE)
    line = str(caught.value)
    assert said in line and "\n" not in line and line.startswith(f"{tmp_path / 'matrix.yaml'}:")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\ncells: [{name: c, sizes: [1 TiB], chunks: [8 MiB]}]", "memory, this machine has"),
        ("name: x\ngoals: [{say: g, cell: d, ratio: [move, memcpy], least: 1}]", "no cell is called 'd'"),
    ],
)
def test_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    out = tmp_path / "out"
    assert call(["bench", written(tmp_path, text), "--out", str(out)]) == 2
    printed, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and not printed
    assert not out.exists()


def test_what_quick_leaves_out_needs_no_room(tmp_path: Path) -> None:
    from kvmove.bench.run import load

    path = written(tmp_path, "name: x\ncells: [{name: c, sizes: [1 MiB, 9 GiB]}]\nservices: [{name: s, memory: 9 GiB}]")
    (point,) = matrix.points(load(path, True, HERE), HERE)
    assert point.nbytes == 1 << 20
    with pytest.raises(Exception, match="9 GiB: both ends take"):
        load(path, False, HERE)


def test_where_it_should_go_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert call(["bench", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "expected a directory" in capsys.readouterr().err


# ---- the matrices that come along ------------------------------------------------------------------------------------
EVERYTHING = Machine(
    transports=("nixl", "socket"),
    named=("arena",),
    known=("arena", "nixl", "socket"),
    available_bytes=64 * GIB,
    gpu=False,
)


@pytest.mark.parametrize("name", ["standard.yaml", "record.yaml"])
def test_our_own_matrices(name: str) -> None:
    from kvmove.bench.run import check_goals, quick

    found = matrix.load(str(matrix.STANDARD.with_name(name)), EVERYTHING)
    check_goals(found, EVERYTHING)
    points = matrix.points(found, EVERYTHING)
    assert len({point.name for point in points}) == len(points)
    assert all(point.tokens * point.token_bytes == point.nbytes for point in points)
    assert {1536 << 10, 2 * GIB} <= {point.nbytes for point in points}
    small = quick(found)
    assert small.repeats == 5
    assert max(point.nbytes for point in matrix.points(small, EVERYTHING)) == 512 << 20


def test_a_chunk_smaller_than_a_token_is_a_token() -> None:
    assert matrix.cut(128 << 10, 16 << 10) == (16 << 10, 1)
    assert matrix.cut(128 << 10, 8 << 20) == (128 << 10, 64)


def test_a_wrong_byte_is_no_figure() -> None:
    """A round whose bytes were wrong, or whose move failed, is not counted."""
    from kvcore.scenario.result import Operation, Result, Violation

    times = measure.Times("cell")
    spoiled = Result("real", "bench", 0, violations=[Violation("byte", "b/0", 1, "byte 7 is not what was stored")])
    with pytest.raises(UserError, match="cell: byte 7"):
        times.take(spoiled, 0)
    failed = Result("real", "bench", 0, operations=[Operation("m-0-0", "move", "failed", reason="full")])
    with pytest.raises(UserError, match="m-0-0 failed, full"):
        times.take(failed, 0)
    assert times.batches == []
