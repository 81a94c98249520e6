"""``kvmove controller``: the service that moves are asked of."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from kvcore.protocol.config import Config
from kvmove import output
from kvmove.errors import RealUnavailable, UserError

if TYPE_CHECKING:
    from kvreal.controller import Opened, Ports

DEFAULT_PORTS = '{"pull": 8300, "reply": 8400}'


def controller(
    host: Annotated[str, typer.Option("--host", help="Where HTTP listens.")] = "localhost",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 9000,
    monitor_ports: Annotated[
        str, typer.Option("--monitor-ports", help="Where workers find it, as JSON.", metavar="JSON")
    ] = DEFAULT_PORTS,
    monitor_host: Annotated[str, typer.Option("--monitor-host", help="The interface of these ports.")] = "localhost",
    address: Annotated[
        str, typer.Option("--address", help="host:port that workers use, if they reach it by another name.")
    ] = "",
    journal: Annotated[
        str | None, typer.Option("--journal", help="Its file; else kvmove-controller-PORT.db here.", metavar="FILE")
    ] = None,
    durability: Annotated[
        str, typer.Option("--durability", help="process: survives SIGKILL; power: fsync before each send.")
    ] = "process",
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Bearer tokens, a line each: read TOKEN or move TOKEN.", metavar="FILE"),
    ] = None,
    keys: Annotated[
        str | None, typer.Option("--keys", help="CURVE keys of `kvmove keys`, for the workers' ports.", metavar="DIR")
    ] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="What dry runs reckon with.", metavar="YAML")] = None,
    prefill: Annotated[
        float, typer.Option("--prefill-tokens-per-s", min=1, help="What dry runs compare with.")
    ] = 8000.0,
    events_kept: Annotated[int, typer.Option("--events-kept", min=1, help="Ended events to remember.")] = 10_000,
    events_max: Annotated[int, typer.Option("--events-max", min=1, help="Events in flight; then 429.")] = 10_000,
    max_body: Annotated[int, typer.Option("--max-body-bytes", min=1024, help="Larger bodies get 413.")] = 16 << 20,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="A constant of the protocol: --set lease='2 s'. Repeatable.", metavar="NAME=VALUE"),
    ] = None,
    direction: Annotated[
        str,
        typer.Option(
            "--direction",
            help="Who moves bytes: read (the destination), push (the source), or auto: whoever is quicker by the"
            " instances' profiles; read where they have none. An instance's own word goes first.",
        ),
    ] = "auto",
    history: Annotated[
        str | None, typer.Option("--history", help="Log every step there, for `kvmove history`.", metavar="FILE")
    ] = None,
) -> None:
    """Run a controller: HTTP for those who ask, a port for the workers, a journal for what must survive.

    Examples:

    * `kvmove controller --host localhost --port 9000 --monitor-ports '{"pull": 8300, "reply": 8400}'`
    * `curl -X POST localhost:9000/lookup -H 'Content-Type: application/json' -d '{"tokens": [1, 2, 3]}'`

    Exit status: 0 told to stop, 1 the journal cannot be written any more, 2 bad input or a port that is taken.
    """
    output.choice("--durability", durability, ("process", "power"))
    output.choice("--direction", direction, ("auto", "read", "push"))
    try:
        from kvreal import controller as real
        from kvreal.http.face import Settings as FaceSettings
    except ImportError as error:
        raise RealUnavailable(f"a controller needs more ({error}): pip install 'kvmove[real,service]'") from None

    _logging()
    settings = real.Settings(
        host=host,
        port=port,
        ports=_ports(monitor_ports),
        monitor_host=monitor_host,
        address=_address(address),
        config=msgspec.structs.replace(_config(sets or [], events_kept, events_max), direction=direction),
        max_body_bytes=max_body,
        face=FaceSettings(_profile(profile), prefill),
        history=Path(history) if history else None,
    )
    for line in real.checked_hosts(settings, tokens is not None, keys is not None):
        raise UserError(line)
    path = Path(journal or f"kvmove-controller-{port}.db")
    status = real.run(settings, lambda: _opened(path, durability, tokens, keys, settings.config))
    if status:
        raise typer.Exit(status)


def _ports(text: str) -> Ports:
    from kvcore.scenario.located import in_words
    from kvreal.controller import Ports

    try:
        return msgspec.json.decode(text, type=Ports)
    except msgspec.MsgspecError as error:
        raise UserError(f"--monitor-ports {text}: {in_words(str(error))}; expected {DEFAULT_PORTS}") from None


def _address(text: str) -> str:
    from kvreal.endpoints import EndpointError, endpoint_of

    try:
        return endpoint_of(text) if text else ""
    except EndpointError as error:
        raise UserError(f"--address {error}") from None


def _profile(path: str | None) -> Any:
    from kvcore.scenario.profile import Profile, load_profile

    return load_profile(Path(path)) if path else Profile()


def _config(sets: list[str], events_kept: int, events_max: int) -> Config:
    """The protocol's constants, as in a scenario file's ``constants``."""
    from kvcore.protocol.config import ConfigError
    from kvcore.scenario.located import convert_as
    from kvcore.scenario.mistake import Mistake, path_text
    from kvcore.scenario.schema import Constants, Scenario, config_of

    given: dict[str, Any] = {}
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected NAME=VALUE, like lease='2 s'")
        name, value = name.strip().removeprefix("constants."), value.strip()
        given[name] = value
        if name == "scale":
            with suppress(ValueError):  # what is no number is refused below, with the rest
                given[name] = float(value)
    constants = convert_as(given, Constants)
    if isinstance(constants, Mistake):
        raise UserError(f"--set {path_text(constants.path)}: {constants.text}")
    try:
        config = config_of(Scenario(name="controller", instances={}, constants=constants))
    except (ConfigError, ValueError) as error:
        raise UserError(f"--set {', '.join(sets)}: {error}") from None
    return msgspec.structs.replace(config, events_kept=events_kept, events_max=events_max)


def _logging() -> None:
    try:
        from kvreal.logs import configure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        logging.basicConfig(level=logging.WARNING, format="kvmove: %(message)s")
    else:
        configure()


def _opened(path: Path, durability: str, tokens: str | None, keys: str | None, config: Config) -> Opened:
    from kvreal import keys as curve
    from kvreal.controller import Journaled, Opened
    from kvreal.http import auth
    from kvreal.journal import JournalError
    from kvreal.journal_sqlite import open_journal

    def journal() -> Journaled:
        try:
            found, records = open_journal(path, durability, config.events_kept_ns, config.events_kept)
        except JournalError as error:
            raise UserError(str(error)) from None
        return Journaled(journal=found, records=records, keeper=found, about=f"{path} ({durability})")

    try:
        curve_keys = curve.load(keys) if keys is not None else None
        known = auth.read_tokens(Path(tokens)) if tokens is not None else None
    except (curve.KeysError, auth.TokensError) as error:
        raise UserError(str(error)) from None
    return Opened(journal=journal, curve=curve_keys, auth_dependency=auth.dependency(known))
