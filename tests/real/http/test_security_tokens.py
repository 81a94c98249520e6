"""Who may ask over HTTP: tokens and their roles, loopback without them, and no web page of somebody else's."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from kvreal.http.auth import Tokens, TokensError, dependency, read_tokens
from kvreal.ports import free_port
from tests.real.http.cluster import ROOT, Controller

pytestmark = pytest.mark.real

DOCS = {"/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/start.js"}
READ = "r-0123456789abcdef"
MOVE = "m-0123456789abcdef"
OPEN = {"/healthz", "/readyz", "/openapi.json", "/docs", *DOCS}
"""What answers without a token: whether it lives, and what its interface is."""


def tokens_file(folder: Path) -> Path:
    path = folder / "tokens"
    path.write_text(f"# who may do what\n\nread {READ}\nmove\t{MOVE}\n")
    path.chmod(0o600)
    return path


# ---- the file
def test_the_file_says_who_may_do_what(tmp_path: Path) -> None:
    known = read_tokens(tokens_file(tmp_path))
    assert (known.role(READ), known.role(MOVE), known.role(""), known.role(READ + "x")) == ("read", "move", None, None)
    assert READ.encode() not in b"".join(known.roles), "only digests are kept"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no tokens, expected lines of a role and a token"),
        ("# nothing\n", "no tokens"),
        (f"{READ}\n", ":1: 1 words, expected a role and a token"),
        (f"\nread {READ} for Ann\n", ":2: 4 words"),
        (f"admin {READ}\n", "unknown role 'admin', expected one of read, move"),
        ("read short\n", "a token of 5 characters, expected 16 to 512"),
        (f"read {'x' * 600}\n", "a token of 600 characters"),
        (f"read {READ}é\n", "letters, digits and ._~+/=- only"),
        (f"read {READ}\nmove {READ}\n", ":2: this token is there twice"),
        (b"read \xff\xfe0123456789abcdef", "is no text file of tokens"),
    ],
)
def test_a_bad_file_is_one_line_that_repeats_no_token(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TokensError) as error:
        read_tokens(path)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert READ not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_everyone_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tokens_file(tmp_path)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        read_tokens(path)
    assert "chmod 600" in caplog.text
    with pytest.raises(TokensError, match="cannot read the tokens: No such file"):
        read_tokens(tmp_path / "none")


# ---- comparing
def test_every_token_is_compared_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant time: whichever token is given, all digests are compared, by compare_digest."""
    import hmac

    known = read_tokens(tokens_file(tmp_path))
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for given in (READ, MOVE, "nobody"):
        compared.clear()
        known.role(given)
        assert [a for a, _ in compared] == list(known.roles)
        assert all(len(a) == len(b) == 32 for a, b in compared)


def app_with(tokens: Tokens | None) -> TestClient:
    allowed = dependency(tokens)
    app = FastAPI()

    @app.get("/r", dependencies=[Depends(allowed("read"))])
    async def r() -> str:
        return "r"

    @app.post("/m", dependencies=[Depends(allowed("move"))])
    async def m() -> str:
        return "m"

    return TestClient(app, base_url="http://localhost:9000")


