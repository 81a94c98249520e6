"""What a scenario file says: what there is, what is asked, what goes wrong and what must come of it.

These structs are the file's form field by field (``from``, ``as``, ``for`` and ``and`` are Python's own words and have
other attribute names here). ``loader.py`` reads and writes YAML and gives every mistake its line; ``valid.py`` checks
what spans several fields.
"""

from __future__ import annotations

from typing import Any, Dict, Final, Literal, Optional, Tuple, Union

import msgspec
from msgspec import field

from kvcore.protocol.config import Config, ConfigError, Rules
from kvcore.scenario.units import ChunkTokens, Duration, Rate, Size, Tokens

#: Bytes of KV a token of known models, all layers and all ranks, in bfloat16: 2 x layers x KV heads x head size x 2.
MODELS: Final[Dict[str, int]] = {
    "llama-3.1-8b": 2 * 32 * 8 * 128 * 2,
    "llama-3.1-70b": 2 * 80 * 8 * 128 * 2,
    "llama-3.2-1b": 2 * 16 * 8 * 64 * 2,
    "mistral-7b": 2 * 32 * 8 * 128 * 2,
    "qwen2.5-7b": 2 * 28 * 4 * 128 * 2,
    "qwen3-8b": 2 * 36 * 8 * 128 * 2,
    "qwen3-32b": 2 * 64 * 8 * 128 * 2,
}

CONTROLLER: Final = "ctl"
CLIENT: Final = "client"


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of everything in a scenario."""


# ---- what there is --------------------------------------------------------------------------------------------------
class Kv(Part, frozen=True, kw_only=True):
    """What KV is made of. ``direction``: the destination reads the bytes, or the source pushes them."""

    model: str = "llama-3.1-8b"
    chunk: ChunkTokens = ChunkTokens(256)
    bytes_per_token: Optional[Size] = None
    """Of all ranks together; each holds its share. Known models need not say it."""
    dtype: str = "bfloat16"
    layout: str = "layers-first"
    weights: str = ""
    direction: Literal["read", "push"] = "read"

    @property
    def chunk_tokens(self) -> int:
        return self.chunk.number

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's KV over all ranks. KeyError for a model that is not known."""
        return self.bytes_per_token.bytes if self.bytes_per_token is not None else MODELS[self.model]


class Constants(Part, frozen=True, kw_only=True):
    """The protocol's constants. ``scale`` multiplies all that are not given, so that faults need not take minutes."""

    scale: float = 1.0
    retry: Optional[Duration] = None
    lease: Optional[Duration] = None
    renew: Optional[Duration] = None
    retain: Optional[Duration] = None
    stop_retry: Optional[Duration] = None
    beat: Optional[Duration] = None
    dead: Optional[Duration] = None
    release_give_up: Optional[Duration] = None
    copy_max: Optional[Duration] = None
    deadline: Optional[Duration] = None
    hold: Optional[Duration] = None
    events_kept_for: Optional[Duration] = None
    events_kept: Optional[int] = None


class Prompt(Part, frozen=True, kw_only=True):
    """A token sequence: its ``ids`` literally, or ``tokens`` generated ones that follow from its name alone.

    ``shares``: the first N tokens equal those of that prompt. ``adapter`` and ``salt`` are part of its keys.
    """

    tokens: Optional[Tokens] = None
    ids: Tuple[int, ...] = ()
    shares: Dict[str, int] = {}
    adapter: str = ""
    salt: str = ""


class Link(Part, frozen=True, kw_only=True):
    bandwidth: Optional[Rate] = None
    latency: Optional[Duration] = None


class LocationSpec(Part, frozen=True, kw_only=True):
    """``LocalCPUBackend: 2 GiB`` is short for ``{size: 2 GiB}``. The size is of all ranks together."""

    size: Size
    bandwidth: Optional[Rate] = None
    latency: Optional[Duration] = None


