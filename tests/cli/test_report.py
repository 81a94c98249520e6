"""``kvmove report``: one page that says what was measured, without a network, an image or a colour."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from kvmove.bench.result import MOVE, Bench, Cell, Figure, Goal, Outcome, Phases, Series, Timing, write_json
from kvmove.cli import call
from kvmove.reports import diff, numbers, sources

ROUTE = ("a/LocalCPUBackend", "b/LocalCPUBackend")
MIB = 1 << 20


def cell(name: str, nbytes: int, ms: tuple[float, ...], **limits: tuple[float, ...]) -> Cell:
    series = [Series(what=MOVE, seconds=tuple(one / 1e3 for one in ms))]
    for what, samples in limits.items():
        series.append(Series(what=what.replace("_", " "), seconds=tuple(one / 1e3 for one in samples)))
    middle = sorted(ms)[len(ms) // 2] / 1e3
    phases = Phases(control_s=3e-4, queue_s=1e-4, copy_s=middle - 1e-3, commit_s=2e-4, total_s=middle)
    return Cell(
        name=name,
        transport="nixl",
        route=ROUTE,
        nbytes=nbytes,
        tokens=nbytes >> 17,
        chunk_bytes=8 * MIB,
        carried="nixl/ucx/cma",
        series=tuple(series),
        phases=(phases,) * len(ms),
        predicted=msgspec.structs.replace(phases, total_s=middle * 1.1),
        checked_bytes=nbytes,
    )


BENCH = Bench(
    name="A machine <of> ours",
    about="Two & three.",
    begun="2026-01-02 03:04 UTC",
    took_s=90.0,
    command="kvmove bench m.yaml --out out/m",
    seed=7,
    repeats=4,
    warmup=1,
    profile="profiles/default.yaml",
    machine={"CPU": "A CPU", "cores": "2", "GPUs": "none", "memory": "8 GiB"},
    versions={"kvmove": "0.1.0", "nixl": "1.5.1"},
    cells=(
        cell("small", MIB, (2.0, 2.1, 2.2, 2.3), memcpy=(0.1, 0.1, 0.1, 0.1)),
        cell("large", 64 * MIB, (10.0, 10.0, 10.0, 12.0), bare_nixl_read=(9.6, 9.6, 9.6, 9.6), memcpy=(5, 5, 5, 5)),
        cell("http: 12 tokens", MIB, (3.0, 3.0, 3.0, 3.0), reference=(18.0, 18.0, 18.0, 20.0)),
        msgspec.structs.replace(
            cell("four", 64 * MIB, (40.0, 40.0, 40.0, 41.0)), concurrency=4, singles=(0.03, 0.035, 0.04, 0.04)
        ),
    ),
    figures=(
        Figure(name="http: idle CPU of a", unit="% of a core", samples=(0.4,)),
        Figure(name="http: idle CPU of b", unit="% of a core", samples=(1.7,)),
        Figure(name="http: small move alone", unit="ms", samples=(2.0, 2.1, 2.2)),
    ),
    goals=(
        Goal(say="of bare NIXL", cell="large", ratio=("move", "bare nixl"), least=0.95),
        Goal(say="of the reference", cell="http: 12 tokens", ratio=("move", "reference"), least=5),
        Goal(say="idle", figure="http: idle CPU", most=1),
        Goal(say="arena", cell="arena", median="move", most=0.002),
    ),
    outcomes=(
        Outcome(file="faults/drop-pin.yaml", name="p", world="sim", good=True, wall_s=0.1, fired={"drop at Pin": 2}),
        Outcome(file="faults/crash.yaml", name="c", world="real", good=False, wall_s=2.0, why="byte 3 is wrong"),
    ),
    timings=(Timing(file="smoke/move.yaml", op="m", predicted_s=0.02, measured_s=0.01),),
    skipped={"the reference": "it is not here"},
)

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.hardware.test_moves" name="test_between_instances[cpu to gpu]" time="0.1">
<skipped message="there is no GPU that torch can use"/></testcase>
<testcase classname="tests.hardware.test_moves" name="test_between_instances[cpu to cpu]" time="1.5"/>
<testcase classname="tests.hardware.test_ends" name="test_kill" time="2"><failure message="it did not end"/></testcase>
</testsuite></testsuites>"""


