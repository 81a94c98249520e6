"""Gather and scatter over layouts of every kind: against one item at a time, and from one engine into another."""

from __future__ import annotations

import itertools
from typing import Any, List, Tuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvreal.layout.paged import Paged
from kvreal.layout.shape import ITEM_BYTES, LayoutError, Part, like
from kvreal.layout.views import HostView, View
from tests.real.layout.strategies import Kept, engines, pairs

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KV = (Part("k", 2, 4, "bfloat16"), Part("v", 2, 4, "bfloat16"))


def chunk_of(kept: Kept, tokens: int) -> Any:
    return torch.zeros(tokens * kept.layout.bytes_per_token, dtype=torch.uint8)


def one_by_one(kept: Kept, start: int, tokens: int) -> bytes:
    """What a chunk's bytes are: each item looked up in the engine's tensors by its coordinates."""
    out = bytearray()
    for number, group in enumerate(kept.layout.groups):
        for layer, part in itertools.product(range(group.layers), group.parts):
            tensor, words, index = held_in(kept, number, layer, part)
            size = ITEM_BYTES[part.dtype]
            for t, head, channel in itertools.product(
                range(start, start + tokens), range(part.heads), range(part.channels)
            ):
                at = {
                    "layer": layer, "part": index, "block": kept.tables[number][t // group.block_tokens],
                    "token": t % group.block_tokens, "head": head, "channel": channel,
                }  # fmt: skip
                item = tensor[coordinates(words, tensor.shape, at)]
                out += bytes(item.reshape(1).view(torch.uint8).tolist())
                assert len(bytes(item.reshape(1).view(torch.uint8).tolist())) == size
    return bytes(out)


def held_in(kept: Kept, number: int, layer: int, part: Part) -> Tuple[Any, List[str], int]:
    given = iter(kept.tensors[number])
    for at, stored in itertools.product(range(kept.layout.groups[number].layers), kept.layout.groups[number].stored):
        words = stored.axes.split()
        if at and "layer" in words:
            continue
        tensor = next(given)
        if part.name in stored.parts and (at == layer or "layer" in words):
            return tensor, words, stored.parts.index(part.name)
    raise AssertionError(part)


def coordinates(words: List[str], shape: Any, at: Any) -> Tuple[int, ...]:
    """Innermost dimension of a split word counts by one."""
    rest = dict(at)
    found = []
    for word, size in reversed(list(zip(words, shape))):
        last = words.count(word) == 1 or words.index(word) == len(found_words(words, found))
        found.append(rest[word] if last else rest[word] % size)
        rest[word] = 0 if last else rest[word] // size
    return tuple(reversed(found))


def found_words(words: List[str], found: List[int]) -> List[str]:
    """The words before the dimension that is looked at."""
    return words[: len(words) - len(found) - 1]


@QUICK
@given(pairs())
def test_a_chunk_is_what_its_items_say(pair: Tuple[Kept, Kept, int, int]) -> None:
    one, _, start, tokens = pair
    tokens = min(tokens, 5)
    chunk = chunk_of(one, tokens)
    before = one.raw()
    one.paged.gather(one.tables, start, tokens, chunk)
    assert bytes(chunk.tolist()) == one_by_one(one, start, tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, one.raw()))  # whoever reads changes nothing


@QUICK
@given(pairs(), st.booleans())
def test_torch_and_numpy_copy_the_same(pair: Tuple[Kept, Kept, int, int], gap: bool) -> None:
    """The one is for GPUs, and compared here where everybody has the device."""
    one, other, start, tokens = pair
    if gap:
        one.tables[0][-1] = other.tables[0][0] = -1
    chunks = [torch.full((tokens * one.layout.bytes_per_token,), fill, dtype=torch.uint8) for fill in (7, 9)]
    after = []
    for chunk, plain in zip(chunks, (True, False)):
        Paged(one.layout, one.tensors, plain).gather(one.tables, start, tokens, chunk)
        given = [[tensor.clone() for tensor in group] for group in other.tensors]
        there = Paged(other.layout, given, plain)
        assert {type(view) for view in there.views} == {View if plain else HostView}
        there.scatter(other.tables, start, tokens, chunk)
        after.append([view.tensor for view in there.views])
    assert torch.equal(*chunks)
    assert all(torch.equal(a, b) for a, b in zip(*after))


@QUICK
@given(pairs())
def test_what_one_engine_stored_another_of_other_layout_loads(pair: Tuple[Kept, Kept, int, int]) -> None:
    one, other, start, tokens = pair
    assert one.layout.form == other.layout.form and one.layout.bytes_per_token == other.layout.bytes_per_token
    chunk = chunk_of(one, tokens)
    one.paged.gather(one.tables, start, tokens, chunk)
    again = chunk_of(other, tokens)
    other.paged.scatter(other.tables, start, tokens, chunk)
    other.paged.gather(other.tables, start, tokens, again)
    assert torch.equal(chunk, again)


