"""Token ids to text, one by one and exactly: the pieces joined equal `tokenizers`' decode of all ids. Pure.

`Tokenizer.decode(ids, skip_special_tokens=True)` looks up the ids' tokens, leaves out unknown and special ones, and
hands the rest to the tokenizer's decoder. Three kinds of decoder are told apart here:

- ByteLevel (GPT-2, Llama 3, Qwen): tokens are bytes in disguise; UTF-8 is decoded as the bytes arrive.
- Decoders that treat tokens one by one, but for the first and for runs of byte tokens: Metaspace, WordPiece, none,
  and the sequences of Llama 2, Mistral and Gemma (Replace, ByteFallback, Fuse, Strip).
- Any other: all text is held back until the end, which is slow to read but never wrong.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias

import msgspec
from tokenizers import Tokenizer

# What a token is as the first of a completion, and as any later one: text, or a single byte.
_Forms: TypeAlias = tuple[str | bytes, str | bytes]
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# The same as the Rust library's `starts_with("<0x")` and `from_str_radix(16)`, which takes a sign.
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class Detokenizer(Protocol):
    """The state of one completion.

    Mutates: both methods. Nothing may be pushed after `finish`.
    """

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain by now and was not returned before."""

    def finish(self) -> str:
        """Return the text that was held back."""


class Vocabulary:
    """What all streams of one model share: its tokens as text, worked out once each."""

    def __init__(self, tokenizer_json: str) -> None:
        """Read the text of a tokenizer.json.

        Raises:
            ValueError: it is none.
        """
        try:
            self._tokenizer: Any = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json: {error}") from error
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special: frozenset[str] = frozenset(token.content for token in added if token.special)
        self._plan = _plan(self._tokenizer)
        self._pieces: dict[int, str | bytes] = {}
        self._forms: dict[int, _Forms] = {}

    def decoder(self) -> Detokenizer:
        """A detokenizer for one new completion."""
        match self._plan:
            case _ByteLevel():
                return ByteLevelDetokenizer(self._pieces, self._load_piece)
            case _TokenWise():
                return TokenWiseDetokenizer(self._plan, self._forms, self._load_forms)
            case _:
                return WholeDetokenizer(self.decode)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids at once."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds in the middle of a text, or the special token's name; b"" for an unknown id."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token in self._special:
            return str(token).encode()
        match self._plan:
            case _ByteLevel():
                return _token_to_bytes(token)
            case _TokenWise():
                form = self._plan.forms(token)[1]
                return form if isinstance(form, bytes) else form.encode()
            case _:
                return self.decode([token_id]).encode()

    def _token(self, token_id: int) -> str | None:
        """None if the id is left out when decoding."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return None if token in self._special else token

    def _load_piece(self, token_id: int) -> str | bytes:
        token = self._token(token_id)
        if token is None:
            return ""
        data = _token_to_bytes(token)
        try:
            piece: str | bytes = data.decode("utf-8")
        except UnicodeDecodeError:
            piece = data
        self._pieces[token_id] = piece
        return piece

    def _load_forms(self, token_id: int) -> _Forms | None:
        token = self._token(token_id)
        if token is None:
            return None
        assert isinstance(self._plan, _TokenWise)
        forms = self._forms[token_id] = self._plan.forms(token)
        return forms


def bytes_to_text(data: bytes) -> str:
    r"""A token's bytes to read: where they are no UTF-8 by themselves they become `\xe2` and the like, as at OpenAI."""
    return data.decode("utf-8", "backslashreplace")


class ByteLevelDetokenizer:
    """Implements Detokenizer over bytes: holds back at most the three of an unfinished character."""

    __slots__ = ("_load", "_pending", "_pieces")

    def __init__(self, pieces: dict[int, str | bytes], load: Callable[[int], str | bytes]) -> None:
        self._pieces = pieces  # text where a token is whole characters, bytes where it is not
        self._load = load
        self._pending = b""

    def push(self, token_id: int) -> str:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._load(token_id)
        if type(piece) is str:
            if not self._pending:
                return piece
            piece = piece.encode()
        data = self._pending + piece  # type: ignore[operator]  # bytes by now
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        return text

    def finish(self) -> str:
        return self._pending.decode("utf-8", "replace")


