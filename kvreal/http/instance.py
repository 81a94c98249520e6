"""The HTTP face of an instance: what vLLM's server answers, from a synthetic engine. No model on disk is needed."""

from __future__ import annotations

import hmac
import json
import time
import uuid
from typing import Any, AsyncIterator, Callable, Dict, Final, Iterator, List, Optional, Tuple, Union

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from kvreal.http import docs
from kvreal.http.openai import CompletionBody, DetokenizeBody, TokenizeBody, choice, error, usage
from kvreal.http.serving import Held, RankGone, Served, Serving, cut

MAX_BODY_BYTES: Final = 16 << 20
OPEN: Final = frozenset({"/health", "/ping", "/version"})
"""Paths that need no API key, as in vLLM."""


class Refusal(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, param: Optional[str] = None) -> None:
        super().__init__(message)
        self.status: int = status
        self.param: Optional[str] = param


class Metrics:
    """vLLM's names where it has one, ours for what moves."""

    def __init__(self, model: str) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        self.model: str = model

        def counter(name: str, about: str, *labels: str) -> Any:
            metric = Counter(name, about, ["model_name", *labels], registry=self.registry)
            return metric if labels else metric.labels(model)

        self.prompt_tokens: Any = counter("vllm:prompt_tokens_total", "Prompt tokens processed.")
        self.generated: Any = counter("vllm:generation_tokens_total", "Tokens generated.")
        self.queries: Any = counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the cache.")
        self.hits: Any = counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.")
        self.success: Any = counter("vllm:request_success_total", "Requests that ended well.", "finished_reason")
        self.stored: Any = counter("kvmove_engine_stored_tokens_total", "Tokens whose KV is stored after a request.")
        self.refused: Any = counter("kvmove_engine_store_short_total", "Prompts not stored whole.", "reason")
        self.wrong: Any = counter("kvmove_engine_wrong_bytes_total", "Prompts whose held bytes were wrong.")
        self.running: Any = Gauge(
            "vllm:num_requests_running", "Requests being served.", ["model_name"], registry=self.registry
        ).labels(model)

    def count(self, prompt: int, served: Served) -> None:
        self.prompt_tokens.inc(prompt)
        self.queries.inc(prompt)
        self.hits.inc(served.held)
        self.stored.inc(served.stored)
        if served.why:
            self.refused.labels(self.model, served.why).inc()
        if served.wrong_bytes:
            self.wrong.inc()


class Pools:
    """A collector: what this instance's first rank holds and has found, read when it is asked for."""

    def __init__(
        self, held: Callable[[], List[Held]], mismatches: Callable[[], int], refused: Callable[[], Dict[str, int]]
    ) -> None:
        """``refused``: of each disk location, reads that did not find what they should have."""
        self.held: Callable[[], List[Held]] = held
        self.mismatches: Callable[[], int] = mismatches
        self.refused: Callable[[], Dict[str, int]] = refused

    def collect(self) -> Iterator[Any]:
        chunks = GaugeMetricFamily("kvmove_engine_pool_chunks", "Chunks that rank 0 holds.", labels=["location"])
        slots = GaugeMetricFamily("kvmove_engine_pool_slots", "Chunks that rank 0 has room for.", labels=["location"])
        for one in self.held():
            chunks.add_metric([one.location], one.chunks)
            slots.add_metric([one.location], one.slots)
        yield chunks
        yield slots
        yield CounterMetricFamily(
            "kvmove_engine_copies_wrong_bytes", "Copies to rank 0 that its checksums refused.", self.mismatches()
        )
        refused = CounterMetricFamily(
            "kvmove_engine_disk_refused",
            "Reads of rank 0's disks that did not find the chunk they should have, as it was written.",
            labels=["location"],
        )
        for location, count in self.refused().items():
            refused.add_metric([location], count)
        yield refused


