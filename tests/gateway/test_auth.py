"""API keys: kept as hashes, asked for only if there is a file of them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from gateway.auth import ApiKeys
from weft.errors import SettingsError, Unauthorized

KEY = "sk-secret"


def keys(tmp_path: Path, text: str) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(text)
    return ApiKeys.read(str(path))


def test_without_a_file_everybody_is_anonymous() -> None:
    assert ApiKeys.read("").tenant_of(None) == ""


def test_a_key_names_its_tenant(tmp_path: Path) -> None:
    known = keys(tmp_path, f"# ours\n\nalice:{sha256(KEY.encode()).hexdigest()}\n")
    assert known.tenant_of(f"Bearer {KEY}") == "alice"
    assert known.tenant_of(f"bearer {KEY}") == "alice"


@pytest.mark.parametrize("header", [None, "", KEY, "Basic abc", "Bearer", "Bearer wrong", "Bearer \udcff"])
def test_any_other_header_is_refused(tmp_path: Path, header: str | None) -> None:
    known = keys(tmp_path, f"alice:{sha256(KEY.encode()).hexdigest()}\n")
    with pytest.raises(Unauthorized):
        known.tenant_of(header)


@pytest.mark.parametrize("text", ["", "alice", "alice:short", f"alice:{KEY}", "alice:" + "g" * 64])
def test_a_bad_file_is_refused_at_start(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="api_keys_file"):
        keys(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        ApiKeys.read(str(tmp_path / "nowhere"))
