"""The README names files, messages, subjects and flags that exist."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from weft import messages, subjects
from weft.settings import UpSettings, declared

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_]+/[A-Za-z0-9_./-]+)`", README))))
def test_named_file_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[A-Z][a-z]+){2,})`", README))))
def test_named_message_exists(name: str) -> None:
    assert name in {cls.__name__ for cls in typing.get_args(messages.Message)}


@pytest.mark.parametrize("subject", sorted(set(re.findall(r"`(weft\.v1\.[^`]+)`", README))))
def test_named_subject_exists(subject: str) -> None:
    made = {
        subjects.tokenize("<model>").replace(subjects.model_token("<model>"), "<model>"),
        subjects.schedule("<model>").replace(subjects.model_token("<model>"), "<model>"),
        subjects.scale("<model>").replace(subjects.model_token("<model>"), "<model>"),
        subjects.assign("<id>"),
        subjects.frames("<id>"),
        subjects.cache("<shard>"),
    }
    assert subject in made


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"}))
def test_named_flag_exists(flag: str) -> None:
    assert flag in {item.flag for item in declared(UpSettings)}
