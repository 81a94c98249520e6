"""What the controller is asked and what it answers, as JSON. The structs are the OpenAPI document's schemas too.

A field that is not here is refused by name: ``cpy`` must not silently become a move that deletes.
"""

from __future__ import annotations

from typing import Annotated, Any, Dict, List, Literal, Optional, Tuple, Union

import msgspec
from msgspec import UNSET, Meta, UnsetType

Token = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
EventName = Annotated[str, Meta(min_length=1, max_length=600, description="As `event_id` of an answer: `3-17`.")]
Seconds = Annotated[float, Meta(gt=0, le=604800)]
Found = Annotated[List[Union[str, int]], Meta(min_length=2, max_length=2)]
Place = Annotated[Tuple[Name, Name], Meta(description="[instance_id, location]")]
Idem = Annotated[str, Meta(max_length=256)]
State = Literal["", "pinning", "reserving", "copying", "releasing", "done", "failed", "held"]
Kind = Literal["", "move", "copy", "drain", "pin", "clear"]
IDEM_ABOUT = "A repeated request with the same key gets the first one's event, also after a restart, and moves nothing."


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all requests."""


class Reply(msgspec.Struct, frozen=True):
    """Base of all answers."""


Priority = Annotated[int, Meta(ge=-100, le=100, description="Of the copies that wait, the highest goes first.")]
Weight = Annotated[int, Meta(ge=1, le=1000, description="How copies of one priority share.")]
Cap = Optional[Annotated[int, Meta(ge=1, lt=1 << 62, description="The bytes of a move never cross faster.")]]


# ---- requests --------------------------------------------------------------------------------------------------------
class MoveBody(Body, frozen=True):
    old_position: Place
    new_position: Place
    tokens: Annotated[
        Optional[Tuple[Token, ...]], Meta(description="The prompt. Empty: all that the old position holds.")
    ] = ()
    copy: Annotated[Optional[bool], Meta(description="Keep the source.")] = None
    should_copy: Annotated[Optional[bool], Meta(description="Another name of `copy`.")] = None
    cache_salt: Annotated[str, Meta(max_length=1024, description="As the prompt was stored with.")] = ""
    idempotency_key: Annotated[Idem, Meta(description=IDEM_ABOUT)] = ""
    deadline_s: Annotated[Optional[Seconds], Meta(description="Undo all that is not decided by then.")] = None
    if_room: Annotated[bool, Meta(description="Fail rather than evict at the destination.")] = False
    priority: Priority = 0
    weight: Weight = 1
    bandwidth_cap_bytes_per_s: Cap = None
    granularity: Annotated[
        Literal["move", "prefix"],
        Meta(description="prefix: longer and longer prefixes are there on the way; the source keeps all until then."),
    ] = "move"
    dry_run: Annotated[bool, Meta(description="Say what would move and what it would cost; move nothing.")] = False


class DrainBody(Body, frozen=True):
    instance_id: Name
    to: Annotated[Tuple[Name, ...], Meta(min_length=1, max_length=64, description="Instances, taken in turn.")]
    locations: Annotated[Tuple[Name, ...], Meta(max_length=16, description="Empty: all of them.")] = ()
    copy: bool = False
    idempotency_key: Annotated[Idem, Meta(description=IDEM_ABOUT)] = ""
    deadline_s: Optional[Seconds] = None
    if_room: bool = False
    priority: Priority = 0
    weight: Weight = 1
    bandwidth_cap_bytes_per_s: Cap = None


class LookupBody(Body, frozen=True):
    tokens: Tuple[Token, ...]
    cache_salt: Annotated[str, Meta(max_length=1024)] = ""


class PinBody(Body, frozen=True):
    instance_id: Name
    location: Name
    tokens: Annotated[Tuple[Token, ...], Meta(min_length=1)]
    cache_salt: Annotated[str, Meta(max_length=1024)] = ""


class LeaseBody(PinBody, frozen=True, kw_only=True):
    """Keep these chunks for so long."""

    seconds: Seconds


class RenewBody(Body, frozen=True):
    """Begin an earlier lease's time again, of this length."""

    event_id: EventName
    seconds: Seconds


class EventBody(Body, frozen=True):
    event_id: EventName


class ClearBody(Body, frozen=True):
    instance_id: Name
    location: Name


class CompressBody(Body, frozen=True):
    instance_id: Name
    method: str
    location: Name
    tokens: Optional[Tuple[Token, ...]] = ()


class InstanceBody(Body, frozen=True):
    instance_id: Name


class QueryInstanceBody(Body, frozen=True):
    ip: Name
    event_id: str = ""


class QueryWorkerInfoBody(Body, frozen=True):
    instance_id: Annotated[Name, Meta(description="Or `all`.")]
    worker_ids: Optional[Tuple[int, ...]] = None


# ---- answers ---------------------------------------------------------------------------------------------------------
class MoveReply(Reply, frozen=True):
    """`num_tokens`: how many tokens' KV this event moves."""

    num_tokens: int
    event_id: str


class LeaseReply(Reply, frozen=True):
    num_tokens: int
    event_id: str
    expires_in_s: float


class DryRunReply(Reply, frozen=True, kw_only=True):
    """By what the registry sees now; nothing is reserved."""

    num_tokens: int
    event_id: None = None
    dry_run: bool = True
    held_tokens: int
    present_tokens: int
    bytes: int
    evicted_chunks: int
    fits: bool
    move_s: float
    recompute_s: float
    recompute_is_quicker: bool
    direction: Annotated[str, Meta(description="Who would move the bytes: read (the destination), push (the source).")]
    profile: str
    prefill_tokens_per_s: float


