import math
import random
from collections.abc import Sequence as Ids

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.support.engine_requests import make_sequence
from weft.messages import SamplingParams
from worker_svc import sampler
from worker_svc.noise import candidate_noise, full_noise, gumbel, philox
from worker_svc.sampled_rows import FIRST_CANDIDATES, filter_candidates
from worker_svc.sampler import Sampler, Samples
from worker_svc.sequence import Sequence

V = 200


def logits_of(count: int = 1, *, seed: int = 0, spread: float = 2.0, vocab_size: int = V) -> Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits: Tensor, sequences: Ids[Sequence]) -> Samples:
    return Sampler().sample(logits.clone(), list(sequences)).collect()


def sequence(seed: int = 0, *, prompt: Ids[int] = (1,), emitted: Ids[int] = (), **params: object) -> Sequence:
    return make_sequence(prompt, emitted=emitted, seed=seed, stop_ids=(5, 6), sampling=SamplingParams(**params))


def draws(logits: Tensor, count: int, **params: object) -> Tensor:
    """Token ids of `count` sequences with seeds of their own over the same logits [1, V]."""
    return torch.tensor(sample(logits.expand(count, -1), [sequence(i, **params) for i in range(count)]).token_ids)


# Known answers of Random123 1.14 (kat_vectors, philox4x32 10): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (torch.tensor([int(word, 16)]) for word in key.split())
    assert [f"{int(word):08x}" for word in philox((c0, c1, c2, c3), (k0, k1))] == expected.split()


def test_gumbel_noise_is_finite_at_both_ends() -> None:
    noise = gumbel(torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert torch.isfinite(noise).all()
    assert noise[0] == pytest.approx(33 * math.log(2))
    assert noise[4] == pytest.approx(-math.log(24 * math.log(2)), rel=1e-5)


def test_noise_depends_on_seed_position_and_token_only() -> None:
    key = (torch.tensor([[1], [2]]), torch.tensor([[0], [9]]))
    both = full_noise(key, torch.tensor([[3], [3]]), V)
    alone = full_noise((key[0][1:], key[1][1:]), torch.tensor([[3]]), V - 3)
    assert torch.equal(both[1, : V - 3], alone[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, full_noise(key, torch.tensor([[4], [4]]), V))


def test_candidates_get_the_noise_that_they_have_in_the_whole_vocabulary() -> None:
    key, positions = (torch.tensor([[1], [2]]), torch.tensor([[0], [9]])), torch.tensor([[3], [70]])
    token_ids = torch.tensor([[199, 0, 17], [4, 5, 6]])
    whole = full_noise(key, positions, V)
    torch.testing.assert_close(candidate_noise(key, positions, token_ids), whole.gather(1, token_ids))


def test_greedy_takes_the_likeliest() -> None:
    logits = logits_of(5)
    assert sample(logits, [sequence(temperature=0.0)] * 5).token_ids == logits.argmax(1).tolist()
    assert sample(logits, [sequence(temperature=1e-7)] * 5).token_ids == logits.argmax(1).tolist()


KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 5.0},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "wide": {"temperature": 9.0, "top_p": 0.99},
    "min_p": {"temperature": 2.0, "min_p": 0.1},
    "all": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"temperature": 1.0, "logit_bias": {3: 5.0, 9: -100.0}},
    "min_tokens": {"temperature": 0.0, "min_tokens": 9},
    "logprobs": {"temperature": 1.0, "logprobs": 3},
}


def mixed_batch() -> list[Sequence]:
    return [sequence(100 + i, prompt=[1, 2, i], emitted=[4, 4, i], **params) for i, params in enumerate(KINDS.values())]


def test_each_sequence_gets_the_same_token_alone_and_in_any_batch() -> None:
    logits = logits_of(len(KINDS))
    together = sample(logits, mixed_batch())
    for row, alone in enumerate(mixed_batch()):
        assert sample(logits[row : row + 1], [alone]).token_ids == [together.token_ids[row]], list(KINDS)[row]
    backwards = sample(logits.flip(0), mixed_batch()[::-1])
    assert backwards.token_ids == together.token_ids[::-1]


def test_batch_that_goes_on_gives_what_a_new_sampler_would() -> None:
    kept, sequences = Sampler(), mixed_batch()
    for step in range(12):
        logits = logits_of(len(KINDS), seed=step)
        tokens = kept.sample(logits.clone(), sequences).collect().token_ids
        assert tokens == sample(logits, sequences).token_ids, f"step {step}"
        for item, token in zip(sequences, tokens, strict=True):
            item.token_ids.append(token)


