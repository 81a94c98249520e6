"""What a report is made of: the directories of ``kvmove bench``, and what the hardware suite left in them."""

from __future__ import annotations

import shlex
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvcore.scenario.located import in_words
from kvmove.bench import result
from kvmove.bench.result import Bench, Outcome
from kvmove.errors import UserError
from kvreal.facts import Machine


class Case(msgspec.Struct, frozen=True):
    """One test of the hardware suite. ``outcome``: passed, failed or skipped; ``why`` of the latter two."""

    group: str
    name: str
    outcome: str
    why: str = ""


class WrittenTest(msgspec.Struct, frozen=True):
    test: str
    outcome: Literal["passed", "failed", "skipped"]
    why: str = ""
    measured: tuple[dict[str, Any], ...] = ()


class Written(msgspec.Struct, frozen=True):
    """What is looked at of the hardware suite's JSON; its machine is another matter."""

    tests: tuple[WrittenTest, ...]
    command: tuple[str, ...] = ()
    date: str = ""


class Suite(msgspec.Struct, frozen=True):
    """One run of the hardware suite. ``measured``: what its tests noted, a row each."""

    file: str
    cases: tuple[Case, ...]
    command: str = ""
    measured: tuple[dict[str, Any], ...] = ()
    date: str = ""
    machine: Machine | None = None
    """Of its JSON; JUnit knows neither."""

    def count(self, outcome: str) -> int:
        return sum(one.outcome == outcome for one in self.cases)


class Found(msgspec.Struct, frozen=True):
    """All of one report. ``bench`` is all benches in one, or says where the rest comes from if there is none:
    ``commands``, what each was made by, is empty then."""

    bench: Bench
    commands: tuple[str, ...]
    suites: tuple[Suite, ...]


def read(folders: Sequence[str]) -> Found:
    """UserError if a folder holds nothing of ours, or something that cannot be read."""
    benches: list[Bench] = []
    suites: list[Suite] = []
    outcomes: list[Outcome] = []
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"{name}: expected a directory of `kvmove bench`, or with results of the hardware suite")
        has_bench = (folder / result.FILE).is_file()
        if has_bench:
            benches.append(result.read(folder))
        others = [path for path in sorted(folder.glob("*.json")) if path.name != result.FILE]
        here = [one for one in map(suite, others) if one is not None]
        if not here:  # both say the same; JSON says more
            here = [junit(path) for path in sorted(folder.glob("*.xml"))]
        played = [one for path in others for one in runs(path)]
        if not has_bench and not here and not played:
            raise UserError(f"{name}: there is no {result.FILE} in it, no JUnit file and no result of `kvmove run`")
        suites += here
        outcomes += played
    whole = merged(benches) if benches else unbenched(suites)
    whole = msgspec.structs.replace(whole, outcomes=(*whole.outcomes, *outcomes))
    return Found(whole, tuple(one.command for one in benches), tuple(suites))


def unbenched(suites: Sequence[Suite]) -> Bench:
    """Of what is on a page that has no bench: the machine, as the hardware suite found it. UserError: two of them."""
    told = [one for one in suites if one.machine is not None]
    machines = [result.described(one.machine) for one in told if one.machine is not None]
    for one, machine in zip(told, machines):
        if (machine["CPU"], machine["cores"]) != (machines[0]["CPU"], machines[0]["cores"]):
            raise UserError(f"{one.file}: it is of another machine than {told[0].file}: one page is of one machine")
    return Bench(
        name="hardware suite" if suites else "runs", begun=told[0].date if told else "", took_s=0, command="", seed=0,
        repeats=0, warmup=0, profile="", machine=machines[0] if machines else {},
        versions=told[0].machine.versions if told and told[0].machine is not None else {},
    )  # fmt: skip


