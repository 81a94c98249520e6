"""The client library: the controller's HTTP interface in Python, sync and async.

    client = kvmove.Client("http://localhost:9000")
    event_id, num_tokens = client.move(("a", "LocalCPUBackend"), ("b", "LocalCPUBackend"), tokens)
    client.wait(event_id)                                   # {"state": "done", "transport": "nixl/ucx/cma", ...}

Every answer that is no 2xx raises ``Refused`` with the controller's reason; ``Unreachable`` says that nobody answered,
in which case a request may have been carried out: repeat it with the same ``idempotency_key`` to find out. With
``retry_s`` above 0 the client does so by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import httpx

DEFAULT_URL: Final = "http://localhost:9000"
TIMEOUT_S: Final = 150.0
"""Above the controller's own deadline for a move."""
RETRY_PAUSE_S: Final = 0.2

Position = tuple[str, str]
"""(instance_id, location)."""


class ClientError(Exception):
    """What can go wrong with a request; one line."""


class Unreachable(ClientError):
    """Nobody answered: whether the request was carried out is not known."""


class Refused(ClientError):
    """The controller's answer is no 2xx. ``reason``: one word; ``body``: all that it says."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status: int = status
        self.body: dict[str, Any] = body
        self.reason: str = str(body.get("reason", ""))
        self.event_id: str = str(body.get("event_id", ""))
        self.num_tokens: int = int(body.get("num_tokens", 0) or 0)
        super().__init__(self._line())

    def _line(self) -> str:
        detail = str(self.body.get("detail", "")) or self.reason or f"HTTP {self.status}"
        field = self.body.get("field")
        known = self.body.get("known")
        words = self.reason.replace("_", " ")
        line = detail if words in ("", detail) else f"{words}: {detail}"
        if field:
            line = f"{field}: {line}"
        if known and not any(str(name) in detail for name in known):
            line += f" (there are {', '.join(str(name) for name in known)})"
        return f"event {self.event_id}: {line}" if self.event_id else line


class Moved(NamedTuple):
    """As the reference has it: which event, and how many tokens' KV it moves."""

    event_id: str
    num_tokens: int


class Call(NamedTuple):
    method: str
    path: str
    body: dict[str, Any] | None = None
    params: dict[str, Any] | None = None


def _move_call(
    old_position: Position,
    new_position: Position,
    tokens: Sequence[int] | None,
    copy: bool | None,
    options: dict[str, Any],
    retrying: bool,
) -> Call:
    body: dict[str, Any] = {
        "old_position": list(old_position),
        "new_position": list(new_position),
        "tokens": list(tokens or ()),
        "copy": bool(copy),
        **{name: value for name, value in options.items() if value is not None},
    }
    if retrying:
        body.setdefault("idempotency_key", uuid.uuid4().hex)
    return Call("POST", "/move", body)


def _place(position: Position) -> dict[str, Any]:
    return {"instance_id": position[0], "location": position[1]}


def _lease_call(seconds: float, position: Position | None, tokens: Sequence[int], event_id: str) -> Call:
    body: dict[str, Any] = {"seconds": seconds}
    if event_id:
        body["event_id"] = event_id
    elif position is not None:
        body.update(_place(position), tokens=list(tokens))
    else:
        raise ValueError("a lease needs a position and tokens, or the event_id of an earlier one")
    return Call("POST", "/lease", body)


def _drain_call(instance_id: str, to: Sequence[str], options: dict[str, Any]) -> Call:
    given = {name: value for name, value in options.items() if value is not None}
    return Call("POST", "/drain", {"instance_id": instance_id, "to": list(to), **given})


def _moved(data: Any) -> Moved:
    return Moved(str(data["event_id"]), int(data["num_tokens"]))


def _result(response: httpx.Response) -> Any:
    """The body of a 2xx; Refused for all else."""
    try:
        data = response.json() if response.content else None
    except ValueError:
        data = None
    if response.is_success:
        return data
    if not isinstance(data, dict):
        data = {"detail": f"HTTP {response.status_code} {' '.join(response.text.split())[:200]}".strip()}
    raise Refused(response.status_code, data)


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _said(url: str, error: httpx.HTTPError) -> Unreachable:
    if isinstance(error, httpx.ConnectError):
        return Unreachable(f"no controller at {url}: {error}")
    return Unreachable(f"{url} did not answer: {type(error).__name__} {error}".strip())


def _again(call: Call) -> bool:
    """Whether repeating it does no harm."""
    return call.method != "POST" or call.path == "/lookup" or bool((call.body or {}).get("idempotency_key"))


