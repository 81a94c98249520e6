"""The client library, against a controller that only records what it is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("httpx")

import httpx

import kvmove
from kvmove import client as library
from kvmove.client import AsyncClient, Client, Refused, Unreachable

A, B = ("a", "LocalCPUBackend"), ("b", "LocalCPUBackend")
Answer = tuple[int, Any]


class Fake:
    """``answers``: what it says, one after another; the last one again and again. An exception is raised instead."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, Any, dict[str, str]]] = []

    def __call__(self, request: Any) -> Any:
        body = json.loads(request.content) if request.content else None
        self.asked.append((request.method, request.url.raw_path.decode(), body, dict(request.headers)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, data = answer
        return httpx.Response(status, content=data) if isinstance(data, bytes) else httpx.Response(status, json=data)

    def client(self, **options: Any) -> Client:
        one = Client("http://ctl", **options)
        one.http = httpx.Client(transport=httpx.MockTransport(self), base_url="http://ctl", headers=one.http.headers)
        return one

    def async_client(self, **options: Any) -> AsyncClient:
        one = AsyncClient("http://ctl", **options)
        one.http = httpx.AsyncClient(
            transport=httpx.MockTransport(self), base_url="http://ctl", headers=one.http.headers
        )
        return one


MOVED: Answer = (200, {"num_tokens": 12, "event_id": "1-1"})


def test_move_is_the_references_function() -> None:
    fake = Fake(MOVED)
    event_id, num_tokens = fake.client().move(A, B, [1, 2, 3])
    assert (event_id, num_tokens) == ("1-1", 12)
    body = {"old_position": list(A), "new_position": list(B), "tokens": [1, 2, 3], "copy": False}
    assert fake.asked[0][:3] == ("POST", "/move", body)
    fake.client().move(old_position=A, new_position=B, tokens=None, copy=True, if_room=True, deadline_s=2.0)
    assert fake.asked[1][2] == {**body, "tokens": [], "copy": True, "if_room": True, "deadline_s": 2.0}


def test_the_package_gives_both_clients() -> None:
    assert kvmove.Client is Client and kvmove.AsyncClient is AsyncClient
    with pytest.raises(AttributeError):
        _ = kvmove.Clients  # type: ignore[attr-defined]


#: name of the method, its arguments -> what is sent
CALLS: list[tuple[str, Callable[[Any], Any], tuple[str, str, Any]]] = [
    ("lookup", lambda c: c.lookup([1, 2]), ("POST", "/lookup", {"tokens": [1, 2]})),
    ("pin", lambda c: c.pin(A, [1]), ("POST", "/pin", {"instance_id": A[0], "location": A[1], "tokens": [1]})),
    ("unpin", lambda c: c.unpin("1-2"), ("POST", "/unpin", {"event_id": "1-2"})),
    (
        "lease",
        lambda c: c.lease(5, A, [1]),
        ("POST", "/lease", {"seconds": 5, "instance_id": A[0], "location": A[1], "tokens": [1]}),
    ),
    ("renew", lambda c: c.lease(5, event_id="1-2"), ("POST", "/lease", {"seconds": 5, "event_id": "1-2"})),
    ("clear", lambda c: c.clear(A), ("POST", "/clear", {"instance_id": A[0], "location": A[1]})),
    ("drain", lambda c: c.drain("a", ["b", "c"]), ("POST", "/drain", {"instance_id": "a", "to": ["b", "c"]})),
    ("event", lambda c: c.event("1-2"), ("GET", "/events/1-2", None)),
    ("events", lambda c: c.events(limit=3), ("GET", "/events?limit=3", None)),
    ("wait", lambda c: c.wait("1-2", 3), ("GET", "/events/1-2/wait?timeout=3", None)),
    ("cancel", lambda c: c.cancel("1-2"), ("DELETE", "/events/1-2", None)),
    ("instances", lambda c: c.instances(), ("GET", "/instances", None)),
    (
        "dry_run",
        lambda c: c.dry_run(A, B, [1]),
        (
            "POST",
            "/move",
            {"old_position": list(A), "new_position": list(B), "tokens": [1], "copy": True, "dry_run": True},
        ),
    ),
]
EVERYTHING: Answer = (200, {"num_tokens": 1, "event_id": "1-2", "events": [], "instances": []})


@pytest.mark.parametrize(("call", "sent"), [(call, sent) for _, call, sent in CALLS], ids=[name for name, *_ in CALLS])
def test_every_call_says_what_it_means_in_both_clients(call: Callable[[Any], Any], sent: tuple[str, str, Any]) -> None:
    fake = Fake(EVERYTHING)
    call(fake.client())

    async def go() -> None:
        async with fake.async_client() as one:
            await call(one)

    asyncio.run(go())
    assert fake.asked[0][:3] == fake.asked[1][:3] == sent


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)


def test_a_token_is_borne() -> None:
    fake = Fake(EVERYTHING)
    fake.client(token="secret").instances()
    fake.client().instances()
    assert fake.asked[0][3]["authorization"] == "Bearer secret" and "authorization" not in fake.asked[1][3]


def test_a_refusal_has_reason_event_and_what_is_known() -> None:
    body = {"reason": "unknown_instance", "detail": "'x' is not here", "known": ["a", "b"]}
    with pytest.raises(Refused) as caught:
        Fake((404, body)).client().move(A, ("x", "y"), [1])
    assert caught.value.status == 404 and caught.value.reason == "unknown_instance"
    assert str(caught.value) == "unknown instance: 'x' is not here (there are a, b)"
    body = {"reason": "full", "detail": "full", "event_id": "1-7", "num_tokens": 0}
    with pytest.raises(Refused, match=r"^event 1-7: full$") as caught:
        Fake((507, body)).client().move(A, B, [1])
    assert caught.value.event_id == "1-7"


def test_an_answer_that_is_none_of_ours_is_one_line() -> None:
    with pytest.raises(Refused, match="HTTP 502 <html> bad gateway") as caught:
        Fake((502, b"<html>\n bad gateway")).client().instances()
    assert caught.value.status == 502 and "\n" not in str(caught.value)


def test_nobody_there() -> None:
    with pytest.raises(Unreachable, match="no controller at http://ctl"):
        Fake(httpx.ConnectError("refused")).client().instances()
    with pytest.raises(Unreachable, match="did not answer: ReadTimeout"):
        Fake(httpx.ReadTimeout("late")).client().instances()


def test_a_move_is_repeated_with_one_key_and_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "RETRY_PAUSE_S", 0.001)
    lost = httpx.ReadError("the controller died")
    fake = Fake(lost, (503, {"reason": "not_ready"}), MOVED)
    assert fake.client(retry_s=30).move(A, B, [1]) == ("1-1", 12)
    keys = {body["idempotency_key"] for _, _, body, _ in fake.asked}
    assert len(fake.asked) == 3 and len(keys) == 1
    once = Fake(lost, MOVED)
    with pytest.raises(Unreachable):
        once.client().move(A, B, [1])
    assert len(once.asked) == 1 and "idempotency_key" not in once.asked[0][2]
    # what cannot be repeated without harm is not
    with pytest.raises(Unreachable):
        Fake(lost, EVERYTHING).client(retry_s=30).pin(A, [1])
    # nor is what was answered
    refused = Fake((409, {"reason": "cancelled"}), MOVED)
    with pytest.raises(Refused):
        refused.client(retry_s=30).move(A, B, [1])


