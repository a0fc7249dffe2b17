"""The rules of the layout, read off the source: who imports whom, and which modules are pure."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICES = ("gateway", "tokenizer_svc", "scheduler_svc", "worker_svc", "cache_svc")
FILES = sorted(path for package in ("weft", *SERVICES) for path in (ROOT / package).rglob("*.py"))
# Third-party packages by our own package (STYLE, imports); jinja2 renders the chat templates.
ALLOWED = {
    "weft": {
        "msgspec", "msgpack", "nats", "uvloop", "prometheus_client", "rich", "aiohttp", "huggingface_hub", "tokenizers",
    },
    "gateway": {"msgspec", "aiohttp", "tokenizers", "prometheus_client"},
    "tokenizer_svc": {"msgspec", "tokenizers", "jinja2", "transformers"},
    "scheduler_svc": {"msgspec"},
    "worker_svc": {"llvmlite", "msgspec", "numba", "numpy", "safetensors", "torch", "transformers", "triton"},
    "cache_svc": {"msgspec", "msgpack", "numpy"},
}  # fmt: skip
PURE = [
    "weft/messages.py",
    "weft/subjects.py",
    "weft/codec.py",
    "weft/errors.py",
    "weft/limits.py",
    "weft/columns.py",
    "weft/hashing.py",
    "weft/roster.py",
    "weft/holder.py",
    "weft/nats_config.py",
    "weft/presets.py",
    "weft/replicas.py",
    "gateway/openai.py",
    "gateway/explain.py",
    "gateway/fields.py",
    "gateway/prompts.py",
    "gateway/quota.py",
    "gateway/tier.py",
    "gateway/responses.py",
    "gateway/detokenize.py",
    "gateway/assembler.py",
    "gateway/streams.py",
    *(f"tokenizer_svc/{name}.py" for name in ("prompt", "sandbox")),
    *(f"scheduler_svc/{name}.py" for name in ("actions", "backlog", "block_index", "cost_model", "ends", "fleet")),
    *(
        f"scheduler_svc/{name}.py"
        for name in ("held", "objective", "policies", "pool", "scaling", "state", "totals", "workers")
    ),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "scheduler_svc/policy").glob("*.py"))),
    *(f"worker_svc/{name}.py" for name in ("batch", "blocks", "checks", "engine_io", "flight", "frames", "held")),
    *(
        f"worker_svc/{name}.py"
        for name in ("kv_exchange", "outbox", "rates", "reports", "sequence", "shards", "step_input")
    ),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "worker_svc/speculation").glob("*.py"))),
    "cache_svc/index.py",
]
IMPURE = {"asyncio", "nats", "aiohttp", "torch", "time", "random", "os", "logging", "socket", "threading", "subprocess"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, dotted, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_what_they_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    if "demo_model" in path.parts:
        pytest.skip("training runs outside the mesh")
    foreign = roots(path) - set(sys.stdlib_module_names) - {package, "weft"} - ALLOWED[package]
    assert not foreign, f"{path.name} imports {sorted(foreign)}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io(name: str) -> None:
    assert not roots(ROOT / name) & IMPURE


def test_whoever_says_to_be_pure_is_held_to_it() -> None:
    ours = [path for path in FILES if "demo_model" not in path.parts]
    claiming = {path for path in ours if "Pure" in (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "")}
    assert {str(path.relative_to(ROOT)) for path in claiming} <= set(PURE)


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_shell_touches_the_bus(service: str) -> None:
    users = {path.name for path in (ROOT / service).rglob("*.py") if "weft.bus" in imports(path)}
    # Two shells more: blocks travel on a connection of their own, and the gateway fetches tokenizers.
    assert users <= {"service.py", "kv_transfer.py", "models.py"}


def test_the_contract_imports_nothing_above_it() -> None:
    contract = {"messages", "subjects", "codec", "errors", "limits", "columns", "hashing", "roster"}
    for name in contract:
        ours = {module for module in imports(ROOT / f"weft/{name}.py") if module.startswith("weft.")}
        assert {module.split(".")[1] for module in ours} <= contract, name


def test_no_test_sleeps() -> None:
    # support/wait.py is the one place that polls.
    pattern = re.compile(r"\bsleep\((?!0\))")
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name not in ("wait.py", "test_architecture.py"):
            lines = [line for line in path.read_text().splitlines() if pattern.search(line)]
            assert not lines, f"{path}: {lines}"


def test_nothing_unpickles_or_evaluates() -> None:
    pattern = re.compile(r"\b(pickle|eval\(|torch\.load\((?!.*weights_only=True)|trust_remote_code=True)")
    for path in FILES:
        assert not pattern.search(path.read_text("utf-8").replace("model.eval()", "")), path
