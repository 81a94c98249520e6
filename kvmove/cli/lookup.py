"""``kvmove lookup`` and ``kvmove instances``: what a running controller sees."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvmove import output
from kvmove.cli import asking
from kvmove.errors import FAILED


def lookup(
    prompt: asking.Prompt = None,
    tokens: asking.Tokens = None,
    tokenizer: asking.Tokenizer = None,
    salt: Annotated[str, typer.Option("--salt", help="The cache_salt the prompt was stored with.")] = "",
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """Say who holds how much of a prompt.

    Examples:

    * `kvmove lookup --prompt 'Explain the significance of KV cache in language models.'`
    * `kvmove lookup --tokens @ids.json --json`

    Exit status: 0 somebody holds some of it, 1 nobody does, 2 bad input.
    """
    ids = asking.ids_of(prompt, tokens, tokenizer)
    with asking.client(url, token_file) as client:
        found = client.lookup(ids, **({"cache_salt": salt} if salt else {}))
    rows = [
        (held, f"{instance}/{location}")
        for instance, places in found["locations"].items()
        for location, held in places.items()
    ]
    if json_out:
        print(json.dumps(found))
    else:
        for held, where in sorted(rows, key=lambda row: (-row[0], row[1])):
            print(f"{where}: {held:,} of {output.plural(len(ids), 'token')}")
        if not rows:
            print(f"nobody holds any of these {output.plural(len(ids), 'token')}")
    if not rows:
        raise typer.Exit(FAILED)


def instances(
    url: asking.Url = asking.DEFAULT_URL,
    token_file: asking.TokenFile = None,
    json_out: asking.Json = False,
) -> None:
    """List the instances, a line a location of each rank.

    Example:

    * `kvmove instances`
    """
    with asking.client(url, token_file) as client:
        found = client.instances()
    if json_out:
        print(json.dumps(found))
        return
    for instance in found:
        whole = "" if instance["whole"] else " (ranks are missing)"
        for rank in instance["ranks"]:
            for place in rank["locations"]:
                print(
                    f"{instance['instance_id']}/{place['name']} rank {rank['rank']} at {rank['address']}: "
                    f"{place['chunks']:,} of {output.plural(place['slots'], 'chunk')}, {place['tokens']:,} tokens, "
                    f"{output.size(place['bytes'])}; heard {rank['heard_s_ago']:.1f} s ago{whole}"
                )
    if not found:
        print("no instance has registered")
