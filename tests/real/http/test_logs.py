"""Logs: JSON in a pipe, words on a terminal; event, node and life on every line that has them. Spans where wanted."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import httpx
import pytest

pytest.importorskip("zmq")

from kvcore.protocol import machine as m
from kvcore.protocol.config import ControllerSpec
from kvcore.protocol.controller import Controller
from kvcore.protocol.messages import event_id
from kvreal import logs
from kvreal.http.events import EventLog
from kvreal.http.models import EventView
from kvreal.tracing import Spans
from tests.real.http.cluster import CPU, ROOT, cluster, eventually
from tests.real.http.processes import commands

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]
TOKENS = list(range(200))


def parsed(text: str) -> List[Dict[str, Any]]:
    """Every line; each must be an object of these fields."""
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        least = {"t", "level", "logger", "what"}
        assert least <= line.keys() <= {*least, "error", *logs.FIELDS}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["t"])
    return found


def about(lines: List[Dict[str, Any]], event: str) -> List[str]:
    return [line["what"] for line in lines if line.get("event") == event]


# ---- processes
def test_a_controller_in_a_pipe_says_json_and_every_line_says_whose_it_is(tmp_path: Path) -> None:
    """Across a SIGKILL: the lines of the next life name the next epoch."""
    one = cluster(tmp_path)
    log = tmp_path / "controller.err"
    try:
        one.workers.add("a")
        one.workers.add("b")
        one.known("a", "b")
        one.stored("a", TOKENS)
        event = one.controller.move("a", "b", TOKENS).json()["event_id"]
        one.controller.ended(event)
        absent = one.controller.move("a", "b", [5] * 40).json()["event_id"]
        one.workers.remove("a")
        eventually(lambda: "not heard any more" in log.read_text(), what="a is missed")
        first = parsed(log.read_text())
        one.controller.kill()
        one.controller.start()
        one.known("b")
        assert one.controller.stop() == 0
        second = parsed(log.read_text())[len(first) :]
    finally:
        one.close()
    node = f"127.0.0.1:{one.controller.pull}"
    assert {(line["node"], line["epoch"]) for line in first} == {(node, "1")}
    assert {(line["node"], line["epoch"]) for line in second} == {(node, "2")}
    begun, decided, done = about(first, event)
    assert begun == f"begun: move 200 tokens from a/{CPU} to b/{CPU}"
    assert (decided, done) == ("decided: 200 tokens", "done: 200 tokens by tcp")
    assert about(first, absent)[-1] == "failed (nothing_held): 0 tokens"
    here = [line for line in first if line["what"] == "a rank 0 is here"]
    gone = [line for line in first if line["what"] == "a rank 0 is not heard any more"]
    assert len(here) == len(gone) == 1 and gone[0]["level"] == "warning"
    assert gone[0]["peer"] == here[0]["peer"] and gone[0]["peer_epoch"] == here[0]["peer_epoch"]
    assert "event" not in gone[0]


def test_one_event_is_followed_through_all_processes(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "name: t\nkv: {bytes_per_token: 4 KiB, chunk: 16 tokens}\n"
        "instances:\n  a: {locations: {LocalCPUBackend: 1 MiB}}\n  b: {locations: {LocalCPUBackend: 1 MiB}}\n"
    )
    argv = ["up", "t.yaml", "--port", "0", "--instance-port", "0", "--pull-port", "0", "--reply-port", "0"]
    with commands(tmp_path) as start:
        up = start("up", [*argv, "--transport", "tcp"])
        said = up.until_says("up: http://")
        ports = {who: int(port) for who, port in re.findall(r"^(\w+): http://localhost:(\d+)", said, re.M)}
        body = {"prompt": TOKENS}
        assert httpx.post(f"http://localhost:{ports['a']}/v1/completions", json=body, timeout=60).status_code == 200
        move = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": TOKENS}
        url = f"http://localhost:{ports['controller']}"

        def moved() -> str:
            answer = httpx.post(f"{url}/move", json=move, timeout=60).json()
            return str(answer["event_id"]) if answer["num_tokens"] else ""

        event = eventually(moved, what="the controller has heard of the prompt")
        assert httpx.get(f"{url}/events/{event}/wait", timeout=60).json()["state"] == "done"
        up.until_says("chunks deleted")
        assert up.stop() == 0
        lines = parsed("\n".join(line for line in up.text().splitlines() if line.startswith("{")))
    by = {line["node"]: line["what"] for line in lines if line.get("event") == event}
    assert by.pop("a/0") == "released: 13 chunks deleted, 0 kept"
    assert by.pop("b/0") == "committed: 13 chunks by tcp, 0 were here before"
    assert list(by.values()) == ["done: 200 tokens by tcp"]


def test_on_a_terminal_it_says_words(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    argv = ["--port", "0", "--monitor-ports", '{"pull": 0, "reply": 0}', "--journal", str(tmp_path / "j.db")]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmove", "controller", *argv], cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL
    )
    os.close(theirs)
    try:
        text = os.read(ours, 4096).decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert re.match(r"\d\d:\d\d:\d\d started  node=127\.0\.0\.1:\d+ epoch=1\s", text), text


# ---- in this process
@pytest.fixture
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_words_and_json_say_the_same(restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMOVE_LOG", raising=False)
    for stream, wanted, json_lines in (
        (io.StringIO(), "", True), (Terminal(), "", False), (io.StringIO(), "human", False), (Terminal(), "json", True),
    ):  # fmt: skip
        monkeypatch.setenv("KVMOVE_LOG", wanted)
        logs.configure(stream=stream)
        steps = logs.StepLog("n:1", lambda address: "a rank 0")
        steps.step(0, m.Boot(), [m.Journal(m.Incarnation(3))])
        steps.step(1, m.Boot(), [m.Journal(m.Outcome(event_id(3, 7), "failed", "deadline"))])
        steps.step(2, m.Boot(), [m.Note("believed", event_id(3, 1), "h:9"), m.Note("decided", 4)])
        steps.step(3, m.Boot(), [m.Note("dead", event_id(3, 1), "h:9")])
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("kvmove.x").exception("broken")
        if json_lines:
            lines = parsed(stream.getvalue())
            assert [line["what"] for line in lines] == [
                "started", "failed (deadline): 0 tokens", "a rank 0 is here", "a rank 0 is not heard any more",
                "broken",
            ]  # fmt: skip
            assert lines[1]["event"] == "3-7" and lines[2]["peer"] == "h:9" and lines[3]["peer_epoch"] == "3-1"
            assert {(line["node"], line["epoch"]) for line in lines} == {("n:1", "3")}
            assert "ValueError: why" in lines[4]["error"]
        else:
            first, second, *_, last = stream.getvalue().splitlines()
            assert re.fullmatch(r"\d\d:\d\d:\d\d failed \(deadline\): 0 tokens  event=3-7 node=n:1 epoch=3", second)
            assert last == "ValueError: why"


# ---- spans
def test_a_span_an_event_and_one_a_phase(tmp_path: Path) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="no opentelemetry-sdk")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    events = EventLog(Controller(ControllerSpec("ctl")))
    Spans(provider, events)
    views = [
        EventView(
            event_id="1-1", kind="move", state="done", num_tokens=200, old_position=("a", CPU),
            new_positions=[("b", CPU)], bytes=4096, transport="tcp", begun=1000.0, ended=1000.5, duration_s=0.5,
            phases_s={"pinning": 0.125, "copying": 0.375},
        ),
        EventView(event_id="1-2", kind="move", state="failed", num_tokens=0, reason="full", begun=1.0, ended=2.0),
        EventView(event_id="1-3", kind="move", state="done", num_tokens=1),  # begun in an earlier life
    ]  # fmt: skip
    for view in views:
        for listener in events.on_ended:
            listener(view)
    spans = {span.name + span.attributes.get("kvmove.event", ""): span for span in memory.get_finished_spans()}
    assert sorted(spans) == ["kvmove.copying", "kvmove.move1-1", "kvmove.move1-2", "kvmove.pinning"]
    whole, copying = spans["kvmove.move1-1"], spans["kvmove.copying"]
    assert (whole.start_time, whole.end_time) == (1000_000_000_000, 1000_500_000_000)
    assert (copying.start_time, copying.end_time) == (1000_125_000_000, 1000_500_000_000)
    assert copying.parent.span_id == whole.context.span_id
    assert dict(whole.attributes) == {
        "kvmove.event": "1-1", "kvmove.state": "done", "kvmove.num_tokens": 200, "kvmove.bytes": 4096,
        "kvmove.transport": "tcp", "kvmove.source": f"a/{CPU}", "kvmove.destinations": (f"b/{CPU}",),
    }  # fmt: skip
    assert not spans["kvmove.move1-2"].status.is_ok and spans["kvmove.move1-2"].status.description == "full"


@pytest.mark.parametrize("wanted", ["console", "none"])
def test_a_controllers_spans_go_where_opentelemetrys_variables_say(tmp_path: Path, wanted: str) -> None:
    pytest.importorskip("opentelemetry.sdk.trace", reason="no opentelemetry-sdk")
    lines, event = _spans_of_a_move(tmp_path, wanted)
    if wanted == "none":
        assert lines == []
        return
    (whole,) = [line for line in lines if line["attributes"].get("kvmove.event") == event]
    phases = [line for line in lines if line["parent_id"] == whole["context"]["span_id"]]
    names = ("pinning", "reserving", "copying", "releasing")
    assert [line["name"] for line in phases] == [f"kvmove.{name}" for name in names]
    assert whole["resource"]["attributes"]["service.name"] == "kvmove-controller"


def _spans_of_a_move(folder: Path, wanted: str) -> Tuple[List[Dict[str, Any]], str]:
    os.environ["OTEL_TRACES_EXPORTER"] = wanted
    try:
        one = cluster(folder)
    finally:
        del os.environ["OTEL_TRACES_EXPORTER"]
    try:
        one.workers.add("a")
        one.workers.add("b")
        one.known("a", "b")
        one.stored("a", TOKENS)
        event = one.controller.move("a", "b", TOKENS).json()["event_id"]
        one.controller.ended(event)
        assert one.controller.stop() == 0
    finally:
        one.close()
    lines = [json.loads(line) for line in (folder / "controller.err").read_text().splitlines()]
    return [line for line in lines if "context" in line], event


def test_a_start_time_is_logged_as_people_read_it(caplog: pytest.LogCaptureFixture) -> None:
    """As the machine notes it: whose the name is, since when in nanoseconds, and who wants it."""
    detail = "a rank 0 at h:2: duplicate_id, have h:1, since 1795529131000000000 ns, got h:2"
    note = m.Note("register_refused", 0, detail)
    with caplog.at_level(logging.INFO, "kvmove.events"):
        logs.StepLog("ctl").step(0, m.Boot(), [note])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "since 2026-11-24 14:05:31 UTC" in line
    assert "1795529131" not in line
