"""Which transport a copy takes, of those that both ends have and that reach both locations, and why.

By what was measured, if a profile of this machine is at hand (``KVMOVE_PROFILE``, or ``kvmove.profile`` in an
instance's file; ``kvmove calibrate`` writes one): the fastest for a copy of that size, and what nobody measured after
it. Else in the order in which the transports stand. What a transport shuns goes by another, where one can. Handing over
in the arena moves no byte and is always first.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Dict, Final, List, NamedTuple, Optional, Tuple

from kvcore.scenario.loader import ScenarioError
from kvcore.scenario.profile import Profile, ProfileError, load_profile
from kvcore.scenario.topology import kind_of
from kvreal.facts import cores, cpu_model, host_id
from kvreal.transfer.carrier import Carrier
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Job
from kvreal.transfer.line import Endpoint

told: Final = logging.getLogger("kvmove.profile")
"""What is said of a profile, and of no peer: processes that belong together have one of them say it."""

VARIABLE: Final = "KVMOVE_PROFILE"
NO_BYTES: Final = "arena"


class Choice(NamedTuple):
    """``why``: one line for people."""

    carrier: Carrier
    why: str


def profile_from(path: str = "") -> Optional[Profile]:
    """The one at ``path``, else the one that the environment names, else none. TransferError: it cannot be read; one of
    another machine is told of and not used."""
    path = path or os.environ.get(VARIABLE, "")
    if not path:
        return None
    try:
        profile = load_profile(Path(path))
    except (ProfileError, ScenarioError, OSError) as error:
        raise TransferError(f"profile {' '.join(str(error).split())}") from error
    elsewhere = profile.made.elsewhere(cpu_model(), cores(), host_id()) if profile.made is not None else ""
    if elsewhere:
        told.warning("profile %s is not used: it is of %s", path, elsewhere)
        return None
    return profile


def choose(
    job: Job, carriers: Dict[str, Carrier], endpoint: Endpoint, profile: Optional[Profile], auto: bool = True
) -> Choice:
    """TransferError says what each end has. Not ``auto``: somebody has named the first of ``carriers``."""
    effect = job.copy.effect
    mine, theirs = kind_of(effect.location), kind_of(effect.peer_location)
    able: List[str] = []
    for name, carrier in carriers.items():
        card = endpoint.card(name)
        if card is not None and carrier.between(card, effect.location, effect.peer_location):
            able.append(name)
    if not able:
        have = ", ".join(name for name, _ in endpoint.cards)
        raise TransferError(
            f"no transport between {mine} memory here ({', '.join(carriers)}) and {theirs} memory of "
            f"{effect.peer} ({have})"
        )
    if auto and len(able) > 1:
        able, shunned = _unshunned(able, carriers, endpoint, effect.read)
        if shunned and len(able) == 1:
            return Choice(carriers[able[0]], f"{able[0]}: {shunned}")
    if len(able) == 1:
        return Choice(carriers[able[0]], f"{able[0]}: the only one that both ends have and that reaches both")
    if profile is None or not auto or able[0] == NO_BYTES:
        return Choice(carriers[able[0]], f"{able[0]}: first of those both ends have: {', '.join(able)}")
    source, target = (theirs, mine) if effect.read else (mine, theirs)
    name, said = _fastest(able, profile, source, target, job)
    return Choice(carriers[name], f"{name}: {said} by profile {profile.name}")


def _unshunned(
    able: List[str], carriers: Dict[str, Carrier], endpoint: Endpoint, read: bool
) -> Tuple[List[str], str]:
    """(those that do not shun such a copy, or all if all do; who does and why)."""
    why = {name: carriers[name].shuns(endpoint.card(name) or "", read) for name in able}
    left = [name for name in able if not why[name]]
    return left or able, "; ".join(f"not {name}, {said}" for name, said in why.items() if said)


def _fastest(able: List[str], profile: Profile, source: str, target: str, job: Job) -> Tuple[str, str]:
    push = not job.copy.effect.read
    rates = {name: profile.rate(name, source, target, job.nbytes, len(job.spans), push) for name in able}
    name = max(able, key=lambda one: rates[one])  # of equal ones, and if none was measured, the first
    said = ", ".join(f"{one} {rates[one] / 1e9:.1f} GB/s" if rates[one] else f"{one} not measured" for one in able)
    return name, f"fastest of {said}"