@pytest.mark.parametrize(
    "given, read, move",
    [
        (None, 401, 401),
        (f"Bearer {READ}", 200, 403),
        (f"bearer {READ}", 200, 403),
        (f"Bearer {MOVE}", 200, 200),
        (f"Bearer {MOVE} ", 200, 200),
        ("Bearer ", 401, 401),
        ("Bearer", 401, 401),
        (f"Basic {MOVE}", 401, 401),
        (MOVE, 401, 401),
        (f"Bearer {MOVE[:-1]}", 401, 401),
        (f"Bearer {MOVE}, Bearer {READ}", 401, 401),
        ("Bearer " + "x" * 5000, 401, 401),
        ("Bearer \u00e9".encode("latin-1"), 401, 401),
    ],
)
def test_roles(tmp_path: Path, given: str | bytes | None, read: int, move: int) -> None:
    client = app_with(read_tokens(tokens_file(tmp_path)))
    headers = {} if given is None else {"Authorization": given}
    answers = client.get("/r", headers=headers), client.post("/m", headers=headers)
    assert tuple(answer.status_code for answer in answers) == (read, move)
    for answer in answers:
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Host": "127.0.0.1:9000"}, 200),
        ({"Host": "[::1]:9000"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Origin": "http://localhost:9000", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "rebound.example:9000"}, 403),
        ({"Host": "localhost.evil.example:9000"}, 403),
        ({"Host": "127.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_without_tokens_no_page_of_another_site_is_obeyed(headers: dict[str, str], status: int) -> None:
    assert app_with(None).post("/m", headers=headers).status_code == status


# ---- the controller itself
@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    folder = tmp_path_factory.mktemp("guarded")
    controller = Controller(folder, "--tokens", str(tokens_file(folder)))
    try:
        controller.start()
        yield controller
    finally:
        controller.close()


def routes(controller: Controller) -> list[tuple[str, str]]:
    paths = controller.http.get("/openapi.json").json()["paths"]
    found = [(method.upper(), re.sub(r"\{.*?\}", "1-1", path)) for path, methods in paths.items() for method in methods]
    return [*found, ("GET", "/metrics")]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def status(controller: Controller, method: str, path: str, token: str = "") -> httpx.Response:
    """Only the beginning of the answer: /stream never ends."""
    headers = bearer(token) if token else {}
    with controller.http.stream(method, path, headers=headers, content=b"{}" if method == "POST" else None) as answer:
        if answer.status_code != 200:
            answer.read()
    return answer


def test_every_route_asks_for_a_token(guarded: Controller) -> None:
    seen = 0
    for method, path in routes(guarded):
        if path in OPEN or path == "/":
            continue
        seen += 1
        for token in ("", "x" * 20):
            answer = status(guarded, method, path, token)
            assert answer.status_code == 401, (method, path)
            body = answer.json()
            assert body["reason"] == "unauthenticated", (method, path)
            assert body["detail"] and "\n" not in body["detail"]
            assert b"\n" not in answer.content
    assert seen > 15


def test_what_changes_something_needs_the_role_move(guarded: Controller) -> None:
    harmless = {"/lookup", "/health", "/query_instance", "/query_worker_info", "/check_finish"}
    for method, path in routes(guarded):
        if path in OPEN or path == "/":
            continue
        answer = status(guarded, method, path, READ)
        if (method == "GET") or path in harmless:
            assert answer.status_code not in (401, 403), (method, path)
        else:
            assert answer.status_code == 403, (method, path)
            assert answer.json()["reason"] == "forbidden"
            assert answer.json()["detail"] == "this token may read; this needs move"
        assert status(guarded, method, path, MOVE).status_code not in (401, 403), (method, path)


def test_nothing_is_read_before_the_token_is(guarded: Controller) -> None:
    """A large body of a stranger is refused by the header, not parsed."""
    answer = guarded.http.post("/move", content=b"[" * (4 << 20))
    assert answer.status_code == 401
    answer = guarded.http.post("/move", content=b"[" * (4 << 20), headers=bearer(MOVE))
    assert answer.status_code == 422
    answer = guarded.http.post("/move", content=b" " * (17 << 20), headers=bearer(MOVE))
    assert answer.status_code == 413
    assert answer.json()["reason"] == "too_large"


def kvmove(*args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmove", *args], cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_beyond_this_machine_tokens_and_keys_are_needed(tmp_path: Path) -> None:
    ports = json.dumps({"pull": free_port(), "reply": free_port()})
    (tmp_path / "bad").write_text("read short\n")
    for args, words in (
        (("--host", "0.0.0.0"), "--host 0.0.0.0: others could reach it; give --tokens FILE"),
        (("--monitor-host", "0.0.0.0"), "--monitor-host 0.0.0.0: others could reach it; give --keys DIR"),
        (("--host", "0.0.0.0", "--tokens", "bad"), "bad:1: a token of 5 characters"),
        (("--keys", "none"), "none/cluster.public: cannot read the key: No such file or directory"),
    ):
        ended = kvmove("controller", "--port", "0", "--monitor-ports", ports, *args, folder=tmp_path)
        assert ended.returncode == 2, ended
        assert len(ended.stderr.splitlines()) == 1, ended.stderr
        assert words in ended.stderr
    assert not list(tmp_path.glob("*.db")), "nothing was begun"
