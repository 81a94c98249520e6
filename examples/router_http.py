"""The router as a server: one address for many engines that speak OpenAI's completions.

    python -m examples.router_http --controller http://localhost:9000 \\
        --engine one=http://localhost:8000 --engine two=http://localhost:8001 --port 8080
    curl http://localhost:8080/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "...", "prompt": "...", "max_tokens": 10}'

Each name is the instance's at the controller. Answers carry x-kvmove-engine, x-kvmove-held (tokens of the prompt that
the engine has) and x-kvmove-moved (tokens that were moved there for it). Without the controller prompts go to the
engine that has least to do; an engine that cannot be reached is left out for a while.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any, AsyncIterator, Dict, Final, List, Optional, Sequence

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from examples.router import Choice, Router

AWAY_S: Final = 5.0
"""How long an engine that could not be reached is not asked again."""
KEPT: Final = ("authorization", "content-type", "x-request-id")


class Gone(Exception):
    """No engine can be reached."""


class Front:
    """``router`` decides, over the engines that can be reached; ``engines``: a client for all of them."""

    def __init__(self, router: Router, engines: httpx.AsyncClient) -> None:
        self.router: Router = router
        self.client: httpx.AsyncClient = engines
        self.away: Dict[str, float] = {}
        """Engine -> when it may be asked again, by the monotonic clock."""

    def there(self) -> List[str]:
        """Engines that may be asked, that with the least to do first."""
        now = time.monotonic()
        names = [name for name in self.router.engines if self.away.get(name, now) <= now]
        return sorted(names, key=lambda name: self.router.running[name])

    async def tokens(self, body: Dict[str, Any], headers: Dict[str, str]) -> List[int]:
        """The prompt's ids: the request's own, or what the first engine that answers makes of its text."""
        prompt = body.get("prompt")
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            return prompt
        if not isinstance(prompt, str):
            return []  # several prompts, or none: wherever there is least to do
        for name in self.there():
            asked = {key: body[key] for key in ("model", "prompt", "add_special_tokens") if key in body}
            with contextlib.suppress(httpx.TransportError):
                answer = await self.client.post(f"{self.router.engines[name]}/tokenize", json=asked, headers=headers)
                return list(answer.json()["tokens"]) if answer.status_code == 200 else []
            self.away[name] = time.monotonic() + AWAY_S
        raise Gone

    async def choose(self, tokens: List[int]) -> Choice:
        if tokens:
            with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):  # no controller, or one that is starting
                choice = await run_in_threadpool(self.router.choose, tokens)
                if choice.engine in self.there():
                    return choice
        names = self.there()
        if not names:
            raise Gone
        return Choice(names[0], 0)

    async def pass_on(self, path: str, body: bytes, headers: Dict[str, str], choice: Choice) -> Optional[Response]:
        """The engine's answer, as it comes; None if the engine cannot be reached."""
        running = contextlib.ExitStack()
        url = running.enter_context(self.router.serving(choice.engine))
        try:
            request = self.client.build_request("POST", f"{url}{path}", content=body, headers=headers)
            answer = await self.client.send(request, stream=True)
        except httpx.TransportError:
            running.close()
            self.away[choice.engine] = time.monotonic() + AWAY_S
            return None

        async def bytes_of() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                running.close()
                await answer.aclose()

        counts = {"x-kvmove-held": str(choice.held), "x-kvmove-moved": str(choice.moved)}
        kept = {key: answer.headers[key] for key in ("content-type", "content-encoding") if key in answer.headers}
        return StreamingResponse(bytes_of(), answer.status_code, {**kept, "x-kvmove-engine": choice.engine, **counts})


def make_app(router: Router) -> FastAPI:
    engines = httpx.AsyncClient(timeout=httpx.Timeout(600.0, connect=2.0))

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engines.aclose()
        router.api.close()

    app = FastAPI(title="kvmove router", lifespan=life, docs_url=None, redoc_url=None)
    front = Front(router, engines)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        raw = await request.body()
        headers = {key: request.headers[key] for key in KEPT if key in request.headers}
        try:
            body = await request.json()
        except ValueError:
            return _error(400, "the body is not JSON")
        if not isinstance(body, dict):
            return _error(400, "the body is no JSON object")
        try:
            tokens = await front.tokens(body, headers)
            for _ in router.engines:
                choice = await front.choose(tokens)
                answer = await front.pass_on(request.url.path, raw, headers, choice)
                if answer is not None:
                    return answer
        except Gone:
            pass
        return _error(503, f"none of the engines {', '.join(router.engines)} can be reached")

    @app.get("/health")
    async def health() -> Response:
        names = front.there()
        return JSONResponse({"engines": names, "running": router.running}, 200 if names else 503)

    return app


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": {"message": text, "type": "router", "code": status}}, status)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="router_http", description="a prompt goes to its KV, or its KV goes with it")
    parser.add_argument("--controller", required=True, metavar="URL")
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=URL", help="repeatable")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--busy", type=int, default=1, help="requests that an engine may have before others are asked")
    parser.add_argument("--worth", type=int, default=256, help="from how many tokens on a move is considered")
    args = parser.parse_args(list(argv))
    engines: Dict[str, str] = {}
    for text in args.engine:
        name, equals, url = text.partition("=")
        if not equals or not name or not url.startswith(("http://", "https://")):
            parser.error(f"--engine {text}: expected NAME=URL, like one=http://localhost:8000")
        if name in engines:
            parser.error(f"--engine {text}: {name} is named twice")
        engines[name] = url.rstrip("/")
    if not args.controller.startswith(("http://", "https://")):
        parser.error(f"--controller {args.controller}: expected a URL, like http://localhost:9000")
    if args.busy < 1 or args.worth < 1:
        parser.error("--busy and --worth: expected at least 1")
    router = Router(args.controller.rstrip("/"), engines, args.busy, args.worth)
    uvicorn.run(make_app(router), host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
