"""The controller's HTTP: every route, its OpenAPI document, and nothing else. What a route does is in face.py."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, Final, List, Optional, Sequence, Tuple, TypeVar, Union

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from kvcore.scenario.located import convert_as
from kvcore.scenario.mistake import Mistake, path_text
from kvreal.http import docs
from kvreal.http import models as b
from kvreal.http.auth import AuthDependency, Guard
from kvreal.http.face import Face
from kvreal.http.quick import Answers, Post, Quick
from kvreal.http.status import Reply, refusal, split_error
from kvreal.http.tokens import decoder
from kvreal.service import ServiceStopped

MAX_BODY_BYTES: Final = 16 << 20
"""About two million token ids."""
AT_ONCE: Final = frozenset({"/lookup", "/move"})
BEAT_S: Final = 15.0
"""A line in an idle stream, so that whoever watches, and what stands between, knows that it lives."""

Responses = Dict[Union[int, str], Dict[str, Any]]
T = TypeVar("T")
_encode: Final = msgspec.json.Encoder().encode

ABOUT: Final = """Moves the KV cache of prompts between instances. Every status code is a promise: 2xx only for what is
true. `POST /move` answers when `num_tokens` is fixed; what became of it afterwards is at `GET /events/{event_id}`.
Whatever is no 2xx has a body with `reason` (a word), `detail` (a line) and, where there is one, `event_id`."""

WORDS: Final[Dict[int, str]] = {
    401: "No token, or an unknown one",
    403: "The token's role does not allow it",
    404: "Unknown instance, location or event; `known` names those that are known",
    409: "Namespaces or ranks do not match (both values in `detail`), or the event failed: cancelled, a participant"
    " restarted, the copy failed",
    413: "The body is too large",
    422: "The body is wrong; `field` names where",
    429: "Too many events in flight; see Retry-After",
    501: "Not built yet",
    503: "Not ready: starting, stopping, or an instance has not been heard since a restart",
    504: "The deadline passed, or a rank does not answer",
    507: "The destination is full",
}


class Refused(Exception):
    """Answers a request at once."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply.status))
        self.reply: Reply = reply


def respond(reply: Reply) -> Response:
    return Response(_encode(reply.body), reply.status, reply.headers, "application/json")


async def body_of(request: Request, kind: Callable[[bytes], T], limit: int) -> T:
    """The request's JSON as a struct. Refused with 413 or 422."""
    for name, value in request.scope["headers"]:  # before any of it is waited for
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            text = f"the body has {value.decode()} bytes, at most {limit} are taken"
            raise Refused(refusal("too_large", text))
    pieces: List[bytes] = []
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        pieces.append(piece)
        size += len(piece)
        more = message.get("more_body", False)
        if size > limit:
            raise Refused(refusal("too_large", f"the body has more than {limit} bytes"))
    try:
        return kind(pieces[0] if len(pieces) == 1 else b"".join(pieces))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        text, field = split_error(str(error))
        raise Refused(refusal("bad_body", f"{field}: {text}" if field else text, field=field)) from None


