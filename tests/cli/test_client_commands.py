"""The commands that ask a controller: what they send, what they print, and their exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

import httpx

from kvmove import client as library
from kvmove.cli import asking, call
from kvreal.tokenizer import General

PLACES = ("a/LocalCPUBackend", "b/LocalCPUBackend")
DONE = {
    "event_id": "1-1", "kind": "move", "state": "done", "num_tokens": 12, "bytes": 1572864, "duration_s": 0.0031,
    "transport": "nixl/ucx/cma", "old_position": ["a", "LocalCPUBackend"], "new_positions": [["b", "LocalCPUBackend"]],
    "phases_s": {"pinning": 0.0005, "copying": 0.002},
    "ranks": [{"rank": 0, "source": "h:1", "destination": "h:2", "pinned": 1, "reserved": 1, "committed": 1,
               "present": 0, "deleted": 1, "kept": 0, "why": ""}],
}  # fmt: skip
FAILED = {**DONE, "state": "failed", "num_tokens": 0, "reason": "destination_restarted", "ranks": []}

Routes = dict[str, tuple[int, Any]]


class Controller:
    """Answers by route; keeps what it was asked."""

    def __init__(self) -> None:
        self.routes: Routes = {}
        self.bodies: list[tuple[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        route = f"{request.method} {request.url.path}"
        self.bodies.append((route, json.loads(request.content) if request.content else None))
        status, data = self.routes.get(route, (404, {"reason": "not_found", "detail": f"no {route}"}))
        if isinstance(data, bytes):
            return httpx.Response(status, content=data)
        return httpx.Response(status, json=data.pop(0) if isinstance(data, list) else data)


@pytest.fixture
def ctl(monkeypatch: pytest.MonkeyPatch) -> Controller:
    one = Controller()
    real = httpx.Client

    def made(**options: Any) -> httpx.Client:
        return real(transport=httpx.MockTransport(one), **options)

    monkeypatch.setattr(library.httpx, "Client", made)
    monkeypatch.delenv("KVMOVE_URL", raising=False)
    monkeypatch.delenv("KVMOVE_TOKEN", raising=False)
    return one


def test_move_waits_and_tells_all(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    ctl.routes = {
        "POST /move": (200, {"num_tokens": 12, "event_id": "1-1"}),
        "GET /events/1-1/wait": (200, [{**DONE, "state": "copying"}, DONE]),
    }
    assert call(["move", *PLACES, "--tokens", "1,2,3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "1-1 move done: 12 tokens a/LocalCPUBackend -> b/LocalCPUBackend, 1.5 MiB over nixl/ucx/cma in 3.10 ms"
    )
    assert lines[1] == "  pinning 500 us, copying 2.00 ms"
    assert "rank 0: h:1 -> h:2, 1 of 1 chunk there" in lines[2] and "source deleted 1" in lines[2]
    assert ctl.bodies[0] == (
        "POST /move",
        {
            "old_position": ["a", "LocalCPUBackend"],
            "new_position": ["b", "LocalCPUBackend"],
            "tokens": [1, 2, 3],
            "copy": False,
        },
    )


def test_move_of_a_prompt_uses_the_general_tokenizer(ctl: Controller) -> None:
    ctl.routes = {"POST /move": (200, {"num_tokens": 3, "event_id": "1-1"})}
    assert call(["move", *PLACES, "--prompt", "hello there", "--copy", "--no-wait"]) == 0
    body = ctl.bodies[0][1]
    assert body["tokens"] == General().encode("hello there") and body["copy"] is True


def test_move_in_json_is_the_event(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    ctl.routes = {
        "POST /move": (200, {"num_tokens": 12, "event_id": "1-1"}),
        "GET /events/1-1/wait": (200, DONE),
    }
    assert call(["move", *PLACES, "--tokens", "[1, 2, 3]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DONE


def test_a_failed_move_is_status_1(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    ctl.routes = {
        "POST /move": (200, {"num_tokens": 12, "event_id": "1-1"}),
        "GET /events/1-1/wait": (200, FAILED),
    }
    assert call(["move", *PLACES, "--tokens", "1"]) == 1
    assert "1-1 move failed" in (out := capsys.readouterr().out) and "(destination restarted)" in out


@pytest.mark.parametrize(
    ("status", "body", "code", "line"),
    [
        (404, {"reason": "unknown_instance", "detail": "'b' is not here", "known": ["a"]}, 2, "(there are a)"),
        (409, {"reason": "mismatch", "detail": "model=x, model=y", "event_id": "1-2"}, 1, "event 1-2: mismatch:"),
        (507, {"reason": "full", "detail": "full"}, 1, "kvmove: full"),
        (422, {"reason": "bad_body", "detail": "x", "field": "tokens"}, 2, "tokens: bad body: x"),
        (401, {"reason": "unauthorized", "detail": "who are you"}, 2, "who are you"),
    ],
)
def test_a_refusal_is_one_line(
    ctl: Controller, capsys: pytest.CaptureFixture[str], status: int, body: Any, code: int, line: str
) -> None:
    ctl.routes = {"POST /move": (status, body)}
    assert call(["move", *PLACES, "--tokens", "1"]) == code
    err = capsys.readouterr().err
    assert line in err and len(err.splitlines()) == 1


def test_move_everything_must_be_said(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    ctl.routes = {"POST /move": (200, {"num_tokens": 12, "event_id": "1-1"})}
    assert call(["move", *PLACES]) == 2 and "--all" in capsys.readouterr().err and not ctl.bodies
    assert call(["move", *PLACES, "--tokens", ""]) == 2 and not ctl.bodies
    assert call(["move", *PLACES, "--all", "--tokens", "1"]) == 2 and not ctl.bodies
    assert call(["move", *PLACES, "--all", "--no-wait"]) == 0 and ctl.bodies[0][1]["tokens"] == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["move", "a", "b/c", "--tokens", "1"], "a: expected INSTANCE/LOCATION"),
        (["move", *PLACES, "--tokens", "1,x"], "expected token ids"),
        (["move", *PLACES, "--tokens", "-1"], "-1 is no token id"),
        (["move", *PLACES, "--tokens", "@missing"], "--tokens @missing"),
        (["move", *PLACES, "--prompt", "x", "--tokens", "1"], "expected one of --prompt and --tokens"),
        (["lookup"], "expected one of --prompt and --tokens"),
        (["lookup", "--prompt", "x", "--tokenizer", "missing.json"], "missing.json: there is no such file"),
        (["lease"], "expected a place, or --renew"),
        (["drain", "a"], "--to"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(
    ctl: Controller, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    assert call(argv) == 2
    err = capsys.readouterr().err
    assert line in err and len(err.splitlines()) == 1 and not ctl.bodies


def test_tokens_come_from_files_and_from_tokenize(tmp_path: Path, ctl: Controller) -> None:
    (tmp_path / "ids").write_text('{"count": 2, "tokens": [5, 6]}')
    ctl.routes = {"POST /lookup": (200, {"locations": {"b": {"LocalCPUBackend": 2}}})}
    assert call(["lookup", "--tokens", f"@{tmp_path}/ids"]) == 0 and ctl.bodies[0][1] == {"tokens": [5, 6]}


def test_lookup_lists_the_longest_first(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"a": {"LocalDiskBackend": 2}, "b": {"LocalCPUBackend": 3}}
    ctl.routes = {"POST /lookup": (200, {"locations": found})}
    assert call(["lookup", "--tokens", "1 2 3"]) == 0
    assert capsys.readouterr().out == "b/LocalCPUBackend: 3 of 3 tokens\na/LocalDiskBackend: 2 of 3 tokens\n"
    ctl.routes = {"POST /lookup": (200, {"locations": {}})}
    assert call(["lookup", "--tokens", "1"]) == 1
    assert "nobody holds" in capsys.readouterr().out


def test_events_are_listed_oldest_first_and_followed(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    stream = f"event: event\ndata: {json.dumps(FAILED)}\n\nevent: instance\ndata: {{}}\n\n".encode()
    ctl.routes = {
        "GET /events": (200, {"events": [{**DONE, "event_id": "1-2"}, DONE]}),
        "GET /stream": (200, stream),
    }
    assert call(["events"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1-1", "1-2"]
    assert call(["events", "--follow"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["done:", "done:", "failed:"]
    assert call(["events", "--follow", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert last == {"kind": "event", "data": FAILED}


def test_one_event_and_its_status(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    ctl.routes = {"GET /events/1-1": (200, DONE), "GET /events/1-2": (200, FAILED)}
    assert call(["events", "1-1"]) == 0 and call(["events", "1-2"]) == 1
    assert call(["events", "1-3"]) == 2
    ctl.routes = {"GET /events/1-1/wait": (200, [{**DONE, "state": "copying"}, DONE])}
    assert call(["events", "1-1", "--wait", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == DONE


def test_cancel_in_time_and_too_late(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    ctl.routes = {
        "DELETE /events/1-1": (200, {"num_tokens": 0, "event_id": "1-1"}),
        "DELETE /events/1-2": (409, {"reason": "already_done", "detail": "event 1-2 is done", "event_id": "1-2"}),
    }
    assert call(["cancel", "1-1"]) == 0 and call(["cancel", "1-2"]) == 1
    assert "event 1-2 is done" in capsys.readouterr().err


def test_drain_shows_progress_and_what_is_left(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    part = {**DONE, "kind": "drain", "state": "copying", "ranks": [], "bytes": 0,
            "progress": {"chains": 4, "chains_begun": 1, "planned_tokens": 40, "moved_tokens": 10}}  # fmt: skip
    left = {**part, "state": "failed", "reason": "incomplete", "detail": "1 chunk: kept, user_pin"}
    ctl.routes = {
        "POST /drain": (200, {"num_tokens": 40, "event_id": "1-1"}),
        "GET /events/1-1/wait": (200, [dict(part), left]),
    }
    assert call(["drain", "a", "--to", "b", "--to", "c", "--location", "LocalCPUBackend"]) == 1
    assert ctl.bodies[0][1] == {"instance_id": "a", "to": ["b", "c"], "locations": ["LocalCPUBackend"]}
    said = capsys.readouterr()
    assert "10 of 40 moved" in said.err and "1 chunk: kept, user_pin" in said.out


def test_pins_and_leases(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    ctl.routes = {
        "POST /pin": (200, {"num_tokens": 3, "event_id": "1-1"}),
        "POST /unpin": (200, {"num_tokens": 3, "event_id": "1-1"}),
        "POST /lease": (200, {"num_tokens": 3, "event_id": "1-2", "expires_in_s": 59.9}),
    }
    assert call(["pin", PLACES[0], "--tokens", "1,2,3"]) == 0
    assert call(["unpin", "1-1"]) == 0
    assert call(["lease", PLACES[0], "--tokens", "1,2,3", "--seconds", "60"]) == 0
    assert call(["lease", "--renew", "1-2", "--seconds", "9"]) == 0
    out = capsys.readouterr().out
    assert "1-1: 3 tokens pinned at a/LocalCPUBackend" in out and "1-2: 3 tokens kept for 60 s" in out
    assert ctl.bodies[-1] == ("POST /lease", {"seconds": 9.0, "event_id": "1-2"})
    ctl.routes["POST /pin"] = (200, {"num_tokens": 0, "event_id": "1-3"})
    assert call(["pin", PLACES[0], "--tokens", "1"]) == 1


def test_dry_run_says_which_is_quicker(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"num_tokens": 12, "bytes": 1572864, "move_s": 0.002, "recompute_s": 0.0015, "recompute_is_quicker": True,
             "profile": "here"}  # fmt: skip
    ctl.routes = {"POST /move": (200, found)}
    assert call(["move", *PLACES, "--tokens", "1", "--dry-run"]) == 0
    assert ctl.bodies[0][1]["dry_run"] is True
    assert "computing it anew is quicker" in capsys.readouterr().out


def test_instances_are_a_line_a_location(ctl: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    place = {"name": "LocalCPUBackend", "slots": 4, "chunks": 1, "tokens": 12, "bytes": 1572864}
    rank = {"rank": 0, "address": "h:1", "heard_s_ago": 0.5, "locations": [place]}
    ctl.routes = {"GET /instances": (200, {"instances": [{"instance_id": "a", "whole": False, "ranks": [rank]}]})}
    assert call(["instances"]) == 0
    out = capsys.readouterr().out
    assert out == (
        "a/LocalCPUBackend rank 0 at h:1: 1 of 4 chunks, 12 tokens, 1.5 MiB; heard 0.5 s ago (ranks are missing)\n"
    )


def test_nobody_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KVMOVE_URL", "http://127.0.0.1:1")
    assert call(["lookup", "--tokens", "1"]) == 2
    assert capsys.readouterr().err.startswith("kvmove: no controller at http://127.0.0.1:1")


def test_the_token_is_in_a_file_never_in_an_argument(
    tmp_path: Path, ctl: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real: Callable[[httpx.Request], httpx.Response] = ctl.__call__

    def look(self: Controller, request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization", ""))
        return real(request)

    monkeypatch.setattr(Controller, "__call__", look)
    ctl.routes = {"GET /instances": (200, {"instances": []})}
    (tmp_path / "token").write_text("secret\n")
    assert call(["instances", "--token-file", str(tmp_path / "token")]) == 0
    assert seen == ["Bearer secret"]


@pytest.mark.parametrize(
    "command",
    ["move", "drain", "lookup", "instances", "events", "cancel", "pin", "unpin", "lease", "instance", "up"],
)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out and f"kvmove {command}" in out


def test_places_may_have_slashes_in_the_instances_name() -> None:
    assert asking.place("team/a/LocalCPUBackend") == ("team/a", "LocalCPUBackend")
