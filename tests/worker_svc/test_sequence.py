import pytest

from tests.support.engine_requests import make_sequence
from weft.columns import pack_u32
from weft.hashing import BLOCK_SIZE, block_hashes, chain_root

ROOT = chain_root(b"digest")


@pytest.mark.parametrize("known", [0, 1, 2])
def test_hash_chain_goes_on_where_the_prompts_chain_ends(known: int) -> None:
    tokens = list(range(2 * BLOCK_SIZE + 5))
    expected = block_hashes(ROOT, pack_u32(tokens))
    sequence = make_sequence(tokens, root=ROOT, hashes=expected[:known])
    assert sequence.extend_hashes() == expected
    sequence.token_ids += range(BLOCK_SIZE)
    assert sequence.extend_hashes() == block_hashes(ROOT, pack_u32(sequence.token_ids))


def test_sequence_that_shares_nothing_has_no_hashes() -> None:
    assert make_sequence(list(range(64)), root=None).extend_hashes() == []


def test_tokens_emitted_before_a_recovery_are_tokens_to_compute() -> None:
    sequence = make_sequence([1, 2, 3], emitted=[4, 5])
    assert sequence.num_output_tokens == 2
    assert sequence.num_uncomputed_tokens == 5


def test_release_gives_blocks_up_and_keeps_tokens() -> None:
    sequence = make_sequence([1, 2, 3])
    sequence.block_table, sequence.num_computed_tokens, sequence.num_committed_blocks = [7, 3], 3, 1
    assert sequence.release() == [7, 3]
    assert (sequence.block_table, sequence.num_uncomputed_tokens, sequence.num_committed_blocks) == ([], 3, 0)
