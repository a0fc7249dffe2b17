"""`weft explain ID`: a request's time line and why it was placed where it was, from the gateway that served it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from weft.chat import Client, url_here
from weft.errors import SettingsError, Unavailable, WeftError
from weft.exit_status import complain
from weft.settings import ExplainSettings, load_with_words

PROG: Final = "weft explain ID"


def main(argv: Sequence[str]) -> int:
    """`explain ID`: an id as answers carry it (chatcmpl-…, cmpl-…), or a request's own as logs do."""
    try:
        settings, words = load_with_words(ExplainSettings, argv, os.environ, prog=PROG)
        if len(words) != 1:
            raise SettingsError("which request? Every answer has an `id`: weft explain ID")
        client = Client(settings.url or url_here(settings.data_path), settings.api_key)
        sys.stdout.write(_read(asyncio.run(client.explanation(words[0]))))
    except WeftError as error:
        return complain("weft explain", error)
    return 0


def _read(explanation: dict[str, Any]) -> str:
    try:
        return to_text(explanation)
    except (KeyError, TypeError, ValueError) as error:
        raise Unavailable(f"the gateway's explanation cannot be read: {error!r}") from error


def to_text(explanation: dict[str, Any]) -> str:
    """The gateway's answer for a terminal. Pure."""
    requests = explanation["requests"]
    lines = [f"{explanation['id']}  {explanation['model']}"]
    for number, request in enumerate(requests, 1):
        lines.append("")
        if len(requests) > 1:
            lines.append(f"prompt {number} of {len(requests)}, request {request['request_id']}")
        lines += [line for entry in request["timeline"] for line in _entry_lines(entry)]
        if request["num_left_out"]:
            lines.append(f"  ({request['num_left_out']} more, from the middle, are left out)")
        lines.append(f"  {request['state']}: {_why(request)}")
    return "\n".join(lines) + "\n"


def _why(request: dict[str, Any]) -> str:
    if request["why"]:
        return f"placed on {request['why']}"
    # Whoever decided may have gone before it told.
    may_be_placed = request["state"] == "running" or any(entry["event"] == "started" for entry in request["timeline"])
    return "no decision is known" if may_be_placed else "it was never placed"


def _entry_lines(entry: dict[str, Any]) -> list[str]:
    """An entry, and below a decision its candidates."""
    first = f"  +{entry['at_s']:9.4f} s  {entry['event'].replace('_', ' '):11}  {entry['text']}".rstrip()
    decision = entry.get("decision")
    if decision is None:
        return [first]
    return [first, *(_score_line(score, decision["num_prompt_blocks"]) for score in decision["scores"])]


def _score_line(score: dict[str, Any], num_prompt_blocks: int) -> str:
    return (
        f"{'':27}{score['worker']}: {score['matched_blocks']}/{num_prompt_blocks} blocks cached, "
        f"{score['load']} sequences, {score['waiting_tokens']} tokens to prefill"
    )
