"""A scenario's prompts: their token ids, their keys, and how many of their tokens a place holds."""

from __future__ import annotations

import hashlib
import struct
from typing import Container, Dict, Final, List, Mapping, Sequence, Tuple

import msgspec

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.messages import Key, Namespace

#: Token ids that one digest gives: 64 bytes, 4 a token.
_BLOCK: Final = 16

Keys = Tuple[Tuple[Key, ...], Tuple[int, ...]]
"""(keys, lens) of a token sequence, as ``chunk_keys`` gives them."""


class PromptError(ValueError):
    """A prompt that cannot be: too short for what is asked of it, or sharing in a circle."""


class PromptKeys(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The chunks of a whole prompt, and the short last chunks of those of its prefixes that a step uses.

    ``tails``: (chunks before it, its key, its tokens) each.
    """

    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]
    tails: Tuple[Tuple[int, Key, int], ...] = ()

    def held(self, has: Container[Key]) -> int:
        """Tokens of the longest prefix whose chunks are all in ``has``."""
        whole = 0
        best = 0
        for key, tokens in zip(self.keys, self.lens):
            if key not in has:
                break
            whole += 1
            best += tokens
        for before, key, tokens in self.tails:
            if before <= whole and key in has:
                best = max(best, sum(self.lens[:before]) + tokens)
        return best


class PromptText(msgspec.Struct, frozen=True):
    """What a prompt's token ids follow from. ``tokens`` 0: as many as are asked for."""

    tokens: int = 0
    ids: Tuple[int, ...] = ()
    shares: Tuple[Tuple[str, int], ...] = ()
    adapter: str = ""
    salt: str = ""


def generated_ids(name: str, count: int) -> List[int]:
    """``count`` token ids below 2**17 that follow from the prompt's name alone; a longer list begins with a shorter."""
    ids: List[int] = []
    seed = hashlib.blake2b(b"kvmove prompt\0" + name.encode(), digest_size=64).digest()
    for block in range((count + _BLOCK - 1) // _BLOCK):
        digest = hashlib.blake2b(struct.pack("<Q", block), digest_size=64, key=seed).digest()
        ids.extend(struct.unpack("<16I", digest))
    return [value & 0x1FFFF for value in ids[:count]]


class Prompts:
    """The prompts by name, with what has been computed of them so far."""

    def __init__(self, texts: Mapping[str, PromptText]) -> None:
        self.texts: Dict[str, PromptText] = dict(texts)
        self._ids: Dict[str, List[int]] = {}
        self._keys: Dict[Tuple[Namespace, str, int], Keys] = {}
        self._used: Dict[str, List[int]] = {name: [] for name in self.texts}

    def declare(self, name: str, text: PromptText) -> None:
        """A prompt that no one declared before."""
        if name not in self.texts:
            self.texts[name] = text
            self._used[name] = []

    def length(self, name: str) -> int:
        """Tokens of the whole prompt: declared, else the most that was asked for."""
        text = self.texts[name]
        return text.tokens or len(text.ids) or max(self._used[name], default=0)

    def ids(self, name: str, count: int, inside: Tuple[str, ...] = ()) -> Sequence[int]:
        """The first ``count`` token ids. PromptError where there are not so many, or sharing goes in a circle."""
        text = self.texts.get(name)
        if text is None:
            raise PromptError(f"prompt {inside[-1]} shares tokens with {name}, which is no prompt")
        if name in inside:
            raise PromptError(f"prompt {name} shares tokens with itself by way of {' -> '.join((*inside, name))}")
        if text.ids and len(text.ids) < count:
            raise PromptError(f"prompt {name} has {len(text.ids)} token ids, {count} are asked for")
        known = self._ids.get(name)
        if known is None or len(known) < count:
            known = list(text.ids) if text.ids else generated_ids(name, count)
            for other, shared in text.shares:
                shared = min(shared, count)
                known[:shared] = self.ids(other, shared, (*inside, name))
            self._ids[name] = known
        return known[:count]

    def keys(self, namespace: Namespace, name: str, count: int) -> Keys:
        """(keys, lens) of the first ``count`` tokens."""
        at = (namespace, name, count)
        found = self._keys.get(at)
        if found is None:
            text = self.texts[name]
            if text.tokens and count > text.tokens:
                raise PromptError(f"prompt {name} has {text.tokens} tokens, {count} are asked for")
            found = chunk_keys(namespace, self.ids(name, count), text.adapter, text.salt)
            self._keys[at] = found
            if count not in self._used[name]:
                self._used[name].append(count)
        return found

    def all(self, namespace: Namespace, names: Sequence[str]) -> Dict[str, PromptKeys]:
        """Those of ``names`` that are used, with their chunks under ``namespace``."""
        size = namespace.chunk_tokens
        result: Dict[str, PromptKeys] = {}
        for name in names:
            used = sorted(self._used[name])
            if not used:
                continue
            whole = max(used)
            keys, lens = self.keys(namespace, name, whole)
            tails: List[Tuple[int, Key, int]] = []
            for count in used:
                if count != whole and count % size:
                    tails.append((count // size, self.keys(namespace, name, count)[0][-1], count % size))
            result[name] = PromptKeys(keys, lens, tuple(tails))
        return result
