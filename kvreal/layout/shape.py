"""What a token's KV is made of, and how an engine keeps it in blocks: ``Layout``.

    kv = (Part("k", 8, 128, "bfloat16"), Part("v", 8, 128, "bfloat16"))
    Layout((Group(32, 16, kv, (Stored(("k", "v"), "part block token head channel"),)),))

A *part* is what a layer keeps of a token: K, V, the latent of MLA, the scales of fp8. A *group* is a number of layers
of one shape with one block table; most models have one group. *Stored* says which parts share a tensor and what the
tensor's dimensions are, outermost first, in these words:

    layer    one tensor holds all layers of the group; without it each layer has its own
    part     the parts of this tensor, in their order; absent where there is one part only
    block    the page: the block table's numbers
    token    the tokens of a block
    head     KV heads of this rank; may be absent where there is one
    channel  the numbers of a head; may be absent where there is one

``token`` and ``channel`` may stand several times, major first: blocks packed for a vector unit have such dimensions.
How they lie in memory (strides) is the tensor's own affair: any view will do.

A chunk of n tokens is n * ``bytes_per_token`` bytes, packed: for each group, layer and part in turn its n tokens, each
[head][channel]. That depends on parts and layers alone (``form``), not on blocks, axes and strides; so engines that
keep their KV differently exchange it, as long as their forms are one.
"""

from __future__ import annotations

from typing import Dict, Final, List, Sequence, Set, Tuple

import msgspec

ITEM_BYTES: Final[Dict[str, int]] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
AXES: Final = ("layer", "part", "block", "token", "head", "channel")
SPLIT: Final = ("token", "channel")
"""What may stand more than once."""


class LayoutError(ValueError):
    """A layout that cannot be, or tensors that are not as it says; one line."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a layer keeps of one token: ``heads`` x ``channels`` numbers."""

    name: str
    heads: int
    channels: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        return self.heads * self.channels * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.heads}x{self.channels} {self.dtype}"


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of an engine (for each layer, or for all): the names of its parts, and its dimensions."""

    parts: Tuple[str, ...]
    axes: str = "block token head channel"

    @property
    def words(self) -> List[str]:
        return self.axes.split()


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``layers`` layers of one shape, kept in blocks of ``block_tokens`` tokens."""

    layers: int
    block_tokens: int
    parts: Tuple[Part, ...]
    stored: Tuple[Stored, ...]

    @property
    def token_bytes(self) -> int:
        """Of one layer."""
        return sum([part.token_bytes for part in self.parts])


class Plane(msgspec.Struct, frozen=True):
    """One part of one layer: where its tokens begin in a chunk of n tokens is n * ``offset_bytes``."""

    group: int
    layer: int
    part: Part
    offset_bytes: int


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    groups: Tuple[Group, ...]

    def __post_init__(self) -> None:
        """LayoutError: what does not fit together."""
        if not self.groups:
            raise LayoutError("a layout needs a group of layers")
        for number, group in enumerate(self.groups):
            where = f"group {number}" if len(self.groups) > 1 else "the layout"
            _whole(where, group)
        for plane in self.planes():
            size = ITEM_BYTES[plane.part.dtype]
            if plane.offset_bytes % size:
                raise LayoutError(
                    f"{plane.part} of layer {plane.layer} begins at byte {plane.offset_bytes} of a token, which is no "
                    f"multiple of {size}: name parts with larger items first"
                )
            if self.bytes_per_token % size:
                raise LayoutError(f"a token's {self.bytes_per_token} bytes are no multiple of {plane.part}'s {size}")

    @property
    def bytes_per_token(self) -> int:
        return sum([group.layers * group.token_bytes for group in self.groups])

    def planes(self) -> List[Plane]:
        """In the order in which they lie in a chunk."""
        found: List[Plane] = []
        offset = 0
        for number, group in enumerate(self.groups):
            for layer in range(group.layers):
                for part in group.parts:
                    found.append(Plane(number, layer, part, offset))
                    offset += part.token_bytes
        return found

    @property
    def form(self) -> str:
        """What a chunk's bytes mean, for ``Namespace.layout``: equal where chunks can be exchanged."""
        return "; ".join([f"{g.layers} x ({', '.join([str(part) for part in g.parts])})" for g in self.groups])

    def fits(self, namespace_bytes_per_token: int) -> None:
        """LayoutError if a namespace counts other bytes for a token than this layout has."""
        if namespace_bytes_per_token != self.bytes_per_token:
            raise LayoutError(
                f"the namespace has {namespace_bytes_per_token} bytes a token, this layout ({self.form}) has "
                f"{self.bytes_per_token}"
            )


def like(parts: Sequence[Part], layers: int, block_tokens: int, axes: str = "part block token head channel") -> Layout:
    """One group; its parts in one tensor a layer if ``axes`` has ``part``, else in a tensor each."""
    names = [part.name for part in parts]
    stored = [tuple(names)] if "part" in axes.split() else [(name,) for name in names]
    return Layout((Group(layers, block_tokens, tuple(parts), tuple([Stored(held, axes) for held in stored])),))


def _whole(where: str, group: Group) -> None:
    for name, value in (("layers", group.layers), ("block_tokens", group.block_tokens)):
        if value < 1:
            raise LayoutError(f"{where}: {name} is {value}, expected at least 1")
    known: Dict[str, Part] = {}
    for part in group.parts:
        if part.dtype not in ITEM_BYTES:
            raise LayoutError(f"{where}: {part.name} has dtype {part.dtype}, expected one of {', '.join(ITEM_BYTES)}")
        if part.heads < 1 or part.channels < 1:
            raise LayoutError(f"{where}: {part.name} has {part.heads} heads of {part.channels} channels")
        if part.name in known:
            raise LayoutError(f"{where}: the part {part.name} is named twice")
        known[part.name] = part
    if not known:
        raise LayoutError(f"{where}: no parts")
    seen: Set[str] = set()
    for stored in group.stored:
        for name in stored.parts:
            if name not in known:
                raise LayoutError(f"{where}: a tensor holds {name}, expected one of {', '.join(known)}")
            if name in seen:
                raise LayoutError(f"{where}: {name} is stored twice")
            seen.add(name)
        _axes(where, stored, [known[name] for name in stored.parts])
    missing = [name for name in known if name not in seen]
    if missing:
        raise LayoutError(f"{where}: no tensor holds {', '.join(missing)}")


def _axes(where: str, stored: Stored, parts: List[Part]) -> None:
    words = stored.words
    told = f"{where}: axes '{stored.axes}'"
    for word in words:
        if word not in AXES:
            raise LayoutError(f"{told}: {word} is none of {', '.join(AXES)}")
        if words.count(word) > 1 and word not in SPLIT:
            raise LayoutError(f"{told}: {word} stands twice; only {' and '.join(SPLIT)} may")
    if not parts:
        raise LayoutError(f"{told}: the tensor holds no part")
    needed = ["block", "token"]
    if len(parts) > 1:
        needed.append("part")
        if len({(part.heads, part.channels, part.dtype) for part in parts}) > 1:
            raise LayoutError(f"{told}: {' and '.join([str(part) for part in parts])} cannot share a tensor")
    needed += ["head"] if parts[0].heads > 1 else []
    needed += ["channel"] if parts[0].channels > 1 else []
    for word in needed:
        if word not in words:
            raise LayoutError(f"{told}: {word} is missing")
