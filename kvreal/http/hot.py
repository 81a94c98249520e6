"""uvicorn's protocol, with a shorter way for the routes that are asked all the time (quick.py): a request that is here
whole is answered at once, without a task and a chain of calls for each. All else about a connection is uvicorn's.
"""

from __future__ import annotations

import logging
import types
from typing import Any, Awaitable, Dict, Final, Generator, List, Optional, Tuple

from starlette.requests import Request

from kvreal.http.quick import Post, Quick
from kvreal.http.status import Reply

log = logging.getLogger("kvmove.http")

TAIL: Final = b"\r\ncontent-type: application/json\r\n\r\n"


@types.coroutine
def _resumed(begun: Any, waits_for: Any) -> Generator[Any, Any, Any]:
    """The rest of a coroutine that has been begun outside a task and waits for a future."""
    while True:
        try:
            value = yield waits_for
        except BaseException as error:
            step, what = begun.throw, error
        else:
            step, what = begun.send, value
        try:
            waits_for = step(what)
        except StopIteration as ended:
            return ended.value


def protocol(quick: Quick) -> Any:
    """For uvicorn's ``http``: a class, or "auto" where this uvicorn has no place for it."""
    try:
        from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
        from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
    except ImportError:
        return "auto"
    if not hasattr(HttpToolsProtocol, "_start_asgi_task"):
        return "auto"

    class Hot(HttpToolsProtocol):
        #: a request whose body is not here yet
        hot: Optional[Tuple[Any, Any, Post]] = None

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            plain = app is self.app and cycle.more_body and not cycle.waiting_for_100_continue and not self.pipeline
            found = quick.find(cycle.scope) if plain and _short(cycle.scope["headers"], HIGH_WATER_LIMIT) else None
            if found is None:
                super()._start_asgi_task(cycle, app)
            else:
                self.hot = (cycle, app, found)

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            if self.hot is not None and len(self.hot[0].body) > HIGH_WATER_LIMIT:
                cycle, app, _ = self.hot  # uvicorn reads no more until somebody takes this
                self.hot = None
                super()._start_asgi_task(cycle, app)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            if self.hot is None:
                return
            cycle, app, found = self.hot
            self.hot = None
            body = bytes(cycle.body)

            async def receive() -> Dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            rest: Awaitable[Optional[Reply]]
            begun = quick.reply(found, Request(cycle.scope, receive))
            if found.at_once:
                try:
                    rest = _resumed(begun, begun.send(None))
                except StopIteration as ended:
                    if not self._answered(cycle, ended.value):
                        super()._start_asgi_task(cycle, _saying(ended.value, quick))
                    return
                except Exception as error:
                    rest = _raising(error)
            else:
                rest = begun
            task = self.loop.create_task(self._later(cycle, rest))
            task.add_done_callback(self.tasks.discard)
            self.tasks.add(task)

        async def _later(self, cycle: Any, rest: Awaitable[Optional[Reply]]) -> None:
            try:
                reply = await rest
            except Exception:
                log.exception("a request could not be answered: %s", cycle.scope["path"])
                await cycle.send_500_response()
                return
            if not self._answered(cycle, reply):
                await _saying(reply, quick)(cycle.scope, cycle.receive, cycle.send)

        def _answered(self, cycle: Any, reply: Optional[Reply]) -> bool:
            """False: it is no plain answer, or must wait its turn; nothing has been written."""
            if cycle.disconnected or reply is None:
                return True
            if reply.headers or cycle.flow.write_paused:
                return False
            body = quick.encode(reply.body)
            parts = [STATUS_LINE[reply.status]]
            for name, value in cycle.default_headers:
                parts += (name, b": ", value, b"\r\n")
            if not cycle.keep_alive:
                parts.append(b"connection: close\r\n")
            parts += (b"content-length: %d" % len(body), TAIL, body)
            cycle.response_started = cycle.response_complete = True
            self.transport.write(b"".join(parts))
            cycle.message_event.set()
            if not cycle.keep_alive:
                self.transport.close()
            cycle.on_response()
            return True

    return Hot


def _saying(reply: Optional[Reply], quick: Quick) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if reply is not None:
            await quick.say(reply, send)

    return app


def _short(headers: List[Tuple[bytes, bytes]], limit: int) -> bool:
    """Whether the body is said to be short enough to wait for all of it."""
    for name, value in headers:
        if name == b"content-length":
            return len(value) < 10 and int(value) <= limit if value.isdigit() else False
    return True


async def _raising(error: Exception) -> Optional[Reply]:
    raise error
