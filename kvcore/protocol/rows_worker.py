"""A worker's transitions: its birth, the pin, the writer, the reservation, the quarantine, the engine."""

from __future__ import annotations

from typing import Final

from kvcore.protocol.rows import Table

BIRTH: Final = Table("birth", "worker", "one process: registered or not")
SOURCE: Final = Table("source", "worker", "the pin of one event")
WRITER: Final = Table("writer", "worker", "the source's writer of one reservation (push only)")
DESTINATION: Final = Table("destination", "worker", "the reservation of one event")
QUARANTINE: Final = Table("quarantine", "worker", "the slots of one aborted reservation")
ENGINE: Final = Table("engine", "worker", "what an engine does with its own rank; it needs no epoch")
HOLD: Final = Table("hold", "worker", "a user's pin at one rank")

UNBORN = "new, expelled, refused"
ALL = "new, registered, expelled, refused"


def _birth() -> None:
    row = BIRTH.row
    row("new", "Boot", "register", "", "", "Register")
    row("new, expelled", "register timer", "register again", "", "", "Register")
    row(UNBORN, "Registered", "take the epoch; nothing of another one is believed", "registered", "h11 h32",
        "Note Beat")
    row("registered", "Registered: of a higher epoch", "take it; nothing of the old one is believed", "", "h11",
        "Note Beat")
    row("registered, expelled", "Registered: again", "ignored: not above the last epoch")
    row("new", "Registered: of another process", "ignored: not my nonce", "", "h32")
    row("new, expelled", "RegisterRefused", "stop asking", "refused", "", "Note")
    row("new, expelled", "RegisterRefused: mismatch", "note it and ask on: its mates may be about to go", "refused", "",
        "Note")
    row("refused", "register timer: after a mismatch", "register again", "", "", "Register")
    row("new, expelled", "RegisterRefused: of another process", "ignored: not my nonce")
    row("refused", "RegisterRefused", "say so again", "", "", "Note")
    row("registered", "RegisterRefused", "ignored: I have an epoch")
    row(ALL, "Probe", "answer, with my epoch and nonce", "", "h32", "Alive")
    row("registered", "Expelled", "my epoch is over: end pins and reservations; register", "expelled", "",
        "Note Register")
    row("registered", "Expelled: of an epoch before", "ignored: long over")
    row(UNBORN, "Expelled", "ignored: I have no epoch")
    row("registered", "beat timer", "beat, with every location's (inc, seq)", "", "h29", "Beat")
    row("registered", "Resync", "the whole inventory", "", "h29", "Snap")
    row("registered", "Clear", "end the location's reservations, empty it, raise its incarnation", "", "h20",
        "Note Cleared")
    row("registered", "Clear: again", "answer only", "", "h20", "Cleared")
    row("registered", "PeerGone", "close that process's window", "", "h30", "CloseWindow")
    row(UNBORN, "Resync, Clear, PeerGone", "refused: no epoch", "", "", "Note")
    row("registered", "Clear: of a lower incarnation", "refused: its controller has been succeeded", "", "h28", "Note")
    row("registered", "Command: full", "an injected fault: nothing can be taken")
    row("registered", "Command: unmount", "an injected fault: a location and its bytes are gone; end its pins, user"
        " pins, reservations and retentions, raise its incarnation", "", "h20", "Note Beat")


def _source() -> None:
    row = SOURCE.row
    row("none", "Pin", "a fresh pid for the longest held prefix; the lease runs", "held", "h11 h22", "Pinned")
    row("none", "Pin: nothing held", "say so", "", "", "Pinned")
    row("none", "Pin: a location that is not here", "refuse, naming mine", "", "", "Refused")
    row("held", "Pin", "the same pid; its lease runs on", "", "h15 h39", "Pinned")
    row("held", "Renew", "the lease runs anew", "", "h22", "Pinned")
    row("held", "Renew: of another pid", "that pin is gone", "", "h15", "Pinned")
    row("none", "Renew", "that pin is gone: never a new one", "", "h15", "Pinned")
    row("none", "Release", "answer: pin_gone; nothing is deleted", "", "h04", "Released")
    row("held", "Release: of another pid", "answer: pin_gone; nothing is deleted", "", "h05", "Released")
    row("held", "Release: keep", "let go", "none", "", "Released")
    row("held", "Release: delete", "tail first, drop what the index still names by the pinned slot; let go", "none",
        "h03 h21", "Delta Released")
    row("held", "Release: delete, a child is here", "keep that chunk; let go", "none", "h16", "Released")
    row("held", "Release: delete, a user's pin is on it", "keep that chunk; let go", "none", "", "Released")
    row("held", "Release: delete, another event retains it", "keep that chunk; let go", "none", "h34", "Released")
    row("none", "Fence", "not alive", "", "h09 h11", "Fenced")
    row("held", "Fence", "alive, if it is that pid", "", "h09 h10", "Fenced")
    row("held", "lease timer", "kill the pid, then let go of its slots", "none", "h09 h22 h37", "Note")
    row("held", "Clear", "the index is emptied, the pin and its bytes stay", "", "", "Note Cleared")
    row("none", "Clear", "the index is emptied", "", "", "Note Cleared")
    row("held", "Expelled", "let go", "none", "", "Note Register")
    row("none", "Expelled", "nothing to let go", "", "", "Note Register")


