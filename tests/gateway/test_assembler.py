"""The assembler against a reference that decodes everything and looks for stop strings afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from gateway.assembler import Assembler, RawLogprob, TokenLogprob
from gateway.detokenize import Vocabulary
from weft.messages import FINISH_LENGTH, FINISH_NONE, FINISH_STOP

# Few letters, so that stop strings are hit often; "Ģ" and "ðŁĺ" are the last byte and the first three of an emoji.
TOKENS = ["a", "b", "ab", "ba", "aab", "abc", "Ġ", "c", "ðŁĺ", "Ģ"]


def build() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


VOCABULARY = Vocabulary(build().to_str())
EOS = build().token_to_id("<eos>")
TOKEN_IDS = st.lists(st.integers(0, len(TOKENS) - 1), max_size=12)
STOP = st.one_of(
    st.text("ab", min_size=1, max_size=4), st.text("abc 😀\N{REPLACEMENT CHARACTER}", min_size=1, max_size=4)
)
STOPS = st.lists(STOP, max_size=3).map(tuple)
FINISHES = st.sampled_from([FINISH_NONE, FINISH_STOP, FINISH_LENGTH])


def ids(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


@dataclass
class Answer:
    """All that came out of an assembler."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_counted: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def take(self, assembler: Assembler, token_ids: Sequence[int], finish: int, raw: Sequence[RawLogprob] = ()) -> None:
        delta = assembler.push(token_ids, finish, raw)
        self.num_counted = assembler.num_counted
        if delta is not None:
            assert self.finish_reason is None, "spoke after its finish"
            assert delta.text or delta.finish_reason, "said nothing"
            self.texts.append(delta.text)
            self.logprobs += delta.logprobs
            self.finish_reason = delta.finish_reason


def answer(
    token_ids: list[int],
    cuts: Sequence[int] = (),
    *,
    finish: int = FINISH_LENGTH,
    stop: tuple[str, ...] = (),
    min_tokens: int = 0,
    logprobs: bool = False,
) -> Answer:
    """Push ids, cut at `cuts`, the last with the finish."""
    assembler = Assembler(VOCABULARY, stop=stop, min_tokens=min_tokens, logprobs=logprobs)
    result = Answer()
    bounds = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        raw = [(-0.5, (token_id,), (-0.5,)) for token_id in token_ids[start:end]] if logprobs else []
        is_last = end == len(token_ids) and start == bounds[-2]
        result.take(assembler, token_ids[start:end], finish if is_last else FINISH_NONE, raw)
    return result


def certain_text(token_ids: list[int]) -> str:
    """What no further token can change."""
    return commonprefix([VOCABULARY.decode([*token_ids, *ids(token)]) for token in ("Ģ", "a")])


def reference(token_ids: list[int], finish: int, stop: tuple[str, ...], min_tokens: int) -> tuple[str, str | None, int]:
    """Text, finish reason and count: after every token, decode it all and look for a stop string that is new."""
    shown = token_ids[:-1] if finish == FINISH_STOP else token_ids
    before = ""
    for count in range(1, len(token_ids) + 1):
        text = VOCABULARY.decode(shown[:count])
        if count < len(token_ids) or finish == FINISH_NONE:
            text = certain_text(shown[:count])
        hits = [
            at for one in stop for at in range(len(text)) if text.startswith(one, at) and at + len(one) > len(before)
        ]
        if hits and count >= min_tokens:
            return text[: min(hits)], "stop", count
        before = text
    reasons = {FINISH_NONE: None, FINISH_STOP: "stop", FINISH_LENGTH: "length"}
    return before, reasons[finish], len(token_ids)


@given(TOKEN_IDS, st.lists(st.integers(0, 12), max_size=6), FINISHES, STOPS, st.integers(0, 6))
@example(ids("abc", "ab", "c"), [1, 2], FINISH_LENGTH, ("cab",), 2)
@example(ids("ðŁĺ", "Ģ", "a"), [1, 2], FINISH_STOP, ("😀",), 0)
@example(ids("a", "ðŁĺ"), [1], FINISH_LENGTH, ("\N{REPLACEMENT CHARACTER}",), 0)
@example(ids("c", "a", "b", "c"), [1, 2, 3], FINISH_LENGTH, ("cabx", "ab"), 4)
def test_the_answer_is_the_reference_however_the_tokens_are_cut(
    token_ids: list[int], cuts: list[int], finish: int, stop: tuple[str, ...], min_tokens: int
) -> None:
    token_ids = [*token_ids, EOS] if finish == FINISH_STOP else token_ids
    result = answer(token_ids, cuts, finish=finish, stop=stop, min_tokens=min_tokens)
    text, reason, count = reference(token_ids, finish, stop, min_tokens)
    assert (result.finish_reason, result.num_counted) == (reason, count)
    # An unfinished stream may hold text back.
    assert result.text == text or (reason is None and text.startswith(result.text))


