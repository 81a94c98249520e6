"""The part of a scenario that says what there is: KV, constants, prompts, instances and the network between them."""

from __future__ import annotations

from typing import Dict, Final, Literal, Optional, Tuple, Union

import msgspec

from kvcore.protocol.links import kind_of as kind_of
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


#: Kind of memory -> the name of an instance's location of that kind.
LOCATIONS: Final[Dict[str, str]] = {"cpu": "LocalCPUBackend", "disk": "LocalDiskBackend", "gpu": "LocalGPUBackend"}


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of everything in a scenario."""


class Kv(Part, frozen=True, kw_only=True):
    """What KV is made of. ``direction``: the destination reads the bytes, or the source pushes them, or whichever the
    network's profile says is quicker (read, where it does not say). ``checksums``: of copies, compared before they
    count; a copy with wrong bytes is made once more."""

    model: str = "llama-3.1-8b"
    chunk: ChunkTokens = ChunkTokens(256)
    bytes_per_token: Optional[Size] = None
    """Of all ranks together; each holds its share. Known models need not say it."""
    dtype: str = "bfloat16"
    layout: str = "layers-first"
    weights: str = ""
    direction: Literal["auto", "read", "push"] = "auto"
    checksums: Literal["off", "sample", "all"] = "off"

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
    progress: Optional[Duration] = None
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
    """``LocalCPUBackend: 2 GiB`` is short for ``{size: 2 GiB}``. The size is of all ranks together, and so is that of a
    ``slot``, if it is larger than a chunk. ``namespace``: fields that differ from the instance's, for another model's
    KV."""

    size: Size
    slot: Optional[Size] = None
    namespace: Dict[str, Union[str, int]] = {}
    bandwidth: Optional[Rate] = None
    latency: Optional[Duration] = None


class Instance(Part, frozen=True, kw_only=True):
    """A serving instance of ``ranks`` tensor-parallel processes.

    ``id``: the name it claims at the controller, if not its own. ``namespace``: fields that differ here. ``direction``:
    of what is moved here, if it is not ``kv.direction``.
    """

    ranks: int = 1
    locations: Dict[str, LocationSpec] = {}
    id: str = ""
    namespace: Dict[str, Union[str, int]] = {}
    direction: Literal["", "auto", "read", "push"] = ""
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
