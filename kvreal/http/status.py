"""From what the controller's machine answers to what HTTP says. A 2xx is a promise that what it says is true."""

from __future__ import annotations

from typing import Dict, Final, List, Optional, Tuple

import msgspec
from msgspec import UNSET

from kvcore.protocol.messages import Answer, event_name
from kvcore.scenario.located import in_words
from kvreal.http.models import ErrorReply, MoveReply

REASON_HEADER: Final = "Kvmove-Reason"

#: reason -> status of a request that was refused, or of a move that failed before num_tokens was fixed
CODES: Final[Dict[str, int]] = {
    "unknown_instance": 404,
    "unknown_location": 404,
    "unknown_event": 404,
    "in_progress": 409,
    "mismatch": 409,
    "idempotency_key_reused": 422,
    "busy": 429,
    "not_ready": 503,
    "deadline": 504,
    "unreachable": 504,
    "full": 507,
    "not_implemented": 501,
    "bad_body": 422,
    "too_large": 413,
}
OTHER: Final = 409
"""Cancelled, a participant restarted, replaced, dead or cleared, the copy failed: the world changed meanwhile."""
RETRY_AFTER_S: Final[Dict[int, int]] = {429: 1, 503: 1}


class Reply(msgspec.Struct, frozen=True):
    """One HTTP answer, before it is bytes."""

    status: int
    body: object
    headers: Dict[str, str] = {}


def code_of(reason: str) -> int:
    return CODES.get(reason, OTHER)


def one_line(text: str) -> str:
    """What a stranger wrote, quoted: it begins no lines in anybody's log."""
    return text if text.isprintable() else "".join([c if c.isprintable() else repr(c)[1:-1] for c in text])


def refusal(reason: str, detail: str, event: int = 0, known: Optional[List[str]] = None, field: str = "") -> Reply:
    """An error with a body that says which event, if there is one, and what is known."""
    status = code_of(reason)
    headers = {REASON_HEADER: reason}
    if status in RETRY_AFTER_S:
        headers["Retry-After"] = str(RETRY_AFTER_S[status])
    body = ErrorReply(
        reason=reason,
        detail=one_line(detail) or reason.replace("_", " "),
        event_id=event_name(event) if event else UNSET,
        known=UNSET if known is None else known,
        field=one_line(field) or UNSET,
    )
    return Reply(status, body, headers)


def of_move(answer: Answer, known: Optional[List[str]] = None) -> Reply:
    """Of a move's first answer, or of what its repetition by idempotency key finds."""
    if answer.state not in ("failed", "refused"):
        return Reply(200, MoveReply(answer.num_tokens, event_name(answer.event)))
    if answer.reason == "nothing_held":
        # No tokens were held, so none are moved: the one failure that is a true answer to the question.
        name = event_name(answer.event) if answer.event else ""
        return Reply(200, MoveReply(0, name), {REASON_HEADER: "nothing_held"})
    return refusal(answer.reason or "failed", answer.detail, answer.event, known)


def of_cancel(answer: Answer) -> Reply:
    """200: it has ended as cancelled. 409: it was too late, or it had ended otherwise; the state says how."""
    name = event_name(answer.event)
    if answer.state == "refused":
        return refusal(answer.reason, answer.detail or f"no event {name} is known", answer.event)
    if answer.reason == "cancelled":
        return Reply(200, MoveReply(answer.num_tokens, name), {REASON_HEADER: "cancelled"})
    why = answer.reason or ("already_done" if answer.state == "done" else "already_failed")
    detail = f"event {name} is {answer.state}{': ' + answer.reason if answer.reason else ''}"
    body = ErrorReply(reason=why, detail=detail, event_id=name, state=answer.state, num_tokens=answer.num_tokens)
    return Reply(409, body, {REASON_HEADER: why})


def split_error(error: str) -> Tuple[str, str]:
    """msgspec's words -> (what is wrong, the field): ("found text, expected a whole number", "tokens[0]")."""
    text, _, path = error.partition(" - at `$")
    field = path.rstrip("`").lstrip(".")
    for word in ("unknown field `", "required field `"):
        if word in text:
            name = text.partition(word)[2].partition("`")[0]
            field = f"{field}.{name}" if field else name
    return in_words(text), field
