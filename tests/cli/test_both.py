"""``--on real`` and ``--on both``: processes, ZeroMQ, bytes, and the comparison with the simulation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvmove.cli import call
from kvmove.play import Player, prepare

pytestmark = pytest.mark.real

STRICT = """\
name: a partial chunk, and back
kv: {bytes_per_token: 64 B, chunk: 16 tokens}
instances:
  a: {locations: {cpu: 64 KiB}}
  b: {locations: {cpu: 64 KiB}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 40}
  - move: {from: a/cpu, to: b/cpu, prompt: p, as: there}
  - move: {from: b/cpu, to: a/cpu, prompt: p, tokens: 16, copy: true, as: back}
  - settle
  - lookup: {prompt: p, as: found}
expect:
  there: {state: done, num_tokens: 40}
  found: {a/cpu: 16, b/cpu: 40}
"""

#: Who of the two is first decides what the other finds.
RACING = """\
name: two moves of one prompt
order: racing
kv: {bytes_per_token: 64 B, chunk: 16 tokens}
instances:
  a: {locations: {cpu: 64 KiB}}
  b: {locations: {cpu: 64 KiB}}
  c: {locations: {cpu: 64 KiB}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 40}
  - settle
  - move: {from: a/cpu, to: b/cpu, prompt: p, as: one, background: true}
  - move: {from: a/cpu, to: c/cpu, prompt: p, as: two, background: true}
  - wait
"""


def played(tmp_path: Path, text: str, *argv: str) -> tuple[int, Any]:
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    out = tmp_path / "out.json"
    status = call(["run", str(path), "--json", str(out), *argv])
    return status, json.loads(out.read_text())


def test_strict_both_worlds_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, body = played(tmp_path, STRICT, "--on", "both", "--transport", "tcp")
    out, _ = capsys.readouterr()
    assert status == 0, out
    assert "bytes carried by tcp" in out
    assert "equal effects, each time" in out and "equal answers, equal final placement" in out
    assert set(body["worlds"]) == {"sim", "real"}
    comparison = body["comparison"]
    assert comparison["replay"]["equal"] and comparison["outcome"]["equal"]
    assert set(comparison["replay"]["nodes"]) == {
        f"{world}/{node}" for world in ("sim", "real") for node in ("ctl", "a/0", "b/0", "client")
    }
    assert [row["op"] for row in comparison["time"]] == ["there", "back"]
    for row in comparison["time"]:
        assert row["predicted_ns"] > 0 and row["measured_ns"] > 0
        assert row["error"] == pytest.approx(row["predicted_ns"] / row["measured_ns"] - 1)
        assert set(row["phases"]) == {"control", "queue", "copy", "commit"}
    assert body["worlds"]["real"]["metrics"]["bytes_checked"] == (40 + 16) * 64
    assert body["worlds"]["real"]["transport"] == "tcp"


def test_racing_real_answers_are_ones_that_a_simulated_schedule_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, body = played(tmp_path, RACING, "--on", "both", "--transport", "tcp")
    assert status == 0, capsys.readouterr()[0]
    outcome = body["comparison"]["outcome"]
    assert outcome["equal"] and outcome["order"] == "racing" and 1 <= outcome["schedules"] <= 201


def test_real_alone_is_replayed_and_checked(tmp_path: Path) -> None:
    status, body = played(tmp_path, STRICT, "--on", "real", "--transport", "tcp", "--history", str(tmp_path / "kept"))
    assert status == 0
    assert set(body["worlds"]) == {"real"} and body["comparison"]["replay"]["equal"]
    assert (tmp_path / "kept" / "scenario.real.jsonl").stat().st_size > 1000


def test_a_planted_answer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of comparison notice a real answer that the protocol does not give."""
    for text, op in ((STRICT, "there"), (RACING, "one")):
        path = tmp_path / "planted.yaml"
        path.write_text(text)
        with Player(("sim", "real"), transport="tcp", budget=20) as player, monkeypatch.context() as patch:
            run = player._run

            def planted(world: str, *rest: Any, run: Any = run, op: str = op) -> Any:
                result = run(world, *rest)
                for operation in result.operations:
                    if operation.op == op and world == "real":
                        operation.num_tokens = 39
                return result

            patch.setattr(player, "_run", planted)
            found = player.play(prepare(str(path)), tmp_path / "planted")
        assert not found.good and found.comparison is not None
        assert any("39 tokens" in line for line in found.comparison.outcome.differs)


def test_ctrl_c_ends_every_process_and_leaves_nothing(tmp_path: Path) -> None:
    """From a shell's point of view: SIGINT to the process group while nodes run."""
    (tmp_path / "slow.yaml").write_text(STRICT.replace("  - settle\n", "  - sleep: {for: 60 s}\n"))
    kept, scratch = tmp_path / "kept", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "kvmove", "run", str(tmp_path / "slow.yaml"), "--on", "real"]
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [*command, "--transport", "tcp", "--history", str(kept)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(scratch.glob("*/client*.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "kvmove: interrupted"
    assert list(kept.iterdir()) == [] and list(scratch.iterdir()) == []
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(process.pid, 0)
