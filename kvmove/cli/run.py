"""``kvmove run``: play scenario files in simulation, for real, or both."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvmove import output
from kvmove.errors import BAD_INPUT, FAILED, UserError


def run(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Scenario files (YAML).", show_default=False)],
    on: Annotated[str, typer.Option("--on", help="sim, real, or both and compare.", metavar="WORLD")] = "sim",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a value: --set constants.lease='2 s'. Repeatable.", metavar="PATH=VALUE"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Instead of the scenario's own.", metavar="N")] = None,
    json_out: Annotated[
        str | None, typer.Option("--json", help="Write the results there as JSON; - for stdout.", metavar="OUT")
    ] = None,
    history: Annotated[
        str | None, typer.Option("--history", help="Keep the histories in this directory.", metavar="DIR")
    ] = None,
    transport: Annotated[
        str,
        typer.Option(
            "--transport", help="What carries real bytes: auto, arena, nixl, mooncake, socket, tcp.", metavar="NAME"
        ),
    ] = "auto",
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="An instance runs on another machine: tcp://HOST:PORT of a waiting `kvmove peer`, or ssh://HOST. "
            "Without a name the scenario's last one. Repeatable.",
            metavar="[INSTANCE=]URL",
        ),
    ] = None,
    peer_token: Annotated[
        str | None, typer.Option("--peer-token", help="The secret of those peers.", metavar="FILE")
    ] = None,
    peer_keys: Annotated[str | None, typer.Option("--peer-keys", help="Or the cluster's keys.", metavar="DIR")] = None,
    bind: Annotated[
        str, typer.Option("--bind", help="Where peers reach this machine, if that cannot be told.", metavar="ADDRESS")
    ] = "",
    trace: Annotated[
        str | None, typer.Option("--trace", help="Write a timeline there, for ui.perfetto.dev.", metavar="OUT")
    ] = None,
    trace_messages: Annotated[
        bool, typer.Option("--trace-messages", help="An arrow for each message in it, too.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="All about each of several files, good ones too.")
    ] = False,
) -> None:
    """Run scenarios: play the steps, inject the faults, check every property, compare with what was expected.

    A simulated run of one seed is the same, byte for byte, everywhere. A real one starts a process for each node,
    moves real bytes and compares each of them. With --on both, the real history is replayed through the protocol,
    answers and placement are compared, and predicted times stand beside measured ones.

    Examples:

    * `kvmove run scenarios/smoke/move.yaml`
    * `kvmove run scenarios/smoke/move.yaml --on both --json out.json`
    * `kvmove run scenarios/faults/*.yaml --seed 7 --history out/`
    * `kvmove run scenarios/smoke/prompt-4k.yaml --set network.links.a-b.bandwidth='25 Gbit/s'`
    * `kvmove run scenarios/smoke/prompt-4k.yaml --on both --trace out.json`
    * `kvmove run scenarios/smoke/prompt-4k.yaml --on real --peer ssh://10.0.0.2`

    Exit status: 0 all good, 1 a check or expectation failed or a run hung, 2 bad input or a world that cannot run here,
    130 Ctrl-C.
    """
    worlds = ("sim", "real") if output.choice("--on", on, ("sim", "real", "both")) == "both" else (on,)
    output.choice("--transport", transport, output.transport_names())
    if json_out not in (None, "-") and not Path(json_out).absolute().parent.is_dir():
        raise UserError(f"--json {json_out}: there is no directory {Path(json_out).parent}")
    _check_trace(trace, trace_messages, files)
    secret = _secret(worlds, peers, peer_token, peer_keys)

    from kvmove import report
    from kvmove.calibrate import foreign
    from kvmove.play import Played, Player, prepare
    from kvmove.trace import of_run

    screen = output.console(to_stderr=json_out == "-")
    # All files are read first: a mistake in the last one is told before the first one runs.
    prepared = [prepare(path, sets or (), seed) for path in files]
    if on == "both":
        for line in foreign([one.built.network.profile for one in prepared]):
            print(f"kvmove: {line}", file=sys.stderr)
    runs: list[Played] = []
    with ExitStack() as stack:
        logs = _directory(history) if history else _scratch(stack)
        player = stack.enter_context(
            Player(
                worlds,
                transport=transport,
                progress=output.progress,
                rates=trace is not None,
                peers=peers or (),
                secret=secret,
                bind=bind,
            )
        )
        for one, name in zip(prepared, _log_names(files)):
            played = player.play(one, logs / name, keep=bool(history or trace))
            if len(files) == 1 or verbose or not played.good or played.skipped:
                report.print_run(screen, played, kept=bool(history))
            else:
                report.print_line(screen, played)
            runs.append(played)
            if trace:
                _write("--trace", trace, of_run(played.histories, played.results, trace_messages))
            if not history:
                for log in played.histories.values():
                    log.unlink(missing_ok=True)
    if json_out:
        _write("--json", json_out, report.encode(runs))
    if len(runs) > 1:
        report.print_summary(screen, runs)
    if not all(played.good for played in runs):
        raise typer.Exit(FAILED)
    if any(played.skipped for played in runs):
        raise typer.Exit(BAD_INPUT)


def _scratch(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmove-")))


def _log_names(files: list[str]) -> list[str]:
    """A log's name is its scenario file's; a second file of that name gets a number."""
    names: list[str] = []
    for file in files:
        stem = Path(file).stem
        same = sum(1 for name in names if name == stem or name.startswith(f"{stem}-"))
        names.append(f"{stem}-{same + 1}" if stem in names else stem)
    return names


def _directory(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--history {name}: expected a directory, and a file of that name is in the way") from None
    return path


def _secret(worlds: tuple[str, ...], peers: list[str] | None, token: str | None, keys: str | None) -> bytes:
    if not peers:
        return b""
    if "real" not in worlds:
        raise UserError(f"--peer {peers[0]}: nothing runs there in simulation, expected --on real or both")
    if token is not None and keys is not None:
        raise UserError("--peer-token and --peer-keys: expected one of them")
    from kvmove.cli.peer import shared_secret

    return shared_secret(token, keys)


def _check_trace(trace: str | None, messages: bool, files: list[str]) -> None:
    if trace is None:
        if messages:
            raise UserError("--trace-messages: nothing to draw them in, expected --trace OUT too")
        return
    if len(files) > 1:
        raise UserError(f"--trace {trace}: expected one scenario file, not {len(files)}")
    if not Path(trace).absolute().parent.is_dir():
        raise UserError(f"--trace {trace}: there is no directory {Path(trace).parent}")


def _write(option: str, target: str, data: bytes) -> None:
    if target == "-":
        sys.stdout.buffer.write(data + b"\n")
        sys.stdout.buffer.flush()
    else:
        try:
            Path(target).write_bytes(data + b"\n")
        except OSError as error:
            raise UserError(f"{option} {target}: {error.strerror}") from None