class Events:
    """Server-sent events, line by line."""

    def __init__(self) -> None:
        self.kind: str = "message"
        self.data: list[str] = []

    def line(self, line: str) -> tuple[str, Any] | None:
        if line.startswith("event:"):
            self.kind = line[6:].strip()
        elif line.startswith("data:"):
            self.data.append(line[5:].strip())
        elif not line and self.data:
            text, kind = "\n".join(self.data), self.kind
            self.kind, self.data = "message", []
            try:
                return kind, json.loads(text)
            except ValueError:
                return kind, text
        return None


class Client:
    """Of one controller. Not for several threads at once. ``token``: what ``kvmove keys`` gave, for the role needed."""

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, *, timeout_s: float = TIMEOUT_S, retry_s: float = 0.0
    ) -> None:
        self.url: str = url.rstrip("/")
        self.retry_s: float = retry_s
        self.http: httpx.Client = httpx.Client(base_url=self.url, headers=_headers(token), timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def call(self, call: Call) -> Any:
        """Any path of the controller: its JSON. Refused, Unreachable."""
        until = time.monotonic() + (self.retry_s if _again(call) else 0.0)
        while True:
            try:
                return _result(self.http.request(call.method, call.path, json=call.body, params=call.params))
            except (httpx.HTTPError, Refused) as error:
                if isinstance(error, Refused) and error.status not in (429, 503):
                    raise
                if time.monotonic() + RETRY_PAUSE_S > until:
                    if isinstance(error, Refused):
                        raise
                    raise _said(self.url, error) from error
            time.sleep(RETRY_PAUSE_S)

    # ---- the reference's interface
    def move(
        self,
        old_position: Position,
        new_position: Position,
        tokens: Sequence[int] | None = (),
        copy: bool | None = False,
        **options: Any,
    ) -> Moved:
        """Returns when num_tokens is fixed; ``wait`` tells how it ended. No ``tokens``: all that is there.

        Options, as in the HTTP body: ``idempotency_key``, ``deadline_s``, ``if_room``, ``cache_salt``,
        ``priority``, ``weight``, ``bandwidth_cap_bytes_per_s``, ``granularity`` (``"prefix"``).
        """
        return _moved(self.call(_move_call(old_position, new_position, tokens, copy, options, self.retry_s > 0)))

    def lookup(self, tokens: Sequence[int], **options: Any) -> dict[str, Any]:
        """``layout_info``: instance -> [location, tokens]; ``locations``: instance -> location -> tokens."""
        found: dict[str, Any] = self.call(Call("POST", "/lookup", {"tokens": list(tokens), **options}))
        return found

    def pin(self, position: Position, tokens: Sequence[int], **options: Any) -> Moved:
        """Hold them until ``unpin`` or the pin's own end."""
        return _moved(self.call(Call("POST", "/pin", {**_place(position), "tokens": list(tokens), **options})))

    def unpin(self, event_id: str) -> Any:
        return self.call(Call("POST", "/unpin", {"event_id": event_id}))

    def lease(
        self, seconds: float, position: Position | None = None, tokens: Sequence[int] = (), event_id: str = ""
    ) -> dict[str, Any]:
        """Hold them for so long; with ``event_id``: that earlier lease, for so long from now."""
        found: dict[str, Any] = self.call(_lease_call(seconds, position, tokens, event_id))
        return found

    def clear(self, position: Position) -> Any:
        return self.call(Call("POST", "/clear", _place(position)))

    # ---- ours
    def drain(self, instance_id: str, to: Sequence[str], **options: Any) -> dict[str, Any]:
        """All of an instance to others. Options: ``locations``, ``copy``, ``deadline_s``, ``if_room``, ``priority``,
        ``weight``, ``bandwidth_cap_bytes_per_s``."""
        found: dict[str, Any] = self.call(_drain_call(instance_id, to, options))
        return found

    def dry_run(
        self, old_position: Position, new_position: Position, tokens: Sequence[int] = (), **options: Any
    ) -> dict[str, Any]:
        """What would move, what it would cost, and whether computing it anew would be quicker."""
        options["dry_run"] = True
        found: dict[str, Any] = self.call(_move_call(old_position, new_position, tokens, True, options, False))
        return found

    def event(self, event_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call(Call("GET", f"/events/{event_id}"))
        return found

    def events(self, **params: Any) -> list[dict[str, Any]]:
        """The newest first. ``limit``, ``state``."""
        found: list[dict[str, Any]] = self.call(Call("GET", "/events", None, params))["events"]
        return found

    def wait(self, event_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The event when it has ended, or as it is after ``timeout_s``."""
        found: dict[str, Any] = self.call(Call("GET", f"/events/{event_id}/wait", None, {"timeout": timeout_s}))
        return found

    def cancel(self, event_id: str) -> Any:
        """Refused (409) if it is too late."""
        return self.call(Call("DELETE", f"/events/{event_id}"))

    def instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call(Call("GET", "/instances"))["instances"]
        return found

    def stream(self) -> Iterator[tuple[str, Any]]:
        """(kind, what) of every change of state from now on."""
        try:
            with self.http.stream("GET", "/stream", timeout=httpx.Timeout(TIMEOUT_S, read=None)) as response:
                if not response.is_success:
                    response.read()
                    _result(response)
                events = Events()
                for line in response.iter_lines():
                    found = events.line(line)
                    if found is not None:
                        yield found
        except httpx.HTTPError as error:
            raise _said(self.url, error) from error


class AsyncClient:
    """The same for asyncio."""

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, *, timeout_s: float = TIMEOUT_S, retry_s: float = 0.0
    ) -> None:
        self.url: str = url.rstrip("/")
        self.retry_s: float = retry_s
        self.http: httpx.AsyncClient = httpx.AsyncClient(base_url=self.url, headers=_headers(token), timeout=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.http.aclose()

    async def call(self, call: Call) -> Any:
        until = time.monotonic() + (self.retry_s if _again(call) else 0.0)
        while True:
            try:
                return _result(await self.http.request(call.method, call.path, json=call.body, params=call.params))
            except (httpx.HTTPError, Refused) as error:
                if isinstance(error, Refused) and error.status not in (429, 503):
                    raise
                if time.monotonic() + RETRY_PAUSE_S > until:
                    if isinstance(error, Refused):
                        raise
                    raise _said(self.url, error) from error
            await asyncio.sleep(RETRY_PAUSE_S)

    async def move(
        self,
        old_position: Position,
        new_position: Position,
        tokens: Sequence[int] | None = (),
        copy: bool | None = False,
        **options: Any,
    ) -> Moved:
        return _moved(await self.call(_move_call(old_position, new_position, tokens, copy, options, self.retry_s > 0)))

    async def lookup(self, tokens: Sequence[int], **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = await self.call(Call("POST", "/lookup", {"tokens": list(tokens), **options}))
        return found

    async def pin(self, position: Position, tokens: Sequence[int], **options: Any) -> Moved:
        return _moved(await self.call(Call("POST", "/pin", {**_place(position), "tokens": list(tokens), **options})))

    async def unpin(self, event_id: str) -> Any:
        return await self.call(Call("POST", "/unpin", {"event_id": event_id}))

    async def lease(
        self, seconds: float, position: Position | None = None, tokens: Sequence[int] = (), event_id: str = ""
    ) -> dict[str, Any]:
        found: dict[str, Any] = await self.call(_lease_call(seconds, position, tokens, event_id))
        return found

    async def clear(self, position: Position) -> Any:
        return await self.call(Call("POST", "/clear", _place(position)))

    async def drain(self, instance_id: str, to: Sequence[str], **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = await self.call(_drain_call(instance_id, to, options))
        return found

    async def dry_run(
        self, old_position: Position, new_position: Position, tokens: Sequence[int] = (), **options: Any
    ) -> dict[str, Any]:
        options["dry_run"] = True
        found: dict[str, Any] = await self.call(_move_call(old_position, new_position, tokens, True, options, False))
        return found

    async def event(self, event_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.call(Call("GET", f"/events/{event_id}"))
        return found

    async def events(self, **params: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.call(Call("GET", "/events", None, params)))["events"]
        return found

    async def wait(self, event_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        found: dict[str, Any] = await self.call(Call("GET", f"/events/{event_id}/wait", None, {"timeout": timeout_s}))
        return found

    async def cancel(self, event_id: str) -> Any:
        return await self.call(Call("DELETE", f"/events/{event_id}"))

    async def instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.call(Call("GET", "/instances")))["instances"]
        return found

    async def stream(self) -> AsyncIterator[tuple[str, Any]]:
        try:
            async with self.http.stream("GET", "/stream", timeout=httpx.Timeout(TIMEOUT_S, read=None)) as response:
                if not response.is_success:
                    await response.aread()
                    _result(response)
                events = Events()
                async for line in response.aiter_lines():
                    found = events.line(line)
                    if found is not None:
                        yield found
        except httpx.HTTPError as error:
            raise _said(self.url, error) from error


def token_from(path: str | None) -> str | None:
    """The bearer token: in a file, else in ``KVMOVE_TOKEN``. Never on a command line, which others can read."""
    if path is not None:
        return Path(path).read_text().strip()
    return os.environ.get("KVMOVE_TOKEN") or None
