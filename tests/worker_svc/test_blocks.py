import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft.errors import InvariantViolation
from weft.messages import BlockHash
from worker_svc.blocks import BlockPool


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def fill(pool: BlockPool, *numbers: int) -> list[int]:
    """Allocate and commit one block for each number."""
    blocks = pool.allocate(len(numbers))
    for block_id, number in zip(blocks, numbers, strict=True):
        pool.commit(block_id, name(number))
    return blocks


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_are_rounded_up(tokens: int, blocks: int) -> None:
    assert BlockPool(4).blocks_for(tokens) == blocks
    assert BlockPool(4, block_size=512).blocks_for(32 * tokens) == blocks


def test_freed_full_blocks_are_found_again_by_their_hashes() -> None:
    pool = BlockPool(4)
    blocks = fill(pool, 1, 2)
    pool.free(blocks)
    assert pool.num_free_blocks == 4
    assert pool.lookup([name(1), name(2), name(3)]) == blocks
    pool.touch(blocks)
    assert pool.num_free_blocks == 2
    pool.check([blocks])


def test_lookup_stops_at_the_first_block_that_is_not_known() -> None:
    pool = BlockPool(4)
    blocks = fill(pool, 1, 2, 3)
    pool.free(blocks)
    fill(pool, 9, 8)  # evicts the tail
    assert pool.lookup([name(1), name(2), name(3)]) == blocks[:2]
    assert pool.lookup([name(7), name(1)]) == []


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4)
    old, new = fill(pool, 1, 2), fill(pool, 3, 4)
    pool.free(old)
    pool.free(new)
    pool.take_changes()
    order = []
    for _ in range(4):
        pool.allocate(1)
        order += pool.take_changes()[1]
    assert order == [name(2), name(1), name(4), name(3)]


def test_use_makes_a_block_recent() -> None:
    pool = BlockPool(2)
    first, second = fill(pool, 1, 2)
    pool.free([first])
    pool.free([second])
    pool.touch([first])
    pool.free([first])
    pool.allocate(1)
    assert pool.block_of(name(1)) is not None and pool.block_of(name(2)) is None


def test_blocks_without_content_are_given_before_anything_is_evicted() -> None:
    pool = BlockPool(3)
    pool.free(fill(pool, 1))
    pool.free(pool.allocate(2))
    pool.allocate(2)
    assert pool.block_of(name(1)) is not None


def test_duplicate_content_is_kept_twice_and_known_once() -> None:
    pool = BlockPool(3)
    (first,) = fill(pool, 1)
    (second,) = fill(pool, 1)
    assert pool.block_of(name(1)) == first
    pool.check([[first], [second]])
    pool.free([second])
    pool.free([first])
    assert pool.lookup([name(1)]) == [first]
    pool.check([])


def test_shared_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(2)
    blocks = fill(pool, 1)
    pool.touch(blocks)
    pool.free(blocks)
    assert pool.ref_count(blocks[0]) == 1 and pool.num_free_blocks == 1
    pool.free(blocks)
    assert pool.num_free_blocks == 2


def test_copy_on_write_exchanges_a_shared_block_for_an_own_one() -> None:
    pool = BlockPool(3)
    (shared,) = fill(pool, 1)
    pool.touch([shared])
    own = pool.copy_on_write(shared)
    assert own != shared and pool.ref_count(shared) == pool.ref_count(own) == 1
    pool.check([[shared], [own]])


def test_changes_are_net_of_what_came_and_went() -> None:
    pool = BlockPool(2)
    pool.free(fill(pool, 1, 2))
    assert pool.take_changes() == ((name(1), name(2)), ())
    pool.free(fill(pool, 3))  # evicts 2
    pool.free(fill(pool, 2, 4))  # evicts 1 and 3
    assert pool.take_changes() == ((name(4),), (name(1),))
    assert pool.take_changes() == ((), ())
    assert set(pool.hashes()) == {name(2), name(4)}


