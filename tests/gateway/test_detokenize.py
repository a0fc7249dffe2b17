"""Detokenizing piece by piece equals the `tokenizers` library's decode of everything, for every kind of decoder."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from gateway.detokenize import (
    ByteLevelDetokenizer,
    TokenWiseDetokenizer,
    Vocabulary,
    WholeDetokenizer,
    bytes_to_text,
)

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["Ġhello", "Ġworld", "âĤ¬", "ðŁĺ", "Ģ", "ĠðŁĺĢ", "ÃŃ", "plain text", "¯\\_", "日本"]
PIECES = [
    "▁",
    "▁Hello",
    "▁world",
    "s",
    "##ing",
    "##",
    "a▁b",
    "▁▁",
    " ",
    "  x",
    ".",
    " .",
    "n't",
    "'",
    "</w>",
    "é",
    "日",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)] + ["<0x+F>", "<0xGG>", "▁<0x41>", "<0x41>x"]


def build(tokens: list[str], decoder: Any) -> Tokenizer:
    """A tokenizer of these tokens, with special, plain and oddly named added tokens and a hole in its ids."""
    vocab = {token: i for i, token in enumerate(tokens)}
    vocab["beyond"] = len(vocab) + 5
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="s"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("Ġ<s>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("Ġa b"), AddedToken("▁added"), AddedToken("né")])
    return tokenizer


def llama(*, strip: bool) -> Any:
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])


BYTE_LEVEL = build(ALPHABET + WORDS, decoders.ByteLevel())
TOKENIZERS = {
    "byte level": BYTE_LEVEL,
    "byte level in a sequence": build(ALPHABET + WORDS, decoders.Sequence([decoders.ByteLevel()])),
    "llama 2": build(PIECES + BYTES, llama(strip=True)),
    "gemma": build(PIECES + BYTES, llama(strip=False)),
    "no fuse": build(PIECES + BYTES, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])),
    "metaspace": build(PIECES, decoders.Metaspace()),
    "metaspace never": build(PIECES, decoders.Metaspace(prepend_scheme="never")),
    "metaspace and bytes": build(PIECES + BYTES, decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])),
    "strip first": build(PIECES, decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Metaspace()])),
    "strip three": build(
        PIECES + BYTES,
        decoders.Sequence(
            [
                decoders.Metaspace(prepend_scheme="never"),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 3),
            ]
        ),
    ),
    "word piece": build(PIECES, decoders.WordPiece()),
    "word piece as it is": build(PIECES, decoders.WordPiece(cleanup=False)),
    "none": build(PIECES, None),
    "bpe": build(PIECES, decoders.BPEDecoder()),
    "ctc": build(PIECES, decoders.CTC(pad_token="s")),
    "regex": build(PIECES, decoders.Replace(Regex("[▁s]+"), " ")),
    "replace after fuse": build(PIECES, decoders.Sequence([decoders.Fuse(), decoders.Replace("s▁", "!")])),
}
VOCABULARIES = {name: Vocabulary(tokenizer.to_str()) for name, tokenizer in TOKENIZERS.items()}
HELD_TO_THE_END = {"bpe", "ctc", "regex", "replace after fuse"}


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Ids of the vocabulary, of its hole, and beyond it."""
    size = TOKENIZERS[name].get_vocab_size()
    return st.lists(st.one_of(st.integers(0, size + 8), st.integers(0, 2**32 - 1)), max_size=30)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_pieces_joined_equal_the_full_decode(name: str, data: st.DataObject) -> None:
    token_ids = data.draw(ids_of(name))
    decoder = VOCABULARIES[name].decoder()
    text = "".join([decoder.push(token_id) for token_id in token_ids]) + decoder.finish()
    assert text == TOKENIZERS[name].decode(token_ids, skip_special_tokens=True)
    assert text == VOCABULARIES[name].decode(token_ids)


