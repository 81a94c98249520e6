"""The controller's transitions: of one event, of one place of an instance, of one fan-out, of one drain."""

from __future__ import annotations

from typing import Final

from kvcore.protocol.rows import Table

COORDINATOR: Final = Table("coordinator", "controller", "one move, as the controller sees it")
REGISTRY: Final = Table("registry", "controller", "who is there: one rank of one instance")
FANOUT: Final = Table("fanout", "controller", "one clear, pin or unpin, asked of every rank")
DRAIN: Final = Table("drain", "controller", "moving all that a place holds")

EARLY = "pinning, reserving, copying"
LATER = "reserving, copying"
ENDED = "done, failed"
OVER = "done, failed, unknown"


def _coordinator() -> None:
    row = COORDINATOR.row
    begin = "journal Begin, pin at every source rank"
    row("unknown", "MoveRequest", begin, "pinning", "h24", "Journal Pin")
    row("unknown", "MoveRequest: a place that is not there", "refuse, naming what is known", "", "", "Answer")
    row("unknown", "MoveRequest: namespaces differ", "fail, naming both values", "failed", "", "Journal Answer")
    row("pinning, reserving", "MoveRequest: the same idempotency key", "answer when num_tokens is fixed", "", "", "")
    row("copying, releasing", "MoveRequest: the same idempotency key", "answer now, and at the end", "", "", "Answer")
    row(ENDED, "MoveRequest: the same idempotency key", "answer as the first time, num_tokens first", "", "", "Answer")
    other = "MoveRequest: its key for another move"
    row(f"{EARLY}, releasing, {ENDED}", other, "refuse: the key is in use", "", "", "Answer")
    # Pinned
    row("pinning", "Pinned: others missing", "keep pid and slots")
    row("pinning", "Pinned: the last rank", "n = min over ranks; fetch at every destination rank", "reserving", "",
        "Fetch")
    row("pinning", "Pinned: the last rank, a move to its own place", "release and keep", "done", "h06",
        "Release Journal Answer")
    row("pinning", "Pinned: nothing held", "fail: nothing_held", "failed", "", "Journal Answer")
    row(f"{EARLY}, releasing", "Pinned: again", "ignored: has it already")
    row(f"{EARLY}, releasing", "Pinned: another pid", "release that pid, and keep", "", "h15", "Release")
    row(LATER, "Pinned: the pin is gone", "note that the source may keep", "", "", "Note")
    row("releasing", "Pinned: the pin is gone", "ignored: Released will say so")
    row(OVER, "Pinned", "release that pid, and keep", "", "h22", "Release")
    row(OVER, "Pinned: nothing held", "ignored: there is nothing to release")
    # Reserved, Committed
    row("pinning", "Reserved, Committed", "ignored: nothing was fetched yet")
    row("reserving", "Reserved: others missing", "keep")
    row("reserving", "Reserved: the last rank", "n = min over ranks; journal it if it may be asked for again; answer",
        "copying", "", "Journal Answer")
    row("reserving", "Reserved: under another incarnation", "ignored: not the process that was asked", "", "h18")
    row("copying, releasing", "Reserved", "ignored: n is fixed")
    row("reserving", "Committed: the last rank", "counts as Reserved too; decide", "releasing", "",
        "Journal Answer Journal Note Release")
    row("copying", "Committed: others missing", "keep", "", "h01")
    decide = "decide: journal it, then release at every source rank (delete, unless it is a copy)"
    row("copying", "Committed: the last rank", decide, "releasing", "h01 h08 h21", "Journal Note Release")
    row("copying", "Committed: the last rank, another's is old", "ask the old ones for their retention first", "",
        "h35", "Retain")
    row("copying", "Committed: n = 0, its retention has lapsed", "fail: retention_lapsed", "failed", "h35",
        "End Release Journal Answer")
    row("reserving", "Committed: n = 0", "ignored: it has not committed yet")
    row(f"{LATER}, releasing", "Committed: under another incarnation", "ignored: not the process that was asked", "",
        "h18")
    row("releasing", "Committed", "ignored: decided")
    row("releasing", "Committed: the last confirmation after a restart", "release at every source rank", "", "h36",
        "Release")
    row("releasing", "Committed: n = 0, its retention has lapsed", "every later Release keeps", "", "h36")
    row("releasing", "Committed: n = 0, before the confirmation", "release, and keep", "", "h36", "Release")
    row(OVER, "Reserved, Committed", "tell it that the event is over", "", "", "End")
    row("done", "Reserved, Committed: done by giving up", "ignored: its retention lapses by itself")
    # Refused, Released
    row("pinning", "Refused: of Pin", "fail, with its reason", "failed", "", "Release Journal Answer")
    row("pinning", "Refused: of Fetch", "ignored: nothing was fetched yet")
    row(LATER, "Refused: of Fetch", "fail, with its reason", "failed", "h31", "End Release Journal Answer")
    row("copying", "Refused: of Fetch, by a rank that has committed", "ignored: a late one")
    row(f"{LATER}, releasing", "Refused: of Pin", "ignored: it has pinned")
    row(f"releasing, {OVER}", "Refused: of Fetch", "ignored: too late")
    row(OVER, "Refused: of Pin", "ignored: too late")
    row(f"{EARLY}, {OVER}", "Released", "ignored: nothing waits for it")
    row("releasing", "Released: others missing", "keep what it did", "", "h25")
    row("releasing", "Released: the last rank", "end every retention", "done", "h25", "End Journal Answer")
    row("releasing", "Released: of another pid", "ignored: not the pin that was decided", "", "h05")
    # timers
    row("pinning", "retry timer", "pin again where it is missing", "", "", "Pin")
    row("reserving", "retry timer", "fetch again", "", "", "Fetch")
    row("copying", "retry timer", "fetch again, renew the retentions of ranks that have committed", "", "",
        "Fetch Retain")
    row(LATER, "retry timer: renew_ns have passed", "renew the pins as well", "", "", "Fetch Renew")
    row("releasing", "retry timer", "renew the retentions, release again", "", "", "Retain Release")
    row("releasing", "retry timer: before the confirmation", "ask for the retentions only", "", "h36", "Retain")
    row("pinning", "retry timer: deadline", "fail: deadline", "failed", "", "Release Journal Answer")
    row(LATER, "retry timer: deadline", "fail: deadline", "failed", "", "End Release Journal Answer")
    row("releasing", "retry timer: give up", "end without the sources' word, leave retentions to lapse", "done", "",
        "Journal Answer")
    row("releasing", "retry timer: give up the confirmation", "release, and keep", "", "h36", "Release")
    row(ENDED, "forget timer", "forget it", "unknown")
    # clients
    row("pinning", "CancelRequest", "fail: cancelled", "failed", "", "Release Journal Answer")
    row(LATER, "CancelRequest", "fail: cancelled", "failed", "", "End Release Journal Answer")
    row("releasing", "CancelRequest", "answer: too late", "", "", "Answer")
    row(OVER, "CancelRequest", "answer what is known", "", "", "Answer")
    row(f"{EARLY}, releasing, {OVER}", "StatusRequest", "answer what is known", "", "", "Answer")
    row(f"{EARLY}, releasing", "StatusRequest: wait", "answer when it has ended")
    # the world around it
    row("pinning", "Beat: of a participant's new epoch", "fail: restarted", "failed", "h18",
        "Release Journal Answer Note")
    row(LATER, "Beat: of a participant's new epoch", "fail: restarted", "failed", "h18",
        "End Release Journal Answer Note")
    row("releasing", "Beat: of a source's new epoch", "counts as Released", "done", "h11", "End Journal Answer Note")
    row("releasing", "Beat: of a destination's new epoch", "every later Release keeps", "", "h36", "Note")
    row("pinning", "dead timer: of a participant", "fail: dead", "failed", "", "Note Release Journal Answer")
    row(LATER, "dead timer: of a participant", "fail: dead", "failed", "", "Note End Release Journal Answer")
    row("releasing", "dead timer: of a source", "counts as Released; retentions are left to lapse", "done", "h37",
        "Note Journal Answer")
    row("releasing", "dead timer: of a destination", "every later Release keeps", "", "", "Note")
    row("pinning", "Cleared: of a participant's location", "fail: cleared", "failed", "h20", "Release Journal Answer")
    row(LATER, "Cleared: of a participant's location", "fail: cleared", "failed", "h20", "End Release Journal Answer")
    row("releasing", "Cleared: of the destination", "every later Release keeps", "", "h20")
    row("releasing", "Cleared: of the source", "ignored: its pin stays")
    row(OVER, "Beat: of a former participant's new epoch", "nothing: it is over", "", "", "Note")
    row(OVER, "Cleared: of a former participant's location", "nothing: it is over")
    # restart, from the journal
    row(EARLY, "Boot: from the journal", "fail: controller_restarted (presumed abort)", "failed", "h24", "Journal")
    row("releasing", "Boot: from the journal", "ask every destination whether it still retains", "", "h08 h36",
        "Journal Retain")
    row(ENDED, "Boot: from the journal", "as recorded", "", "", "Journal")


