"""``kvmove run`` in simulation: its text, its JSON, its exit status, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcore.scenario.history import read
from kvmove.cli import call

SCENARIO = """\
name: twelve tokens
instances:
  a: {locations: {cpu: 1 GiB}}
  b: {locations: {cpu: 1 GiB}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 12}
  - move: {from: a/cpu, to: b/cpu, prompt: p, as: m}
  - settle
  - lookup: {prompt: p, as: found}
expect:
  m: {state: done, num_tokens: 12}
  found: {b/cpu: 12}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "twelve.yaml"
    path.write_text(SCENARIO)
    return path


def run_json(*argv: str) -> tuple[int, Any]:
    out = Path(argv[0]).parent / "out.json"
    status = call(["run", *argv, "--json", str(out)])
    return status, json.loads(out.read_text())


def test_a_good_run_says_so(capsys: pytest.CaptureFixture[str], scenario: Path) -> None:
    assert call(["run", str(scenario)]) == 0
    out, err = capsys.readouterr()
    assert "done, 12 tokens; source: 1 chunk deleted" in out
    assert "every property holds, 2 expectations met" in out
    assert out.rstrip().endswith("ok")
    assert err == f"simulating: {scenario}\n"
    assert "\x1b" not in out + err  # plain in a pipe


def test_json_holds_what_programs_read(scenario: Path) -> None:
    status, body = run_json(str(scenario), "--seed", "7")
    assert status == 0
    assert (body["scenario"], body["seed"], body["good"]) == ("twelve tokens", 7, True)
    sim = body["worlds"]["sim"]
    assert set(sim) >= {"operations", "violations", "placement", "metrics"}
    move = next(one for one in sim["operations"] if one["op"] == "m")
    assert (move["state"], move["num_tokens"], move["event_id"]) == ("done", 12, "1-1")
    assert 0 < move["start_ns"] < move["end_ns"]
    assert sim["violations"] == [] and sim["placement"] == {"b/cpu": {"p": 12}}
    assert "comparison" not in body


