"""What the commands that ask a running controller share: where it is, which tokens are meant, how an event reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmove import output
from kvmove.errors import BAD_INPUT, FAILED, UserError

if TYPE_CHECKING:
    from kvmove.client import Client

Url = Annotated[
    str, typer.Option("--url", envvar="KVMOVE_URL", help="The controller.", metavar="URL", show_default=True)
]
TokenFile = Annotated[
    str | None, typer.Option("--token-file", help="A file with the bearer token; else KVMOVE_TOKEN.", metavar="FILE")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document (a line each where there are several).")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", help="The prompt as text; @FILE reads it from a file.", metavar="TEXT")
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens", "-t", help="The prompt as token ids: 1,2,3 or a JSON list; @FILE; - for stdin.", metavar="IDS"
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="For --prompt: a tokenizer.json, or an instance's URL to ask.", metavar="WHERE"),
]
DEFAULT_URL = "http://localhost:9000"


@contextmanager
def client(url: str, token_file: str | None) -> Iterator[Client]:
    """A client whose errors end the command with one line: 2 if the request was wrong, 1 if it could not be met."""
    try:
        from kvmove.client import Client, Refused, Unreachable, token_from
    except ImportError as error:
        raise UserError(f"asking a controller needs httpx ({error}): pip install 'kvmove[service]'") from None
    try:
        with Client(url, token_from(token_file)) as one:
            yield one
    except Unreachable as error:
        raise UserError(str(error)) from None
    except Refused as error:
        print(f"kvmove: {error}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT if error.status in (400, 401, 403, 404, 422, 501) else FAILED) from None


def place(text: str) -> tuple[str, str]:
    """``a/LocalCPUBackend``."""
    instance, slash, location = text.rpartition("/")
    if not slash or not instance or not location:
        raise UserError(f"{text}: expected INSTANCE/LOCATION such as a/LocalCPUBackend")
    return instance, location


def ids_of(prompt: str | None, tokens: str | None, tokenizer: str | None) -> list[int]:
    """The token ids that are meant. UserError unless exactly one of the two is given."""
    if (prompt is None) == (tokens is None):
        raise UserError("expected one of --prompt and --tokens")
    if tokens is not None:
        return _ids(_text("--tokens", tokens, stdin=True))
    assert prompt is not None
    return _tokenize(_text("--prompt", prompt, stdin=False), tokenizer)


def _text(option: str, given: str, *, stdin: bool) -> str:
    if given.startswith("@"):
        try:
            return Path(given[1:]).read_text()
        except OSError as error:
            raise UserError(f"{option} {given}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{option} {given}: not text in UTF-8") from None
    if stdin and given == "-":
        return sys.stdin.read()
    return given


def _ids(text: str) -> list[int]:
    """``1,2,3``, ``1 2 3``, ``[1, 2, 3]``, or the answer of an instance's /tokenize."""
    text = text.strip()
    try:
        found: Any = json.loads(text) if text[:1] in ("[", "{") else text.replace(",", " ").split()
        if isinstance(found, dict):
            found = found["tokens"]
        ids = [int(token) for token in found]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--tokens {text[:40]}: expected token ids such as 128000,849,21435") from None
    if not ids:
        raise UserError("--tokens: there is none; --all moves everything")
    for token in ids:
        if not 0 <= token < 1 << 32:
            raise UserError(f"--tokens: {token} is no token id")
    return ids


def _tokenize(text: str, tokenizer: str | None) -> list[int]:
    if tokenizer is not None and tokenizer.startswith(("http://", "https://")):
        import httpx

        try:
            answer = httpx.post(f"{tokenizer.rstrip('/')}/tokenize", json={"prompt": text}, timeout=30)
            answer.raise_for_status()
            return _ids(json.dumps(answer.json()))
        except (httpx.HTTPError, ValueError) as error:
            raise UserError(f"--tokenizer {tokenizer}: {error}") from None
    from kvreal.tokenizer import make

    return make(tokenizer).encode(text)


# ---- how things read
def show(data: Any, as_json: bool, line: str) -> None:
    print(json.dumps(data) if as_json else line, flush=True)


def event_line(event: dict[str, Any]) -> str:
    """``1-3 move done: 12 tokens a/LocalCPUBackend -> b/LocalCPUBackend, 1.5 MiB over nixl/ucx/cma in 3.1 ms``."""
    kind = event.get("kind", "event")
    line = f"{event['event_id']} {kind} {event['state']}: {output.plural(int(event.get('num_tokens', 0)), 'token')}"
    if event.get("old_position"):
        line += f" {'/'.join(event['old_position'])}"
    targets = event.get("new_positions") or []
    if targets:
        line += " -> " + ", ".join("/".join(target) for target in targets)
    if event.get("bytes"):
        line += f", {output.size(event['bytes'])}"
        line += f" over {event['transport']}" if event.get("transport") else ""
    if event.get("duration_s") is not None:
        line += f" in {output.duration(event['duration_s'] * 1e9)}"
    progress = event.get("progress")
    if progress and event["state"] not in ("done", "failed"):
        line += f", {progress['moved_tokens']} of {progress['planned_tokens']} moved"
    if event.get("expires_in_s"):
        line += f", for {event['expires_in_s']:.0f} s more"
    if event.get("reason"):
        line += f" ({event['reason'].replace('_', ' ')})"
    return line


def event_details(event: dict[str, Any]) -> list[str]:
    """A line a fact, under the event's own."""
    lines = [event_line(event)]
    if event.get("detail"):
        lines.append(f"  {event['detail']}")
    phases = event.get("phases_s") or {}
    if phases:
        lines.append("  " + ", ".join(f"{name} {output.duration(took * 1e9)}" for name, took in phases.items()))
    for rank in event.get("ranks") or []:
        kept = f", kept {rank['kept']}{' (' + rank['why'] + ')' if rank.get('why') else ''}" if rank["kept"] else ""
        gone = "its source's word is missing" if rank["deleted"] < 0 else f"deleted {rank['deleted']}{kept}"
        lines.append(
            f"  rank {rank['rank']}: {rank['source']} -> {rank['destination']}, {rank['committed']} of "
            f"{output.plural(rank['pinned'], 'chunk')} there, {rank['present']} of them before; source {gone}"
        )
    chosen = dict.fromkeys(rank["chosen"] for rank in event.get("ranks") or [] if rank.get("chosen"))
    lines += [f"  {why}" for why in chosen]
    if event.get("children"):
        lines.append(f"  events: {', '.join(event['children'])}")
    return lines


ENDED = ("done", "failed")


def until_ended(one: Client, event_id: str, follow: bool = False) -> dict[str, Any]:
    """Wait for an event's end, however long it takes; ``follow``: say its progress on stderr."""
    said = ""
    while True:
        event = one.wait(event_id, 1.0 if follow else 30.0)
        if event["state"] in ENDED:
            return event
        line = event_line(event)
        if follow and line != said:
            print(line, file=sys.stderr, flush=True)
            said = line