@given(TOKEN_IDS, FINISHES, STOPS, st.integers(0, 6))
@example(ids("a", "a", "c"), FINISH_LENGTH, ("ab",), 0)
def test_logprobs_come_once_for_each_token_and_not_before_their_text(
    token_ids: list[int], finish: int, stop: tuple[str, ...], min_tokens: int
) -> None:
    assembler = Assembler(VOCABULARY, stop=stop, min_tokens=min_tokens, logprobs=True)
    result = Answer()
    for i, token_id in enumerate(token_ids):
        last = i == len(token_ids) - 1
        result.take(assembler, [token_id], finish if last else FINISH_NONE, [(-1.0, (3, 4), (-1.0, -2.0))])
        if result.finish_reason is None:
            assert all(one.text_offset < len(result.text) for one in result.logprobs)
    if result.finish_reason is not None:
        assert len(result.logprobs) == result.num_counted
    expected = [VOCABULARY.token_bytes(one) for one in token_ids[: len(result.logprobs)]]
    assert [one.data for one in result.logprobs] == expected


def test_a_stop_string_that_straddles_tokens_never_leaks() -> None:
    result = answer(ids("c", "a", "b", "a", "c"), [1, 2, 3, 4], stop=("bac",))
    assert result.texts == ["c", "a", ""]
    assert result.finish_reason == "stop"


def test_text_that_only_looked_like_a_stop_string_comes_out() -> None:
    assert answer(ids("c", "a", "a", "c"), [1, 2, 3], stop=("ab",)).texts == ["c", "a", "ac"]


def test_text_held_back_at_the_finish_comes_out() -> None:
    assert answer(ids("c", "a"), [1], stop=("ab",)).texts == ["c", "a"]
    assert answer([*ids("c", "a"), EOS], [1], stop=("ab",), finish=FINISH_STOP).text == "ca"


def test_the_earliest_stop_string_wins() -> None:
    assert answer(ids("abc"), stop=("c", "bc", "b")).text == "a"


def test_nothing_after_a_stop_string_is_counted() -> None:
    assert answer(ids("a", "c", "b", "b"), stop=("c",)).num_counted == 2


def test_a_stop_string_before_min_tokens_is_text() -> None:
    assert answer(ids("c", "a", "c"), stop=("c",), min_tokens=2).text == "ca"


def test_a_stop_string_that_is_ignored_is_not_held_back() -> None:
    assert answer(ids("ab"), finish=FINISH_NONE, stop=("ab",), min_tokens=5).texts == ["ab"]


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    assert answer(ids("a", "b", "c"), [1, 2], stop=("abc",), min_tokens=3).text == ""


def test_the_stop_token_is_counted_but_not_shown() -> None:
    # "b" is a stop token here, and no special one.
    result = answer(ids("a", "b"), finish=FINISH_STOP)
    assert (result.text, result.finish_reason, result.num_counted) == ("a", "stop", 2)


def test_a_finish_without_tokens_ends_the_answer() -> None:
    assembler = Assembler(VOCABULARY, stop=("ab",), min_tokens=0, logprobs=False)
    assert assembler.push(ids("a"), FINISH_NONE) is None
    delta = assembler.push([], FINISH_STOP)
    assert delta is not None
    assert (delta.text, delta.finish_reason, assembler.num_counted) == ("a", "stop", 1)


def test_after_its_finish_an_assembler_ignores_everything() -> None:
    assembler = Assembler(VOCABULARY, stop=(), min_tokens=0, logprobs=False)
    assembler.push(ids("a"), FINISH_LENGTH)
    assert assembler.push(ids("b"), FINISH_LENGTH) is None
    assert assembler.token_ids == ids("a")


def test_an_unfinished_character_is_held_back_and_flushed_as_one_replacement() -> None:
    assert answer(ids("a", "ðŁĺ"), [1]).texts == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert answer(ids("ðŁĺ", "Ģ"), [1]).texts == ["😀"]


def test_logprobs_carry_bytes_alternatives_and_offsets() -> None:
    assembler = Assembler(VOCABULARY, stop=(), min_tokens=0, logprobs=True)
    raw = [(-1.0, ids("ab", "c"), (-1.0, -2.0)), (-0.5, (), ()), (-0.25, (), ())]
    delta = assembler.push(ids("ab", "ðŁĺ", "Ģ"), FINISH_LENGTH, raw)
    assert delta is not None
    assert [(one.data, one.logprob, one.text_offset) for one in delta.logprobs] == [
        (b"ab", -1.0, 0),
        (b"\xf0\x9f\x98", -0.5, 2),
        (b"\x80", -0.25, 2),
    ]
    assert delta.logprobs[0].top == ((b"ab", -1.0), (b"c", -2.0))


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_a_long_answer_keeps_nothing_but_its_ids(stop: tuple[str, ...]) -> None:
    assembler = Assembler(VOCABULARY, stop=stop, min_tokens=0, logprobs=True)
    for _ in range(1000):
        assembler.push(ids("ab"), FINISH_NONE, [(-1.0, (), ())])
    assert not assembler._held
    assert not assembler._logprobs