class Page(HTMLParser):
    """What a browser would fetch, what a screen reader would say, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.charts: list[str] = []
        self.tags: dict[str, int] = {}
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        found = dict(attrs)
        self.links += [found[name] or "" for name in ("src", "href", "data", "action") if name in found]
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag == "svg":
            assert found.get("role") == "img"
            self.charts.append(found.get("aria-label") or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all there is."""
    place = tmp_path_factory.mktemp("report")
    (place / "in").mkdir()
    write_json(BENCH, place / "in")
    (place / "in" / "hardware.xml").write_text(JUNIT)
    assert call(["report", str(place / "in"), "--out", str(place / "reports")]) == 0
    return place / "reports" / "a-machine-of-ours"


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text())


def test_nothing_is_fetched(folder: Path, page: Page) -> None:
    html = (folder / "index.html").read_text()
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\((?!#)", html)
    assert page.links and all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))  # several charts share the page
    assert not {"script", "iframe", "img", "link", "object"} & set(page.tags)


def test_who_cannot_see_it_is_told_the_same(page: Page) -> None:
    assert len(page.charts) == 5
    assert all(len(alt) > 40 for alt in page.charts)
    (throughput,) = [alt for alt in page.charts if "against size" in alt]
    assert "nixl reaches 6.71 GB/s at 64 MiB" in throughput  # 64 MiB in 10 ms
    assert page.tags["caption"] == page.tags["table"]