def test_disowned_blocks_are_found_no_more_and_free_when_their_holders_let_go() -> None:
    pool = BlockPool(3)
    blocks = fill(pool, 1, 2)
    pool.take_changes()
    pool.touch(blocks[:1])
    pool.disown(blocks)
    assert pool.lookup([name(1)]) == [] and set(pool.take_changes()[1]) == {name(1), name(2)}
    pool.check([blocks, blocks[:1]])
    pool.free(blocks)
    pool.free(blocks[:1])
    pool.check([])


def test_more_than_there_is_cannot_be_allocated() -> None:
    pool = BlockPool(2)
    with pytest.raises(InvariantViolation, match="3 blocks wanted, 2 are free"):
        pool.allocate(3)
    pool.check([])


def test_freeing_what_nobody_holds_is_a_violation() -> None:
    pool = BlockPool(2)
    with pytest.raises(InvariantViolation, match="nobody holds"):
        pool.free([0])


def test_committing_what_nobody_holds_or_twice_is_a_violation() -> None:
    pool = BlockPool(2)
    with pytest.raises(InvariantViolation):
        pool.commit(0, name(1))
    (block,) = fill(pool, 1)
    pool.commit(block, name(1))
    with pytest.raises(InvariantViolation):
        pool.commit(block, name(2))


def test_check_finds_a_table_that_the_books_do_not_know() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(InvariantViolation, match="references"):
        pool.check([])
    with pytest.raises(InvariantViolation, match="references"):
        pool.check([blocks, blocks])


class PoolMachine(RuleBasedStateMachine):
    """Sequences come with tokens of two kinds, share prefixes by hash, grow, and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.tables: list[list[int]] = []
        self.contents: list[list[int]] = []  # of each table's full blocks
        self.known: set[BlockHash] = set()

    def hashes(self, content: list[int]) -> list[BlockHash]:
        return [BlockHash(bytes(content[: i + 1]).rjust(16, b"\1")) for i in range(len(content))]

    @rule(content=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def admit(self, content: list[int]) -> None:
        hashes = self.hashes(content)
        hits = self.pool.lookup(hashes)
        if len(content) - len(hits) + self.pool.num_cached_among(hits) > self.pool.num_free_blocks:
            return
        self.pool.touch(hits)
        table = hits + self.pool.allocate(len(content) - len(hits))
        for block_id, block_hash in zip(table[len(hits) :], hashes[len(hits) :], strict=True):
            self.pool.commit(block_id, block_hash)
        self.tables.append(table)
        self.contents.append(content)

    @precondition(lambda self: self.tables and self.pool.num_free_blocks)
    @rule(data=st.data(), is_full=st.booleans(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, is_full: bool, token: int) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        if len(self.tables[i]) != len(self.contents[i]):
            return
        self.tables[i] += self.pool.allocate(1)
        if is_full:
            self.contents[i].append(token)
            self.pool.commit(self.tables[i][-1], self.hashes(self.contents[i])[-1])

    @precondition(lambda self: self.tables and self.pool.num_free_blocks)
    @rule(data=st.data())
    def copy_last(self, data: st.DataObject) -> None:
        table = self.tables[data.draw(st.integers(0, len(self.tables) - 1))]
        before = self.pool.ref_count(table[-1])
        source, table[-1] = table[-1], self.pool.copy_on_write(table[-1])
        assert self.pool.ref_count(source) == before - 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def disown(self, data: st.DataObject) -> None:
        self.pool.disown(self.tables[data.draw(st.integers(0, len(self.tables) - 1))])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.free(self.tables.pop(i))
        self.contents.pop(i)

    @rule()
    def report(self) -> None:
        stored, removed = self.pool.take_changes()
        assert not set(stored) & set(removed)
        assert not set(stored) & self.known and set(removed) <= self.known
        self.known = (self.known | set(stored)) - set(removed)
        assert self.known == set(self.pool.hashes())

    @invariant()
    def books_balance(self) -> None:
        self.pool.check(self.tables)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_blocks_come_in_a_row_where_as_many_are_free() -> None:
    pool = BlockPool(16)
    held = pool.allocate(16)
    pool.free([held[1], held[3], held[5]])
    pool.free(held[8:12])
    assert pool.allocate(4) == [8, 9, 10, 11]
    assert pool.allocate(3) == [1, 3, 5]
