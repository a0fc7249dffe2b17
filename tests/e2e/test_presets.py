"""Every preset starts and answers, with the workers in the roles it has for them."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.support import up
from weft.presets import PRESETS

pytestmark = pytest.mark.timeout(120)
NUM_TOKENS = 12


@pytest.mark.parametrize("name", PRESETS)
async def test_mesh_of_a_preset_answers(name: str, tmp_path: Path) -> None:
    num_workers = len(PRESETS[name].roles)
    argv = ("--engine", "null", "--null-tokens-per-s", "1000", "--workers", str(num_workers))
    asked = {"model": "tales-6m", "prompt": "Once upon a time " * 20, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    with up.running(tmp_path, "--preset", name, *argv) as mesh:
        mesh.wait_for(f"^Preset {name}: admit={PRESETS[name].admit} ")
        async with aiohttp.ClientSession() as session, session.post(f"{mesh.url}/v1/completions", json=asked) as answer:
            assert answer.status == 200, await answer.text()
            told = await answer.json()
        assert told["usage"]["completion_tokens"] == NUM_TOKENS
        assert told["choices"][0]["finish_reason"] == "length"
        assert mesh.interrupt() == 0
