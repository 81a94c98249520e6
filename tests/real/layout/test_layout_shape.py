"""Layouts that cannot be, and tensors that are not what the layout says: one line each."""

from __future__ import annotations

from typing import Any, Callable

import msgspec
import pytest
import torch

from kvreal.layout.paged import Paged
from kvreal.layout.shape import Group, Layout, LayoutError, Part, Stored, like

K, V = Part("k", 2, 4, "bfloat16"), Part("v", 2, 4, "bfloat16")


def one(parts: Any, *stored: Stored, layers: int = 2, block_tokens: int = 4) -> Layout:
    return Layout((Group(layers, block_tokens, parts, stored),))


BAD = [
    (lambda: Layout(()), "a layout needs a group of layers"),
    (lambda: like((K, V), 0, 4), "layers is 0, expected at least 1"),
    (lambda: like((K, V), 1, 0), "block_tokens is 0, expected at least 1"),
    (lambda: like((Part("k", 2, 4, "int3"),), 1, 4), "k has dtype int3, expected one of float32"),
    (lambda: like((Part("k", 0, 4, "int8"),), 1, 4), "k has 0 heads of 4 channels"),
    (lambda: like((K, K), 1, 4), "the part k is named twice"),
    (lambda: like((), 1, 4), "no parts"),
    (lambda: one((K, V), Stored(("k",))), "no tensor holds v"),
    (lambda: one((K,), Stored(("k",)), Stored(("k",))), "k is stored twice"),
    (lambda: one((K,), Stored(("w",))), "a tensor holds w, expected one of k"),
    (lambda: one((K,), Stored(())), "the tensor holds no part"),
    (lambda: one((K,), Stored(("k",), "block token row head channel")), "row is none of layer, part"),
    (lambda: one((K,), Stored(("k",), "block block token head channel")), "block stands twice"),
    (lambda: one((K,), Stored(("k",), "block token channel")), "head is missing"),
    (lambda: one((K, V), Stored(("k", "v"))), "part is missing"),
    (lambda: like((K, Part("v", 2, 8, "bfloat16")), 1, 4), "cannot share a tensor"),
    (
        lambda: like((Part("q", 1, 3, "uint8"), Part("s", 1, 1, "float32")), 1, 4, "block token channel"),
        "s 1x1 float32 of layer 0 begins at byte 3 of a token, which is no multiple of 4",
    ),
    (
        lambda: like((Part("s", 1, 1, "float32"), Part("q", 1, 3, "uint8")), 1, 4, "block token channel"),
        "a token's 7 bytes are no multiple of s 1x1 float32's 4",
    ),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_a_layout_that_cannot_be(make: Callable[[], Layout], words: str) -> None:
    with pytest.raises(LayoutError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def good(**change: Any) -> Any:
    sizes = {"part": 2, "block": 5, "token": 4, "head": 2, "channel": 4, **change}
    return torch.zeros(*sizes.values(), dtype=torch.bfloat16)


WRONG = [
    ([[good()]], "1 tensors given, expected 2 (2 layers)"),
    ([[good(), good()]] * 2, "2 groups of tensors given, the layout has 1"),
    ([[good(), good(token=8)]], "layer 1, k+v: the tensor's shape is (2, 5, 8, 2, 4), expected (part=2 block token=4"),
    ([[good()[0], good()]], "layer 0, k+v: the tensor's shape is (5, 4, 2, 4)"),
    ([[good(), good(block=6)]], "6 blocks, the group's first tensor has 5"),
    ([[good().float(), good()]], "the tensor is float32, expected bfloat16"),
    ([[good(), good().to("meta")]], "tensors lie on cpu and on meta, expected one device"),
]


@pytest.mark.parametrize(("given", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_tensors_that_are_not_what_the_layout_says(given: Any, words: str) -> None:
    with pytest.raises(LayoutError) as error:
        Paged(like((K, V), 2, 4), given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_llamas_bytes_and_form() -> None:
    layout = like((Part("k", 8, 128, "bfloat16"), Part("v", 8, 128, "bfloat16")), 32, 16)
    assert layout.bytes_per_token == 128 << 10
    assert layout.form == "32 x (k 8x128 bfloat16, v 8x128 bfloat16)"
    assert layout.form == like(layout.groups[0].parts, 32, 128, "block head token channel").form
    layout.fits(131072)
    with pytest.raises(LayoutError, match=r"the namespace has 1000 bytes a token, this layout .* has 131072"):
        layout.fits(1000)


def test_a_layout_is_data() -> None:
    """It travels as JSON; an unknown field, and a layout that cannot be, are refused on the way in."""
    layout = like((K, V), 2, 4)
    text = msgspec.json.encode(layout)
    assert msgspec.json.decode(text, type=Layout) == layout
    with pytest.raises(msgspec.ValidationError, match="unknown field `pages`"):
        msgspec.json.decode(text.replace(b'"layers"', b'"pages"'), type=Layout)
    with pytest.raises(msgspec.ValidationError, match="layers is 0, expected at least 1"):
        msgspec.json.decode(text.replace(b'"layers":2', b'"layers":0'), type=Layout)
