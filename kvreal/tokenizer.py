"""Text to token ids and back, for engines without a model's own tokenizer.

Byte level, so that any text can be said: ids below 256 are bytes, then come common English pieces with the blank
before them, taken greedily, longest first. Every other id below the vocabulary's size stands for itself: it reads as
``<|849|>``, and that text is the id again. ``detokenize(tokenize(text)) == text`` for every text. A model's own
``tokenizer.json`` does the same job where one is named and the ``tokenizers`` package is installed.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, Dict, Final, List, Optional, Protocol, Sequence

VOCAB: Final = 128256
BOS: Final = 128000
EOS: Final = 128001
BOS_TEXT: Final = "<|begin_of_text|>"
EOS_TEXT: Final = "<|end_of_text|>"

_WORDS: Final = """the of and to in a is that for it as was with be by on not he his but at are this have from or had an
they which one you were all her she there would their we him been has when who will no more if out so up said what its
about than into them can only other time new some could these two may first then do any like my now over such our man
me even most made after also did many off before must well back through years much where your way down should because
long each just those people how too little state good very make world still see own work men day get here old between
both life being under three never know same last another while us might great go come since against right used take
house use during without again place around however home small found thought went say part once general high upon
school every does got united left number course war until always away something fact water though less public put
explain significance language models model cache key value memory token tokens prompt system user answer question
server request move instance chunk attention transformer large computer program function data code test write read
please list give short story describe difference between example summarize translate text following"""
_PIECES: Final = """
th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de
hi ri ro ic ne ea ra ce li ch ll be ma si om ur ing ion ent tion ati for ter est ers ment ness able ally ence ance"""
_SPECIAL: Final = re.compile(r"<\|(?:begin_of_text|end_of_text|\d{1,6})\|>")
_PART: Final = re.compile(r" ?[^\W\d_]+| ?\d{1,3}| ?[^\s\w]+|\s+|_|.", re.DOTALL)


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True) -> List[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


class General:
    """No table of prompts, nothing to download; the same ids in every process and version of this file."""

    vocab_size: int = VOCAB

    def __init__(self) -> None:
        words = _WORDS.split()
        texts = [" " + word for word in words] + words + _PIECES.split() + ["\n\n", "  ", "    "]
        pieces = list(dict.fromkeys([text.encode() for text in texts if len(text) > 1]))
        self.ids: Dict[bytes, int] = {piece: 256 + i for i, piece in enumerate(pieces)}
        self.pieces: List[bytes] = [bytes([i]) for i in range(256)] + pieces
        self.longest: int = max(len(piece) for piece in pieces)
        self.words: List[int] = [self.ids[f" {word}".encode()] for word in words]
        """What generated text is made of."""

    def encode(self, text: str, add_special_tokens: bool = True) -> List[int]:
        ids = [BOS] if add_special_tokens else []
        start = 0
        for match in _SPECIAL.finditer(text):
            special = self._special(match.group())
            if special >= 0:
                self._plain(text[start : match.start()], ids)
                ids.append(special)
                start = match.end()
        self._plain(text[start:], ids)
        return ids

    def _special(self, text: str) -> int:
        """-1 for what would read otherwise when it is decoded."""
        if text in (BOS_TEXT, EOS_TEXT):
            return BOS if text == BOS_TEXT else EOS
        number = int(text[2:-2])
        canonical = str(number) == text[2:-2] and number not in (BOS, EOS)
        return number if canonical and len(self.pieces) <= number < VOCAB else -1

    def _plain(self, text: str, ids: List[int]) -> None:
        for part in _PART.findall(text):
            data = part.encode("utf-8", "surrogatepass")
            at = 0
            while at < len(data):
                for size in range(min(self.longest, len(data) - at), 1, -1):
                    piece = self.ids.get(data[at : at + size])
                    if piece is not None:
                        ids.append(piece)
                        at += size
                        break
                else:
                    ids.append(data[at])
                    at += 1

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        out: List[bytes] = []
        for token in ids:
            if token < len(self.pieces):
                out.append(self.pieces[token])
            elif token in (BOS, EOS):
                if not skip_special_tokens:
                    out.append((BOS_TEXT if token == BOS else EOS_TEXT).encode())
            else:
                out.append(b"<|%d|>" % token)
        return b"".join(out).decode("utf-8", "replace")


class FromFile:
    """A model's own ``tokenizer.json``."""

    def __init__(self, path: str) -> None:
        try:
            library: Any = importlib.import_module("tokenizers")
        except ImportError:
            raise TokenizerError(f"{path}: needs the package tokenizers (pip install tokenizers)") from None
        try:
            self.inner: Any = library.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: is no tokenizer.json: {error}") from None
        self.vocab_size: int = self.inner.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> List[int]:
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens))


class TokenizerError(Exception):
    """The tokenizer that was asked for cannot be had."""


def make(path: Optional[str] = None) -> Tokenizer:
    """The general one, or the one in ``path``."""
    if not path:
        return General()
    if not Path(path).is_file():
        raise TokenizerError(f"{path}: there is no such file")
    return FromFile(path)
