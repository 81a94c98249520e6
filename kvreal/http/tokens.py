"""A long prompt's token ids, from JSON's text to four bytes each without an object for each of them.

Only what is plainly right goes this way. All else, right or wrong, is decoded as its schema says, and refused in the
schema's words.
"""

from __future__ import annotations

from typing import Any, Callable, Final, Optional

import msgspec
import numpy as np

SHORT: Final = 2_048
"""Bodies of fewer bytes are decoded sooner than looked at."""

COMMA: Final = ord(",")
PLAIN: Final = b"0123456789, \t\r\n"

Decode = Callable[[bytes], Any]


class Packed(bytes):
    """Token ids, four bytes each, little-endian; no ids: false."""


def decoder(kind: Any, strict: Decode, short: int = SHORT) -> Decode:
    """For bodies with ``tokens``: as ``strict``, but with ``tokens`` Packed where that is quicker."""
    fields = [
        (field.name, msgspec.Raw if field.name == "tokens" else field.type, _default(field))
        for field in msgspec.structs.fields(kind)
    ]
    raw: Any = msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True, kw_only=True)
    fast = msgspec.json.Decoder(raw).decode

    def decode(data: bytes) -> Any:
        if len(data) < short:
            return strict(data)
        try:
            body: Any = fast(data)
        except msgspec.MsgspecError:
            return strict(data)
        tokens = packed(bytes(body.tokens)) if isinstance(body.tokens, msgspec.Raw) else None
        if tokens is None:
            return strict(data)
        body.tokens = tokens
        return body

    return decode


def _default(field: Any) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else msgspec.field(default=())


def packed(text: bytes) -> Optional[Packed]:
    """Of an array in JSON. None if it is not one of whole numbers below 2**32, or is not written plainly."""
    if not text.startswith(b"[") or not text[1:16].lstrip()[:1].isdigit():  # of blanks NumPy makes a 0
        return None
    if text.translate(None, PLAIN) != b"[]":  # older NumPys stop at the first that is no whole number, and say nothing
        return None
    try:
        ids = np.fromstring(text[1:-1], dtype=np.int64, sep=",")
    except ValueError:
        return None
    commas = np.count_nonzero(np.frombuffer(text, np.uint8) == COMMA)
    if len(ids) != commas + 1 or ids.view(np.uint64).max() > 0xFFFFFFFF:  # a negative one is a large one there
        return None
    return Packed(ids.astype("<u4").tobytes())
