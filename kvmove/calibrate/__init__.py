"""``kvmove calibrate``: measure this machine on real processes, and write the profile that the simulator reads.

plan.py says what is played, measure.py plays it, samples.py reads what came of it; fit.py, copies.py and solve.py make
a profile of that, write.py a file; accuracy.py holds the profile against scenarios that had no part in it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from kvcore.scenario.profile import AUTO, Made, load_profile
from kvmove.calibrate.accuracy import Accuracy, check
from kvmove.calibrate.fit import Fitted, fit
from kvmove.calibrate.measure import Measuring, Step, budget
from kvmove.calibrate.write import text
from kvmove.errors import UserError
from kvmove.output import plural, size

__all__ = ["AUTO", "Accuracy", "Calibrated", "calibrate", "check", "foreign", "transports"]

QUICK_REPEATS: Final = 3
REPEATS: Final = 7
BUSY: Final = 0.5
"""Processes a core that ran before, from which on it is said."""
VERSIONS: Final = ("python", "pyzmq", "nixl", "torch")


class Calibrated(msgspec.Struct, frozen=True):
    """``text``: the file. ``lacking``: transport -> why it was not measured. ``busy``: how many processes ran or wanted
    to before it began, where that was too many for the figures to be this machine's own; else 0."""

    fitted: Fitted
    text: str
    accuracy: Accuracy | None
    lacking: dict[str, str]
    busy: float = 0.0


def transports(asked: Sequence[str]) -> list[str]:
    """Those that are asked for, else all that are here, what ``auto`` takes first. UserError for one that is unknown or
    not here."""
    from kvmove.output import choice
    from kvreal import transfer

    known = transfer.here()
    for name in asked:
        choice("--transport", name, list(known))
        if known[name]:
            raise UserError(f"--transport {name}: {known[name]}")
    return list(dict.fromkeys(asked or [name for name, lack in known.items() if not lack]))


def calibrate(
    name: str, asked: Sequence[str], *, quick: bool, seconds: float, of_its_kind: bool, checked: bool, step: Step
) -> Calibrated:
    """Measure for about ``seconds``, then hold the profile against the smoke scenarios if ``checked``.

    ``of_its_kind``: leave out what tells this machine from others like it. Raises UserError, RealUnavailable."""
    from kvreal.facts import machine
    from kvreal.slab import provides

    chosen = transports(asked)
    busy = os.getloadavg()[0]
    step("asking this machine")
    here = machine()
    measuring = Measuring(chosen, budget(seconds, quick, here.memory_free_bytes, provides(), len(chosen)), step)
    measuring.run()
    step("fitting")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = Made(date=today, cpu=here.cpu, cores=here.cores, host="" if of_its_kind else here.host)
    fitted = fit(measuring.samples, measuring.parts, measuring.journal_ns, made, name, measuring.sums_per_s)
    carried = ", ".join(dict.fromkeys(by for one in measuring.samples for by in one.carried))
    about = f"{here.cpu}, {plural(here.cores, 'core')}; bytes by {carried}"
    fitted = msgspec.structs.replace(fitted, profile=msgspec.structs.replace(fitted.profile, about=about))
    fitted.profile.check()
    accuracy = None
    if checked:
        preferred = AUTO if not asked else measuring.samples[0].transport
        accuracy = check(fitted.profile, preferred, QUICK_REPEATS if quick else REPEATS, step)
    count = sum(len(one.moves) for one in measuring.samples)
    known = [f"{what} {here.versions[what]}" for what in VERSIONS if what in here.versions]
    kernel = here.system.partition("-")[0]  # a build's own suffix tells others nothing
    facts = [
        f"{today}: {about}; {', '.join(one.name for one in here.gpus) or 'no GPU'}",
        f"{plural(here.numa_nodes, 'NUMA node')}, {size(here.memory_bytes)} of memory, {kernel}",
        f"{', '.join(known)}; {count:,} moves{' (--quick)' if quick else ''}; load before it {busy:.1f}",
    ]
    facts += [f"not measured: {transport}: {why}" for transport, why in measuring.lacking.items()]
    busy = busy if busy > BUSY * here.cores else 0.0
    return Calibrated(fitted, text(fitted, facts, accuracy), accuracy, measuring.lacking, busy)


def foreign(paths: Iterable[str]) -> Iterator[str]:
    """A line for each of these profiles (empty names aside) that was measured on another machine than this one."""
    from kvreal.facts import cores, cpu_model, host_id

    for path in dict.fromkeys(filter(None, paths)):
        made = load_profile(Path(path)).made
        how = made.elsewhere(cpu_model(), cores(), host_id()) if made is not None else ""
        if how:
            yield f"{path} was measured on {how}: it predicts that machine"