def _writer() -> None:
    row = WRITER.row
    row("none", "Push", "write", "writing", "", "StartCopy")
    row("none", "Push: not above the mark", "refuse: doubled, or overtaken by its Stop", "", "h13 h13c", "Pushed")
    row("none", "Push: below the mark, and awaited", "write: another is to be written after it", "writing", "h13",
        "StartCopy")
    row("none", "Push: its pin is gone", "refuse: source_changed", "", "h09", "Pushed")
    row("writing", "Push: again", "ignored: it runs", "", "h13")
    row("none", "Stop", "raise the mark; nothing runs", "", "h13c", "Stopped")
    row("writing", "Stop", "raise the mark, stop it; its end answers", "", "h12", "AbortCopy")
    row("writing", "CopyMoved", "say how far it is", "", "", "Moved")
    row("none", "CopyMoved", "ignored: it is over")
    row("writing", "CopyDone", "good, if the pin is still alive", "none", "h09", "Pushed")
    row("writing", "CopyDone: failed", "say so", "none", "", "Pushed")
    row("writing", "CopyStopped", "say so", "none", "h12", "Stopped")
    row("none", "Expelled", "nothing to stop", "", "", "Note Register")
    row("writing", "Expelled", "stop it; its end answers", "", "", "Note AbortCopy Register")


