"""The routes that are asked all the time, answered before the framework looks for them: the same handlers, the same
answers and the same document, in half the time. Whatever is not plainly one of them goes the framework's way.
"""

from __future__ import annotations

import re
from typing import Awaitable, Callable, Dict, Final, NamedTuple, Optional

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from kvreal.http.status import Reply

WAIT: Final = re.compile(r"/events/([^/]+)/wait")
TIMEOUT: Final = re.compile(rb"timeout=([0-9]{1,2}(?:\.[0-9]{1,9})?)")
"""Any other query is for the framework to refuse or to understand."""
WAIT_S: Final = 30.0

Answers = Callable[[Request], Awaitable[Reply]]
Admit = Callable[[str, Request], None]
"""(role, request): raises HTTPException if it is not allowed."""


class Post(NamedTuple):
    role: str
    answers: Answers
    at_once: bool = False
    """It waits for plain futures only, so that it can be begun outside a task."""


class Quick:
    """Called as an application is. False: that is none of these, and nothing has been read or sent yet."""

    def __init__(
        self,
        admit: Optional[Admit],
        posts: Dict[str, Post],
        wait: Callable[[str, float], Awaitable[Reply]],
        reply_of: Callable[[Exception], Optional[Reply]],
        encode: Callable[[object], bytes],
    ) -> None:
        """``posts`` by path; ``wait(event_id, seconds)``; ``reply_of``: what an error is answered with, if it is."""
        self.admit: Optional[Admit] = admit
        self.posts: Dict[str, Post] = posts
        self.wait: Callable[[str, float], Awaitable[Reply]] = wait
        self.reply_of: Callable[[Exception], Optional[Reply]] = reply_of
        self.encode: Callable[[object], bytes] = encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> bool:
        found = self.find(scope) if scope["type"] == "http" else None
        if found is None:
            return False
        reply = await self.reply(found, Request(scope, receive))
        if reply is not None:
            await self.say(reply, send)
        return True

    async def reply(self, found: Post, request: Request) -> Optional[Reply]:
        """None: whoever asked has gone."""
        try:
            if self.admit is not None:
                self.admit(found.role, request)
            return await found.answers(request)
        except ClientDisconnect:
            return None
        except Exception as error:
            known = self.reply_of(error)
            if known is None:
                raise
            return known

    async def say(self, reply: Reply, send: Send) -> None:
        body = self.encode(reply.body)
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        for name, value in reply.headers.items():
            headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def find(self, scope: Scope) -> Optional[Post]:
        path: str = scope["path"]
        if scope["method"] == "POST":
            return self.posts.get(path)
        found = WAIT.fullmatch(path) if scope["method"] == "GET" else None
        if found is None:
            return None
        name, query = found.group(1), scope["query_string"]
        asked = TIMEOUT.fullmatch(query) if query else None
        if query and asked is None:
            return None
        seconds = float(asked.group(1)) if asked is not None else WAIT_S
        return Post("read", lambda request: self.wait(name, seconds), True)
