"""Tokens to chunk keys. Equal prefixes have equal keys in every process, with no environment variable to set."""

from __future__ import annotations

import hashlib
import struct
from typing import Dict, List, Optional, Sequence, Tuple

from kvcore.protocol.messages import Key, Namespace

KEY_BYTES = 32
STEP_BYTES = 64 << 20
"""What a move that goes prefix by prefix makes visible at a time, where nothing else is said."""
ROOTS = 256
"""Roots that are remembered: every prompt begins with one."""

_roots: Dict[Tuple[Namespace, str, str], Key] = {}


def root_key(namespace: Namespace, adapter: str = "", salt: str = "") -> Key:
    """The seed of a namespace's keys. Fields are tagged and length-prefixed, so no two namespaces look alike (F30)."""
    asked = (namespace, adapter, salt)
    key = _roots.get(asked)
    if key is None:
        if len(_roots) >= ROOTS:
            _roots.clear()
        key = _roots[asked] = _root_key(namespace, adapter, salt)
    return key


def _root_key(namespace: Namespace, adapter: str, salt: str) -> Key:
    digest = hashlib.blake2b(b"kvmove keys 1", digest_size=KEY_BYTES)
    fields = [(name, str(getattr(namespace, name))) for name in namespace.__struct_fields__]
    if namespace.block_tokens == 1:  # keys are as they were before there were blocks
        fields = [(name, value) for name, value in fields if name != "block_tokens"]
    for name, value in [*fields, ("adapter", adapter), ("salt", salt)]:
        for part in (name.encode(), value.encode()):
            digest.update(struct.pack("<I", len(part)) + part)
    return digest.digest()


def chunk_keys(
    namespace: Namespace, tokens: Sequence[int], adapter: str = "", salt: str = ""
) -> Tuple[Tuple[Key, ...], Tuple[int, ...]]:
    """(keys, lens) of a token sequence; the last chunk may be short. Token ids are unsigned 32-bit.

    A short chunk's key differs from that of the longer chunk it begins: the digest covers its length.
    """
    return packed_keys(namespace, struct.pack(f"<{len(tokens)}I", *tokens), adapter, salt)


def packed_keys(
    namespace: Namespace, tokens: bytes, adapter: str = "", salt: str = ""
) -> Tuple[Tuple[Key, ...], Tuple[int, ...]]:
    """The same of tokens that are packed already, four bytes each, little-endian."""
    size = 4 * namespace.chunk_tokens
    previous = root_key(namespace, adapter, salt)
    keys: List[Key] = []
    lens: List[int] = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        previous = _next_key(previous, part)
        keys.append(previous)
        lens.append(len(part) // 4)
    return tuple(keys), tuple(lens)


def next_key(previous: Key, part: Sequence[int]) -> Key:
    """The key of the chunk ``part`` after the chunk, or the root, whose key is ``previous``."""
    return _next_key(previous, struct.pack(f"<{len(part)}I", *part))


def _next_key(previous: Key, part: bytes) -> Key:
    return hashlib.blake2b(previous + struct.pack("<I", len(part) // 4) + part, digest_size=KEY_BYTES).digest()


def namespace_mismatch(one: Namespace, other: Namespace) -> Optional[Tuple[str, str]]:
    """None if KV of the two is interchangeable; else both sides' values of the fields that differ."""
    if one == other:
        return None
    names = [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
    left = ", ".join(f"{name}={getattr(one, name)}" for name in names)
    right = ", ".join(f"{name}={getattr(other, name)}" for name in names)
    return left, right


def step_chunks(namespace: Namespace, tokens: int = 0) -> int:
    """So many tokens, or else STEP_BYTES, in chunks of one rank; at least one."""
    if tokens:
        return max(1, tokens // namespace.chunk_tokens)
    return max(1, STEP_BYTES // max(1, namespace.chunk_tokens * namespace.bytes_per_token))
