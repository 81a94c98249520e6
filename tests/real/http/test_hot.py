"""The shorter way through uvicorn answers as the longer one does, whatever the connection does."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, Awaitable, Callable, Dict, Optional, Tuple

import msgspec
import pytest

pytest.importorskip("uvicorn")
import uvicorn
from starlette.requests import Request

from kvreal.http.hot import protocol
from kvreal.http.quick import Post, Quick
from kvreal.http.status import Reply

pytestmark = pytest.mark.real
Story = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(request: Request) -> Reply:
    message = await request.receive()
    body: bytes = message["body"]
    while message.get("more_body"):
        message = await request.receive()
        body += message["body"]
    return Reply(200, {"bytes": len(body)})


async def late(request: Request) -> Reply:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.02, lambda: future.done() or future.set_result(7))
    return Reply(202, {"late": await future}, {"Kvmove-Reason": "late"})


async def wrong(request: Request) -> Reply:
    raise ValueError("a fault of ours")


async def wait(name: str, seconds: float) -> Reply:
    return Reply(200, {"name": name, "seconds": seconds})


def told(posts_at_once: bool, story: Story) -> None:
    names = {"/echo": echo, "/late": late, "/wrong": wrong}
    posts: Dict[str, Post] = {path: Post("read", answers, posts_at_once) for path, answers in names.items()}
    quick = Quick(None, posts, wait, lambda error: None, msgspec.json.encode)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not await quick(scope, receive, send):
            await quick.say(Reply(404, {"slow": scope["path"]}), send)

    async def whole() -> None:
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", ws="none", http=protocol(quick), timeout_keep_alive=60
        )  # longer than a story: whoever waits for a connection's end does not get it from this
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            serving = asyncio.ensure_future(server._serve(sockets=[sock]))
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            await asyncio.wait_for(story(reader, writer), 20)
            writer.close()
            server.should_exit = True
            await serving

    asyncio.run(whole())


def post(path: str, body: bytes = b"{}", *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *more, "", ""]
    return "\r\n".join(lines).encode() + body


async def answer(reader: asyncio.StreamReader) -> Tuple[int, Dict[str, str], Optional[Any]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), headers, json.loads(body) if body.startswith(b"{") else None


@pytest.mark.parametrize("at_once", [True, False])
def test_whole_in_pieces_large_and_one_after_the_other(at_once: bool) -> None:
    async def story(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(post("/echo", b"x" * 10))
        assert (await answer(reader))[::2] == (200, {"bytes": 10})
        for piece in (post("/echo", b"y" * 100)[:30], post("/echo", b"y" * 100)[30:90], post("/echo", b"y" * 100)[90:]):
            writer.write(piece)
            await writer.drain()
        assert (await answer(reader))[::2] == (200, {"bytes": 100})
        writer.write(post("/echo", b"z" * 500_000))
        assert (await answer(reader))[::2] == (200, {"bytes": 500_000})
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%s\r\n" % (50_000, b"c" * 50_000) * 10 + b"0\r\n\r\n")
        assert (await answer(reader))[::2] == (200, {"bytes": 500_000})
        writer.write(post("/late") + post("/echo", b"abc") + post("/nowhere") + post("/late"))
        assert [(await answer(reader))[::2] for _ in range(4)] == [
            (202, {"late": 7}), (200, {"bytes": 3}), (404, {"slow": "/nowhere"}), (202, {"late": 7})
        ]  # fmt: skip

    told(at_once, story)


@pytest.mark.parametrize("at_once", [True, False])
def test_headers_closing_and_expectations(at_once: bool) -> None:
    async def story(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /events/3-1/wait?timeout=2.5 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, headers, body = await answer(reader)
        assert (status, body) == (200, {"name": "3-1", "seconds": 2.5})
        assert headers["content-type"] == "application/json" and "date" in headers
        writer.write(post("/late"))
        assert (await answer(reader))[1]["kvmove-reason"] == "late"
        writer.write(post("/echo", b"1234", "Expect: 100-continue"))
        assert (await answer(reader))[0] == 100
        assert (await answer(reader))[2] == {"bytes": 4}
        writer.write(post("/echo", b"12", "Connection: close"))
        status, headers, body = await answer(reader)
        assert (status, headers["connection"], body) == (200, "close", {"bytes": 2})
        assert await reader.read() == b""

    told(at_once, story)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_fault_is_a_500_and_the_server_goes_on(at_once: bool) -> None:
    async def story(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(post("/wrong"))
        assert (await answer(reader))[0] == 500
        assert await reader.read() == b""
        host, port = writer.get_extra_info("peername")
        _, gone = await asyncio.open_connection(host, port)
        gone.write(post("/late"))
        await gone.drain()
        gone.close()  # before its answer
        again, other = await asyncio.open_connection(host, port)
        other.write(post("/late") + post("/echo", b"12345"))
        assert [(await answer(again))[0] for _ in range(2)] == [202, 200]
        other.close()

    told(at_once, story)
