import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from worker_svc.speculation.acceptance import NO_DRAFT
from worker_svc.speculation.ngram import MAX_MATCH, MAX_PLACES, Match, NgramIndex

# Few tokens, so that everything occurs again and again.
TOKENS = st.lists(st.integers(0, 3), max_size=60)
PIECES = st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=14)


def index_of(token_ids: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(token_ids)
    return index


def agreement(token_ids: list[int], place: int) -> int:
    """How many tokens before `place` are those at the end."""
    length = 0
    while length < min(place, MAX_MATCH) and token_ids[place - 1 - length] == token_ids[-1 - length]:
        length += 1
    return length


def longest(token_ids: list[int]) -> Match | None:
    """The latest of the longest earlier occurrences, by looking at all."""
    matches = [Match(place, agreement(token_ids, place)) for place in range(len(token_ids) - 1, 0, -1)]
    best = max(matches, key=lambda match: match.length, default=None)
    return best if best is not None and best.length else None


@given(TOKENS)
def test_match_is_the_longest_and_of_these_the_latest(token_ids: list[int]) -> None:
    found = index_of(token_ids).find()
    best = longest(token_ids)
    is_walk_complete = best is None or sum(pair == tuple(token_ids[-2:]) for pair in pairwise(token_ids)) <= MAX_PLACES
    assert found == best or not is_walk_complete


@given(PIECES)
def test_however_tokens_arrive_the_match_is_as_long_as_any(pieces: list[list[int]]) -> None:
    index, token_ids = NgramIndex(), []
    for piece in pieces:
        index.extend(piece)
        token_ids += piece
        found, best = index.find(), longest(token_ids)
        assert (found and found.length) == (best and best.length)
        assert found is None or agreement(token_ids, found.place) == found.length


@given(PIECES, st.integers(1, 9))
def test_draft_is_what_followed_and_then_itself(pieces: list[list[int]], count: int) -> None:
    index, token_ids = NgramIndex(), []
    for piece in pieces:
        index.extend(piece)
        token_ids += piece
        match, draft = index.find(), index.propose(count)
        if match is None:
            assert draft == NO_DRAFT
            continue
        whole = token_ids + list(draft.token_ids)
        assert draft.token_ids == [whole[match.place + i] for i in range(count)]
        assert draft.grades == [min(match.length + i, MAX_MATCH) for i in range(count)]


def test_longer_match_wins_over_a_later_one() -> None:
    assert index_of([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).propose(1).token_ids == [4]


def test_without_a_pair_the_last_token_alone_is_looked_up() -> None:
    index = index_of([7, 1, 8, 2, 9, 7])
    assert index.find() == Match(1, 1) and index.propose(2).token_ids == [1, 8]


def test_copied_text_is_drafted_whole() -> None:
    text = random.Random(1).sample(range(1000), 50)
    index = index_of([*text, *text[:2]])
    for start in range(2, 42):
        assert index.propose(8).token_ids == text[start : start + 8]
        index.extend([text[start]])


def test_repetition_is_drafted_past_the_end() -> None:
    assert index_of([5, 1, 2, 3, 1, 2, 3]).propose(7).token_ids == [1, 2, 3, 1, 2, 3, 1]


def test_nothing_is_drafted_from_nothing() -> None:
    assert NgramIndex().propose(3) == NO_DRAFT
    assert index_of([4]).propose(3) == NO_DRAFT
    assert index_of([4, 4, 4]).propose(0) == NO_DRAFT


def test_walk_along_a_frequent_pair_is_bounded() -> None:
    def text(num_between: int) -> list[int]:
        return [7, 1, 2, 9, *[token for i in range(num_between) for token in (100 + i, 1, 2, 5)], 7, 1, 2]

    assert index_of(text(MAX_PLACES - 1)).propose(1).token_ids == [9]
    assert index_of(text(MAX_PLACES)).propose(1).token_ids == [5]
