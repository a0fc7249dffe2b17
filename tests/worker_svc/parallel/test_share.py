"""Ranks that each have a share of a model compute together what one computes alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import ARCHITECTURES, make_checkpoint
from tests.support.ranks import ThreadGroup, run_ranks
from tests.support.steps import Driver, make_runner, mixed
from weft import model_folder
from weft.errors import SettingsError
from weft.settings import ModelSettings
from worker_svc.models import read_spec
from worker_svc.models.spec import DecoderSpec
from worker_svc.parallel.share import BlockShares, share_of

SEQUENCES = [[(7 * i + 3 * j) % 128 for j in range(length)] for i, length in enumerate((1, 17, 40))]
SCHEDULE = list(mixed([len(sequence) for sequence in SEQUENCES]))
# Sums of other parts of the same products, in float32 and at logits of magnitude 10.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def spec_of(folder: Path) -> DecoderSpec:
    return read_spec(model_folder.read(ModelSettings(model=str(folder))))


@pytest.mark.parametrize(("family", "size"), [*((name, 2) for name in ARCHITECTURES), ("llama", 4), ("deepseek_v2", 4)])
def test_ranks_give_the_logits_of_one(tmp_path: Path, family: str, size: int) -> None:
    folder = make_checkpoint(tmp_path, family, num_key_value_heads=4, vocab_size=127)
    alone = Driver(make_runner(folder), SEQUENCES).play(SCHEDULE)

    def body(group: ThreadGroup) -> list[torch.Tensor]:
        return Driver(make_runner(folder, group=group), SEQUENCES).play(SCHEDULE)

    for expected, found in zip(alone, run_ranks(size, body)[0], strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(("family", "biases"), [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {})])
def test_biases_count_once(tmp_path: Path, family: str, biases: dict[str, bool]) -> None:
    folder = make_checkpoint(tmp_path, family, **biases)
    alone = Driver(make_runner(folder), SEQUENCES).play(SCHEDULE)

    def body(group: ThreadGroup) -> list[torch.Tensor]:
        return Driver(make_runner(folder, group=group), SEQUENCES).play(SCHEDULE)

    for expected, found in zip(alone, run_ranks(2, body)[0], strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_rank_holds_its_share_of_the_blocks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_key_value_heads=4)
    alone = make_runner(folder)
    ranks = run_ranks(2, lambda group: make_runner(folder, group=group))
    assert [rank.block_bytes for rank in ranks] == [alone.block_bytes // 2] * 2
    assert [rank.num_blocks for rank in ranks] == [alone.num_blocks] * 2
    assert {rank.layout for rank in ranks} == {alone.layout}


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_blocks_are_the_same_whatever_the_number_of_ranks(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family, num_key_value_heads=4)
    runner = make_runner(folder)
    driver = Driver(runner, SEQUENCES)
    driver.play(SCHEDULE)
    blocks = [driver.block_tables[2][0], driver.block_tables[1][0]]
    # Where every rank has the same, as many blocks take more memory.
    kv_memory = 2**20 if family == "llama" else 2**21

    def body(group: ThreadGroup) -> list[bytes]:
        rank = make_runner(folder, group=group, kv_memory=kv_memory)
        Driver(rank, SEQUENCES).play(SCHEDULE)
        return rank.read_blocks(blocks)

    shares = BlockShares.of(spec_of(folder), 2)
    found = [shares.join(parts) for parts in zip(*run_ranks(2, body), strict=True)]
    for one, other in zip(found, runner.read_blocks(blocks), strict=True):
        # Keys and values of the second layer come of sums in another order.
        np.testing.assert_allclose(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32), atol=1e-4)


@pytest.mark.parametrize("is_divided", [True, False])
def test_shares_of_a_block_make_the_block(is_divided: bool) -> None:
    shares = BlockShares(num_layers=3, size=4, is_divided=is_divided)
    block = np.random.default_rng().bytes(shares.block_bytes(3 * 2 * 10))
    parts = shares.split(block)
    assert len(parts) == 4 and {len(part) for part in parts} == {60}
    assert shares.join(parts) == block


@pytest.mark.parametrize(
    ("family", "changes", "size", "complaint"),
    [
        ("llama", {}, 4, "2 KV heads, which 4 ranks"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 6}, 4, "6 KV heads"),
        ("deepseek_v2", {}, 3, "4 attention heads"),
        ("llama", {"intermediate_size": 45}, 2, "45 inner channels of an MLP"),
        ("mixtral", {"intermediate_size": 45}, 2, "45 inner channels of an expert"),
    ],
)
def test_what_does_not_divide_is_refused(
    tmp_path: Path, family: str, changes: dict[str, int], size: int, complaint: str
) -> None:
    spec = spec_of(make_checkpoint(tmp_path, family, **changes))
    with pytest.raises(SettingsError, match=complaint):
        share_of(spec, size)
