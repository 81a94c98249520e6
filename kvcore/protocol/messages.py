"""What nodes say to one another: one struct a message, and that struct is the wire, the log and the YAML form.

Every message may be lost, doubled, late or reordered; handlers are idempotent. Messages of the controller carry its
``incarnation`` (a worker refuses a lower one than it has seen, H28) and the ``event`` they belong to. An answer names
its sender's life by ``inc``, ``pid`` or ``epoch``; the sender's address comes with the frame.
"""

from __future__ import annotations

from typing import Optional, Tuple, Union

import msgspec

from kvcore.protocol.links import Measured

Key = bytes
"""A chunk's key: a cryptographic digest over the namespace, the chunk's tokens and all tokens before it."""

Inc = Tuple[int, int]
"""A location's incarnation: (epoch of its process, number of clears)."""

Pid = Tuple[int, int]
"""A pin's id: (epoch of the source, counter). Fresh for every life of a pin, so it is fence and permission alike."""

Rid = Tuple[int, int]
"""A reservation's id: (epoch of the destination, counter). Rises within an epoch."""

NO_ID: Tuple[int, int] = (0, 0)


class Message(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of all that travels. ``gc=False`` is safe: messages hold ints, strings, bytes and tuples of these."""


class Namespace(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """What must be equal for two instances' KV to be interchangeable. Part of every key; compared before every move."""

    model: str = "synthetic"
    weights: str = ""
    dtype: str = "bfloat16"
    kv_layout: str = "layers-first"
    chunk_tokens: int = 256
    ranks: int = 1
    bytes_per_token: int = 131072
    """Of one rank's shard."""
    block_tokens: int = 1
    """KV comes in whole blocks of so many tokens: a partial chunk has the bytes of the blocks that it begins."""


class Location(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """One location of one rank: a name and its capacity in slots of one chunk each. ``slot_bytes``: how large they
    are, if larger than a chunk; ``namespace``: what KV lies there, if not that of the rank (a second model's)."""

    name: str
    slots: int
    slot_bytes: int = 0
    namespace: Optional[Namespace] = None

    def slot_size(self, own: Namespace) -> int:
        """Bytes of a slot, in a rank of the namespace ``own``."""
        space = self.namespace or own
        return self.slot_bytes or space.chunk_tokens * space.bytes_per_token


class Entry(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, array_like=True):
    """A visible chunk as inventories carry it. ``parent`` is b"" for a root; ``last_use_ns`` orders drains only."""

    key: Key
    parent: Key = b""
    num_tokens: int = 0
    last_use_ns: int = 0


# ---- registration and inventory -------------------------------------------------------------------------------------
class Register(Message, frozen=True, gc=False):
    """worker -> controller. ``nonce`` is fresh for each process; ``endpoint`` is the driver's, opaque here."""

    instance: str
    rank: int
    nonce: int
    namespace: Namespace
    locations: Tuple[Location, ...]
    endpoint: str = ""
    since_ns: int = 0
    version: int = 1
    constants: Tuple[Tuple[str, int], ...] = ()
    """Its constants that are not the usual ones, by name: what does not fit the controller's is refused or noted."""
    direction: str = "auto"
    """Of copies to it: read, push, or as the controller has it."""
    measured: Optional[Measured] = None
    """What was measured of the copies that it carries out itself."""


class Registered(Message, frozen=True, gc=False):
    incarnation: int
    nonce: int
    epoch: int


class RegisterRefused(Message, frozen=True, gc=False):
    """controller -> worker. ``why``: duplicate_id, mismatch or version; ``have`` and ``got`` are the two values."""

    incarnation: int
    nonce: int
    why: str
    have: str
    got: str


class Probe(Message, frozen=True, gc=False):
    incarnation: int
    nonce: int


class Alive(Message, frozen=True, gc=False):
    """worker -> controller. ``epoch`` 0: a process that has none yet; ``mine``: the nonce of the answering process."""

    nonce: int
    epoch: int
    mine: int


class Expelled(Message, frozen=True, gc=False):
    """controller -> worker: this epoch is over for you (silent for too long, or unknown to me). Register anew."""

    incarnation: int
    epoch: int


class LocationSeq(msgspec.Struct, frozen=True, gc=False, array_like=True):
    location: str
    inc: Inc
    seq: int


class Beat(Message, frozen=True, gc=False):
    """worker -> controller, every beat_ns. Each location's (inc, seq), so that a lost last Delta is noticed (H29)."""

    epoch: int
    locations: Tuple[LocationSeq, ...]


class Delta(Message, frozen=True, gc=False):
    """worker -> controller: what changed in one location in one step."""

    location: str
    inc: Inc
    seq: int
    adds: Tuple[Entry, ...] = ()
    drops: Tuple[Key, ...] = ()


class Resync(Message, frozen=True, gc=False):
    incarnation: int
    location: str


class Snap(Message, frozen=True, gc=False):
    """worker -> controller: the whole inventory of a location at ``seq``."""

    location: str
    inc: Inc
    seq: int
    entries: Tuple[Entry, ...]


class Suspect(Message, frozen=True, gc=False):
    """worker -> controller: ``peer`` does not answer my Stop. Answered by PeerGone once its epoch is not believed."""

    peer: str
    epoch: int


class PeerGone(Message, frozen=True, gc=False):
    """controller -> worker: the process ``peer`` of ``epoch`` is not believed any more; close its window."""

    incarnation: int
    peer: str
    epoch: int


# ---- the move -------------------------------------------------------------------------------------------------------
class Pin(Message, frozen=True, gc=False):
    incarnation: int
    event: int
    location: str
    keys: Tuple[Key, ...]
    move: bool
    lease_ns: int


class Pinned(Message, frozen=True, gc=False):
    """source -> controller. ``slots`` of the longest held prefix; ``pid`` NO_ID: nothing held, or the pin is gone."""

    event: int
    inc: Inc
    pid: Pid = NO_ID
    slots: Tuple[int, ...] = ()
    at_ns: int = 0
    """The source's clock, for Renew to echo."""


class Renew(Message, frozen=True, gc=False):
    """controller -> source. Never creates a pin. Answered by Pinned. The lease ends lease_ns after ``at_ns``, the
    newest Pinned that the controller has heard, so that an old Renew prolongs nothing (H39)."""

    incarnation: int
    event: int
    pid: Pid
    at_ns: int = 0


class Terms(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """On what terms a copy shares its way with others. Of those that wait, the highest ``priority`` goes first; among
    equals each gets by ``weight``. ``cap_bytes_per_s``: never faster than this; 0: as fast as it goes."""

    priority: int = 0
    weight: int = 1
    cap_bytes_per_s: int = 0


def terms(priority: int, weight: int, cap_bytes_per_s: int) -> Optional[Terms]:
    """None where they ask for nothing."""
    found = Terms(priority, weight, cap_bytes_per_s)
    return None if found == Terms() else found


class Fetch(Message, frozen=True, gc=False):
    """controller -> destination. ``stamp`` is the controller's clock, echoed by Committed (H35)."""

    incarnation: int
    event: int
    location: str
    inc: Inc
    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]
    src: str
    src_epoch: int
    src_location: str
    pid: Pid
    slots: Tuple[int, ...]
    retain_ns: int
    stamp: int
    push: bool = False
    evict: bool = True
    src_endpoint: str = ""
    terms: Optional[Terms] = None
    step: int = 0
    """So many chunks at a time become visible, in order; 0: all at once."""


class Reserved(Message, frozen=True, gc=False):
    """destination -> controller. ``shown``: keys[:shown] are visible here already (a move that goes in steps).

    ``here``: of how many tokens of keys[:n] the bytes are here by now, ``moved`` of them by this move's copies. It may
    lag, and is for people only.
    """

    event: int
    inc: Inc
    n: int
    shown: int = 0
    here: int = 0
    moved: int = 0


class Committed(Message, frozen=True, gc=False):
    """destination -> controller: keys[:n] are visible and retained here. n = 0 answers a Retain after its end."""

    event: int
    inc: Inc
    n: int
    stamp: int = 0
    incarnation: int = 0
    present: Tuple[int, ...] = ()
    """Which of keys[:n] were here already, by position: nothing was copied for them."""
    via: str = ""
    """The transport that really carried the bytes, as the driver read it from what carried them."""
    chosen: str = ""
    """Why it was that one."""


class Retain(Message, frozen=True, gc=False):
    """controller -> destination: keep the retention alive. Answered by Committed or, while copying, Reserved."""

    incarnation: int
    event: int
    location: str
    stamp: int


class Refused(Message, frozen=True, gc=False):
    """``of``: the message refused (Pin or Fetch). ``have``/``want`` say both sides' values where there are such."""

    event: int
    of: str
    why: str
    inc: Inc = NO_ID
    have: str = ""
    want: str = ""


class End(Message, frozen=True, gc=False):
    """controller -> destination: this event is over for you. Aborts what runs, drops the retention. No answer."""

    incarnation: int
    event: int


class Release(Message, frozen=True, gc=False):
    """controller -> source. ``pid`` NO_ID means any pin of the event; deleting needs a pid."""

    incarnation: int
    event: int
    pid: Pid
    n: int
    delete: bool


class Released(Message, frozen=True, gc=False):
    event: int
    pid: Pid
    deleted: int = 0
    kept: int = 0
    why: str = ""
    kept_at: Tuple[int, ...] = ()
    """Which of keys[:n] were kept, by position."""


# ---- worker to worker -----------------------------------------------------------------------------------------------
class Fence(Message, frozen=True, gc=False):
    """destination -> source, after the last byte: is this pin still alive?"""

    pid: Pid
    rid: Rid


class Fenced(Message, frozen=True, gc=False):
    rid: Rid
    alive: bool


class Push(Message, frozen=True, gc=False):
    """destination -> source: write these slots of yours into those of mine."""

    rid: Rid
    pid: Pid
    src_location: str
    src_slots: Tuple[int, ...]
    location: str
    slots: Tuple[int, ...]
    lens: Tuple[int, ...]
    epoch: int
    endpoint: str = ""
    keys: Tuple[Key, ...] = ()
    terms: Optional[Terms] = None
    after: Rid = NO_ID
    """Its bytes go behind those of that reservation, if it is still being written."""


class Moved(Message, frozen=True, gc=False):
    """source -> destination: so far a push has come, in tokens. For people only, and nobody asks for it again."""

    rid: Rid
    num_tokens: int


class Pushed(Message, frozen=True, gc=False):
    rid: Rid
    ok: bool
    why: str = ""
    via: str = ""
    chosen: str = ""


class Stop(Message, frozen=True, gc=False):
    rid: Rid


class Stopped(Message, frozen=True, gc=False):
    rid: Rid


# ---- user pins and clear --------------------------------------------------------------------------------------------
class Hold(Message, frozen=True, gc=False):
    """controller -> worker: a user's pin. ``event`` is its id; it ends by Unhold or by its lease."""

    incarnation: int
    event: int
    location: str
    keys: Tuple[Key, ...]
    lease_ns: int


class Held(Message, frozen=True, gc=False):
    event: int
    n: int


class Unhold(Message, frozen=True, gc=False):
    incarnation: int
    event: int


class Clear(Message, frozen=True, gc=False):
    """controller -> worker. Clears only while the incarnation is still ``inc``, so doubling it is harmless."""

    incarnation: int
    event: int
    location: str
    inc: Inc


class Cleared(Message, frozen=True, gc=False):
    event: int
    location: str
    inc: Inc


# ---- clients --------------------------------------------------------------------------------------------------------
Position = Tuple[str, str]
"""(instance, location)."""


class MoveRequest(Message, frozen=True, gc=False):
    """client -> controller. Empty ``keys`` means all that ``src`` holds (drain). ``idem``: idempotency key.

    ``also``: more destinations of a drain, taken in turn. ``terms``: of its copies, over all ranks together.
    ``step``: so many chunks at a time become visible at the destination, each longer prefix once it is whole; the
    source lets go after the last. 0: all at once.
    """

    op: str
    src: Position
    dst: Position
    keys: Tuple[Key, ...] = ()
    lens: Tuple[int, ...] = ()
    copy: bool = False
    idem: str = ""
    deadline_ns: int = 0
    evict: bool = True
    also: Tuple[Position, ...] = ()
    terms: Optional[Terms] = None
    step: int = 0


class LookupRequest(Message, frozen=True, gc=False):
    op: str
    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]


class PinRequest(Message, frozen=True, gc=False):
    """client -> controller: a user's pin, for ``lease_ns``. ``event``: an earlier one's, to begin its lease again."""

    op: str
    position: Position
    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]
    lease_ns: int = 0
    event: int = 0