class Instance(Part, frozen=True, kw_only=True):
    """A serving instance of ``ranks`` tensor-parallel processes.

    ``id``: the name it claims at the controller, if not its own. ``namespace``: fields that differ here.
    """

    ranks: int = 1
    locations: Dict[str, LocationSpec] = {}
    id: str = ""
    namespace: Dict[str, Union[str, int]] = {}
    switch: str = ""
    nic: Optional[Link] = None


class Switch(Part, frozen=True, kw_only=True):
    """``uplink``: the switch above it; ``bandwidth`` and ``latency`` are of that uplink. The switches form a tree."""

    uplink: str = ""
    bandwidth: Optional[Rate] = None
    latency: Optional[Duration] = None


class Network(Part, frozen=True, kw_only=True):
    """``profile``: a measured cost profile. ``nic``: of every instance that has none of its own. ``links``: ``a-b``."""

    profile: str = ""
    nic: Optional[Link] = None
    links: Dict[str, Link] = {}
    switches: Dict[str, Switch] = {}


# ---- what is asked --------------------------------------------------------------------------------------------------
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
    """``prompt`` (its first ``tokens``), or ``all: true``: everything there, a drain. ``if_room``: evict nothing."""

    src: str = field(name="from")
    dst: str = field(name="to")
    prompt: str = ""
    tokens: Optional[Tokens] = None
    all: bool = False
    copy: bool = False
    idem: str = ""
    deadline: Optional[Duration] = None
    if_room: bool = False


class Lookup(Body, frozen=True, kw_only=True):
    prompt: str
    tokens: Optional[Tokens] = None


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
    """Pressure: ``slots`` chunks (or ``tokens``) of distinct prompts, ``each`` so long, called ``prefix-N``."""

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


# ---- what goes wrong ------------------------------------------------------------------------------------------------
class When(Part, frozen=True, kw_only=True):
    """The anchor: exactly one of the first five. ``nth`` counts per sending node and life, from 1.

    ``sent``, ``received``: a message's name. ``started``: an effect's (StartCopy, StartFill...), a journal record's
    (Begin, Decide...) or a step's. ``ended``: an answering input's (CopyDone, FillDone...) or a step's. ``at``: since
    the workload began. ``by``: the node it happens at, a rank ``a/0``, an instance ``a``, ``ctl`` or ``client``;
    ``to``: whom a message goes to (or comes from, if ``received``).
    """

    sent: str = ""
    received: str = ""
    started: str = ""
    ended: str = ""
    at: Optional[Duration] = None
    by: str = ""
    to: str = ""
    nth: int = 1

    @property
    def anchor(self) -> str:
        """sent, received, started, ended or at; "" for none."""
        for name in ANCHORS:
            if getattr(self, name):
                return name
        return "at" if self.at is not None else ""


ANCHORS: Final[Tuple[str, ...]] = ("sent", "received", "started", "ended")


class PartitionFault(Part, frozen=True, kw_only=True):
    """``one_way``: only what goes from ``between`` to ``and`` is lost. Nodes are named as in ``When.by``."""

    between: Union[str, Tuple[str, ...]]
    others: Union[str, Tuple[str, ...]] = field(name="and")
    one_way: bool = False
    duration: Optional[Duration] = field(default=None, name="for")


class CrashFault(Part, frozen=True, kw_only=True):
    """Without ``restart_after`` it never comes back. ``client`` dies by it too: it forgets what it had asked."""

    node: str
    restart_after: Optional[Duration] = None


class PauseFault(Part, frozen=True, kw_only=True):
    node: str
    duration: Optional[Duration] = field(default=None, name="for")


class SlowFault(Part, frozen=True, kw_only=True):
    node: str
    factor: float
    duration: Optional[Duration] = field(default=None, name="for")


class CopyFault(Part, frozen=True, kw_only=True):
    """What becomes of a copy or a fill. ``fraction``: how much lands before it fails or sticks.

    Of one rank: ``when: {started: StartCopy, by: b/1}``, which is the anchor if there is none.
    """

    fail: bool = False
    corrupt: bool = False
    stuck: bool = False
    slow: float = 1.0
    fraction: float = 1.0