def test_several_files_are_a_list_and_a_summary(
    capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "other.yaml"
    bad.write_text(SCENARIO.replace("num_tokens: 12", "num_tokens: 13"))
    status, body = run_json(str(scenario), str(bad))
    assert status == 1
    assert [run["good"] for run in body["runs"]] == [True, False]
    assert body["runs"][1]["worlds"]["sim"]["expectations_failed"] == ["m: num_tokens: expected 13, got 12"]
    out, _ = capsys.readouterr()
    assert "2 scenarios: 1 ok, 1 failed\n" in out and f"failed: {bad}\n" in out
    assert f"ok  {scenario}: 4 operations in simulation\n" in out
    assert out.count("store p, 12 tokens") == 0 and out.count("Answer m 1-1") > 0  # all about the bad one alone
    assert call(["run", str(scenario), str(scenario), "--verbose"]) == 0
    assert capsys.readouterr()[0].count("2 expectations met") == 2


def test_a_failed_expectation_shows_the_events_that_led_to_it(
    capsys: pytest.CaptureFixture[str], scenario: Path
) -> None:
    scenario.write_text(SCENARIO.replace("found: {b/cpu: 12}", "found: {a/cpu: 12}"))
    assert call(["run", str(scenario)]) == 1
    out, _ = capsys.readouterr()
    assert "EXPECTED found: found: expected 12 tokens at a/cpu, got 12 tokens at b/cpu" in out
    assert "LookupRequest found" in out and "12 tokens at b/cpu" in out
    assert "FAILED" in out


def test_json_on_stdout_leaves_the_rest_to_stderr(capsys: pytest.CaptureFixture[str], scenario: Path) -> None:
    assert call(["run", str(scenario), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["good"] is True
    assert "every property holds" in err


def test_overrides_reach_the_run(scenario: Path) -> None:
    status, body = run_json(str(scenario), "--set", "steps[0].store.tokens=300", "--set", "expect={}")
    assert status == 0
    assert body["worlds"]["sim"]["placement"] == {"b/cpu": {"p": 300}}


def test_histories_are_kept_where_asked_and_nowhere_else(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert call(["run", str(scenario)]) == 0
    assert call(["run", str(scenario), str(scenario), "--history", str(tmp_path / "kept")]) == 0
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["twelve-2.sim.jsonl", "twelve.sim.jsonl"]
    assert read(tmp_path / "kept" / "twelve.sim.jsonl")[0].scenario == "twelve tokens"
    assert list(scratch.iterdir()) == []


def test_the_same_seed_gives_the_same_history(scenario: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert call(["run", str(scenario), "--history", str(tmp_path / name)]) == 0
    one, two = ((tmp_path / name / "twelve.sim.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_full_disk_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "twelve.sim.jsonl").symlink_to("/dev/full")
    assert call(["run", str(scenario), "--history", str(kept)]) == 2
    _, err = capsys.readouterr()
    assert "cannot write the history: No space left on device" in err.splitlines()[-1]
    assert list(kept.iterdir()) == []
    assert call(["run", str(scenario), "--json", "/dev/full"]) == 2
    _, err = capsys.readouterr()
    assert err.splitlines()[-1] == "kvmove: --json /dev/full: No space left on device"


def test_ctrl_c_is_130_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvmove.play.expectations", interrupted)
    assert call(["run", str(scenario), "--history", str(tmp_path / "kept")]) == 130
    _, err = capsys.readouterr()
    assert err.splitlines()[-1] == "kvmove: interrupted"
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_hang_is_a_failure_that_says_who_was_not_quiet(capsys: pytest.CaptureFixture[str], scenario: Path) -> None:
    scenario.write_text(
        SCENARIO.partition("expect:")[0]
        + "deadline: 2 s\nfaults:\n  - {when: {started: StartCopy}, copy: {stuck: true}}\n"
    )
    assert call(["run", str(scenario)]) == 1
    out, _ = capsys.readouterr()
    assert "HUNG at its deadline: " in out


def test_a_scenario_that_needs_what_is_missing_is_skipped_for_real_by_name(
    capsys: pytest.CaptureFixture[str], scenario: Path
) -> None:
    pytest.importorskip("zmq")
    scenario.write_text("needs: [rdma]\n" + SCENARIO)
    assert call(["run", str(scenario)]) == 0
    assert call(["run", str(scenario), "--on", "both"]) == 2
    out, _ = capsys.readouterr()
    assert f"skipped: {scenario} needs rdma, which this machine lacks" in out


def test_gpu_memory_needs_a_gpu_without_its_saying_so(
    capsys: pytest.CaptureFixture[str], scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zmq")
    monkeypatch.setattr("kvmove.play._provides", lambda: ("disk",))
    scenario.write_text(SCENARIO.replace("cpu", "gpu"))
    assert call(["run", str(scenario), "--on", "both"]) == 2
    assert f"skipped: {scenario} needs gpu, which this machine lacks" in capsys.readouterr().out


def test_history_shows_and_filters(capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path) -> None:
    assert call(["run", str(scenario), "--history", str(tmp_path)]) == 0
    log = str(tmp_path / "twelve.sim.jsonl")
    capsys.readouterr()

    def shown(*argv: str) -> str:
        assert call(["history", log, *argv]) == 0
        return capsys.readouterr()[0]

    assert all(name in shown() for name in ("client", "ctl", "a/0", "b/0", "MoveRequest m", "Release 1-1"))
    assert "LookupRequest" not in shown("--event", "m") and "Pin 1-1" in shown("--event", "1-1")
    assert "Pinned" in shown("--node", "a") and "Fetch" not in shown("--node", "a/0")
    assert "MoveRequest" not in shown("--after", "2 s") and "Release" not in shown("--before", "1 ms")
    assert "Beat" in shown("--all") and "Beat" not in shown()
    assert call(["history", log, "--node", "c"]) == 2
    assert "--node c" in capsys.readouterr()[1]
    assert call(["history", log, "--after", "2 quarks"]) == 2
    assert call(["history", str(scenario)]) == 2
    assert f"{scenario}:1: not a kvmove history" in capsys.readouterr()[1]


def test_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["scenario", "schema"]) == 0
    schema = json.loads(capsys.readouterr()[0])
    assert schema["title"] == "kvmove scenario" and "$schema" in schema


def test_a_scenario_may_be_meant_to_violate_a_property(capsys: pytest.CaptureFixture[str], scenario: Path) -> None:
    """Rule h03 off, or a corrupt copy: the check must notice, and not noticing is the failure."""
    corrupt = SCENARIO.partition("expect:")[0] + "faults:\n  - copy: {corrupt: true}\n"
    scenario.write_text(corrupt)
    assert call(["run", str(scenario)]) == 1
    out, _ = capsys.readouterr()
    assert "VIOLATION Byte at b/0" in out and "copy 1 is done" in out
    scenario.write_text("violates: [Byte]\n" + corrupt)
    assert call(["run", str(scenario)]) == 0
    assert "every property holds but Byte, as is meant" in capsys.readouterr()[0]
    scenario.write_text("violates: [Byte]\n" + SCENARIO)
    assert call(["run", str(scenario)]) == 1
    assert "EXPECTED violates: expected Byte" in capsys.readouterr()[0]