def test_rows_after_drafted_tokens_get_what_they_would_get_if_these_had_been_sampled() -> None:
    kept, rng = Sampler(), random.Random(7)
    sequences = mixed_batch()
    for step in range(8):
        drafts = [[rng.randrange(V) for _ in range(rng.randrange(4))] for _ in sequences]
        logits = logits_of(sum(len(draft) + 1 for draft in drafts), seed=step)
        drafted = iter(kept.sample(logits.clone(), sequences, drafts).collect().token_ids)
        rows = iter(logits)
        for item, draft, params in zip(sequences, drafts, KINDS.values(), strict=True):
            emitted = item.token_ids[item.num_prompt_tokens :]
            for i in range(len(draft) + 1):
                alone = sequence(item.seed, prompt=item.token_ids[:3], emitted=emitted + draft[:i], **params)
                assert sample(next(rows)[None], [alone]).token_ids == [next(drafted)], f"step {step}"
            # As if some of the draft had stood.
            item.token_ids += draft[: rng.randrange(4)] + [rng.randrange(V)]


def test_logprobs_and_errors_are_those_of_their_rows() -> None:
    logits = logits_of(5)
    logits[3, 8] = math.nan
    one, other = sequence(0, temperature=1.0, logprobs=2), sequence(1, temperature=0.0)
    samples = Sampler().sample(logits.clone(), [one, other], [[4, 9], [6]]).collect()
    assert sorted(samples.logprobs) == [0, 1, 2] and list(samples.errors) == [3]
    for row, (_, top_ids, _) in samples.logprobs.items():
        assert top_ids == tuple(logits[row].topk(2).indices.tolist())


def test_sampler_notices_a_sequence_that_went_another_way() -> None:
    kept, item = Sampler(), sequence(3, temperature=1.0)
    kept.sample(logits_of(), [item])
    # The token was not taken over, as after a failed step.
    assert kept.sample(logits_of(), [item]).collect().token_ids == sample(logits_of(), [item]).token_ids


