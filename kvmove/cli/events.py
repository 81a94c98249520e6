"""``kvmove events`` and ``kvmove cancel``: what became of moves."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kvmove.cli import asking
from kvmove.errors import FAILED


def events(
    event_id: Annotated[str | None, typer.Argument(metavar="EVENT", help="All about this one.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show changes as they come, until Ctrl-C.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="With EVENT: return when it has ended.")] = False,
    state: Annotated[str | None, typer.Option("--state", help="Only those: copying, done, failed, ...")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most so many.")] = 20,
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """List the newest events, tell all about one, or follow what happens.

    Examples:

    * `kvmove events`
    * `kvmove events 1-3 --wait --json`
    * `kvmove events --follow`

    Exit status with EVENT: 0, or 1 if it has failed.
    """
    with asking.client(url, token_file) as client:
        if event_id is not None:
            event = asking.until_ended(client, event_id) if wait else client.event(event_id)
            asking.show(event, json_out, "\n".join(asking.event_details(event)))
            if event["state"] == "failed":
                raise typer.Exit(FAILED)
            return
        params: dict[str, Any] = {"limit": limit, **({"state": state} if state else {})}
        found = client.events(**params)
        for event in reversed(found):
            asking.show(event, json_out, asking.event_line(event))
        if follow:
            for kind, what in client.stream():
                if json_out:
                    print(json.dumps({"kind": kind, "data": what}), flush=True)
                elif isinstance(what, dict) and "event_id" in what and "state" in what:
                    if state in (None, what["state"]):
                        print(asking.event_line(what), flush=True)
                elif kind == "lagged":
                    print("(changes were missed: they came faster than they could be shown)", flush=True)
        elif not found and not json_out:
            print("no event yet")


def cancel(
    event_id: Annotated[str, typer.Argument(metavar="EVENT", show_default=False)],
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """Cancel a move that is not decided yet. Its source keeps all.

    Example:

    * `kvmove cancel 1-3`

    Exit status: 0 cancelled, 1 too late, 2 there is no such event.
    """
    with asking.client(url, token_file) as client:
        asking.show(client.cancel(event_id), json_out, f"{event_id}: cancelled")
