"""``kvmove move`` and ``kvmove drain``: ask a running controller to move KV."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvcore.scenario.units import Rate, UnitError
from kvmove import output
from kvmove.cli import asking
from kvmove.errors import FAILED, UserError

Priority = Annotated[
    int, typer.Option("--priority", help="Of the copies that wait, the highest goes first.", min=-100, max=100)
]
Weight = Annotated[int, typer.Option("--weight", help="How copies of one priority share.", min=1, max=1000)]
Cap = Annotated[
    str | None, typer.Option("--cap", help="Never faster, such as '500 MB/s' or '4 Gbit/s'.", metavar="RATE")
]


def move(
    old: Annotated[str, typer.Argument(metavar="FROM", help="INSTANCE/LOCATION.", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="TO", help="INSTANCE/LOCATION.", show_default=False)],
    prompt: asking.Prompt = None,
    tokens: asking.Tokens = None,
    everything: Annotated[bool, typer.Option("--all", help="All that FROM holds, hottest first.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Keep the source.")] = False,
    tokenizer: asking.Tokenizer = None,
    salt: Annotated[str, typer.Option("--salt", help="The cache_salt the prompt was stored with.")] = "",
    deadline_s: Annotated[
        float | None, typer.Option("--deadline", help="Undo what is not decided by then.", metavar="S")
    ] = None,
    if_room: Annotated[bool, typer.Option("--if-room", help="Fail rather than evict at TO.")] = False,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Repeat a request safely.", metavar="KEY")
    ] = None,
    priority: Priority = 0,
    weight: Weight = 1,
    cap: Cap = None,
    prefixes: Annotated[
        bool, typer.Option("--prefixes", help="Longer and longer prefixes are there on the way.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; move nothing.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once num_tokens is fixed.")] = False,
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """Move the KV cache of a prompt from one place to another, and say how it ended.

    Examples:

    * `kvmove move a/LocalCPUBackend b/LocalCPUBackend --prompt 'Explain the significance of KV cache.'`
    * `kvmove move a/LocalCPUBackend b/LocalCPUBackend --tokens 128000,849,21435 --copy --json`
    * `kvmove move a/LocalCPUBackend a/LocalDiskBackend --all`

    Exit status: 0 moved, 1 it failed or nothing was there, 2 bad input.
    """
    if everything and (prompt is not None or tokens is not None):
        raise UserError("--all moves everything: no --prompt and no --tokens beside it")
    if not everything and prompt is None and tokens is None:
        raise UserError("expected --prompt or --tokens, or --all for everything that is there")
    source, target = asking.place(old), asking.place(new)
    ids = [] if everything else asking.ids_of(prompt, tokens, tokenizer)
    options: dict[str, Any] = {
        "cache_salt": salt or None, "deadline_s": deadline_s, "if_room": if_room or None, "idempotency_key": key,
        "granularity": "prefix" if prefixes else None, **_terms(priority, weight, cap),
    }  # fmt: skip
    with asking.client(url, token_file) as client:
        if dry_run:
            asking.show(found := client.dry_run(source, target, ids, **options), json_out, _costs(found))
            return
        event_id, num_tokens = client.move(source, target, ids, copy, **options)
        if not event_id:
            asking.show({"num_tokens": 0, "event_id": ""}, json_out, f"nothing held at {old}: 0 tokens moved")
            raise typer.Exit(FAILED)
        if no_wait:
            line = f"{event_id}: {output.plural(num_tokens, 'token')}"
            asking.show({"num_tokens": num_tokens, "event_id": event_id}, json_out, line)
            return
        event = asking.until_ended(client, event_id, follow=not json_out)
        asking.show(event, json_out, "\n".join(asking.event_details(event)))
        if event["state"] != "done" or not event["num_tokens"]:
            raise typer.Exit(FAILED)


def _terms(priority: int, weight: int, cap: str | None) -> dict[str, Any]:
    """As the HTTP body has them. UserError: no rate."""
    try:
        cap_bytes_per_s = max(1, int(Rate.parse(cap).bytes_per_s)) if cap is not None else None
    except UnitError as error:
        raise UserError(f"--cap: {error}") from None
    return {
        "priority": priority or None,
        "weight": weight if weight != 1 else None,
        "bandwidth_cap_bytes_per_s": cap_bytes_per_s,
    }


def _costs(found: dict[str, Any]) -> str:
    would = f"would move {output.plural(found['num_tokens'], 'token')}, {output.size(found['bytes'])}"
    quicker = "computing it anew is quicker" if found.get("recompute_is_quicker") else "moving is quicker"
    return (
        f"{would}, in {output.duration(found['move_s'] * 1e9)}; computing it anew takes "
        f"{output.duration(found['recompute_s'] * 1e9)}: {quicker} (by {found.get('profile') or 'no profile'})"
    )


def drain(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="What is emptied.", show_default=False)],
    to: Annotated[list[str], typer.Option("--to", help="Where to. Repeatable: taken in turn.", metavar="INSTANCE")],
    locations: Annotated[
        list[str] | None, typer.Option("--location", help="Only this one. Repeatable.", metavar="LOCATION")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Keep the source.")] = False,
    if_room: Annotated[bool, typer.Option("--if-room", help="Fail rather than evict.")] = False,
    deadline_s: Annotated[float | None, typer.Option("--deadline", metavar="S")] = None,
    priority: Priority = 0,
    weight: Weight = 1,
    cap: Cap = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once it has begun.")] = False,
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """Move all that an instance holds to others, hottest first, and show how far it is.

    Examples:

    * `kvmove drain a --to b --to c`
    * `kvmove drain a --to b --location LocalDiskBackend --json`

    Exit status: 0 all is moved, 1 something is left (it is named), 2 bad input.
    """
    options: dict[str, Any] = {
        "locations": locations, "copy": copy or None, "if_room": if_room or None, "deadline_s": deadline_s,
        **_terms(priority, weight, cap),
    }  # fmt: skip
    with asking.client(url, token_file) as client:
        begun = client.drain(instance, to, **options)
        names = _event_ids(begun)
        if no_wait or not names:
            asking.show(begun, json_out, ", ".join(names) or f"nothing held at {instance}")
            return
        good = True
        for name in names:
            event = asking.until_ended(client, name, follow=not json_out)
            asking.show(event, json_out, "\n".join(asking.event_details(event)))
            good = good and (event["state"] == "done" or event.get("reason") == "nothing_held")
        if not good:
            raise typer.Exit(FAILED)


def _event_ids(begun: dict[str, Any]) -> list[str]:
    """A drain is an event, or one a location."""
    found = begun.get("event_ids") or [begun.get("event_id", "")]
    return [str(name) for name in found if name]