def _responses(good: Optional[str], *codes: int, kind: str = "application/json") -> Responses:
    schema: Dict[str, Any] = {"$ref": f"#/components/schemas/{good}"} if good else {"type": "string"}
    found: Responses = {200: {"description": "OK", "content": {kind: {"schema": schema}}}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    for code in sorted({*codes, 401, 403, 503}):
        found[code] = {"description": WORDS[code], "content": error}
    return found


def _takes(*bodies: str) -> Dict[str, Any]:
    refs = [{"$ref": f"#/components/schemas/{body}"} for body in bodies]
    schema = refs[0] if len(refs) == 1 else {"oneOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class _Renews(msgspec.Struct, frozen=True):
    event_id: Any = None


def _lease(data: bytes) -> Union[b.LeaseBody, b.RenewBody]:
    """A renewal names an event."""
    renews = msgspec.json.decode(data, type=_Renews).event_id is not None
    kind: Any = b.RenewBody if renews else b.LeaseBody
    body: Union[b.LeaseBody, b.RenewBody] = msgspec.json.decode(data, type=kind)
    return body


Handler = Callable[[Face, Any, Request], Awaitable[Reply]]


async def _now(reply: Reply) -> Reply:
    return reply


def _idem(request: Request) -> str:
    for name, value in request.scope["headers"]:
        if name == b"idempotency-key":
            return str(value.decode("latin-1"))[:256]
    return ""


#: path, role, body, answer, other status codes, what it says, what it does
POSTS: Final[Tuple[Tuple[str, str, Any, str, Tuple[int, ...], str, Handler], ...]] = (
    (
        "/move", "move", b.MoveBody, "MoveReply", (404, 409, 429, 501, 504, 507),
        "Move (or copy) a prompt's KV cache. Answers when num_tokens is fixed. 200 with num_tokens 0 only if nothing is"
        " held. With `dry_run` the answer is a DryRunReply.",
        lambda face, body, request: face.move(body, _idem(request)),
    ),
    (
        "/lookup", "read", b.LookupBody, "LookupReply", (), "Who holds how much of a prompt's beginning.",
        lambda face, body, request: face.lookup(body),
    ),
    (
        "/pin", "move", b.PinBody, "MoveReply", (404, 409, 504),
        "Keep the longest held prefix from eviction, for the default lease. See /lease.",
        lambda face, body, request: face.pin(body),
    ),
    (
        "/unpin", "move", b.EventBody, "MoveReply", (404, 409, 504), "End a pin or a lease.",
        lambda face, body, request: face.unpin(body),
    ),
    (
        "/lease", "move", _lease, "LeaseReply", (404, 409, 504),
        "Keep the longest held prefix for some seconds, or begin an earlier lease's time again.",
        lambda face, body, request: face.lease(body),
    ),
    (
        "/drain", "move", b.DrainBody, "MoveReply", (404, 409, 429, 504, 507),
        "Move all that an instance holds to one or several others, the hottest first.",
        lambda face, body, request: face.drain(body, _idem(request)),
    ),
    (
        "/clear", "move", b.ClearBody, "MoveReply", (404, 409, 504),
        "Drop all that a location holds. num_tokens: what the registry saw there.",
        lambda face, body, request: face.clear(body),
    ),
    (
        "/compress", "move", b.CompressBody, "MoveReply", (501,), "Not built yet.",
        lambda face, body, request: _now(refusal("not_implemented", "compress is not built yet")),
    ),
    (
        "/decompress", "move", b.CompressBody, "MoveReply", (501,), "Not built yet.",
        lambda face, body, request: _now(refusal("not_implemented", "decompress is not built yet")),
    ),
    (
        "/health", "read", b.InstanceBody, "HealthReply", (404,), "How an instance's ranks are.",
        lambda face, body, request: _now(face.members.health(body)),
    ),
    (
        "/query_instance", "read", b.QueryInstanceBody, "QueryInstanceReply", (404,),
        "Which instance is at an address.",
        lambda face, body, request: _now(face.members.query_instance(body)),
    ),
    (
        "/query_worker_info", "read", b.QueryWorkerInfoBody, "QueryWorkerInfoReply", (404,), "The ranks' addresses.",
        lambda face, body, request: _now(face.members.query_worker_info(body)),
    ),
    (
        "/check_finish", "read", b.EventBody, "CheckFinishReply", (404,), "An event's state: done, failed, copying...",
        lambda face, body, request: face.check_finish(body),
    ),
)  # fmt: skip


class App(FastAPI):
    quick: Optional[Quick] = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.quick is None or not await self.quick(scope, receive, send):
            await super().__call__(scope, receive, send)


def create_app(
    face: Face,
    *,
    auth_dependency: Optional[AuthDependency] = None,
    routers: Sequence[APIRouter] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> App:
    """``routers``: more routes (the page, the metrics), each with dependencies of its own."""
    app = App(title="kvmove controller", description=ABOUT, version="1", docs_url=None, redoc_url=None)
    app.state.face = face

    def allowed(role: str) -> List[Any]:
        return [Depends(auth_dependency(role))] if auth_dependency is not None else []

    posts: Dict[str, Post] = {}
    for path, role, kind, good, codes, about, handler in POSTS:
        answers = _post(app, face, path, kind, handler, max_body_bytes, dependencies=allowed(role), description=about,
                        responses=_responses(good, 413, 422, *codes), name=path[1:])  # fmt: skip
        posts[path] = Post(role, answers, path in AT_ONCE)
    _gets(app, face, allowed)
    app.include_router(docs.router(app.title))
    for router in routers:
        app.include_router(router)
    _errors(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    if auth_dependency is None or isinstance(auth_dependency, Guard):
        admit = auth_dependency.admit if auth_dependency is not None else None
        app.quick = Quick(admit, posts, face.wait, _reply_of, _encode)
    return app


def _whole(value: Any) -> Any:
    """12.0 is an integer in JSON; it is none to msgspec."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value


def _post(app: FastAPI, face: Face, path: str, kind: Any, handler: Handler, limit: int, **options: Any) -> Answers:
    lease = kind is _lease
    strict = _lease if lease else msgspec.json.Decoder(kind).decode

    def decode(data: bytes) -> Any:
        try:
            return strict(data)
        except msgspec.ValidationError as error:
            if not lease and "Invalid enum value" in str(error):  # msgspec names none of those that are valid
                mistake = convert_as(msgspec.json.decode(data), kind)
                if isinstance(mistake, Mistake):
                    raise msgspec.ValidationError(f"{mistake.text} - at `$.{path_text(mistake.path)}`") from None
            if "Expected `int`, got `float`" not in str(error):
                raise
            return strict(_encode(_whole(msgspec.json.decode(data))))

    names = ("LeaseBody", "RenewBody") if lease else (kind.__name__,)
    read = decoder(kind, decode) if path in AT_ONCE else decode

    async def answers(request: Request) -> Reply:
        return await handler(face, await body_of(request, read, limit), request)

    async def endpoint(request: Request) -> Response:
        return respond(await answers(request))

    app.post(path, openapi_extra=_takes(*names), response_model=None, **options)(endpoint)
    return answers


def _gets(app: FastAPI, face: Face, allowed: Callable[[str], List[Any]]) -> None:
    read = allowed("read")

    @app.get("/events", dependencies=read, responses=_responses("EventsReply", 422), name="events")
    async def events(
        limit: int = Query(100, ge=1, le=10_000),
        state: b.State = "",
        kind: b.Kind = "",
    ) -> Response:
        """Events, the newest first, without their ranks and chunks; all, or those of a state or a kind."""
        return respond(face.events(limit, state, kind))

    @app.get("/events/{event_id}", dependencies=read, responses=_responses("EventView", 404, 422), name="event")
    async def event(event_id: str) -> Response:
        """One event: state, reason, each rank's and chunk's outcome, bytes, and how long each phase took."""
        return respond(face.event(event_id))

    @app.get("/events/{event_id}/wait", dependencies=read, responses=_responses("EventView", 404, 422), name="wait")
    async def wait(event_id: str, timeout: float = Query(30.0, ge=0, le=600)) -> Response:
        """Answers when the event has ended, or after `timeout` seconds with where it is then."""
        return respond(await face.wait(event_id, timeout))

    @app.delete(
        "/events/{event_id}",
        dependencies=allowed("move"),
        responses=_responses("MoveReply", 404, 409, 422, 504),
        name="cancel",
    )
    async def cancel(event_id: str) -> Response:
        """Cancel: 200 if it has ended as cancelled, 409 if it was too late. A pin is unpinned."""
        return respond(await face.cancel(event_id))

    @app.get("/instances", dependencies=read, responses=_responses("InstancesReply"), name="instances")
    async def instances() -> Response:
        """Who is there, with what in its locations."""
        return respond(face.members.instances())

    @app.get("/healthz", responses=_responses("ReadyReply"), name="healthz")
    async def healthz() -> Response:
        """This process lives."""
        return respond(Reply(200, b.ReadyReply("alive", face.machine.incarnation)))

    @app.get("/readyz", responses=_responses("ReadyReply"), name="readyz")
    async def readyz() -> Response:
        """The journal is replayed, and requests are answered."""
        return respond(face.ready())

    @app.get(
        "/stream", dependencies=read, responses=_responses(None, kind="text/event-stream"), name="stream",
        response_class=StreamingResponse,
    )  # fmt: skip
    async def stream() -> StreamingResponse:
        """Server-sent events: `event` (an event has come to another state), `instance` (one came or went)."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_streamed(face), media_type="text/event-stream", headers=headers)


async def _streamed(face: Face) -> AsyncIterator[bytes]:
    queue = face.log.open_stream()
    try:
        yield _line("hello", {"incarnation": face.machine.incarnation})
        while True:
            try:
                told = await asyncio.wait_for(queue.get(), BEAT_S)
            except TimeoutError:
                yield b": still here\n\n"
                continue
            if told is None:
                return
            yield _line(*told)
    finally:
        face.log.streams.discard(queue)


def _line(kind: str, what: object) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + _encode(what) + b"\n\n"


def _reply_of(error: Exception) -> Optional[Reply]:
    """Every answer that is no 2xx has the same form. None: that is no answer, but a fault of ours."""
    if isinstance(error, Refused):
        return error.reply
    if isinstance(error, ServiceStopped):
        return refusal("not_ready", "the controller is stopping")
    if isinstance(error, HTTPException):
        words = {401: "unauthenticated", 403: "forbidden", 404: "unknown_path", 405: "method_not_allowed"}
        body = b.ErrorReply(reason=words.get(error.status_code, "error"), detail=str(error.detail))
        return Reply(error.status_code, body, dict(error.headers or {}))
    return None


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    @app.exception_handler(ServiceStopped)
    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: Exception) -> Response:
        reply = _reply_of(error)
        assert reply is not None
        if reply.status == 405:
            reply.headers["Allow"] = ", ".join(_methods(app, request))
        return respond(reply)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return respond(refusal("bad_body", f"{field}: {first['msg']}", field=field))


def _methods(app: FastAPI, request: Request) -> List[str]:
    """All that this path knows, whichever of its routes knows it."""
    found: Dict[str, None] = {}
    for route in app.routes:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            found.update(dict.fromkeys(sorted(getattr(route, "methods", None) or ())))
    return list(found)


def _document(app: FastAPI) -> Dict[str, Any]:
    """The OpenAPI document, with our structs as its schemas."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, schemas = msgspec.json.schema_components(b.TYPES, ref_template="#/components/schemas/{name}")
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        move = document["paths"]["/move"]["post"]["responses"]["200"]["content"]["application/json"]
        move["schema"] = {"anyOf": [move["schema"], {"$ref": "#/components/schemas/DryRunReply"}]}
        for name in ("HTTPValidationError", "ValidationError"):
            with suppress(KeyError):
                del document["components"]["schemas"][name]
        app.openapi_schema = document
    return app.openapi_schema
