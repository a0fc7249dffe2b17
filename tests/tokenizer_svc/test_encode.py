"""Text to ids and back, with `transformers` as the judge."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tokenizer_svc import encode
from tokenizer_svc.encode import TextTokenizer
from weft.columns import pack_u32, unpack_u32
from weft.errors import SettingsError
from weft.model_folder import BUNDLED

TALES = BUNDLED / "tales-1m"
TOKENIZER = encode.load(TALES)
JUDGE = PreTrainedTokenizerFast.from_pretrained(TALES)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.booleans())
def test_ids_are_those_of_transformers_and_decode_to_the_text(text: str, add_special_tokens: bool) -> None:
    column = TOKENIZER.encode(text, add_special_tokens=add_special_tokens)
    assert unpack_u32(column) == JUDGE.encode(text, add_special_tokens=add_special_tokens)
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_special_tokens_in_a_text_are_one_token_each_and_are_written_out_again() -> None:
    column = TOKENIZER.encode("<|user|>Hi<|end|>", add_special_tokens=False)
    assert {unpack_u32(column)[0], unpack_u32(column)[-1]} == set(JUDGE.convert_tokens_to_ids(["<|user|>", "<|end|>"]))
    assert TOKENIZER.decode(column) == "<|user|>Hi<|end|>"


def test_prompt_is_neither_cut_nor_filled_up_whatever_the_file_asks_for() -> None:
    file = json.loads((TALES / "tokenizer.json").read_text())
    file["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    side = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    file["padding"] = {**side, "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>"}
    tokenizer = TextTokenizer(json.dumps(file).encode())
    text = "Once upon a time there was a fox"
    assert tokenizer.encode(text, add_special_tokens=False) == TOKENIZER.encode(text, add_special_tokens=False)


def test_packed_file_is_the_file() -> None:
    assert zlib.decompress(TOKENIZER.packed) == (TALES / "tokenizer.json").read_bytes()
    assert len(TOKENIZER.digest) == 16


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{tmp_path.name} has no tokenizer.json"):
        encode.load(tmp_path)


def test_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"tokenizer\.json cannot be read"):
        encode.load(tmp_path)


def test_empty_column_decodes_to_nothing() -> None:
    assert TOKENIZER.decode(pack_u32([])) == ""
