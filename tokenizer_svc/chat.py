"""Conversations to text, by the chat template in the model's folder.

Which template and which special tokens follow `transformers` (tokenization_utils_base.py, 5.x): chat_template.jinja
before tokenizer_config.json, the template named `default` where there are several; tokens from tokenizer_config.json,
or from special_tokens_map.json in older folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from jinja2.environment import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from tokenizer_svc.sandbox import TemplateEnvironment
from weft import model_folder
from weft.errors import InvalidRequest, SettingsError
from weft.messages import ChatPrompt

_MAX_DATE_FORMAT_CHARS: Final = 256
# What a template's own refusal may say of itself.
_MAX_REASON_CHARS: Final = 500


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises SettingsError if the template does not compile."""
        try:
            self._template: Template = TemplateEnvironment().compile_capped(source)
        except (TemplateSyntaxError, RecursionError) as error:
            raise SettingsError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, prompt: ChatPrompt) -> str:
        """The prompt's text, special tokens written out.

        Raises:
            InvalidRequest: the template refuses these messages, or fails on them.
        """
        messages = [
            {"role": message.role, "content": message.content} | ({"name": message.name} if message.name else {})
            for message in prompt.messages
        ]
        variables = self._special_tokens | {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt.add_generation_prompt,
            "strftime_now": _strftime(prompt.now),
        }
        try:
            return self._template.render(variables)
        except TemplateError as error:
            raise InvalidRequest(
                f"the chat template refused: {str(error)[:_MAX_REASON_CHARS]}", param="messages"
            ) from error
        except (MemoryError, RecursionError) as error:
            raise InvalidRequest("the messages are too large for the chat template", param="messages") from error
        except Exception as error:
            # Whatever a template does to messages of a kind that its author did not think of.
            raise InvalidRequest(
                f"the chat template failed on these messages: {type(error).__name__}: {str(error)[:_MAX_REASON_CHARS]}",
                param="messages",
            ) from error


def load(folder: Path) -> ChatTemplate | None:
    """The folder's template; None if it has none, as base models do.

    Raises:
        SettingsError: a file cannot be read, the template does not compile, or none of several is the default.
    """
    config = _read_json_if_there(folder / "tokenizer_config.json")
    templates = _templates(folder, config)
    if not templates:
        return None
    if "default" not in templates:
        raise SettingsError(f"{folder} has chat templates named {', '.join(sorted(templates))}, but no default")
    try:
        return ChatTemplate(templates["default"], special_tokens(folder, config))
    except SettingsError as error:
        raise SettingsError(f"{folder}: {error.message}") from error


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on, as a template names them."""
    named: dict[str, Any] = dict(config)
    if "added_tokens_decoder" not in config:
        named |= _read_json_if_there(folder / "special_tokens_map.json")
    extra = named.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    tokens = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    try:
        files = {
            path.stem: path.read_text("utf-8")
            for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
        }
        if (folder / "chat_template.jinja").exists():
            files["default"] = (folder / "chat_template.jinja").read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"a chat template of {folder} cannot be read: {error}") from error
    if files:
        return files
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict) and "name" in entry}
    return {}


def _strftime(now: float) -> Callable[[str], str]:
    """`strftime_now` as of the request's arrival, so that a recovery renders the same prompt."""

    def strftime_now(form: str) -> str:
        if len(form) > _MAX_DATE_FORMAT_CHARS:
            raise TemplateError("the date's format is too long")
        return datetime.fromtimestamp(now).strftime(form)

    return strftime_now


def _read_json_if_there(path: Path) -> dict[str, Any]:
    return model_folder.read_json(path) if path.exists() else {}
