"""``kvmove instance``: one serving instance, with an engine that needs no model."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from kvmove import output
from kvmove.errors import RealUnavailable, UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def instance(
    config: Annotated[
        str | None,
        typer.Option("--config", help="The instance's YAML; else KVMOVE_CONFIG_FILE or LMCACHE_CONFIG_FILE."),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="What makes KV: synthetic.")] = "synthetic",
    host: Annotated[str, typer.Option("--host", help="Where HTTP listens.")] = "localhost",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    model: Annotated[str, typer.Option("--model", help="Served under this name, instead of the file's.")] = "",
    api_key_file: Annotated[
        str | None, typer.Option("--api-key-file", help="A file with the key that requests must bear.", metavar="FILE")
    ] = None,
) -> None:
    """Run an instance: an OpenAI-like server, and KV of its prompts that the controller can move.

    A process a rank. The synthetic engine stores bytes that any node can check for every prompt, and answers with words
    that follow from it. Controller and instances may start in any order.

    Examples:

    * `kvmove instance --config instance1.yaml --port 8000`
    * `UCX_TLS=tcp kvmove instance --config instance2.yaml --engine synthetic --port 8001`

    Exit status: 0 told to stop, 1 a rank has ended, 2 bad input or refused by the controller.
    """
    output.choice("--engine", engine, ("synthetic",))
    key = _key(api_key_file)
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host}: others could reach it; give --api-key-file, or listen at localhost")
    try:
        from kvreal import logs
        from kvreal.instance import Settings, run
        from kvreal.instance_file import path_from, read
    except ImportError as error:
        raise RealUnavailable(f"an instance needs more ({error}): pip install 'kvmove[real,service]'") from None
    from kvmove.version import version_text

    logs.configure()
    file = read(path_from(config, os.environ), model)
    if file.host not in LOOPBACK and not file.keys:
        raise UserError(f"{file.path}: p2p_host: {file.host}: others could reach it; name kvmove.keys (`kvmove keys`)")
    if file.ignored:
        logging.getLogger("kvmove.instance").warning(
            "%s: ignored, they mean nothing here: %s", file.path, ", ".join(file.ignored)
        )
    status = run(file, Settings(host, port, key, version_text().split("\n")[0]))
    if isinstance(status, str):
        raise UserError(status)
    if status:
        raise typer.Exit(status)


def _key(path: str | None) -> str:
    if path is None:
        return ""
    key = Path(path).read_text().strip()
    if not key:
        raise UserError(f"--api-key-file {path}: is empty")
    return key