class TokenWiseDetokenizer:
    """Implements Detokenizer token by token, but for runs of byte tokens.

    A run is text only if all of it is UTF-8, else every byte of it becomes U+FFFD; so it is held back to its end.
    """

    __slots__ = ("_forms", "_is_first", "_load", "_num_to_strip", "_run", "_strip")

    def __init__(self, plan: _TokenWise, forms: dict[int, _Forms], load: Callable[[int], _Forms | None]) -> None:
        self._forms = forms
        self._load = load
        self._is_first = True
        self._run = b""
        self._strip, self._num_to_strip = plan.strip

    def push(self, token_id: int) -> str:
        forms = self._forms.get(token_id) or self._load(token_id)
        if forms is None:
            return ""
        text = forms[not self._is_first]
        self._is_first = False
        if isinstance(text, bytes):
            self._run += text
            return ""
        if self._run:
            text = self._end_run() + text
        return self._strip_start(text) if self._num_to_strip else text

    def finish(self) -> str:
        return self._strip_start(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _strip_start(self, text: str) -> str:
        """Take off the text's first characters, as far as they are to be stripped."""
        start = 0
        while start < len(text) and self._num_to_strip:
            if text[start] == self._strip:
                start += 1
                self._num_to_strip -= 1
            else:
                self._num_to_strip = 0
        return text[start:]


class WholeDetokenizer:
    """Implements Detokenizer for a decoder that we cannot take apart: it says everything at the end."""

    __slots__ = ("_decode", "_token_ids")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._token_ids: list[int] = []

    def push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        return ""

    def finish(self) -> str:
        return self._decode(self._token_ids)


class _ByteLevel(msgspec.Struct, frozen=True):
    """Tokens are bytes in disguise, and the text is their UTF-8."""


class _TokenWise(msgspec.Struct, frozen=True):
    """`render` gives a token's text as the first and as a later one; `strip` is what the whole text loses in front."""

    render: Callable[[str], tuple[str, str]]
    has_bytes: bool
    strip: tuple[str, int]

    def forms(self, token: str) -> _Forms:
        first, later = self.render(token)
        return (_to_byte(first), _to_byte(later)) if self.has_bytes else (first, later)


def _plan(tokenizer: Any) -> _ByteLevel | _TokenWise | None:
    """How to decode piece by piece; None if we do not know how."""
    if tokenizer.decoder is None:
        return _TokenWise(lambda token: (token, f" {token}"), False, ("", 0))
    nodes = _flatten(msgspec.json.decode(tokenizer.decoder.__getstate__()))
    if [node["type"] for node in nodes] == ["ByteLevel"]:
        return _ByteLevel()
    num_local = 0
    while num_local < len(nodes) and _is_local(nodes[num_local]):
        num_local += 1
    local, rest = nodes[:num_local], nodes[num_local:]
    has_bytes = bool(rest) and rest[0]["type"] == "ByteFallback"
    rest = rest[has_bytes:]
    strip = ("", 0)
    if rest and rest[0]["type"] == "Fuse":
        rest = rest[1:]
        if rest and rest[0]["type"] == "Strip" and not rest[0]["stop"]:
            strip = (rest[0]["content"], rest[0]["start"])
            rest = rest[1:]
    return None if rest else _TokenWise(_renderer(local), has_bytes, strip)


def _flatten(node: dict[str, Any]) -> list[dict[str, Any]]:
    if node["type"] != "Sequence":
        return [node]
    return [leaf for child in node["decoders"] for leaf in _flatten(child)]


def _is_local(node: dict[str, Any]) -> bool:
    """Whether a decoder makes one text of each token that depends on nothing but whether the token is the first."""
    match node["type"]:
        case "Metaspace" | "WordPiece":
            return True
        case "Replace":
            return bool(node["pattern"].get("String"))
        case "Strip":
            return not node["stop"]
        case _:
            return False


def _renderer(nodes: list[dict[str, Any]]) -> Callable[[str], tuple[str, str]]:
    """Render tokens with the library's own decoder: local decoders make "" of an empty first token."""
    description = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "Sequence", "decoders": nodes},
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
    }
    decoder = Tokenizer.from_str(msgspec.json.encode(description).decode()).decoder
    return lambda token: (decoder.decode([token]), decoder.decode(["", token]))


def _to_byte(text: str) -> str | bytes:
    """The byte that a byte token stands for; any other text as it is."""
    found = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else text


def _byte_of_char() -> dict[str, int]:
    """GPT-2's disguise of bytes: printable ones of Latin-1 stand for themselves, the others follow from U+0100 on.

    Source: Radford et al. (2019), `bytes_to_unicode` of the GPT-2 release.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR: Final = _byte_of_char()


def _token_to_bytes(token: str) -> bytes:
    """A token with any character that is no byte in disguise (an added token, say) stands for itself."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()