class FullFault(Part, frozen=True, kw_only=True):
    """Nothing can be taken there, not by eviction either. ``at``: ``b/LocalCPUBackend``, every rank of it."""

    at: str
    duration: Optional[Duration] = field(default=None, name="for")


class NamespaceFault(Part, frozen=True, kw_only=True):
    """A field that differs at one node (an instance, or one rank), from the start."""

    node: str
    model: Optional[str] = None
    weights: Optional[str] = None
    dtype: Optional[str] = None
    kv_layout: Optional[str] = None
    chunk_tokens: Optional[int] = None
    ranks: Optional[int] = None
    bytes_per_token: Optional[int] = None

    def changes(self) -> Dict[str, Union[str, int]]:
        """The fields of ``Namespace`` that differ."""
        found: Dict[str, Union[str, int]] = {}
        for name in NAMESPACE_FIELDS:
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found


NAMESPACE_FIELDS: Final[Tuple[str, ...]] = tuple([n for n in NamespaceFault.__struct_fields__ if n != "node"])


class Fault(Part, frozen=True, kw_only=True):
    """One or more kinds at one anchor, ``times`` times a sender; node faults happen once.

    ``drop``: the message there and the N - 1 after it, or all from there on. ``duplicate``: N copies more. ``reorder``:
    behind the next message to the same node. ``cancel``: the client cancels that step.
    """

    when: Optional[When] = None
    times: int = 1
    drop: Union[int, Literal["all"], None] = None
    delay: Optional[Duration] = None
    duplicate: int = 0
    reorder: bool = False
    partition: Optional[PartitionFault] = None
    crash: Optional[CrashFault] = None
    pause: Optional[PauseFault] = None
    slow: Optional[SlowFault] = None
    copy: Optional[CopyFault] = None
    full: Optional[FullFault] = None
    cancel: str = ""
    namespace: Optional[NamespaceFault] = None

    @property
    def kinds(self) -> Tuple[str, ...]:
        return tuple([name for name in FAULT_KINDS if getattr(self, name)])


FAULT_KINDS: Final[Tuple[str, ...]] = tuple([n for n in Fault.__struct_fields__ if n not in ("when", "times")])


# ---- what must come of it -------------------------------------------------------------------------------------------
class Expect(Part, frozen=True, kw_only=True):
    """What a step's operation must say at its end; what is not named is not asked. A list means: one of these.

    ``a/LocalCPUBackend: 4096`` is short for ``found: {a/LocalCPUBackend: 4096}``; what a lookup found must be that and
    no more. ``deleted``, ``kept``: chunks at every source rank; ``why``: why one kept. ``promised``: a move's first
    answer.
    """

    state: Union[str, Tuple[str, ...], None] = None
    reason: Union[str, Tuple[str, ...], None] = None
    num_tokens: Union[int, Tuple[int, ...], None] = None
    promised: Union[int, Tuple[int, ...], None] = None
    found: Optional[Dict[str, int]] = None
    deleted: Optional[int] = None
    kept: Optional[int] = None
    why: Union[str, Tuple[str, ...], None] = None


# ---- generators -----------------------------------------------------------------------------------------------------
class Arrival(Part, frozen=True, kw_only=True):
    """One of: ``poisson``, ``constant``: operations a second; ``closed``: so many at a time, the next when one ends."""

    poisson: Optional[float] = None
    constant: Optional[float] = None
    closed: Optional[int] = None


class Between(Part, frozen=True, kw_only=True):
    """Both ends included."""

    least: Tokens = field(name="min")
    most: Tokens = field(name="max")


class Zipfian(Part, frozen=True, kw_only=True):
    """``min`` x k, k = 1 .. ``max`` / ``min``, with weight k ** -exponent: many short ones, few long."""

    exponent: float
    least: Tokens = field(name="min")
    most: Tokens = field(name="max")


class LogNormal(Part, frozen=True, kw_only=True):
    """``median`` x exp(sigma x normal), cut to ``min`` .. ``max``."""

    median: Tokens
    sigma: float
    least: Tokens = field(default=Tokens(1), name="min")
    most: Tokens = field(default=Tokens(131072), name="max")


