"""What a request wants continued: a chat's messages, or prompts as text or token ids. Pure."""

from __future__ import annotations

from typing import Final

from gateway.fields import Accepted, Fields, invalid, is_integer, show
from weft import limits
from weft.columns import pack_u32
from weft.errors import InvalidRequest, PayloadTooLarge
from weft.messages import ChatMessage, Prompt, TextPrompt, TokenPrompt

# What an assistant's message carries when a client sends it back. Templates see roles, contents and names only.
_NEUTRAL: Final[dict[str, Accepted]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": str,
    "tool_calls": ([],),
}


def read_messages(fields: Fields) -> list[ChatMessage]:
    """Read the "messages" of a chat.

    Raises:
        InvalidRequest: `param` names the message, and the field or content part of it.
    """
    messages = fields.array("messages", limits.MAX_CHAT_MESSAGES)
    if messages is None:
        raise fields.missing("messages")
    if not messages:
        raise invalid("messages", "at least one message", messages)
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(path: str, value: object) -> ChatMessage:
    if not isinstance(value, dict):
        raise invalid(path, "an object", value)
    fields = Fields(value, f"{path}.")
    role = fields.name("role", limits.MAX_NAME_CHARS)
    content = fields.take("content")
    if isinstance(content, list):
        content = _join_parts(f"{path}.content", content)
    elif content is None and role == "assistant":
        content = ""
    elif not isinstance(content, str):
        raise invalid(f"{path}.content", "a string or an array of content parts", content)
    name = fields.string("name", limits.MAX_NAME_CHARS)
    fields.refuse_rest(_NEUTRAL)
    # OpenAI's newer word for the same role, which chat templates do not know.
    return ChatMessage("system" if role == "developer" else role, content, name)


def _join_parts(path: str, parts: list[object]) -> str:
    texts = []
    for j, part in enumerate(parts):
        if not isinstance(part, dict):
            raise invalid(f"{path}[{j}]", "an object", part)
        fields = Fields(part, f"{path}[{j}].")
        kind = fields.take("type")
        if kind != "text":
            raise fields.invalid("type", '"text" (other parts are not supported)', kind)
        text = fields.string("text", limits.MAX_MESSAGE_BYTES)
        if text is None:
            raise fields.missing("text")
        fields.refuse_rest({})
        texts.append(text)
    if not texts:
        raise invalid(path, "at least one content part", parts)
    return "".join(texts)


def read_prompts(fields: Fields) -> tuple[Prompt, ...]:
    """Read the "prompt" of a completion: a text, token ids, or an array of these.

    Raises:
        InvalidRequest: `param` names the prompt, or the token id in it.
    """
    value = fields.take("prompt")
    if isinstance(value, str):
        return (TextPrompt(value),)
    if value is None:
        raise fields.missing("prompt")
    if not isinstance(value, list):
        raise invalid("prompt", "a string, an array of strings, or one or several arrays of token ids", value)
    if not value:
        raise invalid("prompt", "at least one prompt", value)
    if type(value[0]) is int:
        return (TokenPrompt(pack_token_ids("prompt", value)),)
    if len(value) > limits.MAX_PROMPTS:
        raise invalid("prompt", f"at most {limits.MAX_PROMPTS} prompts", value)
    return tuple(_one_prompt(f"prompt[{i}]", one) for i, one in enumerate(value))


def _one_prompt(path: str, value: object) -> Prompt:
    if isinstance(value, str):
        return TextPrompt(value)
    if isinstance(value, list):
        return TokenPrompt(pack_token_ids(path, value))
    raise invalid(path, "a string or an array of token ids", value)


def pack_token_ids(path: str, token_ids: list[object]) -> bytes:
    """Token ids as a uint32 column; `path` names them in errors.

    Raises:
        InvalidRequest: none at all, or one that is no token id.
        PayloadTooLarge: too many.
    """
    if not token_ids:
        raise invalid(path, "at least one token id", token_ids)
    if len(token_ids) > limits.MAX_PROMPT_TOKENS:
        raise PayloadTooLarge(
            f"'{path}' has {len(token_ids)} token ids, more than the {limits.MAX_PROMPT_TOKENS} allowed.", param=path
        )
    check_token_ids(path, token_ids)
    return pack_u32(token_ids)  # type: ignore[arg-type]  # just checked


def check_token_ids(path: str, token_ids: list[object]) -> None:
    """Raises InvalidRequest for the first that is no token id."""
    # The loop that finds the culprit is ten times slower than this, and a prompt may have a million ids.
    if set(map(type, token_ids)) <= {int} and _in_range(token_ids):  # type: ignore[arg-type]  # they are integers
        return
    for i, token_id in enumerate(token_ids):
        if not is_integer(token_id, 0, limits.MAX_TOKEN_ID):
            raise InvalidRequest(
                f"Invalid value for '{path}[{i}]': expected a token id (an integer from 0 to {limits.MAX_TOKEN_ID}), "
                f"got {show(token_id)}.",
                param=f"{path}[{i}]",
            )


def _in_range(token_ids: list[int]) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) <= limits.MAX_TOKEN_ID)
