"""Gather and scatter on a GPU, as one Triton kernel: all layers of a part in one launch.

Only imported where Triton is (see kvreal.layout.gpu). What it must do is what kvreal.layout.paged does, byte by byte.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def copy(  # type: ignore[no-untyped-def, unused-ignore]
    chunk,  # uint8: the chunk's first byte
    bases,  # int64 [planes]: address of each plane in the engine's memory
    offsets,  # int64 [planes]: where a plane begins in a chunk of one token
    table,  # int64: block of the first token, and following
    start,  # offset of the first token in its block
    tokens,  # of the chunk
    block_stride,  # strides are in items
    token_high,
    token_low,
    head_stride,
    channel_high,
    channel_low,
    BLOCK_TOKENS: tl.constexpr,
    LOW_TOKENS: tl.constexpr,  # of a split token dimension the inner size, else BLOCK_TOKENS
    ROW: tl.constexpr,  # items of a token
    CHANNELS: tl.constexpr,
    LOW_CHANNELS: tl.constexpr,
    ITEM: tl.constexpr,
    GATHER: tl.constexpr,
    TOKENS_EACH: tl.constexpr,
    ITEMS_EACH: tl.constexpr,
):
    plane = tl.program_id(0)
    token = tl.program_id(1) * TOKENS_EACH + tl.arange(0, TOKENS_EACH)
    item = tl.program_id(2) * ITEMS_EACH + tl.arange(0, ITEMS_EACH)
    theirs = tl.load(bases + plane).to(tl.pointer_type(ITEM))
    begin = tl.load(offsets + plane) * tokens
    mine = (chunk + begin).to(tl.pointer_type(ITEM))
    inside = token < tokens
    at = start + token
    block = tl.load(table + at // BLOCK_TOKENS, mask=inside, other=-1)
    within = at % BLOCK_TOKENS
    head = item // CHANNELS
    channel = item % CHANNELS
    high = (within // LOW_TOKENS).to(tl.int64) * token_high
    row = block * block_stride + high + (within % LOW_TOKENS).to(tl.int64) * token_low
    wide = head.to(tl.int64) * head_stride + (channel // LOW_CHANNELS).to(tl.int64) * channel_high
    column = wide + (channel % LOW_CHANNELS).to(tl.int64) * channel_low
    there = theirs + row[:, None] + column[None, :]
    here = mine + token.to(tl.int64)[:, None] * ROW + item[None, :]
    mask = inside[:, None] & (item < ROW)[None, :]
    present = mask & (block >= 0)[:, None]
    if GATHER:
        tl.store(here, tl.load(there, mask=present, other=0), mask=mask)
    else:
        tl.store(there, tl.load(here, mask=present, other=0), mask=present)


ITEMS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
