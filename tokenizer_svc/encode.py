"""Text to token ids and back, by the model's tokenizer.json."""

from __future__ import annotations

import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from weft.columns import pack_u32, unpack_u32
from weft.errors import InvalidRequest, SettingsError

DIGEST_BYTES: Final = 16


class TextTokenizer:
    """A model's tokenizer. Safe to use from several threads; long work lets other threads run."""

    def __init__(self, file: bytes) -> None:
        """Raises ValueError if `file` is no tokenizer.json."""
        try:
            self._tokenizer = Tokenizer.from_buffer(file)
        except Exception as error:
            # `tokenizers` raises plain Exception for whatever it cannot read.
            raise ValueError(f"no tokenizer.json: {error}") from error
        # A file may ask for either, and a prompt must be neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = blake2b(file, digest_size=DIGEST_BYTES).digest()
        self.packed = zlib.compress(file, 6)

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        """Token ids as a uint32 column.

        Raises:
            InvalidRequest: the tokenizer has no token for something in the text.
        """
        try:
            # Of all ways to encode, only the batched ones release the GIL; without offsets they are the fastest too.
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except Exception as error:
            raise InvalidRequest(f"the text cannot be tokenized: {error}", param="prompt") from error
        return pack_u32(encoding.ids)

    def decode(self, token_ids: bytes) -> str:
        """The text of a uint32 column, special tokens written out."""
        texts: list[str] = self._tokenizer.decode_batch([unpack_u32(token_ids)], skip_special_tokens=False)
        return texts[0]


def load(folder: Path) -> TextTokenizer:
    """Raises SettingsError, which names the folder, if it has no tokenizer that can be read."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise SettingsError(f"{folder} has no tokenizer.json: its tokenizer must be converted to the fast format first")
    try:
        return TextTokenizer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
