"""One location's memory by itself: who goes when room is needed."""

from __future__ import annotations

from typing import List

from kvcore.protocol.config import Rules
from kvcore.protocol.pool import Pool


def full_pool(*chain: bytes) -> Pool:
    """A pool that is full with one chain, used head first: its head is the least recently used."""
    pool = Pool("cpu", len(chain), Rules())
    for i, key in enumerate(chain):
        pool.put(key, pool.take(evict=False), chain[i - 1] if i else b"", 16, i)
    return pool


def taken(pool: Pool, count: int) -> List[bytes]:
    """What goes, in order, for ``count`` slots."""
    for _ in range(count):
        pool.take(evict=True)
    return pool.drops


def test_a_child_goes_before_its_parent_whichever_was_used_last() -> None:
    assert taken(full_pool(b"head", b"middle", b"tail"), 3) == [b"tail", b"middle", b"head"]


def test_of_chunks_without_children_the_least_recently_used_goes_first() -> None:
    pool = Pool("cpu", 3, Rules())
    for i, key in enumerate((b"p", b"q", b"r")):
        pool.put(key, pool.take(evict=False), b"", 16, i)
    pool.touch(b"p", 3)
    assert taken(pool, 3) == [b"q", b"r", b"p"]


def test_what_something_else_refers_to_stays_and_its_parents_with_it() -> None:
    pool = full_pool(b"head", b"tail")
    pool.ref(pool.index[b"tail"].slot)
    assert pool.take(evict=True) == -1 and not pool.drops


def test_nothing_goes_where_nothing_may_be_evicted() -> None:
    pool = full_pool(b"p")
    assert pool.take(evict=False) == -1 and list(pool.index) == [b"p"]