def _registry() -> None:
    row = REGISTRY.row
    row("unknown", "Register", "issue an epoch, journal it", "issued", "h32", "Journal Registered")
    row("unknown", "Register: of another version", "refuse, naming both", "", "", "RegisterRefused Note")
    row("unknown", "Register: its beats do not fit into dead", "refuse, naming both", "", "", "RegisterRefused Note")
    row("unknown", "Register: other constants", "issue an epoch, journal it, note both", "issued", "h32",
        "Note Journal Registered")
    row("unknown", "Register: another rank has another namespace", "refuse, naming both", "", "",
        "RegisterRefused Note")
    row("issued", "Register: again", "the same epoch again", "", "", "Registered")
    row("issued", "Register: of another process", "issue another epoch", "", "h32", "Journal Registered")
    row("believed", "Register: again", "the same epoch again", "", "", "Registered")
    row("believed", "Register: of another process", "ask the known one whether it is there", "probing", "h32", "Probe")
    row("probing", "Register: of the claimant", "ask again", "", "", "Probe")
    row("probing", "Register: of a third process", "ignored: one at a time")
    row("succeeding", "Register: of the successor", "ask the known one again", "probing", "h32", "Probe")
    row("unknown, issued, believed, succeeding", "Alive", "ignored: nobody has asked")
    row("probing", "Alive: by the known process", "refuse the claimant: duplicate_id", "believed", "h32",
        "RegisterRefused Note")
    row("probing", "Alive: by the claimant, at the known address", "issue an epoch", "succeeding", "",
        "Journal Registered")
    row("probing", "Alive: of another probe", "ignored: not what was asked")
    row("probing", "probe timer", "silence: issue an epoch", "succeeding", "h32", "Journal Registered")
    row("unknown", "Beat", "that epoch is over", "", "", "Expelled")
    row("issued", "Beat", "believe it", "believed", "h32", "Note")
    row("issued", "Beat: another rank, believed meanwhile, has another namespace", "that epoch is over", "unknown", "",
        "Expelled")
    row("succeeding", "Beat: of the successor", "believe it, the known one is out", "believed", "h32", "Note")
    row("succeeding, probing", "Beat: of the known process", "it lives")
    row("believed", "Beat", "it lives", "", "", "")
    row("believed", "Beat: seq is not the view's", "ask for the inventory", "", "h29", "Resync")
    row("believed", "Beat: under another epoch", "that epoch is over", "", "h28", "Expelled")
    row("unknown, issued", "Delta, Snap", "refused: not believed", "", "h32", "Note")
    row("believed, probing, succeeding", "Delta: the next", "apply it")
    row("believed, probing, succeeding", "Delta: again", "ignored: applied already", "", "h29")
    row("believed, probing, succeeding", "Delta: after a gap", "ask for the inventory", "", "h29", "Resync")
    row("believed, probing, succeeding", "Delta: under another epoch", "refused: not believed", "", "", "Note")
    row("believed, probing, succeeding", "Snap", "take it as the view")
    row("believed, probing, succeeding", "Snap: older than the view", "ignored: older")
    row("unknown", "Suspect", "confirm that it is gone", "", "h30", "PeerGone")
    row("issued", "Suspect: of the issued epoch", "ignored: it may yet be heard")
    row("believed, probing, succeeding", "Suspect: of the believed epoch", "ignored: it is there")
    row("believed, probing, succeeding", "Suspect: of an epoch before", "confirm that it is gone", "", "h30",
        "PeerGone")
    row("believed", "dead timer", "not believed any more; its events fail", "unknown", "", "Note")
    row("succeeding", "dead timer", "not believed any more; its events fail", "issued", "", "Note")
    row("probing", "dead timer", "not believed any more; its events fail", "", "", "Note")
    row("issued", "restored timer: of an epoch from the journal", "not waited for any longer", "unknown")
    row("unknown, issued, believed, probing, succeeding", "LookupRequest", "answer from the view", "", "", "Answer")


