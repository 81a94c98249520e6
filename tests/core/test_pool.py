"""One location's memory by itself: who goes when room is needed."""

from __future__ import annotations

import random
from typing import Dict, List, Tuple

import pytest

from kvcore.protocol.config import Rules
from kvcore.protocol.messages import Key
from kvcore.protocol.pool import Pool, count_down, count_up, parent_of
from tests.core.drive import CPU, Story, keys


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


# ---- many at once is each of them, one by one ------------------------------------------------------------------------
def test_counting_many_is_counting_each() -> None:
    draw = random.Random(3)
    many: Dict[int, int] = {}
    each: Dict[int, int] = {}
    for _ in range(300):
        if each and draw.random() < 0.5:
            names = draw.sample(sorted(each), min(len(each), draw.choice([1, 3, 20, 60])))
            gone = []
            for name in names:
                each[name] -= 1
                if not each[name]:
                    gone.append(name)
                    del each[name]
            assert list(count_down(many, names)) == gone
        else:
            names = draw.choices(range(100), k=draw.choice([0, 1, 20])) if draw.random() < 0.5 else list(range(40))
            for name in names:
                each[name] = each.get(name, 0) + 1
            count_up(many, names)
        assert many == each


def test_a_name_that_is_there_twice_counts_twice() -> None:
    counts: Dict[int, int] = {}
    count_up(counts, [7] * 20)
    assert counts == {7: 20} and list(count_down(counts, [7] * 20)) == [7] and counts == {}


def keys_of(count: int) -> Tuple[Key, ...]:
    return tuple(number.to_bytes(32, "big") for number in range(1, count + 1))


def state(pool: Pool) -> Tuple[object, ...]:
    index = [(key, one.slot, one.parent, one.num_tokens, one.last_use_ns) for key, one in pool.index.items()]
    return index, pool.kids, pool.refs, sorted(pool.free), pool.fresh, pool.adds, pool.drops, pool.retained


@pytest.mark.parametrize("here", [0, 1, 9, 20])
def test_putting_and_dropping_a_chain_is_putting_and_dropping_each(here: int) -> None:
    keys, lens = keys_of(20), tuple(range(1, 21))
    pools = [Pool("cpu", 32, Rules()) for _ in range(2)]
    for pool in pools:
        for i in range(here):
            pool.put(keys[i], pool.take(False), parent_of(keys, i), lens[i], 1)
        pool.put(b"other", pool.take(False), keys[3], 5, 1)  # another child of the same parent
    many, each = pools
    assert many.new_from(keys) == here
    slots = [many.index[key].slot for key in keys[:here]] + many.take_all(20 - here, False)
    for i in range(19, here - 1, -1):
        assert each.take(False) >= 0
        each.put(keys[i], slots[i], parent_of(keys, i), lens[i], 2)
    many.put_all(keys, slots, lens, here, 2)
    assert state(many) == state(each) and many.adds == each.adds

    assert not many.drop_all(keys, slots)  # a child is still there
    assert state(many) == state(each)
    for pool in pools:
        pool.drop(b"other")
    many.retain(keys[4:6], slots[4:6])
    assert not many.drop_all(keys, slots)
    many.unretain(keys[4:6], slots[4:6])
    assert not many.drop_all(keys, [*slots[1:], slots[0]])  # they lie elsewhere
    assert many.drop_all(keys[5:], slots[5:])
    assert state(many) != state(each)
    many.unref_all(slots[5:])  # the index's references are the caller's
    for i in range(19, 4, -1):
        each.drop(keys[i])
    assert state(many) == state(each)


def test_a_chain_with_a_key_twice_is_put_one_by_one() -> None:
    pool = Pool("cpu", 32, Rules())
    keys = (*keys_of(10), keys_of(10)[4])
    pool.put_all(keys, pool.take_all(11, False), (1,) * 11, 0, 1)
    assert len(pool.index) == 10 and len(pool.refs) == 10 and len(pool.free) == 1


def test_many_slots_ascend_and_fit_together_whatever_was_freed_in_which_order() -> None:
    pool = Pool("cpu", 100, Rules())
    slots = pool.take_all(64, False)
    assert slots == list(range(64))
    pool.unref_all(slots[::-1])
    assert pool.take_all(32, False) == list(range(32))
    pool.unref_all([3, 1, 2])
    assert pool.take_all(36, False) == [1, 2, 3, *range(32, 65)]
    assert pool.take_all(100, False) == list(range(65, 100)) and pool.take_all(9, False) == []


def test_what_is_evicted_for_many_is_what_is_evicted_for_each() -> None:
    chain = keys_of(12)
    pool = full_pool(*chain)
    assert len(pool.take_all(5, True)) == 5 and pool.drops == list(chain[:6:-1])
    pool.full = True
    assert pool.take_all(5, True) == []


def test_a_prompt_lies_in_one_piece_at_both_ends_however_often_it_moves() -> None:
    text, other = "abcdefghijkl", "mnopqrstu"
    w = Story(Rules(), {"a": 32, "b": 32})
    w.store("a/0", other)
    w.store("a/0", text)
    for src, dst in [("a", "b"), ("b", "a")] * 3:
        for chain in (text, other):
            event = w.move(src, dst, chain)
            w.mail()
            for at in list(w.copies):
                w.finish_copy(*at)
            w.mail()
            assert w.status(event).state == "done"
        pools = [w.worker(f"{name}/0").pools[CPU] for name in (src, dst)]
        assert not pools[0].index
        for chain in (text, other):
            slots = [pools[1].index[key].slot for key in keys(chain)]
            assert slots == list(range(slots[0], slots[0] + len(slots)))
