"""The command line: one file a command. ``main`` is the console script.

Commands import what they need when they run, so that ``kvmove --help`` is quick and works where
only a part is installed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from kvmove.cli import (
    bench,
    calibrate,
    controller,
    demo,
    doctor,
    events,
    history,
    instance,
    keys,
    lookup,
    move,
    peer,
    pin,
    protocol,
    report,
    run,
    scenario,
    search,
    swarm,
    up,
)
from kvmove.errors import BAD_INPUT, GOOD, INTERRUPTED, line_for

EPILOG: Final = """Start here: `kvmove demo`, then `kvmove run scenarios/smoke/move.yaml --on both`.
Exit status: 0 all good, 1 a check or expectation failed, 2 bad input or a world that cannot run here, 130 Ctrl-C."""

app = typer.Typer(
    name="kvmove",
    help="Move the KV cache of prompts between serving instances: simulated, for real, and compared.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("run")(run.run)
app.add_typer(scenario.app, name="scenario")
app.command("history")(history.history)
app.command("protocol")(protocol.protocol)
app.command("search")(search.search)
app.command("swarm")(swarm.swarm)
app.command("demo")(demo.demo)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.command("calibrate")(calibrate.calibrate)
app.command("controller")(controller.controller)
app.command("instance")(instance.instance)
app.command("up")(up.up)
app.command("peer")(peer.peer)
app.add_typer(keys.app, name="keys")
app.command("move")(move.move)
app.command("drain")(move.drain)
app.command("lookup")(lookup.lookup)
app.command("instances")(lookup.instances)
app.command("events")(events.events)
app.command("cancel")(events.cancel)
app.command("pin")(pin.pin)
app.command("unpin")(pin.unpin)
app.command("lease")(pin.lease)


def _version(asked: bool) -> None:
    if asked:
        from kvmove.version import version_text

        print(version_text())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Say which kvmove, and which form of its core."
        ),
    ] = False,
) -> None:
    pass


#: typer's own words for bad usage. Newer releases bring this class along, older ones take click's.
_USAGE_ERROR: Final[type[Exception]] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status. Known errors become one line on stderr; anything else is a bug."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # what a command began is then ended by its own with blocks
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    raise SystemExit(call(argv))


def call(argv: Sequence[str] | None = None) -> int:
    """``main`` without the exit: the status."""
    try:
        status = app(args=None if argv is None else list(argv), prog_name="kvmove", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as exit_:  # what typer makes of a broken pipe that it sees itself
        return _nobody_reads() if exit_.code == 1 else int(exit_.code or 0)
    except _USAGE_ERROR as error:
        return _usage(error)
    except Exception as error:
        line = line_for(error)
        if line is None:
            raise
        print(f"kvmove: {line}", file=sys.stderr)
        return BAD_INPUT
    if status == INTERRUPTED:
        print("kvmove: interrupted", file=sys.stderr)
    return status if isinstance(status, int) else GOOD


def _nobody_reads() -> int:
    """``kvmove history FILE | head``: what is still to be written goes nowhere, and that is no error."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return GOOD


def _usage(error: Exception) -> int:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if not message:  # no_args_is_help: the help itself was the answer
        return BAD_INPUT
    command = getattr(getattr(error, "ctx", None), "command_path", "kvmove")
    print(f"kvmove: {' '.join(message.split())} (see {command} --help)", file=sys.stderr)
    return BAD_INPUT