def test_repeating_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "RETRY_PAUSE_S", 0.001)
    with pytest.raises(Refused):
        Fake((503, {"reason": "not_ready"})).client(retry_s=0.02).move(A, B, [1])


def test_a_stream_is_followed() -> None:
    text = b': hello\n\nevent: event\ndata: {"event_id": "1-1"}\n\ndata: {"a":\ndata: 1}\n\nevent: x\ndata: y\n\n'
    expected = [("event", {"event_id": "1-1"}), ("message", {"a": 1}), ("x", "y")]
    assert list(Fake((200, text)).client().stream()) == expected

    async def go() -> list[Any]:
        async with Fake((200, text)).async_client() as one:
            return [item async for item in one.stream()]

    assert asyncio.run(go()) == expected
    with pytest.raises(Refused, match="no"):
        list(Fake((401, {"reason": "unauthorized", "detail": "no"})).client().stream())


def test_a_token_comes_from_a_file_else_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").write_text(" from-file\n")
    monkeypatch.setenv("KVMOVE_TOKEN", "from-env")
    assert library.token_from(str(tmp_path / "t")) == "from-file" and library.token_from(None) == "from-env"
    monkeypatch.delenv("KVMOVE_TOKEN")
    assert library.token_from(None) is None


def test_what_a_client_raises_is_beside_it() -> None:
    assert (kvmove.Refused, kvmove.Unreachable) == (library.Refused, library.Unreachable)
    assert issubclass(kvmove.Refused, kvmove.ClientError) and issubclass(kvmove.Unreachable, kvmove.ClientError)
