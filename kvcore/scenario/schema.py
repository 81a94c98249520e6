"""What a scenario file says: what there is, what is asked, what goes wrong and what must come of it.

These structs are the file's form field by field (``from``, ``as``, ``for`` and ``and`` are Python's own words and have
other attribute names here). ``loader.py`` reads and writes YAML and gives every mistake its line; ``valid.py`` checks
what spans several fields. The parts: ``topology.py`` (what there is), ``steps.py`` (what is asked), and here the rest.
"""

from __future__ import annotations

from typing import Any, Dict, Final, Literal, Optional, Tuple, Union

from msgspec import field

from kvcore.protocol.config import Config, ConfigError, Rules
from kvcore.scenario.steps import (
    STEP_KINDS,
    Body,
    Cancel,
    Clear,
    Fill,
    Lookup,
    Move,
    Settle,
    Sleep,
    Status,
    Step,
    Store,
    Unpin,
    Use,
    UserPin,
    Wait,
    step_names,
)
from kvcore.scenario.topology import (
    CLIENT,
    CONTROLLER,
    MODELS,
    Constants,
    Instance,
    Kv,
    Link,
    LocationSpec,
    Network,
    Part,
    Prompt,
    Switch,
)
from kvcore.scenario.units import Duration, Tokens

__all__ = [
    "ANCHORS",
    "CLIENT",
    "CONSTANT_OF",
    "CONTROLLER",
    "FAULT_KINDS",
    "MODELS",
    "NAMESPACE_FIELDS",
    "STEP_KINDS",
    "Arrival",
    "Between",
    "Body",
    "Cancel",
    "Clear",
    "Constants",
    "CopyFault",
    "CrashFault",
    "Expect",
    "Fault",
    "Fill",
    "FullFault",
    "Instance",
    "Kv",
    "Lengths",
    "Link",
    "LocationSpec",
    "LogNormal",
    "Lookup",
    "Move",
    "NamespaceFault",
    "Network",
    "Part",
    "PartitionFault",
    "PauseFault",
    "Prompt",
    "Scenario",
    "Settle",
    "SharedPrefix",
    "Sleep",
    "SlowFault",
    "Status",
    "Step",
    "Store",
    "Switch",
    "UnmountFault",
    "Unpin",
    "Use",
    "UserPin",
    "Wait",
    "When",
    "Workload",
    "Zipfian",
    "config_of",
    "step_names",
]


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

    ``delay``: its first byte moves that much later. Of one rank: ``when: {started: StartCopy, by: b/1}``, which is the
    anchor if there is none.
    """

    fail: bool = False
    corrupt: bool = False
    stuck: bool = False
    slow: float = 1.0
    delay: Optional[Duration] = None
    fraction: float = 1.0


class FullFault(Part, frozen=True, kw_only=True):
    """Nothing can be taken there, not by eviction either. ``at``: ``b/LocalCPUBackend``, every rank of it."""

    at: str
    duration: Optional[Duration] = field(default=None, name="for")


class UnmountFault(Part, frozen=True, kw_only=True):
    """The tier goes with all that is in it, and is back, empty, after ``for``. ``at`` as in ``FullFault``."""

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
    unmount: Optional[UnmountFault] = None
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
    config = Config(**values, direction=scenario.kv.direction, checksums=scenario.kv.checksums, rules=rules)
    config.check()
    return config


#: Constants that are not called as in Config.
CONSTANT_OF: Final[Dict[str, str]] = {"events_kept_ns": "events_kept_for"}
