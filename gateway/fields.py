"""Reading a client's JSON object field by field: what is wrong becomes an `InvalidRequest` that names the field.

Pure. JSON's null reads as "not given". A bool is no number here, and a float is no integer, not even 1.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Final, TypeAlias

import msgspec

from weft.errors import InvalidRequest

# What a field that we do not implement may say: one of these values, or anything of a type.
Accepted: TypeAlias = tuple[object, ...] | type

_MAX_SHOWN_CHARS: Final = 60
# `float` turns 1e999 into infinity, which the range check of its field refuses by name.
_decoder: Final = msgspec.json.Decoder(float_hook=float)


def decode_object(body: bytes) -> dict[str, object]:
    """Decode the JSON object that a request's body must be.

    Raises:
        InvalidRequest: not UTF-8, not JSON (says where), nested too deeply, or not an object.
    """
    try:
        value = _decoder.decode(body)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    except (UnicodeDecodeError, msgspec.MsgspecError) as error:
        # Bad UTF-8 is the one or the other, by the version of msgspec.
        if (place := _first_bad_byte(body)) is not None:
            raise InvalidRequest(f"The request body is not valid UTF-8 (byte {place}).") from None
        fault = str(error).removeprefix("JSON is malformed: ")
        name = _not_a_number(body)
        where = f" ('{name}' is NaN or infinite)" if name else ""
        raise InvalidRequest(f"The request body is not valid JSON: {fault}{where}.", param=name) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The request body must be a JSON object, not {show(value)}.")
    return value


def _not_a_number(body: bytes) -> str | None:
    """The first field whose value is one of the literals that Python writes and JSON does not have, if any."""
    found: list[float] = []

    def note(literal: str) -> float:
        found.append(float(literal))
        return found[-1]

    try:
        value = json.loads(body, parse_constant=note)
    except (ValueError, RecursionError):
        return None
    if not found or not isinstance(value, dict):
        return None
    return next((name for name, item in value.items() if _holds_constant(item)), None)


def _holds_constant(value: object) -> bool:
    """Depth is bounded: `json.loads` would have refused deeper ones."""
    if isinstance(value, dict | list):
        return any(map(_holds_constant, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not math.isfinite(value)


def invalid(name: str, expected: str, value: object) -> InvalidRequest:
    """An error that says what `name` should be and what it was."""
    return InvalidRequest(f"Invalid value for '{name}': expected {expected}, got {show(value)}.", param=name)


def show(value: object) -> str:
    """Name a JSON value in a few words, however large it is."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value) if abs(value) < 2**64 else "a huge integer"
        case float():
            return str(value)
        case str():
            return f'"{shorten(value)}"'
        case list():
            return f"an array of {len(value)}"
        case _:
            return "an object"


def shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def is_integer(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value: object, low: float, high: float) -> bool:
    """NaN and infinities are out of every range."""
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]  # it is a number


class Fields:
    """The fields of one JSON object that have not been read yet.

    Every reader takes its field off, returns None for one that is not given, and raises InvalidRequest for a value of
    the wrong type or range. `path` goes before the names in errors: "messages[0]." and the like.
    """

    def __init__(self, values: dict[str, object], path: str = "") -> None:
        self._values = values.copy()
        self._path = path

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str) -> object:
        return self._values.pop(name, None)

    def string(self, name: str, max_chars: int) -> str | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.invalid(name, "a string", value)
        if len(value) > max_chars:
            raise self.invalid(name, f"at most {max_chars} characters", value)
        return value

    def name(self, name: str, max_chars: int) -> str:
        """A string that must be given and not empty."""
        value = self.string(name, max_chars)
        if value is None:
            raise self.missing(name)
        if not value:
            raise self.invalid(name, "a string that is not empty", value)
        return value

    def boolean(self, name: str) -> bool | None:
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return value
        raise self.invalid(name, "true or false", value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if not is_integer(value, low, high):
            raise self.invalid(name, f"an integer from {low} to {high}", value)
        return value  # type: ignore[return-value]  # is_integer said so

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if not is_number(value, low, high):
            raise self.invalid(name, f"a number from {low:g} to {high:g}", value)
        return float(value)  # type: ignore[arg-type]  # is_number said so

    def array(self, name: str, max_length: int) -> list[object] | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.invalid(name, "an array", value)
        if len(value) > max_length:
            raise self.invalid(name, f"an array of at most {max_length}", value)
        return value

    def mapping(self, name: str, max_length: int) -> dict[str, object] | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.invalid(name, "an object", value)
        if len(value) > max_length:
            raise InvalidRequest(
                f"Invalid value for '{self._path}{name}': expected an object of at most {max_length} fields, "
                f"got {len(value)}.",
                param=self._path + name,
            )
        return value

    def refuse_rest(self, accepted: Mapping[str, Accepted]) -> None:
        """Check what nobody has read: `accepted` names the fields that may say nothing of consequence.

        Raises:
            InvalidRequest: a field that is not among them, or asks for something.
        """
        for name, value in self._values.items():
            if name not in accepted:
                param = self._path + shorten(name)
                raise InvalidRequest(f"Unrecognized request argument supplied: '{param}'.", param=param)
            if value is not None and not _is_accepted(value, accepted[name]):
                param = self._path + name
                raise InvalidRequest(f"'{param}' is not supported (got {show(value)}).", param=param)

    def invalid(self, name: str, expected: str, value: object) -> InvalidRequest:
        return invalid(self._path + name, expected, value)

    def missing(self, name: str) -> InvalidRequest:
        param = self._path + name
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)


def _is_accepted(value: object, accepted: Accepted) -> bool:
    if isinstance(accepted, tuple):
        # 0 == False and 1 == True, but they are not the same JSON.
        return any(type(value) is type(one) and value == one for one in accepted)
    return type(value) is accepted


def _first_bad_byte(body: bytes) -> int | None:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None