class Face:
    """The routes' state."""

    def __init__(self, serving: Serving, healthy: Callable[[], str], warn: Callable[[str], None]) -> None:
        self.serving: Serving = serving
        self.models: List[str] = serving.file.models
        self.model: str = self.models[0]
        self.max_model_len: int = serving.file.max_model_len
        self.healthy: Callable[[], str] = healthy
        """"" or why not."""
        self.warn: Callable[[str], None] = warn
        self.metrics: Metrics = Metrics(self.model)
        self.began_s: int = int(time.time())

    # ---- what a request means
    def check_model(self, model: Optional[str]) -> None:
        if model is not None and model not in self.models:
            known = ", ".join(f"`{name}`" for name in self.models)
            raise Refusal(404, f"The model `{model}` does not exist; this instance serves {known}.", "model")

    def ids(self, prompt: Union[str, List[int]], body: CompletionBody) -> List[int]:
        tokenizer = self.serving.tokenizer
        ids = tokenizer.encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
        self.check_ids(ids, "prompt")
        if not ids:
            raise Refusal(400, "The prompt is empty.", "prompt")
        if len(ids) + body.max_tokens > self.max_model_len:
            raise Refusal(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens, but {len(ids)} of the prompt and "
                f"{body.max_tokens} of the completion were requested.",
                "max_tokens",
            )
        return ids

    def check_ids(self, ids: List[int], param: str) -> None:
        for token in ids:
            if not 0 <= token < self.serving.tokenizer.vocab_size:
                raise Refusal(400, f"Token id {token} is out of vocabulary.", param)

    async def serve(self, ids: List[int], body: CompletionBody) -> Served:
        self.metrics.running.inc()
        try:
            served = await self.serving.serve(ids, body.cache_salt or "", body.model or "")
        finally:
            self.metrics.running.dec()
        self.metrics.count(len(ids), served)
        if served.wrong_bytes:
            self.warn("held KV had wrong bytes; the prompt was computed anew")
        return served

    def answer(self, ids: List[int], body: CompletionBody) -> Tuple[List[int], List[str], Optional[str]]:
        """(generated ids, their texts, the stop string that ended them)."""
        out = self.serving.words_after(ids, body.max_tokens)
        pieces, stop = cut(list(self.serving.pieces(out)), body.stops())
        return out[: len(pieces)], pieces, stop

    # ---- completions
    async def completion(self, body: CompletionBody) -> Response:
        self.check_model(body.model)
        prompts = [self.ids(prompt, body) for prompt in body.prompts()]
        if not prompts:
            raise Refusal(400, "The prompt is empty.", "prompt")
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or self.model,
        }
        if body.stream:
            return StreamingResponse(self.stream(head, prompts, body), media_type="text/event-stream")
        choices: List[Dict[str, Any]] = []
        completion = cached = 0
        for ids in prompts:
            served = await self.serve(ids, body)
            cached += served.held
            for _ in range(body.n):
                out, pieces, stop = self.answer(ids, body)
                completion += len(out)
                choices.append(self.choice(len(choices), ids, out, "".join(pieces), stop, body))
        total = sum(len(ids) for ids in prompts)
        return JSONResponse({**head, "choices": choices, "usage": usage(total, completion, cached)})

    def choice(
        self, index: int, ids: List[int], out: List[int], text: str, stop: Optional[str], body: CompletionBody
    ) -> Dict[str, Any]:
        finish = "stop" if stop is not None else "length"
        self.metrics.generated.inc(len(out))
        self.metrics.success.labels(self.model, finish).inc()
        before = self.serving.tokenizer.decode(ids) if body.echo else ""
        made = choice(index, before + text, finish, stop)
        if body.return_token_ids:
            made.update(prompt_token_ids=ids, token_ids=out)
        return made

    async def stream(self, head: Dict[str, Any], prompts: List[List[int]], body: CompletionBody) -> AsyncIterator[str]:
        """One event a token; the last one of each choice says why it ended."""

        def event(data: Any) -> str:
            return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"

        completion = cached = index = 0
        try:
            for ids in prompts:
                cached += (await self.serve(ids, body)).held
                for _ in range(body.n):
                    out, pieces, stop = self.answer(ids, body)
                    whole = self.choice(index, ids, out, "", stop, body)
                    if whole["text"]:
                        yield event({**head, "choices": [choice(index, whole["text"], None, None)]})
                    for piece in pieces[:-1]:
                        yield event({**head, "choices": [choice(index, piece, None, None)]})
                    last = {**whole, "text": pieces[-1] if pieces else ""}
                    yield event({**head, "choices": [last]})
                    completion += len(out)
                    index += 1
        except RankGone as gone:
            yield event(error(503, str(gone)))
            yield event("[DONE]")
            return
        if body.stream_options is not None and body.stream_options.include_usage:
            total = sum(len(ids) for ids in prompts)
            yield event({**head, "choices": [], "usage": usage(total, completion, cached)})
        yield event("[DONE]")


