"""What msgspec says, for people."""

from __future__ import annotations

from typing import Annotated, Optional

import msgspec
import pytest

from kvcore.scenario.located import in_words


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    n: Optional[int] = None
    pair: tuple[int, int] = (0, 0)
    share: Annotated[int, msgspec.Meta(le=100)] = 0


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: list[Inner]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"inner": [{"n": "x"}]}', "inner[0].n: found text, expected a whole number or nothing"),
        ('{"inner": [{"m": 1}]}', "inner[0]: unknown field 'm'"),
        ('{"inner": [{"pair": [1]}]}', "inner[0].pair: found a list of another length, expected one of 2"),
        ('{"inner": [{"share": 101}]}', "inner[0].share: expected a whole number, at most 100"),
        ("{}", "inner is missing"),
        ("[3]", "found a list, expected a mapping"),
        ("{", "Input data was truncated"),
    ],
)
def test_no_word_of_a_machine(text: str, says: str) -> None:
    with pytest.raises(msgspec.DecodeError) as caught:
        msgspec.json.decode(text, type=Outer)
    assert in_words(str(caught.value)) == says


def test_how_long_a_list_is_where_it_is_known() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"pair": [1]}, Inner)
    assert in_words(str(caught.value)) == "pair: found a list of 1, expected one of 2"
