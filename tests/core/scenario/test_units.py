"""Quantities: what is read, what is refused, and that their text says exactly what they are."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.protocol.config import Config
from kvcore.scenario.units import (
    QUANTITIES,
    ChunkTokens,
    Duration,
    Rate,
    Size,
    Tokens,
    UnitError,
    dec_hook,
    enc_hook,
    known_units,
)

CONFIG = Config()


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("250 us", 250_000),
        ("250us", 250_000),
        ("250 µs", 250_000),
        (" 1.5 ms ", 1_500_000),
        ("2 min", 120_000_000_000),
        ("1 h", 3_600_000_000_000),
        ("1_000 ns", 1000),
        ("0 s", 0),
        ("0", 0),
        (0, 0),
        ("2 leases", 2 * CONFIG.lease_ns),
        ("1 lease", CONFIG.lease_ns),
        ("1.5 retries", 3 * CONFIG.retry_ns // 2),
        ("0.5 retains", CONFIG.retain_ns // 2),
        ("3 beats", 3 * CONFIG.beat_ns),
        ("1 dead", CONFIG.dead_ns),
        ("2 deads", 2 * CONFIG.dead_ns),
        ("1 give_up", CONFIG.release_give_up_ns),
        ("1 release_give_up", CONFIG.release_give_up_ns),
        ("1 copy_max", CONFIG.copy_max_ns),
        ("2 deadlines", 2 * CONFIG.deadline_ns),
        ("1 stop_retry", CONFIG.stop_retry_ns),
    ],
)
def test_durations(text: object, ns: int) -> None:
    assert Duration.parse(text).ns(CONFIG) == ns


def test_a_multiple_follows_its_constant() -> None:
    quick = Config(lease_ns=1000, renew_ns=300, retry_ns=100)
    assert Duration.parse("2.5 leases").ns(quick) == 2500


@pytest.mark.parametrize(
    ("text", "count"), [("5 GiB", 5 * 2**30), ("128 KiB", 2**17), ("2 GB", 2 * 10**9), ("1.5 kB", 1500), ("7 B", 7)]
)
def test_sizes(text: str, count: int) -> None:
    assert Size.parse(text).bytes == count


@pytest.mark.parametrize(
    ("text", "bits"), [("10 Gbit/s", 10**10), ("2 GB/s", 16 * 10**9), ("1 GiB/s", 2**33), ("1 B/s", 8)]
)
def test_rates(text: str, bits: int) -> None:
    assert Rate.parse(text).bits_per_s == bits
    assert Rate.parse(text).bytes_per_s == bits / 8


def test_tokens_count_tokens_or_chunks() -> None:
    assert Tokens.parse(4096).count(256) == 4096
    assert Tokens.parse("4096 tokens").count(256) == 4096
    assert Tokens.parse("8 chunks").count(256) == 2048
    assert Tokens.parse("1 chunk") == Tokens(1, chunks=True)
    assert Tokens.parse("1 chunk") != Tokens(1)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (Duration, 250, "found '250' without a unit, expected a duration such as '250 us'"),
        (Duration, "250", "without a unit"),
        (Duration, "-1 s", "'-1 s' is negative"),
        (Duration, "5 lightyears", "unknown unit 'lightyears'"),
        (Duration, "0.5 ns", "not a whole number of nanoseconds"),
        (Duration, None, "found nothing, expected a duration"),
        (Duration, True, "found true, expected a duration"),
        (Duration, [1], "found a list, expected a duration"),
        (Duration, "soon", "found 'soon', expected a duration such as '250 us'"),
        (Duration, "99999999999999999999 h", "too large"),
        (Duration, "1" * 40 + " s", "a number of 40 digits"),
        (Size, 5, "found '5' without a unit, expected a size such as '5 GiB'"),
        (Size, "-5 GiB", "is negative"),
        (Size, "5 Gib", "unknown unit 'Gib'"),
        (Size, "0.5 B", "not a whole number of bytes"),
        (Rate, "10 Gbit", "unknown unit 'Gbit'"),
        (Rate, "0 Gbit/s", "expected a rate above 0"),
        (Rate, 10.5, "without a unit"),
        (Tokens, "5 chunkz", "unknown unit 'chunkz'"),
        (Tokens, "1.5 tokens", "not a whole number of tokens"),
        (Tokens, -5, "is negative"),
        (ChunkTokens, 256, "found '256' without a unit, expected a number of tokens such as '256 tokens'"),
        (ChunkTokens, "0 tokens", "expected a chunk of 1 to"),
    ],
)
def test_refused(kind: type, value: object, said: str) -> None:
    with pytest.raises(UnitError) as caught:
        dec_hook(kind, value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 2**63 - 1))
def test_the_text_of_a_time_is_exact(ns: int) -> None:
    duration = Duration.of_ns(ns)
    assert Duration.parse(str(duration)) == duration
    assert Duration.parse(str(duration)).ns(CONFIG) == ns


@given(st.decimals(0, 10**6, places=3), st.sampled_from(["leases", "retries", "beats", "give_ups", "copy_maxes"]))
def test_the_text_of_a_multiple_is_exact(number: object, constant: str) -> None:
    duration = Duration.parse(f"{number} {constant}")
    assert Duration.parse(str(duration)) == duration


@given(st.integers(0, 2**63 - 1), st.booleans())
def test_the_text_of_the_others_is_exact(number: int, chunks: bool) -> None:
    assert Size.parse(str(Size(number))).bytes == number
    assert Rate.parse(str(Rate(number + 1 if number < 2**63 - 1 else 1))).bits_per_s >= 1
    few = number % 2**30 + 1
    assert Tokens.parse(str(Tokens(few, chunks))) == Tokens(few, chunks)
    assert ChunkTokens.parse(str(ChunkTokens(few % 2**20 + 1 - (few % 2**20 == 2**20 - 1)))).number >= 1


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for kind in QUANTITIES:
        try:
            value = dec_hook(kind, text)
        except UnitError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert dec_hook(kind, str(value)) == value


def test_the_shortest_text_is_chosen() -> None:
    assert str(Size(2 * 2**30)) == "2 GiB"
    assert str(Size(5_000_000)) == "5 MB"
    assert str(Size(0)) == "0 B"
    assert str(Duration.of_ns(1_500_000)) == "1500 us"
    assert str(Duration.parse("1.50 leases")) == "1.5 leases"
    assert str(Duration.parse("1 leases")) == "1 lease"
    assert str(Rate.parse("25 Gbit/s")) == "25 Gbit/s"


def test_quantities_do_not_mix() -> None:
    assert Size(5) != Tokens(5)
    assert len({Size(5), Size(5), Tokens(5)}) == 2
    assert repr(Size(5)) == "Size.parse('5 B')"


def test_every_kind_survives_msgspec() -> None:
    for kind, text in ((Duration, "2 leases"), (Size, "1 GiB"), (Rate, "1 Gbit/s"), (Tokens, "3 chunks")):
        value = dec_hook(kind, text)
        data = msgspec.json.encode(value, enc_hook=enc_hook)
        assert msgspec.json.decode(data, type=kind, dec_hook=dec_hook) == value
        assert known_units(kind)
    with pytest.raises(NotImplementedError):
        dec_hook(complex, "1")
    with pytest.raises(NotImplementedError):
        enc_hook(1j)