def _fanout() -> None:
    row = FANOUT.row
    row("none", "PinRequest", "hold at every rank", "asking", "", "Hold")
    row("none", "UnpinRequest: of a live pin", "unhold at every rank", "asking", "", "Unhold")
    row("none", "UnpinRequest: of no pin", "refuse: unknown_event", "", "", "Answer")
    row("none", "ClearRequest", "clear at every rank, naming its incarnation", "asking", "h20", "Clear")
    row("none", "PinRequest, ClearRequest: a place that is not there", "refuse, naming what is known", "", "", "Answer")
    row("asking", "PinRequest", "begin another, under its own number", "", "", "Hold")
    row("asking", "ClearRequest", "begin another, under its own number", "", "h20", "Clear")
    row("asking", "UnpinRequest: of a pin that is not yet", "refuse: unknown_event", "", "", "Answer")
    row("none", "Held, Cleared", "ignored: nobody has asked, or it has been answered")
    row("asking", "Held: others missing", "keep")
    row("asking", "Held: the last rank", "journal the pin, answer the least of the ranks", "none", "", "Journal Answer")
    row("asking", "Held: n = 0, to a pin", "refuse: nothing_held; let go at every rank", "none", "", "Answer Unhold")
    row("asking", "Cleared: others missing", "keep")
    row("asking", "Cleared: the last rank", "answer", "none", "", "Answer")
    row("asking", "fanout timer", "ask again where it is missing", "", "", "Hold")
    row("asking", "fanout timer: deadline", "fail: unreachable, naming who", "none", "", "Answer")
    row("none", "Beat: of a rank's new epoch", "nothing: nobody waits for it", "", "", "Note")
    row("asking", "Beat: of a rank's new epoch, to a pin", "fail: participant_restarted", "none", "", "Answer Note")
    row("asking", "Beat: of a rank's new epoch, to a clear", "that epoch is asked next", "", "", "Note")
    row("none", "PinRequest: of a live pin", "begin its lease again at every rank", "asking", "", "Hold")
    row("none", "PinRequest: of no pin", "refuse: unknown_event", "", "", "Answer")
    row("none", "hold timer", "the pin has lapsed: forget it", "", "", "Journal")
    row("asking", "hold timer", "the pin that is asked for anew has lapsed: forget it", "", "", "Journal")


def _drain() -> None:
    row = DRAIN.row
    row("none", "MoveRequest: no keys", "fix the list, answer what is planned, move the first chain", "draining",
        "h26", "Journal Answer Journal Pin")
    row("none", "MoveRequest: no keys, nothing is held", "fail: nothing_held", "", "", "Journal Answer Journal Answer")
    row("none", "Released, Refused", "ignored: no chain runs")
    row("none", "CancelRequest, StatusRequest", "answer what is known", "", "", "Answer")
    row("draining", "MoveRequest: no keys", "begin another", "", "h26", "Journal Answer Journal Pin")
    row("draining", "Released: of a chain, others to come", "count it, move the next chain", "", "h16",
        "End Journal Pin")
    row("draining", "Released: of the last chain", "answer the sum", "none", "", "End Journal Answer")
    row("draining", "Refused: of the last chain", "fail: incomplete, naming what stayed", "none", "",
        "End Release Journal Answer")
    row("draining", "CancelRequest", "fail the chain that runs, begin no other", "none", "", "Release Journal Answer")
    row("draining", "StatusRequest", "answer what is planned", "", "", "Answer")
    row("draining", "StatusRequest: wait", "answer when it has ended")


_coordinator()
_registry()
_fanout()
_drain()
