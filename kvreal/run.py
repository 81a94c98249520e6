"""``run(built) -> Result``: a scenario on real processes. Whatever happens, no process, port or file is left behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final, List, Mapping, Optional

from kvcore.scenario.build import Built, as_measured
from kvcore.scenario.faults import Crash, FaultPlan
from kvcore.scenario.history import HistoryError
from kvcore.scenario.result import Result
from kvreal import collect
from kvreal.arena import ARENAS
from kvreal.pool import HostError, Lender, Pool
from kvreal.seats import Broken, Hang
from kvreal.session import Session

FATAL: Final = ("JournalError", "HistoryError", "SlabError", "transport")
"""Troubles of this machine, not of the protocol: they end the run with an error instead of a result."""


class RunError(Exception):
    """The run could not be carried out here; one line for people says why."""


def run(
    built: Built,
    *,
    history: Optional[Path] = None,
    transport: str = "auto",
    pool: Optional[Pool] = None,
    timeout_s: Optional[float] = None,
    faults: bool = True,
    elsewhere: Optional[Mapping[str, Lender]] = None,
) -> Result:
    """Start a process a node, play the client's steps, wait until all is quiet, check every byte, and tell.

    ``history``: where the merged log goes; without it none is kept. ``pool``: processes to use, and to leave running;
    without one they are started and ended here (``transport`` is then the pool's). ``elsewhere``: instance -> where its
    ranks run instead (``kvreal.borrow``). ``timeout_s``: overrides the scenario's deadline. A run that is not quiet in
    time is ended and says who was not (``Result.hung``). Raises RunError (a child that cannot start, no memory, a
    history that cannot be written) and TransferError (a transport that is not there); anything else, Ctrl-C too, passes
    through once everything is reaped.
    """
    if history is not None:
        _writable(history)
    built = as_measured(built, pool.transport if pool is not None else transport)
    own = pool is None
    used = pool if pool is not None else Pool(transport)
    try:
        with tempfile.TemporaryDirectory(prefix="kvreal-", ignore_cleanup_errors=True) as folder:
            return _run(built, used, Path(folder), history, timeout_s, faults, elsewhere or {})
    except HostError as error:
        raise RunError(str(error)) from error
    finally:
        if own:
            used.close()


def _writable(path: Path) -> None:
    """HistoryError before anything is started, if the history cannot go there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise HistoryError(f"{path}: cannot write the history: {error.strerror}") from error


def _run(
    built: Built,
    pool: Lender,
    folder: Path,
    keep: Optional[Path],
    timeout_s: Optional[float],
    faults: bool,
    elsewhere: Mapping[str, Lender],
) -> Result:
    limit_ns = built.deadline_ns if timeout_s is None else int(timeout_s * 1e9)
    away = {instance: sum(spec.name.rpartition("/")[0] == instance for spec in built.specs) for instance in elsewhere}
    spare = _restarts(built) if faults else 0
    pool.warm(len(built.specs) - sum(away.values()) + spare)
    for instance, lender in elsewhere.items():
        lender.warm(away[instance] + spare)
    session = Session(built, pool, folder, limit_ns, faults, elsewhere)
    hung: List[str] = []
    broken: Optional[Broken] = None
    try:
        try:
            session.start()
            session.play()
        except Hang as hang:
            hung = str(hang).splitlines()
        except Broken as error:
            broken = error
        _last_words(session, wipe=not hung and broken is None)
        session.release()
    finally:
        session.abandon()
        # The last to leave an arena takes it away; one whose members were all killed is nobody's.
        shutil.rmtree(f"{ARENAS}/kvmove-{session.run}", ignore_errors=True)
    if broken is not None and broken.kind in FATAL:
        raise RunError(f"{broken.node}: {broken.text}")
    path = keep if keep is not None else folder / "history.jsonl"
    collect.merged(session, path)
    return collect.result(session, path, keep is not None, hung, broken, None)


def _last_words(session: Session, wipe: bool) -> None:
    """Each process checks its own memory and hands over what it knows; after a hang, those that still answer do."""
    try:
        session.verify(wipe)
    except (Broken, HostError):
        if wipe:
            raise


def _restarts(built: Built) -> int:
    """How many processes may have to be started while the run goes on: they are better warm already."""
    plan = FaultPlan(built.faults, built.config, built.nodes)
    actions = [action for found in plan.actions.values() for action in found]
    return sum(isinstance(action, Crash) and action.restart_after_ns >= 0 for action in actions)