def test_no_colour_alone_means_anything(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    assert re.findall(r'<td class="met">([^<]*)', html).count("✓ met") == 2
    assert [one.split()[0] for one in re.findall(r'<td class="missed">([^<]*)', html)] == ["✗", "✗"]
    svg = html[html.index('aria-label="Gigabytes a second against size') :]
    assert "stroke-dasharray" in svg[: svg.index("</svg>")]  # limits are dashed
    bars = html[html.index('aria-label="Milliseconds of each move') :]
    assert bars[: bars.index("</svg>")].count("<pattern") >= 3  # parts are hatched


def test_light_dark_and_paper(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    for svg in charts:  # every colour is the page's: it follows the page into the dark
        assert not re.search(r"(?:fill|stroke|color)(?:: |=\")#", svg)
        assert "var(--" in svg
    used = {name for svg in charts for name in re.findall(r"var\((--\w+)\)", svg)}
    dark = html[html.index("prefers-color-scheme: dark") :]
    for name in used:
        assert f"{name}:" in html and f"{name}:" in dark


def test_the_verdict_is_computed(page: Page) -> None:
    text = " ".join(page.text)
    assert "64 MiB in chunks of 8 MiB" in text and "10.0 ms from request to released source, 6.71 GB/s" in text
    assert "0.96 of what bare NIXL does there" in text  # 9.6 ms over 10
    assert "ours is 6.0 times as fast for 8 tokens" in text
    assert "2 of 3 goals met; missed: idle." in text  # the worse of two nodes counts
    assert "1 goal could not be judged" in text and "not measured: no cell is called arena" in text
    assert "2 runs with faults" in text and "1 of them went WRONG" in text
    assert "1 passed, 1 FAILED, 1 skipped" in text
    assert "there is no GPU that torch can use" in text and "it did not end" in text
    assert "A machine <of> ours" in text  # escaped: it is text, not a tag
    assert "kvmove bench m.yaml --out out/m" in text


def test_the_twin_says_the_same(folder: Path, page: Page) -> None:
    twin = (folder / "README.md").read_text()
    assert twin.startswith("# A machine <of> ours\n")
    headings = [line[3:] for line in twin.splitlines() if line.startswith("## ")]
    assert "Verdict" in headings and len(headings) == page.tags["section"]
    assert twin.count("\n| -") + twin.count("\n| ---") >= page.tags["table"]
    cells = [part.strip() for line in twin.splitlines() if line.startswith("| ") for part in line.split("|")]
    html_text = "\n".join(page.text)
    assert all(part.strip("-: ") in html_text for part in cells)
    for alt in page.charts:
        assert alt in twin


def test_one_point_a_size() -> None:
    """A move that stands in two parts of a matrix is drawn once, as it was measured beside its limits."""
    from kvmove.reports.speed import throughput

    again = cell("again", 64 * MIB, (1.0, 1.0, 1.0, 1.0))
    section = throughput(msgspec.structs.replace(BENCH, cells=(again, *BENCH.cells)))
    assert section is not None and "nixl reaches 6.71 GB/s at 64 MiB" in section.charts[0].alt
    assert len(section.tables[0].rows) == 3


def test_what_can_be_copied(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    blocks = re.findall(r"<pre>([^<]*\t[^<]*)</pre>", html)
    (moves,) = [one for one in blocks if one.startswith("carried by")]
    lines = [line.split("\t") for line in moves.splitlines()]
    assert len({len(line) for line in lines}) == 1 and lines[2][:3] == ["nixl/ucx/cma", "64 MiB", "8 MiB"]


SUITE = {
    "what": "kvmove hardware suite",
    "date": "2026-01-02T03:04:05+00:00",
    "command": ["pytest", "tests/hardware"],
    "machine": {
        "host": "h", "system": "Linux 6.1.0", "cpu": "A CPU", "cores": 2, "numa_nodes": 1, "memory_bytes": 8 << 30,
        "memory_free_bytes": 6 << 30, "shm_bytes": 4 << 30, "shm_free_bytes": 4 << 30, "memlock_bytes": -1,
        "huge_pages": 0, "huge_pages_free": 0, "transparent_huge_pages": "", "ptrace_scope": -1, "cma": True,
        "user_namespaces": True, "versions": {"nixl": "1.5.1"},
    },
    "tests": [
        {"test": "test_moves.py::test_between_instances[x]", "outcome": "passed", "why": "",
         "measured": [{"transport": "nixl", "carried by": "nixl/ucx/cma", "GB/s": 5.1}]},
        {"test": "test_moves.py::test_between_instances[y]", "outcome": "skipped", "why": "gpu: there is none"},
    ],
}  # fmt: skip


def test_a_page_of_the_suite_alone(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_bytes(msgspec.json.encode(SUITE))
    assert call(["report", str(tmp_path), "--out", str(tmp_path / "reports")]) == 0
    folder = tmp_path / "reports" / "hardware-suite"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "index.html"]  # nothing to compare later
    text = (folder / "README.md").read_text()
    said = ["1 passed, none failed, 1 skipped", "Found on 2026-01-02.", "| CPU | A CPU |", "| nixl | 1.5.1 |"]
    said += ["nixl/ucx/cma", "gpu: there is none", "    pytest tests/hardware", "not measured: kvmove bench"]
    assert [one for one in said if one not in text] == []
    assert "repeat" not in text and "Throughput" not in text


def test_a_page_of_a_junit_file_alone_knows_no_machine(tmp_path: Path) -> None:
    (tmp_path / "suite.xml").write_text(JUNIT)
    assert call(["report", str(tmp_path), "--out", str(tmp_path / "reports"), "--name", "mine"]) == 0
    text = (tmp_path / "reports" / "mine" / "README.md").read_text()
    assert "1 passed, 1 FAILED, 1 skipped" in text and "This machine" not in text


def test_two_suites_of_two_machines_have_no_page_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**SUITE, "machine": {**SUITE["machine"], "cores": 64}}  # type: ignore[dict-item]
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(SUITE))
    (tmp_path / "b.json").write_bytes(msgspec.json.encode(other))
    assert "b.json: it is of another machine than a.json" in refused(capsys, str(tmp_path))


def test_minutes_are_counted_as_people_do(tmp_path: Path) -> None:
    for took_s, said in ((61.0, "in 1 minute;"), (600.0, "in 10 minutes;")):
        write_json(msgspec.structs.replace(BENCH, took_s=took_s), tmp_path)
        assert call(["report", str(tmp_path), "--out", str(tmp_path / "reports")]) == 0
        assert said in (tmp_path / "reports" / "a-machine-of-ours" / "README.md").read_text()


def test_runs_and_json_of_the_suite_join_in(tmp_path: Path) -> None:
    write_json(BENCH, tmp_path)
    run = {"scenario": "s", "file": "scenarios/faults/x.yaml", "good": True, "seed": 0, "order": "strict",
           "worlds": {"sim": {"operations": [{"what": "move", "state": "done"}], "fired": {"drop at Pin": 4},
                              "violations": [], "hung": [], "metrics": {"wall_s": 0.5}}}}  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps({"runs": [run]}))
    measured = {"transport": "socket", "from": "cpu", "to": "disk", "GB/s": 1.25, "carried by": "unix"}
    suite = {
        "what": "kvmove hardware suite",
        "command": ["pytest", "tests/hardware"],
        "tests": [
            {"test": "t.py::test_a_b[x]", "outcome": "passed", "seconds": 1, "why": "", "measured": [measured]},
        ],
    }
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    assert call(["report", str(tmp_path), "--out", str(tmp_path / "r"), "--name", "n"]) == 0
    twin = (tmp_path / "r" / "n" / "README.md").read_text()
    assert "| faults/x.yaml | in simulation | 1 done | ✓ survived |" in twin
    assert "3 runs with faults" in twin
    assert "| a b | 1 | 0 | 0 |" in twin and "| socket | cpu | disk | 1.25 | unix |" in twin
    assert "    pytest tests/hardware\n" in twin


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"violations": [{"text": "byte 7 is wrong"}]}, "byte 7 is wrong"),
        ({"hung": ["a/0 waits"]}, "a/0 waits"),
        ({"expectations_failed": ["m: state done"]}, "m: state done"),
        ({}, "b holds 3 tokens more"),
    ],
)
def test_what_went_wrong_in_a_run_is_said(tmp_path: Path, found: dict[str, list[object]], why: str) -> None:
    run = {"scenario": "s", "good": False, "worlds": {"real": found}}
    run["comparison"] = {"outcome": {"differs": []}, "replay": {"differs": ["b holds 3 tokens more"]}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (one,) = sources.runs(tmp_path / "run.json")
    assert (one.good, one.why) == (False, why)


def test_the_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    write_json(BENCH, tmp_path)
    for name in ("one", "two"):
        assert call(["report", str(tmp_path), "--out", str(tmp_path / name)]) == 0
    one, two = ((tmp_path / name / "a-machine-of-ours" / "index.html").read_bytes() for name in ("one", "two"))
    assert one == two


# ---- numbers --------------------------------------------------------------------------------------------------------
def test_a_ratio_is_of_the_fastest_limit_of_its_kind() -> None:
    found = cell(
        "c", MIB, (10, 10, 10), bare_nixl_read=(9, 9, 9), bare_nixl_write=(8, 8, 8), merged_nixl_read=(1, 1, 1)
    )
    limit = numbers.fastest(found, "bare nixl")
    ours = found.of(MOVE)
    assert limit is not None and ours is not None and limit.what == "bare nixl write"
    assert numbers.ratio(ours, limit).median == pytest.approx(0.8)
    assert numbers.fastest(found, "raw") is None


def test_the_spread_is_where_half_of_the_samples_lie() -> None:
    found = numbers.spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.median, found.low, found.high, found.least, found.most) == (3.0, 2.0, 4.0, 1.0, 5.0)
    assert numbers.spread([2.0]).low == 2.0


