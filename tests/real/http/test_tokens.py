"""Token ids that are read straight from JSON's text: the same as the schema says, whatever the text."""

from __future__ import annotations

import json
import struct
from typing import Any, List, Tuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.protocol.chunks import chunk_keys, packed_keys
from kvcore.protocol.messages import Namespace
from kvreal.http import models as b
from kvreal.http.tokens import Packed, decoder

pytestmark = pytest.mark.real
STRICT = msgspec.json.Decoder(b.LookupBody).decode
QUICK = decoder(b.LookupBody, STRICT, short=0)
WHOLE = st.one_of(st.integers(0, 2**32 - 1), st.integers(-(2**65), 2**65))
ODD = st.one_of(st.floats(), st.text(max_size=3), st.none(), st.booleans(), st.lists(WHOLE, max_size=2))
BLANKS = st.text(" \t\r\n", max_size=3)


def result(decode: Any, data: bytes) -> Tuple[str, Any, str]:
    """(what came of it, the ids or the error's words, the salt)."""
    try:
        body = decode(data)
    except msgspec.MsgspecError as error:
        return type(error).__name__, str(error), ""
    ids: Tuple[int, ...] = body.tokens
    if isinstance(ids, Packed):
        ids = struct.unpack(f"<{len(ids) // 4}I", ids)
    return "ok", tuple(ids), body.cache_salt


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(WHOLE, WHOLE, WHOLE, ODD), max_size=8), st.lists(BLANKS, min_size=20, max_size=20))
def test_any_array_is_read_as_the_schema_says(items: List[Any], blanks: List[str]) -> None:
    parts = [blanks[2 * i] + json.dumps(item) + blanks[2 * i + 1] for i, item in enumerate(items)]
    text = f'{{"cache_salt": "s", "tokens": [{",".join(parts) or blanks[-1]}]}}'.encode()
    assert result(QUICK, text) == result(STRICT, text)


@pytest.mark.parametrize(
    "text",
    ["[]", "[ ]", "[" + " " * 99 + "]", "null", "[1,]", "[,1]", "[01]", "[1 2]", "[+1]", "[-0]", "[1e3]", "[0x1]",
     '"[1]"', "[1, 2", "[1.0]", "[4294967296]", "{}", "[[1]]", '["1,2"]', "[1,\n2]", "1", "[nan]", "[٣]"],
)  # fmt: skip
def test_odd_texts_are_read_as_the_schema_says(text: str) -> None:
    data = f'{{"tokens": {text}}}'.encode()
    assert result(QUICK, data) == result(STRICT, data)


@given(data=st.binary(max_size=40))
def test_any_bytes_are_read_as_the_schema_says(data: bytes) -> None:
    assert result(QUICK, data) == result(STRICT, data)


def test_a_plain_array_is_packed_and_has_the_same_keys() -> None:
    ids = list(range(5, 2005))
    body = QUICK(json.dumps({"tokens": ids}).encode())
    space = Namespace(chunk_tokens=256)
    assert isinstance(body.tokens, Packed)
    assert packed_keys(space, body.tokens, "", "salt") == chunk_keys(space, ids, "", "salt")


def test_short_bodies_and_unknown_fields() -> None:
    assert not isinstance(decoder(b.LookupBody, STRICT)(b'{"tokens": [1]}').tokens, Packed)
    with pytest.raises(msgspec.ValidationError, match="token_ids"):
        QUICK(b'{"token_ids": [1]}')