def make_app(
    serving: Serving,
    *,
    healthy: Callable[[], str] = lambda: "",
    warn: Callable[[str], None] = lambda text: None,
    api_key: str = "",
    version: str = "",
    held: Optional[Callable[[], List[Held]]] = None,
    mismatches: Callable[[], int] = lambda: 0,
    refused: Callable[[], Dict[str, int]] = dict,
) -> FastAPI:
    """The application. ``healthy``: "" or why this instance cannot serve; ``held``: what its first rank holds."""
    face = Face(serving, healthy, warn)
    if held is not None:
        face.metrics.registry.register(Pools(held, mismatches, refused))
    app = FastAPI(
        title="kvmove instance", version=version or "0", summary=f"Synthetic engine of {face.model}",
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.include_router(docs.router(app.title))

    @app.middleware("http")
    async def guard(request: Request, go_on: Any) -> Response:
        if api_key and request.url.path not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                return JSONResponse(error(401, "Unauthorized"), 401)
        if "transfer-encoding" in request.headers:
            return JSONResponse(error(411, "Say how long the body is (content-length)."), 411)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return JSONResponse(error(413, f"The body is larger than {MAX_BODY_BYTES} bytes."), 413)
        response: Response = await go_on(request)
        return response

    @app.exception_handler(Refusal)
    async def refuse(request: Request, what: Refusal) -> Response:
        return JSONResponse(error(what.status, str(what), what.param), what.status)

    @app.exception_handler(RankGone)
    async def gone(request: Request, what: RankGone) -> Response:
        return JSONResponse(error(503, str(what)), 503)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, what: RequestValidationError) -> Response:
        first = what.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error(400, f"{field}: {first['msg']}" if field else str(first["msg"]), field or None), 400)

    @app.exception_handler(HTTPException)
    async def missing(request: Request, what: HTTPException) -> Response:
        return JSONResponse(error(what.status_code, str(what.detail)), what.status_code, headers=what.headers)

    @app.get("/v1/models")
    async def models() -> Dict[str, Any]:
        cards = [{"id": name, "object": "model", "created": face.began_s, "owned_by": "kvmove", "root": name,
                  "parent": None, "max_model_len": face.max_model_len} for name in face.models]  # fmt: skip
        return {"object": "list", "data": cards}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Response:
        return await face.completion(body)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Dict[str, Any]:
        face.check_model(body.model)
        tokenizer = serving.tokenizer
        tokens = tokenizer.encode(body.prompt, body.add_special_tokens)
        strings = [tokenizer.decode([token]) for token in tokens] if body.return_token_strs else None
        return {"count": len(tokens), "max_model_len": face.max_model_len, "tokens": tokens, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Dict[str, Any]:
        face.check_model(body.model)
        face.check_ids(body.tokens, "tokens")
        return {"prompt": serving.tokenizer.decode(body.tokens)}

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        why = face.healthy()
        return PlainTextResponse(f"{why}\n", 503) if why else Response(status_code=200)

    @app.get("/version")
    async def say_version() -> Dict[str, str]:
        return {"version": version}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(face.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