class Lengths(Part, frozen=True, kw_only=True):
    """One of them. ``prompt_tokens: 4096`` is short for ``{fixed: 4096}``."""

    fixed: Optional[Tokens] = None
    uniform: Optional[Between] = None
    zipf: Optional[Zipfian] = None
    lognormal: Optional[LogNormal] = None


class SharedPrefix(Part, frozen=True, kw_only=True):
    """Prompts fall into ``groups``; those of a group begin with the same ``tokens``."""

    groups: int
    tokens: Tokens


class Workload(Part, frozen=True, kw_only=True):
    """Steps drawn from the seed, after the written ones. ``moves``: N moves of prompts from where they are to
    elsewhere; ``requests``: N operations of the ``mix`` (weights of store, use, lookup, move, copy).

    ``prompts``: how many there are (0: one an operation, at most 64); ``zipf``: the exponent of their popularity, 0:
    all alike. ``mix`` is ``{store: 1, use: 6, lookup: 1, move: 2}`` unless given.
    """

    moves: int = 0
    requests: int = 0
    arrival: Arrival = Arrival(closed=1)
    prompt_tokens: Lengths = Lengths(fixed=Tokens(1, chunks=True))
    prompts: int = 0
    shared_prefix: Optional[SharedPrefix] = None
    zipf: float = 0.0
    mix: Dict[str, float] = {}
    location: str = ""
    """Where: a location that every instance taking part has. Default: each instance's first."""


# ---- the whole ------------------------------------------------------------------------------------------------------
class Scenario(Part, frozen=True, kw_only=True):
    """``order`` strict: both worlds must answer alike; racing: each real answer is one that some schedule gives.

    ``without``: rules of the protocol that are switched off, e.g. ``[h03]``. ``needs``: what the machine must have.
    ``violates``: properties that are meant to break here (a rule is off, bytes are corrupted), and must.
    ``deadline``: a run that is not quiet by then hangs.
    """

    name: str
    about: str = ""
    order: Literal["strict", "racing"] = "strict"
    seed: int = 0
    needs: Tuple[Literal["gpu", "disk", "rdma"], ...] = ()
    kv: Kv = Kv()
    constants: Constants = Constants()
    without: Tuple[str, ...] = ()
    prompts: Dict[str, Prompt] = {}
    instances: Dict[str, Instance]
    network: Network = Network()
    workload: Optional[Workload] = None
    steps: Tuple[Step, ...] = ()
    faults: Tuple[Fault, ...] = ()
    expect: Dict[str, Expect] = {}
    violates: Tuple[str, ...] = ()
    deadline: Duration = Duration.parse("3 deadlines")


def config_of(scenario: Scenario) -> Config:
    """The protocol's settings in this scenario. ConfigError names the two that contradict each other."""
    constants = scenario.constants
    standard = Config()
    if not 0 < constants.scale <= 1000:
        raise ConfigError(f"constants.scale is {constants.scale}, expected a number above 0, at most 1000")
    values: Dict[str, Any] = {}
    for name in standard.__struct_fields__:
        if name.endswith("_ns"):
            values[name] = round(getattr(standard, name) * constants.scale)
            given = getattr(constants, CONSTANT_OF.get(name, name[:-3]))
            if given is not None:
                if given.constant:
                    raise ConfigError(f"{name[:-3]} is {given}, expected a time such as '250 ms'")
                values[name] = given.ns(standard)
    if constants.events_kept is not None:
        values["events_kept"] = constants.events_kept
    known = Rules.__struct_fields__
    for rule in scenario.without:
        if rule not in known:
            raise ConfigError(f"there is no rule {rule!r}, expected one of {known[0]} .. {known[-1]}")
    rules = Rules(**dict.fromkeys(scenario.without, False))
    config = Config(**values, push=scenario.kv.direction == "push", rules=rules)
    config.check()
    return config


#: Constants that are not called as in Config.
CONSTANT_OF: Final[Dict[str, str]] = {"events_kept_ns": "events_kept_for"}
