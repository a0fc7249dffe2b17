"""Messages to bytes and back: plain msgpack, checked while decoding."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from weft import limits
from weft.errors import DecodeError, PayloadTooLarge
from weft.messages import Message

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {}


def encode(message: Message) -> bytes:
    """Encode one message.

    Raises:
        PayloadTooLarge: it is larger than the bus carries.
    """
    data = _encoder.encode(message)
    if len(data) > limits.MAX_MESSAGE_BYTES:
        raise PayloadTooLarge(
            f"{type(message).__name__} of {len(data)} bytes is over the limit of {limits.MAX_MESSAGE_BYTES}"
        )
    return data


def decode(data: bytes, expected: type[M]) -> M:
    """Decode `data` as `expected`: one message class, or a union of them.

    Raises:
        DecodeError: too large, not msgpack, another type or version, an unknown field, or a value out of bounds.
    """
    if len(data) > limits.MAX_MESSAGE_BYTES:
        raise DecodeError(f"message of {len(data)} bytes is over the limit of {limits.MAX_MESSAGE_BYTES}")
    decoder = _decoders.get(expected)
    if decoder is None:
        decoder = _decoders[expected] = msgspec.msgpack.Decoder(expected)
    try:
        return decoder.decode(data)  # type: ignore[return-value]  # the decoder was made for `expected`
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"no {_name(expected)}: {error}") from error


def _name(expected: object) -> str:
    return getattr(expected, "__name__", str(expected))