class LookupReply(Reply, frozen=True):
    event_id: str
    layout_info: Annotated[
        Dict[str, Found], Meta(description="instance -> [location of the longest prefix, its tokens]")
    ]
    locations: Annotated[Dict[str, Dict[str, int]], Meta(description="instance -> location -> tokens")]


class HealthReply(Reply, frozen=True):
    """0: heard; 1: not there; 2: not heard for two beats."""

    event_id: str
    error_codes: Dict[str, int]


class QueryInstanceReply(Reply, frozen=True):
    event_id: str
    instance_id: str
    instance_ids: List[str]


class WorkerInfo(Reply, frozen=True):
    instance_id: str
    worker_id: int
    ip: str
    port: int
    peer_init_url: str
    registration_time: float
    last_heartbeat_time: float


class QueryWorkerInfoReply(Reply, frozen=True):
    event_id: str
    worker_infos: List[WorkerInfo]


class CheckFinishReply(Reply, frozen=True):
    status: str
    reason: str


class ReadyReply(Reply, frozen=True):
    status: str
    incarnation: int


class LocationView(Reply, frozen=True, kw_only=True):
    name: str
    slots: int
    chunks: int
    tokens: int
    bytes: int
    capacity_bytes: int
    namespace: Optional[Dict[str, Any]] = None
    """What KV lies there, if not the instance's."""


class RankView(Reply, frozen=True, kw_only=True):
    rank: int
    address: str
    epoch: str
    since: float
    heard_s_ago: float
    locations: List[LocationView]


class InstanceView(Reply, frozen=True, kw_only=True):
    """`whole`: all of its ranks are there, so that it can take part in moves."""

    instance_id: str
    whole: bool
    ranks: List[RankView]
    namespace: Dict[str, Any]


class InstancesReply(Reply, frozen=True):
    instances: List[InstanceView]
    awaited: Annotated[List[str], Meta(description="Known from before the controller's restart, not heard since.")]


class RankOutcome(Reply, frozen=True, kw_only=True):
    """Chunks. -1: not known. `deleted` and `kept` are the source's."""

    rank: int
    source: str
    destination: str
    pinned: int = 0
    reserved: int = 0
    committed: int = 0
    present: int = 0
    bytes: int = 0
    deleted: int = 0
    kept: int = 0
    why: str = ""
    via: str = ""
    chosen: str = ""
    """Why it went that way."""


class ChunkOutcome(Reply, frozen=True):
    """`destination`: copied, present (was there already), partial (at some of its ranks only, so that it is of no use
    there), none, or unknown (the destination was not heard after it had been asked, or has gone since).
    `source`: deleted, kept, unknown or untouched."""

    index: int
    num_tokens: int
    destination: str
    source: str


class Progress(Reply, frozen=True, kw_only=True):
    """How far a drain is, or a move that copies. `moved_tokens`: of as many the bytes are at the destination, as its
    slowest rank has said last (five times a second); `moved_chunks`: so many whole chunks are that;
    `visible_tokens`: so many are found there already, where a move goes prefix by prefix."""

    planned_tokens: int
    moved_tokens: int
    moved_chunks: int | UnsetType = UNSET
    visible_tokens: int | UnsetType = UNSET
    chains: int | UnsetType = UNSET
    chains_begun: int | UnsetType = UNSET


class EventView(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """`state`: pinning, reserving, copying, releasing, done or failed; held for a pin that lives. `bytes`: copied so
    far. Of a drain, `bytes`, `transport` and `phases_s` are its children's, all together, as they end."""

    event_id: str
    kind: str
    state: str
    num_tokens: int
    reason: str | UnsetType = UNSET
    detail: str | UnsetType = UNSET
    old_position: List[str] | UnsetType = UNSET
    new_positions: List[List[str]] | UnsetType = UNSET
    copy: bool | UnsetType = UNSET
    requested_chunks: int | UnsetType = UNSET
    requested_tokens: int | UnsetType = UNSET
    transport: str | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    begun: float | UnsetType = UNSET
    ended: float | UnsetType = UNSET
    duration_s: float | UnsetType = UNSET
    phases_s: Dict[str, float] | UnsetType = UNSET
    idempotency_key: str | UnsetType = UNSET
    parent: str | UnsetType = UNSET
    expires_in_s: float | UnsetType = UNSET
    progress: Progress | UnsetType = UNSET
    children: List[str] | UnsetType = UNSET
    ranks: List[RankOutcome] | UnsetType = UNSET
    chunks: List[ChunkOutcome] | UnsetType = UNSET


class EventsReply(Reply, frozen=True):
    """Newest first."""

    events: List[EventView]


class ErrorReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """Every answer that is no 2xx. `reason` is a word for programs, `detail` a line for people."""

    reason: str
    detail: str
    event_id: str | UnsetType = UNSET
    num_tokens: int | UnsetType = UNSET
    field: str | UnsetType = UNSET
    known: List[str] | UnsetType = UNSET
    state: str | UnsetType = UNSET


TYPES: Tuple[Any, ...] = (
    MoveBody, DrainBody, LookupBody, PinBody, LeaseBody, RenewBody, EventBody, ClearBody, CompressBody, InstanceBody,
    QueryInstanceBody, QueryWorkerInfoBody, MoveReply, LeaseReply, DryRunReply, LookupReply, HealthReply,
    QueryInstanceReply, QueryWorkerInfoReply, CheckFinishReply, ReadyReply, InstancesReply, EventView, EventsReply,
    ErrorReply,
)  # fmt: skip
