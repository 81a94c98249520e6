"""From what the processes left behind to a Result: logs merged, phases and placement computed, bytes judged."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

from kvcore.protocol.messages import Rid
from kvcore.scenario import build, history
from kvcore.scenario.history import VERSION, Header, Line
from kvcore.scenario.result import CopyRecord, Operation, PhaseTracker, Result, Violation
from kvreal import control as c
from kvreal.seats import Broken
from kvreal.session import Session

Metrics = Dict[str, Union[int, float, str]]


def merged(session: Session, path: Path) -> Tuple[Header, int]:
    """Write one history of all processes' logs, in order of time, to ``path``. Its header and how many files."""
    built = session.built
    header = Header(VERSION, "real", built.name, built.seed, built)
    for lender, file in session.histories:
        lender.bring(file)
    files = [file for _, file in session.histories if file.exists()]
    history.merge(files, path, header, lambda text: None)
    return header, len(files)


def result(
    session: Session, path: Path, keep: bool, hung: List[str], broken: Optional[Broken], lines: Optional[List[Line]]
) -> Result:
    """What the run gives back. ``lines``: the merged history where it is held already, else it is read."""
    built = session.built
    checked = {seat.name: seat.checked[-1] for seat in session.seats.values() if seat.checked}
    copies = [copy for each in checked.values() for copy in each.copies]
    tracker = PhaseTracker(built.bytes_per_token)
    queued: Dict[Rid, int] = {copy.rid: copy.began_ns - copy.asked_ns for copy in copies}
    for line in lines if lines is not None else history.read(path, lambda text: None)[1]:
        tracker.step(line.t, line.node, line.input, line.out)
        rid = getattr(line.input, "rid", None)
        if rid in queued:
            tracker.queued(rid, queued[rid])
    visible = {
        name: {place: {key for key, _ in chunks} for place, chunks in each.inventory.items()}
        for name, each in checked.items()
    }
    names = sorted({copy.transport for copy in copies if copy.transport and copy.state == "done"})
    return Result(
        world="real",
        scenario=built.name,
        seed=built.seed,
        operations=_operations(session, checked),
        violations=_violations(session, checked, broken),
        placement=build.placement(built, visible),
        metrics=_metrics(session, checked, copies),
        transport="+".join(names) if names else None,
        phases=tracker.done,
        hung=hung,
        history=str(path) if keep else None,
        fired=session.acts.fired_counts(),
        struck=session.acts.struck,
        copies=copies,
    )


def _operations(session: Session, checked: Dict[str, c.Checked]) -> List[Operation]:
    client = checked.get(session.client)
    return list(client.operations) if client is not None else []


def _violations(session: Session, checked: Dict[str, c.Checked], broken: Optional[Broken]) -> List[Violation]:
    """Wrong bytes, and nodes that could not go on. The protocol's properties are the checkers', over the history."""
    now = session.now()
    found = []
    for name, each in sorted(checked.items()):
        for bad in each.spoiled:
            chunk = f"{bad.location} slot {bad.slot}, chunk {bad.key.hex()[:12]}"
            text = f"{chunk}: byte {bad.offset} is not what was stored"
            found.append(Violation("byte", name, now, text))
    if broken is not None:
        found.append(Violation(f"node {broken.kind}", broken.node, now, broken.text.strip().splitlines()[-1]))
    return found


def _metrics(session: Session, checked: Dict[str, c.Checked], copies: List[CopyRecord]) -> Metrics:
    done = [copy for copy in copies if copy.state == "done"]
    copied = sum(copy.nbytes for copy in done)
    busy_ns = sum(copy.ended_ns - copy.began_ns for copy in done)
    wiped = sum(each.wiped_bytes for seat in session.seats.values() for each in seat.checked)
    metrics: Metrics = {
        "bytes_checked": sum(each.checked_bytes for each in checked.values()),
        "chunks_checked": sum(each.checked_chunks for each in checked.values()),
        "chunks_spoiled": sum(len(each.spoiled) for each in checked.values()),
        "bytes_overwritten": wiped,
        "copies": len(done),
        "copies_failed": sum(copy.state == "failed" for copy in copies),
        "copies_stopped": sum(copy.state == "stopped" for copy in copies),
        "bytes_copied": copied,
        "copy_busy_ns": busy_ns,
        "copy_queue_ns": sum(copy.began_ns - copy.asked_ns for copy in done),
        "copy_gb_per_s": round(copied / busy_ns, 3) if busy_ns else 0.0,
        "processes": sum(seat.life for seat in session.seats.values()),
        "workload_ns": session.now() - session.started_ns,
    }
    for name in ("inputs", "frames_sent", "frames_received", "frames_dropped", "frames_malformed", "filled_bytes"):
        metrics[name] = sum(each.counters.get(name, 0) for each in checked.values())
    return metrics
