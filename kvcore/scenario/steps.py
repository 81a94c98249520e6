"""The part of a scenario that says what is asked: one struct a kind of step."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Optional, Tuple, Union

from msgspec import Meta, field

from kvcore.scenario.topology import Part
from kvcore.scenario.units import Duration, Rate, Tokens


class Body(Part, frozen=True, kw_only=True):
    """What every step may say besides: its name, a wait before it, whether the next step waits for its end (background:
    it does not). ``window``: it is issued only while fewer steps than that are open."""

    name: str = field(default="", name="as")
    after: Optional[Duration] = None
    background: bool = False
    window: int = 0
    timeout: Optional[Duration] = None


class Store(Body, frozen=True, kw_only=True):
    """An engine stores a prompt's KV. A prompt that nothing declares needs ``tokens`` here."""

    at: str
    prompt: str
    tokens: Optional[Tokens] = None


class Move(Body, frozen=True, kw_only=True):
    """``prompt`` (its first ``tokens``), or ``all: true``: everything there, a drain. ``if_room``: evict nothing.

    ``priority``, ``weight``: of the copies of one process, whose bytes go first, and how those of one priority share.
    ``cap``: never faster. ``granularity: prefix``: longer and longer prefixes become visible on the way, by
    ``step`` at a time (64 MiB).
    """

    src: str = field(name="from")
    dst: str = field(name="to")
    prompt: str = ""
    tokens: Optional[Tokens] = None
    all: bool = False
    copy: bool = False
    idem: str = ""
    deadline: Optional[Duration] = None
    if_room: bool = False
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    weight: Annotated[int, Meta(ge=1, le=1000)] = 1
    cap: Optional[Rate] = None
    granularity: Literal["move", "prefix"] = "move"
    step: Optional[Tokens] = None


class Lookup(Body, frozen=True, kw_only=True):
    """``of``: a place whose KV is meant, where there is that of more than one model (``a/Draft``)."""

    prompt: str
    tokens: Optional[Tokens] = None
    of: str = ""


class Use(Body, frozen=True, kw_only=True):
    """An engine loads the longest prefix it holds, reading its bytes for at least ``hold``."""

    at: str
    prompt: str
    tokens: Optional[Tokens] = None
    hold: Optional[Duration] = None


class UserPin(Body, frozen=True, kw_only=True):
    """A user's pin, until its ``unpin`` or the end of its lease."""

    at: str
    prompt: str
    tokens: Optional[Tokens] = None
    lease: Optional[Duration] = None


class Unpin(Body, frozen=True, kw_only=True):
    """``pin``: the name of the pin step."""

    pin: str


class Clear(Body, frozen=True, kw_only=True):
    at: str


class Cancel(Body, frozen=True, kw_only=True):
    """``op``: the name of a move step."""

    op: str


class Status(Body, frozen=True, kw_only=True):
    """The state of a step's event, by its idempotency key if ``idem``; ``wait``: answered once it has ended."""

    op: str = ""
    idem: str = ""
    wait: bool = False


class Settle(Body, frozen=True, kw_only=True):
    """Wait until all is quiet: nothing pending anywhere, no message in flight."""


class Sleep(Body, frozen=True, kw_only=True):
    duration: Duration = field(name="for")


class Wait(Body, frozen=True, kw_only=True):
    """Wait for the end of background steps: ``op``, or all before it."""

    op: Union[str, Tuple[str, ...]] = ()

    @property
    def ops(self) -> Tuple[str, ...]:
        return (self.op,) if isinstance(self.op, str) else self.op


class Fill(Body, frozen=True, kw_only=True):
    """Pressure: ``slots`` chunks (or ``tokens``) of distinct prompts, ``each`` so long. Later steps can name them:
    ``prefix-1`` and so on."""

    at: str
    slots: int = 0
    tokens: Optional[Tokens] = None
    each: Tokens = Tokens(1, chunks=True)
    prefix: str = "fill"


class Step(Part, frozen=True, kw_only=True):
    """Exactly one kind. ``- move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: m}``."""

    store: Optional[Store] = None
    move: Optional[Move] = None
    lookup: Optional[Lookup] = None
    use: Optional[Use] = None
    pin: Optional[UserPin] = None
    unpin: Optional[Unpin] = None
    clear: Optional[Clear] = None
    cancel: Optional[Cancel] = None
    status: Optional[Status] = None
    settle: Optional[Settle] = None
    sleep: Optional[Sleep] = None
    wait: Optional[Wait] = None
    fill: Optional[Fill] = None

    @property
    def kind(self) -> str:
        """Which of them it is; "" for none."""
        for name in STEP_KINDS:
            if getattr(self, name) is not None:
                return name
        return ""

    @property
    def body(self) -> Body:
        body = getattr(self, self.kind)
        assert isinstance(body, Body)
        return body


STEP_KINDS: Final[Tuple[str, ...]] = Step.__struct_fields__


def step_names(steps: Tuple[Step, ...]) -> Tuple[str, ...]:
    """What each step is called: its ``as``, else its kind and number, counted from 1: ``move-2``."""
    return tuple([step.body.name or f"{step.kind}-{i + 1}" for i, step in enumerate(steps)])