def merged(benches: Sequence[Bench]) -> Bench:
    """The first one, with the others' cells and findings after its own. UserError if they are of different machines."""
    first = benches[0]
    for other in benches[1:]:
        for key in ("CPU", "cores", "GPUs"):
            ours, theirs = first.machine.get(key), other.machine.get(key)
            if ours != theirs:
                raise UserError(
                    f"{other.name}: {key} is {theirs}, of {first.name} it is {ours}: figures of two"
                    " machines do not belong on one page (kvmove report --diff compares them)"
                )
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for one in benches:
        skipped |= one.skipped
        failed |= one.failed
    return msgspec.structs.replace(
        first,
        cells=tuple(cell for one in benches for cell in one.cells),
        figures=tuple(figure for one in benches for figure in one.figures),
        goals=tuple(goal for one in benches for goal in one.goals),
        outcomes=tuple(outcome for one in benches for outcome in one.outcomes),
        timings=tuple(timing for one in benches for timing in one.timings),
        took_s=sum(one.took_s for one in benches),
        skipped=skipped,
        failed=failed,
    )


def junit(path: Path) -> Suite:
    """What ``pytest --junit-xml`` writes. UserError if it is something else."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"{path}: not a JUnit file: {error}") from None
    cases = []
    for case in root.iter("testcase"):
        outcome, why = "passed", ""
        for kind, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            for node in case.findall(kind):
                outcome, why = word, (node.get("message") or "").splitlines()[0] if node.get("message") else ""
        cases.append(_case(case.get("name", ""), outcome, why))
    if not cases:
        raise UserError(f"{path}: a JUnit file without a test")
    return Suite(path.name, tuple(cases))


def _case(name: str, outcome: str, why: str) -> Case:
    """``test_between_tiers[cpu to disk]`` is of the group ``between tiers``."""
    group = name.partition("[")[0].removeprefix("test_").replace("_", " ")
    return Case(group, name, outcome, why)


def suite(path: Path) -> Suite | None:
    """What ``pytest --hardware-json`` writes; None for another JSON file."""
    try:
        body: Any = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("what") != "kvmove hardware suite":
        return None
    try:
        said = msgspec.convert(body, Written)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: not a result of the hardware suite: {in_words(str(error))}") from None
    cases = tuple(_case(one.test.partition("::")[2], one.outcome, one.why) for one in said.tests)
    measured = tuple(row for one in said.tests for row in one.measured)
    return Suite(path.name, cases, shlex.join(said.command), measured, said.date, _machine(body))


def _machine(body: dict[str, Any]) -> Machine | None:
    try:
        return msgspec.convert(body.get("machine"), Machine)
    except msgspec.ValidationError:  # another version's
        return None


def runs(path: Path) -> list[Outcome]:
    """The outcomes of a file that ``kvmove run --json`` wrote; none for another JSON file."""
    try:
        body: Any = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, OSError):
        return []
    bodies = body.get("runs", [body]) if isinstance(body, dict) else []
    found = []
    for one in bodies:
        if not isinstance(one, dict) or "worlds" not in one or "scenario" not in one:
            continue
        held = one.get("comparison", {})
        differs = [*held.get("outcome", {}).get("differs", []), *held.get("replay", {}).get("differs", [])]
        for world, played in one["worlds"].items():
            operations = played.get("operations", [])
            moves = Counter(operation["state"] for operation in operations if operation.get("what") == "move")
            violations = [violation["text"] for violation in played.get("violations", [])]
            bad = [*played.get("hung", []), *played.get("expectations_failed", []), *violations, *differs]
            good = bool(one.get("good"))
            found.append(
                Outcome(
                    file="/".join(Path(one.get("file", "")).parts[-2:]),
                    name=one["scenario"],
                    world=world,
                    good=good,
                    wall_s=float(played.get("metrics", {}).get("wall_s", 0.0)),
                    fired=played.get("fired", {}),
                    violations=len(violations),
                    moves=moves,
                    why="" if good else next(iter(bad), "its run in the other world went wrong"),
                )
            )
    return found
