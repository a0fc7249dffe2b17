"""The tenants file: what a line gives, and that every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import SettingsError
from weft.tenants import UNBOUNDED, Tenant, Tenants


def read(tmp_path: Path, text: str) -> Tenants:
    path = tmp_path / "tenants"
    path.write_text(text)
    return Tenants.read(str(path))


def test_without_a_file_nobody_is_bounded() -> None:
    tenants = Tenants.read("")
    assert tenants.of("acme") == tenants.of("") == UNBOUNDED
    assert tenants.weights() == {}


def test_a_line_says_what_a_tenant_may_have(tmp_path: Path) -> None:
    tenants = read(
        tmp_path,
        "# ours\n\n  acme weight=2.5 tokens_per_minute=60000 burst=500 class=priority earliest_priority=-3\nb\n",
    )
    assert tenants.of("acme") == Tenant(2.5, 60_000, 500, "priority", -3)
    assert tenants.of("b") == tenants.of("not there") == Tenant()


def test_a_star_is_everybody_without_a_line(tmp_path: Path) -> None:
    tenants = read(tmp_path, "acme weight=3\n* weight=2 tokens_per_minute=10\n")
    assert tenants.of("") == tenants.of("not there") == Tenant(2.0, 10)
    assert tenants.of("acme").tokens_per_minute is None


def test_weights_are_told_by_that_of_everybody(tmp_path: Path) -> None:
    assert read(tmp_path, "a weight=3\nb\n* weight=2\n").weights() == {"a": 1.5, "b": 0.5}


@pytest.mark.parametrize(
    ("line", "earliest"),
    [("a", 0), ("a class=priority", -10), ("a class=flex", 0), ("a class=priority earliest_priority=0", 0)],
)
def test_a_class_that_was_given_brings_its_priority(tmp_path: Path, line: str, earliest: int) -> None:
    assert read(tmp_path, line).of("a").earliest_priority == earliest


@pytest.mark.parametrize(
    ("tenant", "classes"),
    [
        (Tenant(), {"", "flex"}),
        (UNBOUNDED, {"", "flex", "priority"}),
        (Tenant(slo_class="priority", earliest_priority=0), {"", "flex", "priority"}),
        (Tenant(slo_class="flex", earliest_priority=10), {"flex"}),
    ],
)
def test_a_tenant_may_use_its_own_class_and_later_ones(tenant: Tenant, classes: set[str]) -> None:
    assert {name for name in ("", "flex", "priority") if tenant.may_use(name)} == classes


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("acme wieght=2", "no key 'wieght'; there are weight, tokens_per_minute, burst, class, earliest_priority"),
        ("acme weight=0", "weight: '0' is no number above 0"),
        ("acme weight=nan", "weight: 'nan' is no number above 0"),
        ("acme weight", "weight: '' is no number above 0"),
        ("acme tokens_per_minute=6e4", "tokens_per_minute: '6e4' is no whole number from 1 to 1000000000000"),
        ("acme tokens_per_minute=0", "tokens_per_minute: '0' is no whole number from 1 to 1000000000000"),
        ("acme class=gold", "class: 'gold' is none of default, priority, flex"),
        ("acme earliest_priority=-1001", "earliest_priority: '-1001' is no whole number from -1000 to 1000"),
        ("acme weight=1 weight=2", "'weight' is given twice"),
        ("acme burst=5", "'burst' needs 'tokens_per_minute'"),
        ("b", "'b' has a line already"),
        ("a:b", "'a:b' is no tenant's name: letters, digits, and any of `_.-`, or `*` for everybody else"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, line: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, f"# first\nb\n{line}\n")
    assert caught.value.message == f"tenants_file: {tmp_path / 'tenants'}, line 3: {sentence}"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tenants_file: .*nowhere cannot be read"):
        Tenants.read(str(tmp_path / "nowhere"))
