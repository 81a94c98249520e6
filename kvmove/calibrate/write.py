"""A profile as a file that people read: every number with a word on it and how far its measurements lay apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from kvcore.scenario.profile import CopyCost
from kvmove.calibrate.accuracy import Accuracy
from kvmove.calibrate.copies import label
from kvmove.calibrate.fit import Fitted
from kvmove.output import duration, percent, size
from kvmove.spread import Spread

CONTROL: Final = {
    "message_latency_ns": "a message on its way, with waking up whom it is for",
    "service_ns": "a node takes one message in, thinks and sends what follows",
    "journal_ns": "a record is in the kernel's hands",
    "key_ns": "each chunk that a message names, at either end",
    "index_ns": "each chunk that comes into an index or leaves it",
    "wake_ns": "each further node that is told the like at once",
}
PLAIN: Final = {
    "transfer_ns": "post a transfer and notice its end",
    "descriptor_ns": "each slot of it",
    "copy_bytes_per_s": "the largest copies",
    "host_bytes_per_s": "all copies of this host together",
    "peer_death_ns": "a transfer notices that its peer is gone (not measured)",
    "abort_ns": "a transfer is stopped (not measured)",
    "window_ns": "a peer is shut out (not measured)",
}
INSIDE: Final = {
    "memcpy_bytes_per_s": "within one process (not measured)",
    "fill_ns": "an engine writes new KV",
    "fill_bytes_per_s": "",
    "read_ns": "an engine reads KV and compares it with what it should be",
    "read_bytes_per_s": "",
    "sum_ns": "a checksum of one chunk, besides its bytes (not measured)",
    "sum_bytes_per_s": "what it reads",
}
COPY: Final = {
    "queue_ns": "asked for, until its first byte",
    "first_ns": "as much more for the first between two processes",
    "copy_ns": "fixed, from its first byte on",
    "descriptor_ns": "each chunk",
    "process_bytes_per_s": "all that one process carries out at once",
    "host_bytes_per_s": "all by this transport on this host at once",
    "cpu_s_per_gb": "CPU seconds of all processes; the simulator does not read it",
}


def text(fitted: Fitted, facts: Sequence[str], accuracy: Accuracy | None) -> str:
    """The whole file. ``facts``: what machine, what was done, a line each."""
    profile = fitted.profile
    lines = [
        "# What things cost on one machine, measured by `kvmove calibrate`. Times in nanoseconds, rates in bytes a"
    ]
    lines += [
        "# second; +- is half of what the middle half of the measurements spans. docs/calibrate.md explains each.",
        "#",
    ]
    lines += [f"# {fact}" for fact in facts]
    lines += _accuracy(accuracy)
    lines += [f"name: {profile.name}", f"about: {_quoted(profile.about)}"]
    if profile.made is not None:
        made = profile.made
        lines += ["made:", f"  date: {_quoted(made.date)}", f"  cpu: {_quoted(made.cpu)}", f"  cores: {made.cores}"]
        lines += [f"  host: {_quoted(made.host)}  # digits that tell it from others"] if made.host else []
    for head, names in (("control", CONTROL), ("bytes, where `copies` has no entry", PLAIN), ("engines", INSIDE)):
        lines += ["", f"# {head}"]
        lines += [
            _field("", name, getattr(profile, name), word, fitted.spreads.get(name)) for name, word in names.items()
        ]
    lines += ["", "# bytes: what `auto` takes first comes first", "copies:" if profile.copies else "copies: []"]
    for cost in profile.copies:
        lines += _copy(cost, fitted.spreads)
    return "\n".join([*lines, ""])


def _copy(cost: CopyCost, spreads: dict[str, Spread]) -> Iterator[str]:
    name = label(cost.transport, (cost.source, cost.target, cost.inside, cost.push))
    where = "within one process" if cost.inside else "between two processes"
    where += ", pushed" if cost.push else ""
    yield f"  - transport: {cost.transport}  # {cost.source} to {cost.target}, {where}"
    yield f"    from: {cost.source}"
    yield f"    to: {cost.target}"
    if cost.inside:
        yield "    inside: true"
    if cost.push:
        yield "    push: true"
    for field, word in COPY.items():
        value = getattr(cost, field)
        if value or (field.endswith("_ns") and field != "first_ns"):
            found = spreads.get(f"{name} {field}") or spreads.get(f"{cost.transport} {field}")
            yield _field("    ", field, value, word, found)
    yield "    rates:  # [bytes, bytes a second, the fixed costs aside]"
    for nbytes, rate in cost.rates:
        found = spreads.get(f"{name} {nbytes}")
        more = f", {_gb(found.median)} GB/s with them{_plus_minus(found)}" if found is not None else ""
        yield f"      - [{nbytes}, {_number(rate)}]  # {size(nbytes)}{more}"


def _field(indent: str, name: str, value: int | float, word: str, found: Spread | None) -> str:
    said = "; ".join(part for part in (word, _plus_minus(found).lstrip(" ,")) if part)
    return f"{indent}{name}: {_number(value)}".ljust(36) + (f"  # {said}" if said else "")


def _plus_minus(found: Spread | None) -> str:
    return f", +-{found.percent:.0f}% of {found.count}" if found is not None and found.count > 1 else ""


def _number(value: int | float) -> str:
    if isinstance(value, int) or value == int(value):
        return f"{int(value):_}"
    return f"{value:g}"


def _gb(rate: float) -> str:
    return f"{rate / 1e9:,.0f}" if rate >= 1e12 else f"{rate / 1e9:.3g}"


def _quoted(word: str) -> str:
    return '"' + word.replace("\\", "\\\\").replace('"', "'") + '"'


def _accuracy(accuracy: Accuracy | None) -> Iterator[str]:
    if accuracy is None:
        yield "# Not held against anything: `kvmove calibrate --against FILE` does that."
        return
    yield "#"
    yield f"# Held against scenarios/smoke, which had no part in it, over {accuracy.transport}:"
    yield f"# median error of a move's duration {accuracy.median_error:.0%}, worst {accuracy.worst_error:.0%}."
    yield f"# Predicted beside the middle one of {accuracy.repeats} measured:"
    for move in accuracy.moves:
        times = f"{duration(move.predicted_ns)} / {duration(move.measured.median)}"
        yield f"#   {move.scenario + ' ' + move.op:<28} {times:<20} {percent(move.error)}"