@given(data=st.binary(max_size=40))
@example(b"\xf0\x9f\x98\x80\xf0\x9f\x98")
@example(b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf\xff")
@example(b"\xe0\x80\xe2\x82\xf0\x80\xf0\x90\x80")
def test_any_bytes_decode_as_the_library_decodes_them(data: bytes) -> None:
    chars = {byte: char for char, byte in byte_chars().items()}
    token_ids = [BYTE_LEVEL.token_to_id(chars[byte]) for byte in data]
    decoder = VOCABULARIES["byte level"].decoder()
    text = "".join([decoder.push(token_id) for token_id in token_ids]) + decoder.finish()
    assert text == BYTE_LEVEL.decode(token_ids) == data.decode("utf-8", "replace")


def byte_chars() -> dict[str, int]:
    """The library's own disguise of each byte, found by encoding a text of all bytes that UTF-8 has."""
    vocabulary = VOCABULARIES["byte level"]
    return {char: vocabulary.token_bytes(BYTE_LEVEL.token_to_id(char))[0] for char in ALPHABET}


@pytest.mark.parametrize("char", ["a", " ", "\n", "é", "€", "😀", "\x7f", "\xad", "\xa0"])
def test_bytes_are_disguised_as_the_library_does_it(char: str) -> None:
    ((disguised, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(char)
    assert bytes(byte_chars()[one] for one in disguised) == char.encode()


def test_whole_characters_are_not_held_back() -> None:
    decoder = VOCABULARIES["byte level"].decoder()
    euro = [BYTE_LEVEL.token_to_id(char) for char in "âĤ¬"]
    assert [decoder.push(one) for one in euro] == ["", "", "€"]
    assert decoder.finish() == ""


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    decoder = VOCABULARIES["byte level"].decoder()
    assert decoder.push(BYTE_LEVEL.token_to_id("ðŁĺ")) == ""
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_run_of_byte_tokens_is_held_to_its_end() -> None:
    tokenizer, decoder = TOKENIZERS["llama 2"], VOCABULARIES["llama 2"].decoder()
    emoji = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    assert [decoder.push(one) for one in emoji] == ["", "", "", ""]
    assert decoder.push(tokenizer.token_to_id("▁world")) == "😀 world"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_decoders_that_cannot_be_taken_apart_are_held_to_the_end(name: str) -> None:
    expected: type = WholeDetokenizer if name in HELD_TO_THE_END else TokenWiseDetokenizer
    if name.startswith("byte level"):
        expected = ByteLevelDetokenizer
    assert isinstance(VOCABULARIES[name].decoder(), expected)


@pytest.mark.parametrize(
    ("name", "token", "text", "data"),
    [
        ("byte level", "Ġhello", " hello", b" hello"),
        ("byte level", "ðŁĺ", "\\xf0\\x9f\\x98", b"\xf0\x9f\x98"),
        ("byte level", "<|end|>", "<|end|>", b"<|end|>"),
        ("byte level", "Ġa b", "Ġa b", "Ġa b".encode()),
        ("llama 2", "▁Hello", " Hello", b" Hello"),
        ("llama 2", "<0xE2>", "\\xe2", b"\xe2"),
        ("word piece", "##ing", "ing", b"ing"),
        ("none", "s", " s", b" s"),
        ("regex", "▁Hello", " Hello", b" Hello"),
    ],
)
def test_a_token_alone_reads_as_in_the_middle_of_a_text(name: str, token: str, text: str, data: bytes) -> None:
    token_id = TOKENIZERS[name].token_to_id(token)
    assert VOCABULARIES[name].token_bytes(token_id) == data
    assert bytes_to_text(data) == text


def test_an_unknown_id_has_no_text() -> None:
    assert VOCABULARIES["byte level"].token_bytes(2**32 - 1) == b""


def test_unknown_ids_take_no_memory() -> None:
    vocabulary = Vocabulary(BYTE_LEVEL.to_str())
    decoder = vocabulary.decoder()
    for token_id in range(10_000, 11_000):
        decoder.push(token_id)
    assert not vocabulary._pieces


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        Vocabulary(text)
