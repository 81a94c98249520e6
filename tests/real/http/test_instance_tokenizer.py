"""The general tokenizer: any text survives, and so does any list of token ids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvreal.tokenizer import BOS, EOS, VOCAB, General, TokenizerError, make

PROMPT = "Explain the significance of KV cache in language models."
LITERAL = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]
TOKENIZER = General()


@given(st.text(max_size=200))
def test_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids[0] == BOS and all(0 <= token < VOCAB for token in ids)
    assert TOKENIZER.decode(ids[1:]) == text


@given(st.from_regex(r"(<\|[a-z0-9_]{0,9}\|>| |a){0,8}", fullmatch=True))
def test_text_that_looks_like_ids_survives_too(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


@given(st.lists(st.integers(600, VOCAB - 1), max_size=30))
def test_ids_that_are_no_pieces_survive_as_text(ids: list[int]) -> None:
    assert TOKENIZER.encode(TOKENIZER.decode(ids), add_special_tokens=False) == ids


def test_the_literal_ids_of_the_walkthrough() -> None:
    assert TOKENIZER.encode(TOKENIZER.decode(LITERAL), add_special_tokens=False) == LITERAL


def test_english_takes_fewer_tokens_than_bytes() -> None:
    assert len(TOKENIZER.encode(PROMPT)) < len(PROMPT) // 2


def test_special_tokens_are_left_out_where_asked() -> None:
    assert TOKENIZER.decode([BOS, *TOKENIZER.encode("hello", False), EOS], skip_special_tokens=True) == "hello"


def test_every_process_makes_the_same_ids() -> None:
    code = f"from kvreal.tokenizer import General; print(General().encode({PROMPT!r}))"
    for seed in ("0", "123"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parents[3],
        )  # fmt: skip
        assert done.stdout.strip() == str(TOKENIZER.encode(PROMPT))


def test_a_models_own_tokenizer(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    vocab = {"[UNK]": 0, "hello": 1, "there": 2}
    made = library.Tokenizer(library.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    own = make(str(path))
    assert own.encode("hello there") == [1, 2] and own.decode([2, 1]) == "there hello" and own.vocab_size == 3


def test_a_tokenizer_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="there is no such file"):
        make(str(tmp_path / "tokenizer.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"bad\.json"):
        make(str(tmp_path / "bad.json"))