class UnpinRequest(Message, frozen=True, gc=False):
    op: str
    event: int


class ClearRequest(Message, frozen=True, gc=False):
    op: str
    position: Position


class CancelRequest(Message, frozen=True, gc=False):
    op: str
    event: int


class StatusRequest(Message, frozen=True, gc=False):
    """``wait``: answer when the event has ended instead of at once."""

    op: str
    event: int = 0
    idem: str = ""
    wait: bool = False


class StoreRequest(Message, frozen=True, gc=False):
    """engine -> its own rank: store new KV under these keys."""

    op: str
    location: str
    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]


class UseRequest(Message, frozen=True, gc=False):
    """engine -> its own rank: load the longest held prefix, reading and checking its bytes, for ``hold_ns``."""

    op: str
    location: str
    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]
    hold_ns: int = 0


class Found(msgspec.Struct, frozen=True, gc=False, array_like=True):
    instance: str
    location: str
    num_tokens: int


class SourceOutcome(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What one source rank did with the moved chunks. ``deleted`` -1: unknown (the pin was gone, H25)."""

    rank: int
    deleted: int = 0
    kept: int = 0
    why: str = ""


class Answer(Message, frozen=True, gc=False):
    """To a client. A move is answered twice: when num_tokens is fixed (state copying) and when the event has ended.

    ``state``: pinning, reserving, copying, releasing, done, failed for events; ok or refused for everything else.
    """

    op: str
    state: str
    num_tokens: int = 0
    event: int = 0
    reason: str = ""
    detail: str = ""
    n: int = 0
    source: Tuple[SourceOutcome, ...] = ()
    found: Tuple[Found, ...] = ()
    via: str = ""
    here: int = 0
    """Of a move that copies: of how many of its tokens the bytes are at the destination by now, at every rank."""


Wire = Union[
    Register, Registered, RegisterRefused, Probe, Alive, Expelled, Beat, Delta, Resync, Snap, Suspect, PeerGone,
    Pin, Pinned, Renew, Fetch, Reserved, Committed, Retain, Refused, End, Release, Released,
    Fence, Fenced, Push, Moved, Pushed, Stop, Stopped,
    Hold, Held, Unhold, Clear, Cleared,
    MoveRequest, LookupRequest, PinRequest, UnpinRequest, ClearRequest, CancelRequest, StatusRequest,
    StoreRequest, UseRequest, Answer,
]  # fmt: skip
"""Everything that travels between nodes. ``msgspec.msgpack.Decoder(Wire)`` decodes a frame and refuses all else."""


def event_id(incarnation: int, counter: int) -> int:
    """An event's (or epoch's) number: it holds the controller's incarnation, so it is never used twice (H24)."""
    return incarnation << 32 | counter


def event_name(event: int) -> str:
    """How people see an event: ``incarnation-counter``."""
    return f"{event >> 32}-{event & 0xFFFFFFFF}"


def event_number(name: str) -> int:
    """The inverse of ``event_name``; ValueError for anything else."""
    high, _, low = name.partition("-")
    return event_id(int(high), int(low))
