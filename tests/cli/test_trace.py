"""``kvmove run --trace``: the JSON is well formed, slices nest, every move's flow is whole, times are the history's."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kvcore.protocol.machine import CopyDone, StartCopy
from kvcore.scenario.history import read
from kvcore.scenario.result import CopyRecord, LinkRate, Result
from kvmove.cli import call
from kvmove.play import Player, prepare
from kvmove.spans import CONTROLLER, Span
from kvmove.timeline import timeline
from kvmove.trace import Tracer, measured_rates, of_run, trace

SIMULATED = [
    "smoke/move",
    "smoke/prompt-4k",
    "smoke/tensor-parallel",
    "smoke/restart",
    "smoke/shared-prefix",
    "faults/copy-fails-push",
    "faults/copy-stuck-halfway-push",
    "faults/copy-fails-at-one-rank",
    "faults/crash-controller-begun",
    "faults/crash-controller-decided",
    "faults/crash-destination-committed",
    "faults/crash-source-pushing",
    "faults/drop-committed-often",
    "faults/duplicate-everything",
    "faults/client-cancels",
    "faults/partition-both-ways",
    "faults/pause-source",
    "faults/full-for-a-while",
    "field/f02-drain-forgets-a-tier",
    "field/f36-four-ranks-one-slow",
    "prior-art/03-two-ranks-to-one",
]

UNHEARD = """\
name: the destination dies with its commit unheard
instances:
  a: {locations: {LocalCPUBackend: 1 GiB}}
  b: {locations: {LocalCPUBackend: 1 GiB}}
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 4096}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: m}
  - settle
faults:
  - when: {sent: Committed, by: b/0}
    drop: all
    crash: {node: b/0, restart_after: 2 beats}
