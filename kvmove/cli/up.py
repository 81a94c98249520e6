"""``kvmove up``: a scenario's controller and instances, running."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmove import output
from kvmove.errors import FAILED, RealUnavailable, UserError

if TYPE_CHECKING:
    from kvcore.scenario.build import Built
    from kvreal.topology import Topology

READY_S = 60.0


def up(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A scenario file (YAML).", show_default=False)],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The controller's. 0: any free one.")] = 9000,
    instance_port: Annotated[
        int, typer.Option("--instance-port", min=0, max=65535, help="The first instance's; the others follow.")
    ] = 8000,
    pull_port: Annotated[
        int, typer.Option("--pull-port", min=0, max=65535, help="Where workers reach the controller; 0: any.")
    ] = 8300,
    reply_port: Annotated[int, typer.Option("--reply-port", min=0, max=65535)] = 8400,
    transport: Annotated[
        str, typer.Option("--transport", help="auto, arena, nixl, mooncake, socket, tcp.", metavar="NAME")
    ] = "auto",
    journal: Annotated[
        str | None, typer.Option("--journal", help="Keep the controller's journal there; else it ends with this.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a value: --set constants.lease='2 s'. Repeatable.", metavar="PATH=VALUE"),
    ] = None,
) -> None:
    """Start the controller and the instances of a scenario file, and leave them running until Ctrl-C.

    Its steps and faults are not played: ask the controller and the instances yourself. Links are this machine's own.

    Examples:

    * `kvmove up scenarios/smoke/move.yaml`
    * `kvmove up scenarios/smoke/move.yaml --port 0 --instance-port 0 --pull-port 0 --reply-port 0`

    Exit status: 0 Ctrl-C, 1 a process has ended by itself, 2 bad input or something could not start.
    """
    output.choice("--transport", transport, output.transport_names())
    from kvcore.scenario.build import build
    from kvcore.scenario.loader import load

    built = build(load(file, sets or ()))
    try:
        from kvreal.ports import free_port
    except ImportError as error:
        raise RealUnavailable(f"processes need more ({error}): pip install 'kvmove[real,service]'") from None
    ports = [number or free_port() for number in (port, pull_port, reply_port)]
    with tempfile.TemporaryDirectory(prefix="kvmove-up-") as folder:
        status = asyncio.run(
            _run(built, Path(folder), ports, instance_port, transport, journal or str(Path(folder) / "journal.db"))
        )
    if isinstance(status, str):
        raise UserError(status)
    if status:
        raise typer.Exit(status)


def topology(
    built: Built, folder: Path, ports: list[int], instance_port: int, transport: str, journal: str
) -> Topology:
    """The processes, not started."""
    import json

    from kvreal.topology import Process, Topology, constants, instance_files

    def say(line: str) -> None:
        print(line, flush=True)

    port, pull, reply = ports
    monitor = json.dumps({"pull": pull, "reply": reply})
    argv = ["controller", "--host", "localhost", "--port", str(port), "--monitor-ports", monitor, "--journal", journal]
    argv += ["--direction", built.config.direction]
    for constant, value in constants(built.config).items():
        argv += ["--set", f"{constant}={value}"]
    controller = Process("controller", argv, say)
    files = instance_files(built, folder, f"localhost:{pull}", f"localhost:{reply}", transport)
    instances = []
    for number, (name, path) in enumerate(files):
        at = instance_port + number if instance_port else 0
        argv = ["instance", "--config", str(path), "--engine", "synthetic", "--port", str(at)]
        instances.append(Process(name, argv, say))
    return Topology(controller, instances)


async def _run(
    built: Built, folder: Path, ports: list[int], instance_port: int, transport: str, journal: str
) -> int | str:
    """0, 1, or the line that says why not."""
    from kvreal.topology import TopologyError

    whole = topology(built, folder, ports, instance_port, transport, journal)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stopped = asyncio.ensure_future(stop.wait())
    started = asyncio.ensure_future(whole.start(READY_S))
    try:
        await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            return 0
        try:
            started.result()
        except TopologyError as error:
            return str(error)
        names = list(built.instances)
        print(f"up: http://localhost:{ports[0]}, {output.plural(len(names), 'instance')}. Ctrl-C ends it.", flush=True)
        ended = asyncio.ensure_future(whole.until_one_ends())
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            ended.cancel()
            return 0
        print(f"kvmove: {ended.result()}; all the others are stopped", file=sys.stderr, flush=True)
        return FAILED
    finally:
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)
        await whole.stop()
