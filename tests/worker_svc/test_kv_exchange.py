"""What becomes of blocks that were asked for, in the books alone."""

from __future__ import annotations

import pytest

from tests.support.engine_requests import make_sequence, make_settings
from weft.hashing import BLOCK_SIZE, chain_root
from weft.messages import BlockHash
from worker_svc.blocks import BlockPool
from worker_svc.engine_io import BlocksLoaded, LoadWanted
from worker_svc.kv_exchange import MAX_OFFLOADS_PER_STEP, KvExchange, make_exchange
from worker_svc.sequence import Sequence, State

ROOT = chain_root(b"d" * 16)
BYTES = 8


def make_parked(num_blocks: int) -> tuple[BlockPool, KvExchange, Sequence, LoadWanted]:
    """A sequence of five blocks that waits for all of them."""
    pool = BlockPool(num_blocks)
    exchange = KvExchange(pool, kv_load="always", kv_offload="never", block_bytes=BYTES)
    exchange.set_available(True)
    sequence = make_sequence(range(5 * BLOCK_SIZE), arrival=2, root=ROOT)
    is_parked, wanted = exchange.park(sequence)
    assert is_parked and wanted is not None and len(wanted.hashes) == 5
    return pool, exchange, sequence, wanted


def answer(wanted: LoadWanted, num_blocks: int) -> BlocksLoaded:
    blocks = tuple(bytes([number]) * BYTES for number in range(num_blocks))
    return BlocksLoaded(wanted.request_id, wanted.epoch, wanted.hashes[:num_blocks], blocks)


def test_blocks_that_came_are_cached_and_held_by_nobody() -> None:
    pool, exchange, sequence, wanted = make_parked(8)
    placed = exchange.place(answer(wanted, 3), [])
    assert placed.block_ids == pool.lookup(sequence.hashes) and len(placed.block_ids) == 3
    assert placed.blocks == [bytes([number]) * BYTES for number in range(3)]
    assert pool.num_free_blocks == 8
    pool.check(())


def test_no_more_blocks_are_placed_than_are_free() -> None:
    pool, exchange, _, wanted = make_parked(8)
    held = pool.allocate(6)
    placed = exchange.place(answer(wanted, 5), [])
    assert len(placed.block_ids) == len(placed.blocks) == 2
    pool.check([held])


def test_whoever_waited_for_blocks_comes_to_its_place_in_line() -> None:
    _, exchange, sequence, wanted = make_parked(8)
    before, after = make_sequence([1], arrival=1), make_sequence([1], arrival=3)
    waiting = [before, after]
    assert exchange.place(answer(wanted, 0), waiting).sequences == [sequence]
    assert waiting == [before, sequence, after]
    assert sequence.state is State.WAITING and not exchange.num_loading


def test_answer_that_nobody_asked_for_is_not_placed() -> None:
    pool, exchange, _, wanted = make_parked(8)
    waiting: list[Sequence] = []
    stray = BlocksLoaded("another", 0, (BlockHash(wanted.hashes[0]),), (bytes(BYTES),))
    placed = exchange.place(stray, waiting)
    assert (placed.block_ids, placed.blocks, placed.sequences, waiting) == ([], [], [], [])
    assert exchange.num_loading == 1 and not pool.lookup(list(wanted.hashes))


@pytest.mark.parametrize(
    ("role", "kv_offload", "is_cpu", "is_sent_while_busy"),
    [
        ("both", "auto", True, False),
        ("both", "auto", False, True),
        ("prefill", "auto", True, True),
        ("both", "always", True, True),
        ("both", "idle", False, False),
    ],
)
def test_blocks_are_sent_at_once_where_that_costs_no_step(
    role: str, kv_offload: str, is_cpu: bool, is_sent_while_busy: bool
) -> None:
    pool = BlockPool(8)
    settings = make_settings(role=role, kv_offload=kv_offload)
    exchange = make_exchange(pool, settings, block_bytes=BYTES, is_cpu=is_cpu)
    exchange.set_available(True)
    (block_id,) = pool.allocate(1)
    pool.commit(block_id, BlockHash(ROOT))
    exchange.offer(BlockHash(ROOT))
    assert bool(exchange.next_offloads(is_idle=False)) is is_sent_while_busy


def test_who_prefills_for_others_reads_all_that_a_step_fills() -> None:
    pool = BlockPool(64)
    settings = make_settings(role="prefill", max_num_batched_tokens=32 * BLOCK_SIZE)
    exchange = make_exchange(pool, settings, block_bytes=BYTES, is_cpu=True)
    exchange.set_available(True)
    hashes = [BlockHash(bytes([number]) * 16) for number in range(40)]
    for block_id, block_hash in zip(pool.allocate(40), hashes, strict=True):
        pool.commit(block_id, block_hash)
        exchange.offer(block_hash)
    assert len(exchange.next_offloads(is_idle=False)) == 33 > MAX_OFFLOADS_PER_STEP
