"""``kvmove scenario``: check scenario files, and the schema that editors complete them with."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmove.errors import BAD_INPUT, line_for

app = typer.Typer(help="Check scenario files, or print their schema.", no_args_is_help=True)


@app.command("check")
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Scenario files (YAML).", show_default=False)],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value, as kvmove run does.", metavar="PATH=VALUE")
    ] = None,
) -> None:
    """Check scenario files without running them: one line a mistake, with its file, line and column.

    Example:

    * `kvmove scenario check scenarios/smoke/*.yaml`
    """
    from kvmove.play import prepare

    bad = 0
    for path in files:
        try:
            prepared = prepare(path, sets or ())
        except Exception as error:
            line = line_for(error)
            if line is None:
                raise
            bad += 1
            typer.echo(line, err=True)
        else:
            typer.echo(f"{path}: ok: {prepared.scenario.name}")
    if bad:
        raise typer.Exit(BAD_INPUT)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of scenario files, for editors.

    Example:

    * `kvmove scenario schema > .scenario-schema.json`

    then, as the first line of a scenario file:

    * `# yaml-language-server: $schema=../../.scenario-schema.json`
    """
    import msgspec

    from kvcore.scenario.loader import json_schema

    typer.echo(msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode())
