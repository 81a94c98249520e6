"""What a synthetic instance does for a prompt: use what it holds of it, store the rest, answer with some words.

The words follow from the prompt alone, so that every instance answers alike, whatever it had cached.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from typing import Any, Dict, Final, Iterator, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import msgspec

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.messages import Answer, Key, StoreRequest, UseRequest
from kvreal.instance_file import InstanceFile
from kvreal.tokenizer import General, Tokenizer

ASK_TIMEOUT_S: Final = 60.0
_WORDS: Final = " the of a cache key value model token system memory server request answer state time data number"


class RankGone(Exception):
    """A rank does not answer: this instance cannot serve any more."""


class Rank(Protocol):
    """One rank's machine, here or in another process."""

    async def ask(self, request: Any) -> Answer: ...


class Held(NamedTuple):
    """How full a location is."""

    location: str
    chunks: int
    slots: int


class Served(msgspec.Struct, frozen=True):
    """What became of a prompt. ``held``: tokens that every rank had and whose bytes were right."""

    held: int
    stored: int
    why: str = ""
    """Why less is stored than asked: full, ..."""
    wrong_bytes: bool = False


class Serving:
    """``ranks[0]`` is this process's own."""

    def __init__(self, file: InstanceFile, ranks: Sequence[Rank], tokenizer: Tokenizer) -> None:
        self.file: InstanceFile = file
        self.ranks: Tuple[Rank, ...] = tuple(ranks)
        self.tokenizer: Tokenizer = tokenizer
        self.words: List[int] = (
            tokenizer.words if isinstance(tokenizer, General) else tokenizer.encode(_WORDS, add_special_tokens=False)
        )
        self.numbers: Iterator[int] = itertools.count(1)

    async def serve(self, ids: Sequence[int], salt: str = "", model: str = "") -> Served:
        """Load the longest prefix that every rank holds, then store all of the prompt: of the instance's own model, or
        of another that it has locations for. RankGone."""
        places = self.file.searched(model)
        space = places[0].namespace or self.file.namespace
        places = [place for place in places if (place.namespace or self.file.namespace) == space]
        keys, lens = chunk_keys(space, ids, "", salt)
        if not self.file.save_unfull_chunk and lens and lens[-1] < space.chunk_tokens:
            keys, lens = keys[:-1], lens[:-1]
        if not keys:
            return Served(0, 0)
        held = 0
        wrong = False
        for place in places:
            answers = await self._all(UseRequest("use", place.name, keys, lens))
            wrong = wrong or any(answer.reason == "wrong_bytes" for answer in answers)
            held = max(held, min(answer.num_tokens if answer.state == "ok" else 0 for answer in answers))
            if held == sum(lens):
                break
        return await self._store(places[0].name, keys, lens, held, wrong)

    async def _store(
        self, location: str, keys: Tuple[Key, ...], lens: Tuple[int, ...], held: int, wrong: bool
    ) -> Served:
        answers = await self._all(StoreRequest("store", location, keys, lens))
        stored = min(answer.num_tokens if answer.state == "ok" else 0 for answer in answers)
        why = next((answer.reason for answer in answers if answer.state != "ok"), "")
        return Served(held, stored, why or ("full" if stored < sum(lens) else ""), wrong)

    async def _all(self, request: Any) -> List[Answer]:
        """The same of every rank."""
        op = f"{type(request).__name__[:-7].lower()}-{next(self.numbers)}"
        named = msgspec.structs.replace(request, op=op)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return list(await asyncio.gather(*[rank.ask(named) for rank in self.ranks]))
        except TimeoutError:
            raise RankGone(f"a rank has not answered {op} for {ASK_TIMEOUT_S:.0f} s") from None

    def words_after(self, ids: Sequence[int], count: int) -> List[int]:
        """``count`` token ids that follow from the prompt."""
        seed = hashlib.blake2b(b"".join(token.to_bytes(4, "little") for token in ids), digest_size=16).digest()
        out: List[int] = []
        for number in range(count):
            digest = hashlib.blake2b(number.to_bytes(8, "little"), key=seed, digest_size=4).digest()
            out.append(self.words[int.from_bytes(digest, "little") % len(self.words)])
        return out

    def pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """The text of each generated token, so that they add up to the text of all."""
        before = ""
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            yield text[len(before) :]
            before = text


def cut(pieces: Sequence[str], stop: Sequence[str]) -> Tuple[List[str], Optional[str]]:
    """The pieces up to the first stop string, and that string; None if there is none."""
    text = "".join(pieces)
    found: Dict[int, str] = {}
    for word in stop:
        at = text.find(word) if word else -1
        if at >= 0:
            found.setdefault(at, word)
    if not found:
        return list(pieces), None
    end = min(found)
    kept: List[str] = []
    for piece in pieces:
        if end <= 0:
            break
        kept.append(piece[:end])
        end -= len(piece)
    return kept, found[min(found)]