def test_resumed_stream_draws_the_same_noise() -> None:
    logits = logits_of(seed=5)
    went_on = sequence(7, emitted=[10, 11, 12], temperature=1.0)
    resumed = make_sequence([1, 10, 11, 12], seed=7, sampling=SamplingParams(temperature=1.0))
    resumed.num_prompt_tokens = 1
    assert sample(logits, [went_on]).token_ids == sample(logits, [resumed]).token_ids


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies_match_the_distribution(params: dict[str, float]) -> None:
    logits = logits_of(vocab_size=40, spread=1.5)
    count = 8_000
    expected = judge(logits, params).softmax(1)[0].double()
    observed = draws(logits, count, **params).bincount(minlength=40).double()
    kept = expected > 0
    assert observed[~kept].sum() == 0
    chi_square = float((((observed - count * expected) ** 2)[kept] / (count * expected[kept])).sum())
    freedom = int(kept.sum()) - 1
    # The 0.999 quantile of chi-square (Wilson and Hilferty); seeds are fixed, so this cannot fail by chance.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def judge(logits: Tensor, params: dict[str, float]) -> Tensor:
    """What transformers makes of logits [B, V]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params["temperature"]))])
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    result: Tensor = warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits)
    return result


def support(logits: Tensor, params: dict[str, float]) -> set[int]:
    """Tokens that can be drawn."""
    item = sequence(**params)
    batch = sampler._Batch.of([item], torch.device("cpu"), logits.shape[1])
    size = FIRST_CANDIDATES
    while True:
        values, token_ids, is_found = filter_candidates(logits / item.sampling.temperature, batch.filtered, size)
        if bool(is_found.all()):
            return set(token_ids[values > -torch.inf].tolist())
        size *= 8


@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.sampled_from([3, 64, 65, 200, 700]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 2, 10, 64, 100, 5000]),
    top_p=st.sampled_from([None, 0.01, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([None, 0.001, 0.1, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_the_tokens_kept_are_those_that_transformers_keeps(
    seed: int,
    vocab_size: int,
    spread: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    logits = logits_of(seed=seed, vocab_size=vocab_size, spread=spread)
    named = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    params = {name: value for name, value in named.items() if value is not None}
    if len(params) == 1:
        params["top_k"] = 3
    expected = judge(logits, params)[0]
    difference = support(logits, params) ^ set((expected > -torch.inf).nonzero()[:, 0].tolist())
    # Sums are taken in another order there, so a token at the very edge of top_p may fall on either side.
    assert len(difference) <= (1 if top_p else 0)


def test_top_k_of_one_is_greedy_and_whole_vocabulary_is_no_limit() -> None:
    logits = logits_of(8)
    assert sample(logits, [sequence(i, top_k=1) for i in range(8)]).token_ids == logits.argmax(1).tolist()
    free = sample(logits, [sequence(i) for i in range(8)]).token_ids
    assert sample(logits, [sequence(i, top_k=V) for i in range(8)]).token_ids == free
    assert sample(logits, [sequence(i, top_k=10**9) for i in range(8)]).token_ids == free


def test_filters_do_not_change_which_noise_a_token_gets() -> None:
    logits = logits_of(64)
    free = sample(logits, [sequence(i) for i in range(64)]).token_ids
    limited = sample(logits, [sequence(i, top_k=20) for i in range(64)]).token_ids
    allowed = logits.topk(20, dim=1).indices.tolist()
    both = [(a, b) for a, b, ids in zip(free, limited, allowed, strict=True) if a in ids]
    assert both and all(a == b for a, b in both)


def test_equal_logits_keep_a_nucleus_of_the_right_size() -> None:
    assert len(support(torch.zeros(1, 100), {"temperature": 1.0, "top_p": 0.495})) == 50
    assert len(support(torch.zeros(1, 100), {"temperature": 1.0, "top_k": 7})) == 7


def adjusted(logits: Tensor, item: Sequence) -> Tensor:
    """Logits [V] as they are when the token is chosen."""
    copy = logits.clone()
    sampler._Batch.of([item], torch.device("cpu"), logits.shape[1]).adjust(copy)
    return copy[0]


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_completion() -> None:
    logits = logits_of()
    item = sequence(prompt=[1, 2, 2, 9], emitted=[30, 30], temperature=0.0, repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([item.token_ids]), logits.clone())
    torch.testing.assert_close(adjusted(logits, item), expected[0])


def test_presence_and_frequency_penalties_look_at_the_completion_only() -> None:
    logits = logits_of()
    item = sequence(prompt=[1, 2], emitted=[30, 30, 31], presence_penalty=0.5, frequency_penalty=0.25)
    change = adjusted(logits, item) - logits[0]
    expected = torch.zeros(V)
    expected[30], expected[31] = -1.0, -0.75
    torch.testing.assert_close(change, expected)


def test_logit_bias_is_added_and_can_force_or_forbid() -> None:
    logits = logits_of()
    best = int(logits.argmax())
    assert sample(logits, [sequence(temperature=0.0, logit_bias={best: -100.0})]).token_ids != [best]
    assert sample(logits, [sequence(temperature=1.0, logit_bias={17: 100.0})]).token_ids == [17]


def test_stop_tokens_are_impossible_before_min_tokens() -> None:
    logits = logits_of()
    logits[0, 5], logits[0, 6] = 90.0, 80.0
    for emitted, expected in (((), False), ((1, 1), False), ((1, 1, 1), True)):
        item = sequence(emitted=emitted, temperature=1.0, min_tokens=3)
        assert (sample(logits, [item]).token_ids == [5]) is expected


def test_logprobs_are_those_of_the_models_own_logits() -> None:
    logits = logits_of(3)
    items = [
        sequence(1, temperature=0.3, logprobs=2, logit_bias={3: 50.0}),
        sequence(2, temperature=0.0),
        sequence(3, temperature=0.0, logprobs=0, frequency_penalty=1.0, emitted=[1]),
    ]
    samples = sample(logits, items)
    expected = logits.log_softmax(1)
    assert samples.token_ids[0] == 3 and set(samples.logprobs) == {0, 2}
    logprob, top_ids, top_values = samples.logprobs[0]
    assert logprob == pytest.approx(float(expected[0, 3]))
    assert list(top_ids) == expected[0].topk(2).indices.tolist()
    assert top_values == pytest.approx(expected[0].topk(2).values.tolist())
    assert samples.logprobs[2] == (pytest.approx(float(expected[2, samples.token_ids[2]])), (), ())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sequence_whose_logits_are_not_finite_fails_alone(value: float) -> None:
    logits = logits_of(len(KINDS))
    clean = sample(logits, mixed_batch())
    for row in range(len(KINDS)):
        spoiled = logits.clone()
        spoiled[row, 11] = value
        samples = sample(spoiled, mixed_batch())
        assert set(samples.errors) == {row} and "not finite" in samples.errors[row].message
        assert [t for i, t in enumerate(samples.token_ids) if i != row] == [
            t for i, t in enumerate(clean.token_ids) if i != row
        ]


def test_seeds_use_all_64_bits() -> None:
    logits = torch.zeros(1, V)
    tokens = [sample(logits, [sequence(seed)]).token_ids[0] for seed in (1, 1 + 2**32, 2**64 - 1, 2**63)]
    assert len(set(tokens)) == 4