def test_the_error_of_predictions_is_a_median() -> None:
    assert numbers.median_error([("a", 1.1, 1.0), ("b", 0.5, 1.0), ("c", 1.2, 1.0)]) == pytest.approx(0.2)


# ---- what changed ---------------------------------------------------------------------------------------------------
def changed(**ms: tuple[float, ...]) -> Bench:
    cells = tuple(cell(one.name, one.nbytes, ms[one.name]) if one.name in ms else one for one in BENCH.cells)
    return msgspec.structs.replace(BENCH, cells=cells)


def words(after: Bench) -> dict[str, str]:
    cells = next(one for one in diff.sections(BENCH, after) if one.name == "cells")
    return {row[0]: row[-1] for row in cells.tables[0].rows if row[1] == MOVE}


def test_what_is_slower_is_named() -> None:
    assert set(words(BENCH).values()) == {"alike"}
    assert words(changed(large=(13.0, 13.0, 13.1, 13.2)))["large"] == "▲ slower"
    assert words(changed(large=(7.0, 7.0, 7.1, 7.2)))["large"] == "▼ faster"
    assert words(changed(large=(10.2, 10.3, 10.2, 10.3)))["large"] == "alike"  # by 2%
    assert words(changed(small=(1.0, 2.1, 2.9, 3.5)))["small"] == "alike"  # more, but within the noise


