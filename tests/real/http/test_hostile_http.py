"""Requests made from the controller's own OpenAPI document, good and bad: each answer is one that the document has."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis", reason="the tests' extras are not installed: no schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from kvreal.http.app import MAX_BODY_BYTES  # noqa: E402
from tests.real.http.hostile import Inside  # noqa: E402

pytestmark = pytest.mark.real
ENDLESS = "/stream"
TRUE = {501, 503, 504, 507}
"""5xx that are answers: not built, not ready, too late, full."""


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    found = Inside(tmp_path_factory.mktemp("http"), "a", "b")
    try:
        assert found.workers.store("a", list(range(300))) == 300
        yield found
    finally:
        found.close()


CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
def test_every_answer_is_one_that_the_document_has(inside: Inside, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{inside.url}/openapi.json").exclude(path=ENDLESS)
    tried: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except Exception:  # nothing bad can be made for what takes nothing
            continue

        tried[operation.label] = 0
        try:
            attacked(inside, strategy, tried, operation.label)
        except schemathesis.errors.SchemathesisError as error:
            assert mode is GenerationMode.NEGATIVE, error
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE
    assert sum(count > 0 for count in tried.values()) >= 15, tried


def attacked(inside: Inside, strategy: Any, tried: dict[str, int], label: str) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(case=strategy)
    def attack(case: Any) -> None:
        tried[label] += 1
        answered(inside, case)

    attack()


def answered(inside: Inside, case: Any) -> None:
    if "/wait" in case.path and case.query:
        case.query.pop("timeout", None)
    response = case.call(timeout=20)
    assert response.status_code < 500 or response.status_code in TRUE, (case.as_curl_command(), response.text)
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400:
        body = response.json()
        assert body["reason"] and body["detail"], body
        assert "\n" not in body["detail"] and "Traceback" not in body["detail"], body
    assert inside.running()


# ---- bodies and headers
@pytest.mark.parametrize(
    "body, status, reason",
    [
        (b"", 422, "bad_body"),
        (b"[" * 100_000, 422, "bad_body"),
        (b'{"tokens":' + b"[" * 100_000, 422, "bad_body"),
        (b"\xff\xfe\x00", 422, "bad_body"),
        (b"\x80\x04\x95", 422, "bad_body"),
        (b'{"tokens": [1e400]}', 422, "bad_body"),
        (b'{"tokens": [-1]}', 422, "bad_body"),
        (b'{"tokens": [99999999999999999999]}', 422, "bad_body"),
        (b'{"tokens": [1], "tokens": "x"}', 422, "bad_body"),
        (b'{"tokens": [1]} {}', 422, "bad_body"),
        (b'{"tokens": [1], "\\ud800": 1}', 422, "bad_body"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "too_large"),
    ],
)
def test_a_bad_body_is_one_clear_answer(inside: Inside, body: bytes, status: int, reason: str) -> None:
    answer = httpx.post(f"{inside.url}/lookup", content=body, timeout=20)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    assert b"\n" not in answer.content
    assert len(answer.content) < 2000


def test_a_body_without_a_length_is_kept_up_to_the_limit_only(inside: Inside) -> None:
    """Chunked: 200 MiB are announced by nobody. It is refused, and what comes after the limit is not kept."""
    pages = Path("/proc/self/statm")
    piece = b" " * (1 << 20)
    before = int(pages.read_text().split()[1])
    most = 0

    def long() -> Iterator[bytes]:
        nonlocal most
        for _ in range(200):
            most = max(most, int(pages.read_text().split()[1]))
            yield piece

    answer = httpx.post(f"{inside.url}/lookup", content=long(), timeout=30)
    assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")
    assert (most - before) * os.sysconf("SC_PAGE_SIZE") < 100 << 20


def test_what_is_no_http_is_hung_up_on(inside: Inside) -> None:
    port = int(inside.url.rpartition(":")[2])
    for data in (
        b"\x16\x03\x01\x02\x00" * 10,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"POST /move HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /move HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /move HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(10)
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                answer = b""
                while piece := sock.recv(65536):
                    answer += piece
                assert not answer or b" 200 " not in answer.split(b"\r\n")[0], (data[:50], answer[:200])
    assert httpx.get(f"{inside.url}/readyz").status_code == 200


def test_those_who_watch_and_do_not_read_are_let_go(inside: Inside) -> None:
    """A stream that nobody reads holds a bounded queue; whoever lags is told so, and the queue goes."""
    log = inside.face.log
    queue = inside.look(log.open_stream)
    inside.look(lambda: [log._tell("event", {"n": n}) for n in range(5000)])
    assert inside.look(queue.qsize) <= 2
    assert queue not in log.streams
