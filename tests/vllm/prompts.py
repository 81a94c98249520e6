"""Prompts by seed: letters, so that they can be sent as text too."""

from __future__ import annotations

import random


def letters(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(97, 123) for _ in range(count)]


def fifty() -> list[list[int]]:
    """Every kind of length there is (blocks of 128 tokens, chunks of 256), and families that share a beginning."""
    lengths = [1, 2, 12, 31, 127, 128, 129, 200, 255, 256, 257, 300, 383, 384, 385, 511, 512, 513, 700, 767, 768, 769]
    lengths += [1000, 1024, 1025, 1500, 2047, 2048, 2049, 3000, 6000]
    found = [letters(n, n) for n in lengths]
    trunk = letters(1, 900)
    for i, cut in enumerate((0, 1, 100, 128, 255, 256, 257, 300, 511, 512, 513, 768, 800)):
        found.append([*trunk[:cut], *letters(100 + i, 60 + i)])
    found += [trunk[:n] for n in (44, 300, 500, 640, 641, 900)]
    assert len(found) == 50
    return found