def test_a_diff_is_a_page(tmp_path: Path) -> None:
    write_json(BENCH, tmp_path)
    (tmp_path / "b").mkdir()
    write_json(changed(large=(13.0, 13.0, 13.1, 13.2)), tmp_path / "b")
    assert call(["report", "--diff", str(tmp_path), str(tmp_path / "b"), "--out", str(tmp_path / "r")]) == 0
    (target,) = (tmp_path / "r").iterdir()
    text = " ".join(Page((target / "index.html").read_text()).text)
    assert "4 cells are in both: 0 faster, 1 slower, 3 alike." in text and "Slower: large +30%." in text
    assert "▲ slower" in (target / "README.md").read_text()


def test_a_diff_of_two_machines_says_so() -> None:
    def said(**machine: str) -> str:
        return " ".join(diff.sections(BENCH, msgspec.structs.replace(BENCH, machine=BENCH.machine | machine))[0].text)

    assert "They ran on different machines (CPU, cores)" in said(CPU="B", cores="4")
    assert "different machines" not in said(memory="7 GiB")


# ---- bad input ------------------------------------------------------------------------------------------------------
def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert call(["report", *argv]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and not out
    return error


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "reports")]
    good, empty, broken, other = (tmp_path / name for name in ("good", "empty", "broken", "other"))
    for one in (good, empty, broken, other):
        one.mkdir()
    write_json(BENCH, good)
    (broken / "bench.json").write_text('{"name": 3}')
    write_json(msgspec.structs.replace(BENCH, name="theirs", machine={"CPU": "B"}), other)
    assert f"{tmp_path / 'none'}: expected a directory" in refused(capsys, str(tmp_path / "none"), *out)
    assert f"{empty}: there is no bench.json in it" in refused(capsys, str(good), str(empty), *out)
    assert f"{broken / 'bench.json'}: not a result of `kvmove bench`" in refused(capsys, str(broken), *out)
    assert "theirs: CPU is B, of A machine <of> ours it is A CPU" in refused(capsys, str(good), str(other), *out)
    assert "--diff: expected two directories, found 1" in refused(capsys, "--diff", str(good), *out)
    assert "bench.json: No such file" in refused(capsys, "--diff", str(good), str(empty), *out)
    (empty / "suite.xml").write_text("<a>")
    assert "not a JUnit file" in refused(capsys, str(good), str(empty), *out)
    (empty / "suite.xml").unlink()
    for tests, said in (
        (3, "tests: found a whole number, expected a list"),
        ([{"outcome": "passed"}], "tests[0]: test is missing"),
    ):
        (empty / "suite.json").write_bytes(msgspec.json.encode({**SUITE, "tests": tests}))
        assert f"suite.json: not a result of the hardware suite: {said}" in refused(capsys, str(empty), *out)
    (empty / "suite.json").unlink()
    (empty / "suite.xml").write_text(JUNIT)
    (tmp_path / "file").write_text("")
    assert "cannot write the report" in refused(capsys, str(good), "--out", str(tmp_path / "file"))
    assert not (tmp_path / "reports").exists()
