from hypothesis import given
from hypothesis import strategies as st

from tests.support.engine_requests import make_sequence
from weft.hashing import BLOCK_SIZE, chain_root
from worker_svc.sequence import Sequence
from worker_svc.speculation.draft_book import DraftBook

ROOT = chain_root(b"d" * 16)


def sequence_of(token_ids: list[int], block_table: list[int]) -> Sequence:
    sequence = make_sequence(token_ids, root=ROOT)
    sequence.block_table = block_table
    sequence.extend_hashes()
    return sequence


def test_new_sequence_has_nothing_computed() -> None:
    assert DraftBook().num_computed(sequence_of(list(range(40)), [3, 1, 2])) == 0


def test_last_known_token_is_computed_in_any_case() -> None:
    book, sequence = DraftBook(), sequence_of(list(range(40)), [3, 1, 2])
    book.write(sequence, 0, 40)
    assert book.num_computed(sequence) == 39


def test_drafted_tokens_that_do_not_stand_are_not_computed() -> None:
    book, sequence = DraftBook(), sequence_of(list(range(20)), [3, 1])
    book.write(sequence, 0, 23)
    sequence.token_ids += [7, 8, 9]
    book.keep(sequence, 22)
    assert book.num_computed(sequence) == 22
    book.keep(sequence, 25)
    assert book.num_computed(sequence) == 22, "what was not computed is not kept"


def test_whole_blocks_are_known_to_other_sequences_by_their_hash() -> None:
    book, first = DraftBook(), sequence_of(list(range(40)), [3, 1, 2])
    book.write(first, 0, 40)
    same = sequence_of([*range(35), 99], [3, 1, 7])
    assert book.num_computed(same) == 2 * BLOCK_SIZE
    other = sequence_of([99, *range(35)], [3, 1, 7])
    assert book.num_computed(other) == 0


def test_block_with_drafted_tokens_is_nobody_elses() -> None:
    book, first = DraftBook(), sequence_of(list(range(30)), [3, 1])
    book.write(first, 0, 32)
    first.token_ids += [30, 31, 32]
    first.extend_hashes()
    assert book.num_computed(sequence_of(list(range(33)), [3, 1, 5])) == BLOCK_SIZE


def test_block_that_is_written_anew_is_what_was_written() -> None:
    book, first = DraftBook(), sequence_of(list(range(32)), [3, 1])
    book.write(first, 0, 32)
    book.forget(first)
    second = sequence_of(list(range(50, 70)), [1, 4])
    book.write(second, 0, 5)
    assert book.num_computed(sequence_of(list(range(33)), [3, 1, 5])) == BLOCK_SIZE


def test_sequence_that_gave_its_blocks_back_starts_with_those_it_gets() -> None:
    book, sequence = DraftBook(), sequence_of(list(range(40)), [3, 1, 2])
    book.write(sequence, 0, 40)
    book.forget(sequence)
    sequence.block_table = [3, 8, 9]
    assert book.num_computed(sequence) == BLOCK_SIZE


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_what_counts_as_computed_was_written_and_stands(steps: list[tuple[int, int, int]]) -> None:
    book, sequence = DraftBook(), sequence_of(list(range(9)), list(range(60)))
    written: list[int] = []  # by position, what the draft model computed last
    for num_new, num_drafts, num_standing in steps:
        start, known = book.num_computed(sequence), sequence.num_known_tokens
        drafts = [1000 + i for i in range(num_drafts)]
        written[start:] = (sequence.token_ids + drafts)[start : known + num_drafts]
        book.write(sequence, start, known + num_drafts)
        sequence.token_ids += drafts[:num_standing] + [2000] * num_new
        book.keep(sequence, known + min(num_standing, num_drafts))
        assert written[: book.num_computed(sequence)] == sequence.token_ids[: book.num_computed(sequence)]
