"""``kvmove pin``, ``kvmove unpin`` and ``kvmove lease``: keep chunks where they are."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmove import output
from kvmove.cli import asking
from kvmove.errors import FAILED, UserError

Place = Annotated[str, typer.Argument(metavar="PLACE", help="INSTANCE/LOCATION.", show_default=False)]


def pin(
    position: Place,
    prompt: asking.Prompt = None,
    tokens: asking.Tokens = None,
    tokenizer: asking.Tokenizer = None,
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """Keep a prompt's chunks from being evicted or moved away, until unpin; at most 10 minutes (the constant hold).

    Example:

    * `kvmove pin a/LocalCPUBackend --prompt 'You are a helpful assistant.'`
    """
    ids = asking.ids_of(prompt, tokens, tokenizer)
    with asking.client(url, token_file) as client:
        event_id, held = client.pin(asking.place(position), ids)
    line = f"{event_id}: {output.plural(held, 'token')} pinned at {position}; kvmove unpin {event_id} lets go"
    asking.show({"num_tokens": held, "event_id": event_id}, json_out, line if held else f"nothing held at {position}")
    if not held:
        raise typer.Exit(FAILED)


def unpin(
    event_id: Annotated[str, typer.Argument(metavar="EVENT", show_default=False)],
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """Let go of what a pin or a lease keeps.

    Example:

    * `kvmove unpin 1-3`
    """
    with asking.client(url, token_file) as client:
        asking.show(client.unpin(event_id), json_out, f"{event_id}: let go")


def lease(
    position: Annotated[str | None, typer.Argument(metavar="PLACE", help="INSTANCE/LOCATION.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", "-s", min=0.001, help="For so long from now.")] = 60.0,
    renew: Annotated[
        str | None, typer.Option("--renew", help="Instead of a place: an earlier lease.", metavar="EVENT")
    ] = None,
    prompt: asking.Prompt = None,
    tokens: asking.Tokens = None,
    tokenizer: asking.Tokenizer = None,
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """Keep a prompt's chunks for some seconds: a pin that cannot leak.

    Examples:

    * `kvmove lease a/LocalCPUBackend --prompt 'You are a helpful assistant.' --seconds 300`
    * `kvmove lease --renew 1-3 --seconds 300`
    """
    if (position is None) == (renew is None):
        raise UserError("expected a place, or --renew EVENT")
    with asking.client(url, token_file) as client:
        if renew is not None:
            found = client.lease(seconds, event_id=renew)
        else:
            assert position is not None
            found = client.lease(seconds, asking.place(position), asking.ids_of(prompt, tokens, tokenizer))
    held = int(found["num_tokens"])
    line = f"{found['event_id']}: {output.plural(held, 'token')} kept for {found.get('expires_in_s', seconds):.0f} s"
    asking.show(found, json_out, line if held else f"nothing held at {position}")
    if not held:
        raise typer.Exit(FAILED)