@QUICK
@given(pairs())
def test_what_is_not_the_chunks_stays_as_it_was(pair: Tuple[Kept, Kept, int, int]) -> None:
    """Every token of every block, those of the touched blocks too: only the chunk's own have changed."""
    _, other, start, tokens = pair
    before = [view.tensor.clone() for view in other.paged.views]
    chunk = torch.randint(0, 256, (tokens * other.layout.bytes_per_token,), dtype=torch.uint8)
    other.paged.scatter(other.tables, start, tokens, chunk)
    for old, view in zip(before, other.paged.views):
        size = other.layout.groups[view.plane.group].block_tokens
        table = other.tables[view.plane.group]
        written = {(table[t // size], t % size) for t in range(start, start + tokens)}
        for block in range(other.paged.blocks[view.plane.group]):
            flat_old = old[block].reshape(size, -1)
            flat_new = view.tensor[block].reshape(size, -1)
            for offset in range(size):
                if (block, offset) not in written:
                    assert torch.equal(flat_old[offset], flat_new[offset]), (view.plane, block, offset)


@QUICK
@given(st.data())
def test_blocks_that_have_left_the_window(data: st.DataObject) -> None:
    kept = data.draw(engines((KV,), (2,), 24))
    size = kept.layout.groups[0].block_tokens
    gone = data.draw(st.sets(st.integers(0, len(kept.tables[0]) - 1)))
    table = [-1 if at in gone else block for at, block in enumerate(kept.tables[0])]
    chunk = torch.full((20 * kept.layout.bytes_per_token,), 7, dtype=torch.uint8)
    full = torch.empty_like(chunk)
    kept.paged.gather(kept.tables, 3, 20, full)
    kept.paged.gather([table], 3, 20, chunk)
    for plane in kept.layout.planes():
        first = 20 * plane.offset_bytes
        for token in range(20):
            here = slice(first + token * plane.part.token_bytes, first + (token + 1) * plane.part.token_bytes)
            there = (3 + token) // size not in gone
            assert torch.equal(chunk[here], full[here]) if there else not chunk[here].any()
    before = kept.raw()
    kept.paged.scatter([table], 3, 20, full)
    assert all(torch.equal(a, b) for a, b in zip(before, kept.raw()))  # the same bytes, and nothing of the gone


def test_a_copy_that_mixes_parts_or_blocks_up_is_seen() -> None:
    """The planted bugs: K where V belongs, and two blocks exchanged."""
    tensor = torch.randint(-999, 999, (2, 3, 4, 2, 4), dtype=torch.int16).view(torch.bfloat16)
    kept = Kept(like(KV, 1, 4), [[tensor]], [[0, 2]], Paged(like(KV, 1, 4), [[tensor]]))
    chunk = chunk_of(kept, 8)
    kept.paged.gather(kept.tables, 0, 8, chunk)
    assert bytes(chunk.tolist()) == one_by_one(kept, 0, 8)
    kept.paged.gather([[2, 0]], 0, 8, chunk)
    assert bytes(chunk.tolist()) != one_by_one(kept, 0, 8)
    one, other = kept.paged.views
    kept.paged.views = [HostView(one.plane, other.tensor, 1), HostView(other.plane, one.tensor, 1)]
    kept.paged.gather(kept.tables, 0, 8, chunk)
    assert bytes(chunk.tolist()) != one_by_one(kept, 0, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"table": [0]}, "1 blocks in the table, 2 needed"),
        ({"table": [0, 3]}, "no block 3 among 3"),
        ({"table": [0, -2]}, "no block -2 among 3"),
        ({"tables": [[0, 1], [0, 1]]}, "2 block tables given, the layout has 1 groups"),
        ({"nbytes": 99}, "a chunk of 8 tokens is 256 contiguous uint8, found (99,) of torch.uint8"),
        ({"start": -4}, "no tokens -4 to 4"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_is_written(change: Any, words: str) -> None:
    tensor = torch.zeros(2, 3, 4, 2, 4, dtype=torch.bfloat16)
    paged = Paged(like(KV, 1, 4), [[tensor]])
    tables = change.get("tables", [change.get("table", [0, 1])])
    chunk = torch.ones(change.get("nbytes", 256), dtype=torch.uint8)
    for go in (paged.scatter, paged.gather):
        with pytest.raises(LayoutError) as error:
            go(tables, change.get("start", 0), 8, chunk)
        assert words in str(error.value) and "\n" not in str(error.value)
    assert not tensor.any() and chunk.all()
