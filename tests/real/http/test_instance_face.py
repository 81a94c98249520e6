"""The HTTP face of an instance against ranks that are only dictionaries: what it answers, stores and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.config import Config
from kvcore.protocol.messages import Answer, Location, Namespace, StoreRequest, UseRequest
from kvreal.http.instance import make_app
from kvreal.http.serving import RankGone, Serving, cut
from kvreal.instance_file import InstanceFile
from kvreal.store import DiskError, Store
from kvreal.tokenizer import General

MODEL = "llama-3.1-8b"
SPACE = Namespace(MODEL, chunk_tokens=8, bytes_per_token=64)
LITERAL = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]


class FakeRank:
    """Holds keys; ``room``: how many chunks."""

    def __init__(self, room: int = 1000) -> None:
        self.held: dict[str, dict[bytes, int]] = {"LocalCPUBackend": {}, "LocalDiskBackend": {}}
        self.room = room
        self.asked: list[Any] = []
        self.wrong = False
        self.gone = False

    async def ask(self, request: Any) -> Answer:
        self.asked.append(request)
        if self.gone:
            raise RankGone("rank 1 has ended")
        here = self.held[request.location]
        if isinstance(request, UseRequest):
            if self.wrong and request.keys[0] in here:
                return Answer(request.op, "failed", reason="wrong_bytes")
            n = 0
            while n < len(request.keys) and request.keys[n] in here:
                n += 1
            return Answer(request.op, "ok", num_tokens=sum(request.lens[:n]), n=n)
        assert isinstance(request, StoreRequest)
        for n, key in enumerate(request.keys):
            if key not in here and len(here) >= self.room:
                if n == 0:
                    return Answer(request.op, "refused", reason="full")
                return Answer(request.op, "ok", num_tokens=sum(request.lens[:n]), n=n)
            here[key] = request.lens[n]
        return Answer(request.op, "ok", num_tokens=sum(request.lens), n=len(request.keys))


def file(**changes: Any) -> InstanceFile:
    values: dict[str, Any] = {
        "path": "i.yaml", "instance": "a", "namespace": SPACE, "store_at": "LocalCPUBackend",
        "controller": ("localhost", 1), "reply": None,
        "places": (Location("LocalCPUBackend", 9), Location("LocalDiskBackend", 9)),
        "host": "localhost", "worker_ports": (), "data_ports": (), "transport": "tcp",
        "arena": "", "arena_bytes": 0, "save_unfull_chunk": True,
        "config": Config(), "disk_path": "", "tokenizer": "", "max_model_len": 200, "keys": "", "ignored": (),
    }  # fmt: skip
    return InstanceFile(**{**values, **changes})


class Setup:
    def __init__(self, ranks: int = 1, room: int = 1000, **options: Any) -> None:
        self.ranks = [FakeRank(room) for _ in range(ranks)]
        self.warnings: list[str] = []
        changes = options.pop("file", {})
        serving = Serving(file(**changes), self.ranks, General())
        self.http = TestClient(make_app(serving, warn=self.warnings.append, **options))

    def complete(self, prompt: Any, **more: Any) -> Any:
        return self.http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, **more})

    def cached(self, prompt: Any, **more: Any) -> int:
        answer = self.complete(prompt, **more)
        assert answer.status_code == 200, answer.text
        found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


@pytest.fixture
def setup() -> Iterator[Setup]:
    yield Setup()


def test_a_completion_looks_like_vllms(setup: Setup) -> None:
    body = setup.complete("hello there", max_tokens=10).json()
    assert body["object"] == "text_completion" and body["model"] == MODEL and body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["text"]
    usage = body["usage"]
    assert usage["completion_tokens"] == 10 and usage["total_tokens"] == usage["prompt_tokens"] + 10
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_same_prompt_gets_the_same_words_everywhere(setup: Setup) -> None:
    text = setup.complete("hello there", max_tokens=10).json()["choices"][0]["text"]
    other = Setup()
    assert other.complete("hello there", max_tokens=10).json()["choices"][0]["text"] == text
    assert setup.complete("hello there", max_tokens=10).json()["choices"][0]["text"] == text  # cached now
    assert setup.complete("hello then", max_tokens=10).json()["choices"][0]["text"] != text


def test_token_ids_are_a_prompt_and_all_of_it_is_stored(setup: Setup) -> None:
    assert setup.cached(LITERAL) == 0
    keys, lens = chunk_keys(SPACE, LITERAL)
    assert lens == (8, 4) and setup.ranks[0].held["LocalCPUBackend"] == dict(zip(keys, lens))
    assert setup.cached(LITERAL) == 12
    assert setup.cached([*LITERAL[:8], 1, 2, 3]) == 8


def test_text_and_its_token_ids_are_one_prompt(setup: Setup) -> None:
    ids = setup.http.post("/tokenize", json={"model": MODEL, "prompt": "hello there"}).json()
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 200
    setup.cached("hello there")
    assert setup.cached(ids["tokens"]) == ids["count"]
    text = setup.http.post("/detokenize", json={"model": MODEL, "tokens": ids["tokens"]}).json()["prompt"]
    assert text == "<|begin_of_text|>hello there"


def test_held_is_the_minimum_over_ranks() -> None:
    two = Setup(ranks=2)
    keys, lens = chunk_keys(SPACE, LITERAL)
    two.ranks[0].held["LocalCPUBackend"] = dict(zip(keys, lens))
    two.ranks[1].held["LocalCPUBackend"] = {keys[0]: 8}
    assert two.cached(LITERAL) == 8
    assert two.cached(LITERAL) == 12


def test_what_another_location_holds_counts() -> None:
    one = Setup()
    keys, lens = chunk_keys(SPACE, LITERAL)
    one.ranks[0].held["LocalDiskBackend"] = dict(zip(keys, lens))
    assert one.cached(LITERAL) == 12


def test_salts_do_not_share(setup: Setup) -> None:
    assert setup.cached(LITERAL, cache_salt="x") == 0
    assert setup.cached(LITERAL) == 0
    assert setup.cached(LITERAL, cache_salt="x") == 12


def test_short_chunks_are_left_out_only_where_the_file_says_so() -> None:
    one = Setup(file={"save_unfull_chunk": False})
    assert one.cached(LITERAL) == 0 and one.cached(LITERAL) == 8
    assert one.cached([1, 2, 3]) == 0 and one.cached([1, 2, 3]) == 0


def test_a_full_place_is_counted_and_the_answer_still_comes() -> None:
    one = Setup(room=1)
    assert one.cached(LITERAL) == 0 and one.cached(LITERAL) == 8
    metrics = one.http.get("/metrics").text
    assert f'kvmove_engine_store_short_total{{model_name="{MODEL}",reason="full"}} 2.0' in metrics


def test_wrong_bytes_are_not_used_and_not_kept_quiet(setup: Setup) -> None:
    setup.cached(LITERAL)
    setup.ranks[0].wrong = True
    assert setup.cached(LITERAL) == 0
    assert setup.warnings and "kvmove_engine_wrong_bytes_total" in setup.http.get("/metrics").text


def test_streaming_adds_up_to_the_answer(setup: Setup) -> None:
    whole = setup.complete("hello there", max_tokens=5).json()
    answer = setup.complete("hello there", max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 4 + ["length"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 5
    assert len({event["id"] for event in events}) == 1


def test_several_prompts_and_several_choices(setup: Setup) -> None:
    body = setup.complete(["hello", "there"], n=2, max_tokens=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 12


def test_a_stop_string_ends_the_text(setup: Setup) -> None:
    words = setup.complete("hello", max_tokens=8).json()["choices"][0]["text"]
    stop = words.split()[3]
    body = setup.complete("hello", max_tokens=8, stop=stop).json()["choices"][0]
    assert body["finish_reason"] == "stop" and body["stop_reason"] == stop
    assert body["text"] == words[: words.find(stop)]


def test_cut_finds_stops_across_pieces() -> None:
    assert cut([" ab", " cd", " ef"], ["b c"]) == ([" a"], "b c")
    assert cut([" ab"], ["x"]) == ([" ab"], None)


def test_echo_and_token_ids(setup: Setup) -> None:
    body = setup.complete([5, 6], max_tokens=0, echo=True, return_token_ids=True).json()["choices"][0]
    assert body["text"] == "\x05\x06" and body["prompt_token_ids"] == [5, 6] and body["token_ids"] == []


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "other", "prompt": "x"}, 404, "does not exist"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": ""}, 200, ""),
        ({}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "out of vocabulary"),
        ({"prompt": [1 << 40]}, 400, "out of vocabulary"),
        ({"prompt": ["a", 1]}, 400, "prompt"),
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": 500}, 400, "maximum context length is 200"),
        ({"prompt": "x", "temperature": 0.5, "anything": 1}, 200, ""),
    ],
)
def test_bad_requests_are_refused_as_vllm_does(setup: Setup, body: Any, status: int, says: str) -> None:
    answer = setup.http.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert says in answer.json()["error"]["message"] and answer.json()["error"]["code"] == status
        assert not setup.ranks[0].asked


def test_what_is_no_json_and_what_is_too_large(setup: Setup) -> None:
    assert setup.http.post("/v1/completions", content=b"{").status_code == 400
    big = setup.http.post("/tokenize", content=b"{}", headers={"content-length": str(1 << 30)})
    assert big.status_code == 413
    assert setup.http.get("/nowhere").status_code == 404
    assert setup.http.get("/v1/completions").status_code == 405


def test_models_health_version_and_metrics(setup: Setup) -> None:
    (card,) = setup.http.get("/v1/models").json()["data"]
    assert card["id"] == MODEL and card["max_model_len"] == 200
    assert setup.http.get("/health").status_code == 200 and setup.http.get("/ping").status_code == 200
    setup.cached(LITERAL, max_tokens=3)
    metrics = setup.http.get("/metrics").text
    assert f'vllm:prompt_tokens_total{{model_name="{MODEL}"}} 12.0' in metrics
    assert f'vllm:generation_tokens_total{{model_name="{MODEL}"}} 3.0' in metrics


def test_what_a_disk_did_not_have_any_more_is_counted() -> None:
    store = Store("LocalDiskBackend", 2, 16, None)
    one = Setup(held=list, refused=lambda: {store.name: store.wrong})
    series = 'kvmove_engine_disk_refused_total{location="LocalDiskBackend"}'
    assert f"{series} 0.0" in one.http.get("/metrics").text
    store.write(0, np.zeros(16, dtype=np.uint8), b"one")
    with pytest.raises(DiskError):
        store.read(0, np.empty(16, dtype=np.uint8), b"another")
    assert f"{series} 1.0" in one.http.get("/metrics").text
    store.close()


def test_an_instance_that_cannot_serve_says_so() -> None:
    one = Setup(ranks=2, healthy=lambda: "rank 1 has ended with status -9")
    one.ranks[1].gone = True
    assert one.http.get("/health").status_code == 503 and "rank 1" in one.http.get("/health").text
    answer = one.complete(LITERAL)
    assert answer.status_code == 503 and "rank 1" in answer.json()["error"]["message"]
    streamed = one.complete(LITERAL, stream=True).text
    assert '"code": 503' in streamed and streamed.rstrip().endswith("[DONE]")


def test_an_api_key_guards_all_but_health() -> None:
    one = Setup(api_key="secret")
    assert one.http.get("/v1/models").status_code == 401
    assert one.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert one.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert one.http.get("/health").status_code == 200