"""


def check(body: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Well formed: what every viewer relies on. The events by their phase."""
    assert body["displayTimeUnit"] == "ns"
    by_phase: dict[str, list[dict[str, Any]]] = defaultdict(list)
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    named = {(e["pid"], e["tid"]) for e in body["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in body["traceEvents"]:
        by_phase[event["ph"]].append(event)
        assert isinstance(event["name"], str) and event["name"]
        if event["ph"] == "M":
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            lanes[(event["pid"], event["tid"])].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] != "C":
            assert (event["pid"], event["tid"]) in named
    assert set(by_phase) <= set("MXstfiC")
    for slices in lanes.values():
        nests(slices)
    flows(by_phase, lanes)
    return by_phase


def nests(slices: list[tuple[float, float]]) -> None:
    """Of any two slices of one thread, one lies within the other or they are apart."""
    tolerance = 1e-6  # microseconds: ts + dur of floats
    open_: list[tuple[float, float]] = []
    for begin, end in sorted(slices, key=lambda one: (one[0], -one[1])):
        while open_ and open_[-1][1] <= begin + tolerance:
            open_.pop()
        assert not open_ or end <= open_[-1][1] + tolerance, (open_[-1], (begin, end))
        open_.append((begin, end))


def flows(by_phase: dict[str, list[dict[str, Any]]], lanes: dict[tuple[int, int], list[tuple[float, float]]]) -> None:
    """Each begins once and ends once, in this order, and each of its points lies on a slice."""
    points: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for phase in "stf":
        for event in by_phase[phase]:
            points[event["id"]].append((event["ts"], phase))
            at = lanes[(event["pid"], event["tid"])]
            assert any(begin - 1e-6 <= event["ts"] <= end + 1e-6 for begin, end in at), event
    for ident, found in points.items():
        phases = [phase for _, phase in sorted(found, key=lambda point: (point[0], "stf".index(point[1])))]
        assert phases[0] == "s" and phases[-1] == "f" and set(phases[1:-1]) <= {"t"}, (ident, phases)


def played(path: str, tmp_path: Path) -> tuple[dict[str, Path], dict[str, Result]]:
    with Player(["sim"], rates=True) as player:
        found = player.play(prepare(path), tmp_path / "log")
    return found.histories, found.results


@pytest.mark.parametrize("name", SIMULATED)
def test_a_simulated_run(name: str, tmp_path: Path) -> None:
    histories, results = played(f"scenarios/{name}.yaml", tmp_path)
    by_phase = check(json.loads(of_run(histories, results, messages=True)))
    header, steps = read(histories["sim"])
    lines = list(steps)
    assert header.built is not None
    line = timeline("sim", header.built, lines, results["sim"])
    _times(line.spans, {one.t for one in lines}, results["sim"])
    moves = {event["id"].split()[1] for event in by_phase["s"] if event["cat"] == "move"}
    assert moves == {f"{event:x}" for event in line.moves}
    for phases in results["sim"].phases:
        move = line.moves[phases.event]
        took = {one.name: one.end_ns - one.begin_ns for one in move.whole.inside}
        assert move.bytes == phases.bytes
        if phases.bytes:  # one that copied nothing is all control
            assert took["pin"] + took["reserve"] == phases.control_ns
            assert took["copy"] == phases.copy_ns + phases.queue_ns
            assert took["commit"] + took.get("release", 0) == phases.commit_ns
        assert sum(took.values()) == phases.total_ns
    copies = {effect.rid for one in lines for effect in one.out if isinstance(effect, StartCopy)}
    assert set(line.copies) == copies
    for one in lines:  # each copy ends with the input that says so
        if isinstance(one.input, CopyDone) and line.copies[one.input.rid].node == one.node:
            assert one.t == line.copies[one.input.rid].end_ns or "cut_off" in line.copies[one.input.rid].args
    assert {mark.text.split()[0] for mark in line.marks} >= {
        type(action).__name__.lower() for _, action in results["sim"].struck
    }


def _times(spans: list[Span], known: set[int], result: Result) -> None:
    """Every time is one of the history's; a client's steps are timed by the client."""
    for span in spans:
        steps = {t for one in result.operations for t in (one.start_ns, one.end_ns)}
        assert {span.begin_ns, span.end_ns} <= (known | steps if span.kind == "step" else known), span
        _times(span.inside, known, result)


def test_links_have_their_rates(tmp_path: Path) -> None:
    """As much crosses a link as its copies hold."""
    histories, results = played("scenarios/smoke/prompt-4k.yaml", tmp_path)
    by_phase = check(json.loads(of_run(histories, results)))
    crossed = 0.0
    for link in {event["name"] for event in by_phase["C"]}:
        points = [(e["ts"], e["args"]["GB/s"]) for e in by_phase["C"] if e["name"] == link]
        assert points == sorted(points, key=lambda point: point[0]) and points[-1][1] == 0.0
        crossed += sum(rate * (after - t) * 1e3 for (t, rate), (after, _) in zip(points, points[1:]))
    moved = sum(phases.bytes for phases in results["sim"].phases)
    assert moved == 512 << 20 and crossed == pytest.approx(moved, rel=1e-3)


def test_rates_of_real_copies_add_up() -> None:
    def copy(node: str, began: int, ended: int, nbytes: int, read: bool = True) -> CopyRecord:
        return CopyRecord(node, (1, began), "done", read, "a/0", "nixl", nbytes, began, began, ended)

    rates = measured_rates(
        [
            copy("b/0", 0, 100, 1000),
            copy("b/0", 50, 150, 3000),
            copy("b/0", 10, 20, 5, read=False),
            copy("b/0", 7, 7, 1),
        ]
    )
    assert [one for one in rates if one.link == "a/0 -> b/0"] == [
        LinkRate(0, "a/0 -> b/0", 10e9), LinkRate(50, "a/0 -> b/0", 40e9),
        LinkRate(100, "a/0 -> b/0", 30e9), LinkRate(150, "a/0 -> b/0", 0),
    ]  # fmt: skip
    assert [one.link for one in rates if one.link != "a/0 -> b/0"] == ["b/0 -> a/0"] * 2


def test_the_checker_finds_slices_that_do_not_nest() -> None:
    with pytest.raises(AssertionError):
        nests([(0.0, 10.0), (5.0, 15.0)])
    nests([(0.0, 10.0), (2.0, 10.0), (10.0, 12.0), (10.0, 10.0)])


def test_what_overlaps_gets_a_lane_of_its_own(tmp_path: Path) -> None:
    """Also what claims to lie within a span and does not."""
    histories, results = played("scenarios/smoke/move.yaml", tmp_path)
    header, steps = read(histories["sim"])
    assert header.built is not None
    line = timeline("sim", header.built, steps, None)
    node = next(name for name in header.built.nodes if "/" in name)
    outer = Span(node, "outer", "x", 0, 10, inside=[])
    outer.inside = [Span(node, "in", "x", 1, 5, inside=[]), Span(node, "overlaps", "x", 4, 6, inside=[])]
    outer.inside.append(Span(node, "sticks out", "x", 7, 12, inside=[]))
    line.spans.append(outer)
    by_phase = check(trace([line], [None]))
    lane = {event["name"]: event["tid"] for event in by_phase["X"]}
    assert lane["in"] == lane["outer"] and lane["overlaps"] != lane["outer"] != lane["sticks out"]
    assert Tracer(alone=True).named() == []


def test_lost_messages_and_faults_are_there(tmp_path: Path) -> None:
    (tmp_path / "unheard.yaml").write_text(UNHEARD)
    histories, results = played(str(tmp_path / "unheard.yaml"), tmp_path)
    by_phase = check(json.loads(of_run(histories, results, messages=True)))
    instants = {event["name"].split()[0] for event in by_phase["i"]}
    assert "crash" in instants
    assert any(event["name"].startswith("Committed") and event["cat"] == "lost" for event in by_phase["i"])
    assert any("boots again" in event["name"] for event in by_phase["i"])
    assert any("cut_off" in event["args"] for event in by_phase["X"] if "args" in event)


@pytest.mark.real
def test_both_worlds_beside_each_other(tmp_path: Path) -> None:
    pytest.importorskip("zmq", reason="the real world is not installed: pip install 'kvmove[real]'")
    out = tmp_path / "trace.json"
    logs = tmp_path / "logs"
    argv = ["run", "scenarios/smoke/move.yaml", "--on", "both", "--history", str(logs), "--trace", str(out)]
    assert call(argv) == 0
    body = json.loads(out.read_bytes())
    by_phase = check(body)
    names = {e["args"]["name"]: e["pid"] for e in by_phase["M"] if e["name"] == "process_name"}
    assert {"sim ctl", "real ctl", "sim links", "real links"} <= set(names)
    begun = {}
    for world in ("sim", "real"):
        shift = body["otherData"][world]["shift_ns"]
        _, lines = read(logs / f"move.{world}.jsonl")
        times = {line.t for line in lines}
        slices = [e for e in by_phase["X"] if e["pid"] in (names[f"{world} {CONTROLLER}"],)]
        assert [e["name"] for e in slices if e["cat"] == "move"] == ["move m"]
        for event in slices:
            assert round(event["ts"] * 1000) - shift == event["args"]["t_ns"] and event["args"]["t_ns"] in times
        begun[world] = min(e["ts"] for e in by_phase["X"] if e["pid"] == names[f"{world} client"])
    assert 0 in (body["otherData"]["sim"]["shift_ns"], body["otherData"]["real"]["shift_ns"])
    assert abs(begun["sim"] - begun["real"]) < 1e5  # the first steps stand together, whenever either run began
    real = [e for e in by_phase["X"] if e["cat"] == "copy" and e["args"]["transport"] not in ("", "simulated")]
    assert real and all(e["args"]["queue_ns"] >= 0 for e in real)


def test_no_history_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    out = tmp_path / "t.json"
    assert call(["run", "scenarios/smoke/move.yaml", "--trace", str(out)]) == 0
    assert out.exists() and not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["scenarios/smoke/move.yaml", "--trace-messages"], "expected --trace OUT too"),
        (["scenarios/smoke/move.yaml", "--trace", "/nowhere/t.json"], "there is no directory /nowhere"),
        (
            ["scenarios/smoke/move.yaml", "scenarios/smoke/restart.yaml", "--trace", "t.json"],
            "one scenario file, not 2",
        ),
    ],
)
def test_bad_input(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
