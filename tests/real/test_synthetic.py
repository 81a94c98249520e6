"""KV that any node can make again: every byte depends on key, layer and offset."""

from __future__ import annotations

import numpy as np
import pytest

from kvreal.engines.synthetic import check, fill, layers_of

KEY = b"k" * 32


def blank(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, dtype=np.uint8)


@pytest.mark.parametrize(("tokens", "bpt"), [(1, 8), (3, 72), (7, 100), (16, 1024), (5, 131072), (1, 3)])
def test_what_was_filled_is_what_is_checked(tokens: int, bpt: int) -> None:
    view = blank(tokens * bpt + 16)
    assert fill(view, KEY, tokens, bpt) == tokens * bpt
    assert check(view, KEY, tokens, bpt) == -1
    assert not view[tokens * bpt :].any(), "wrote past the chunk's end"


def test_fill_and_check_work_at_any_address() -> None:
    view = blank(5000)[3:]
    fill(view, KEY, 4, 1000)
    assert check(view, KEY, 4, 1000) == -1
    view[3999] ^= 1
    assert check(view, KEY, 4, 1000) == 3999


@pytest.mark.parametrize("offset", [0, 1, 12345, 300_000, 16 * 131072 - 1])
def test_one_flipped_bit_is_found_where_it_is(offset: int) -> None:
    view = blank(16 * 131072)
    fill(view, KEY, 16, 131072)
    view[offset] ^= 4
    assert check(view, KEY, 16, 131072) == offset


def test_other_keys_lengths_and_layers_have_other_bytes() -> None:
    one, other = blank(64 * 1024), blank(64 * 1024)
    fill(one, KEY, 64, 1024)
    fill(other, b"l" * 32, 64, 1024)
    assert (one != other).mean() > 0.9
    assert check(one, KEY, 63, 1024) >= 0, "a shorter chunk is another chunk"
    part = len(one) // layers_of(1024)
    layers = one.reshape(-1, part)
    assert len({layer.tobytes() for layer in layers}) == len(layers)


def test_a_shifted_or_swapped_piece_is_found() -> None:
    view = blank(1 << 20)
    fill(view, KEY, 16, 65536)
    assert check(np.roll(view, 8), KEY, 16, 65536) >= 0
    swapped = view.copy()
    swapped[:4096], swapped[4096:8192] = view[4096:8192], view[:4096]
    assert 0 <= check(swapped, KEY, 16, 65536) < 8, "within the first word"


def test_every_word_of_a_chunk_is_its_own() -> None:
    view = blank(1 << 20)
    fill(view, KEY, 8, 131072)
    words = view.view(np.uint64)
    assert len(np.unique(words)) == len(words)