def _destination() -> None:
    row = DESTINATION.row
    every = "none, copying, fencing, retained"
    row(every, "Fetch: another incarnation than mine", "refuse: stale_inc", "", "h18 h20", "Refused")
    hold = "hold what is here and not leaving, take slots for the rest; "
    row("none", "Fetch", hold + "read", "copying", "h02 h07 h19", "Reserved StartCopy")
    row("none", "Fetch: by push", hold + "ask for the push", "copying", "h02 h07 h19", "Reserved Push")
    row("none", "Fetch: in steps", hold + "read the first steps, each behind the one before it", "copying",
        "h02 h07 h19", "Reserved StartCopy")
    row("none", "Fetch: all is here", "commit at once", "retained", "h02 h06", "Reserved Committed")
    row("none", "Fetch: no slot for the first", "refuse: full", "", "h23", "Refused")
    row("copying", "Fetch", "say again what is reserved", "", "", "Reserved")
    row("copying", "Fetch: by push", "say again what is reserved, and ask for the push again", "", "", "Reserved Push")
    row("fencing", "Fetch", "say again what is reserved, and ask the source again", "", "", "Reserved Fence")
    row("retained", "Fetch", "committed; the retention runs anew", "", "h33", "Committed")
    row("none", "Retain", "committed 0: there is no retention", "", "h35", "Committed")
    row("copying, fencing", "Retain", "say again what is reserved", "", "", "Reserved")
    row("retained", "Retain", "committed; the retention runs anew", "", "h35", "Committed")
    row("copying", "CopyDone", "ask the source whether the pin was alive after the last byte", "fencing", "h09 h10",
        "Fence")
    row("copying", "CopyDone: of a step", "ask the source whether the pin was alive after its last byte", "", "h09 h10",
        "Fence")
    row("copying", "CopyDone: of a step, failed", "stop the other steps, free what nothing writes into, refuse:"
        " copy_failed", "none", "h12", "AbortCopy Refused")
    row("copying", "CopyMoved", "say how far it is", "", "", "Reserved")
    row("copying", "Moved", "say how far it is", "", "", "Reserved")
    row("none, fencing, retained", "CopyMoved, Moved", "ignored: all of it is here, or nothing will be")
    row("copying", "CopyDone: failed", "free its slots, refuse: copy_failed", "none", "", "Refused")
    row("copying", "CopyDone, CopyStopped, Pushed, Stopped: of another reservation",
        "only that one's quarantine ends", "", "h14")
    row("none, fencing, retained", "CopyDone, CopyStopped, Pushed, Stopped",
        "only that reservation's quarantine ends", "", "h14")
    step = "show and hold it, and what stands ready behind it; begin the next"
    row("copying", "Fenced: alive, of a step", step, "", "h07", "Delta StartCopy Reserved")
    row("copying", "Fenced: alive, of a step that has others before it", "keep it: nothing is shown out of order")
    row("copying", "Pushed: good, of a step", step, "", "h07", "Delta Push Reserved")
    row("copying", "Pushed: good", "commit", "retained", "h03 h07", "Delta Committed")
    row("copying", "Pushed: failed", "free its slots, refuse", "none", "", "Refused")
    row("none, copying, retained", "Fenced", "ignored: nothing asks", "", "h14")
    row("fencing", "Fenced: alive", "commit: index what is not here or leaving, retain all", "retained", "h07 h33",
        "Delta Committed")
    row("fencing", "Fenced: not alive", "free its slots, refuse: source_changed", "none", "h09 h31", "Refused")
    row("none", "End", "ignored: nothing is here of it")
    row("copying", "End", "stop the read; its slots go into quarantine", "none", "h12", "AbortCopy")
    row("copying", "End: in steps", "stop every read that runs; their slots go into quarantine; what is shown stays",
        "none", "h12", "AbortCopy")
    row("copying", "End: by push", "ask the source to stop; its slots go into quarantine", "none", "h12", "Stop")
    row("fencing", "End", "free its slots", "none")
    row("retained", "End", "the retention ends", "none", "h33")
    row("copying", "reservation timer", "as End, and refuse: copy_failed", "none", "h38", "AbortCopy Refused")
    row("fencing", "reservation timer", "free its slots, refuse: source_changed", "none", "h38", "Refused")
    row("retained", "retention timer", "the retention ends", "none", "h33", "Note")
    row("none, retained", "Clear", "the index is emptied, a retention ends", "none", "h20", "Note Cleared")
    row("copying", "Clear", "as End", "none", "h20", "AbortCopy Note Cleared")
    row("fencing", "Clear", "free its slots", "none", "h20", "Note Cleared")
    row("copying", "Expelled", "as End", "none", "", "Note AbortCopy Register")
    row("none", "Expelled", "nothing to end", "", "", "Note Register")
    row("fencing", "Expelled", "as End", "none", "", "Note Register")
    row("retained", "Expelled", "the retention lives on", "", "h40", "Note Register")
    row(every, "WindowClosed", "that process's quarantines end", "", "h30")


def _quarantine() -> None:
    row = QUARANTINE.row
    row("waiting", "CopyDone, CopyStopped", "the read has ended: free its slots", "none", "h12 h14")
    row("waiting", "Pushed, Stopped", "the writer has ended: free its slots", "none", "h12 h14")
    row("none", "CopyDone, CopyStopped, Pushed, Stopped", "ignored: nothing waits for it")
    row("waiting", "WindowClosed", "nothing of that process can land: free its slots", "none", "h30")
    row("none", "WindowClosed", "remember that its writers are gone", "", "h30")
    row("waiting", "quarantine timer", "ask the source to stop again, tell the controller that it is silent", "",
        "h30", "Stop Suspect")


def _engine() -> None:
    row = ENGINE.row
    row("any", "StoreRequest", "hold what is here, take slots for the rest, write them", "", "", "StartFill")
    row("any", "StoreRequest: all is here", "answer", "", "", "Answer")
    row("any", "StoreRequest: no slot for the first", "refuse: full; engines never wait", "", "h23", "Answer")
    row("any", "FillDone", "index the bytes, now whole", "", "", "Delta Answer")
    row("any", "FillDone: cleared meanwhile, or failed", "free the slots, refuse", "", "h20", "Answer")
    row("any", "UseRequest", "hold and read the longest held prefix", "", "h27", "StartRead")
    row("any", "UseRequest: nothing held", "answer 0", "", "", "Answer")
    row("any", "ReadDone", "let go", "", "h27", "Answer")


def _hold() -> None:
    row = HOLD.row
    row("none", "Hold", "hold the longest held prefix; the lease runs", "held", "", "Held")
    row("none", "Hold: nothing held", "say so", "", "", "Held")
    row("held", "Hold", "the lease runs anew", "", "", "Held")
    row("held, none", "Unhold", "let go", "none", "", "Held")
    row("held", "hold timer", "let go: a pin cannot leak", "none")


_birth()
_source()
_writer()
_destination()
_quarantine()
_engine()
_hold()
