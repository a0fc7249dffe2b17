"""The sampler of a GPU, in the interpreter, gives what the torch sampler gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.engine_requests import make_sequence
from weft.messages import SamplingParams
from worker_svc.device_sampler import DeviceSampler
from worker_svc.sampler import Sampler
from worker_svc.sequence import Sequence

V = 200
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"temperature": 1.0, "logit_bias": {3: 5.0, 9: -100.0}},
    "min_tokens": {"temperature": 0.0, "min_tokens": 5},
    "logprobs": {"temperature": 1.0, "logprobs": 3},
}


def batch() -> list[Sequence]:
    return [
        make_sequence([1, 2, i], emitted=[4, 4, i], seed=2**63 + i, stop_ids=(5, 6), sampling=SamplingParams(**params))
        for i, params in enumerate(KINDS.values())
    ]


def logits_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, V, generator=torch.Generator().manual_seed(seed)) * 2


def test_sequences_that_go_on_get_the_torch_samplers_tokens() -> None:
    torch_sampler, ours, sequences = Sampler(), DeviceSampler(CPU), batch()
    for step in range(4):
        logits = logits_of(len(KINDS), step)
        expected = torch_sampler.sample(logits.clone(), sequences).collect()
        found = ours.sample(logits, sequences).collect()
        assert found.token_ids == expected.token_ids
        assert found.logprobs.keys() == expected.logprobs.keys()
        for row, (value, ids, values) in expected.logprobs.items():
            assert found.logprobs[row][1] == ids
            assert found.logprobs[row][0] == pytest.approx(value, abs=1e-5)
            assert found.logprobs[row][2] == pytest.approx(values, abs=1e-5)
        for sequence, token_id in zip(sequences, expected.token_ids, strict=True):
            sequence.token_ids.append(token_id)


def test_drafted_rows_get_the_torch_samplers_tokens() -> None:
    sequences = batch()
    drafts: list[list[int]] = [[7, 8], [], [9], [4, 4, 10], [], [11], [2]]
    logits = logits_of(sum(len(draft) + 1 for draft in drafts), 9)
    expected = Sampler().sample(logits.clone(), sequences, drafts).collect()
    assert DeviceSampler(CPU).sample(logits, sequences, drafts).collect().token_ids == expected.token_ids


def test_pending_tokens_count_towards_penalties() -> None:
    sequences, logits = batch(), logits_of(len(KINDS), 3)
    known, pending = Sampler(), DeviceSampler(CPU)
    first = known.sample(logits.clone(), sequences).collect().token_ids
    pending.sample(logits, sequences)
    for row, sequence in enumerate(sequences):
        sequence.await_token(row)
    # In another order, so that nothing of the batch before is of use.
    found = pending.sample(logits.flip(0), sequences[::-1]).collect().token_ids
    for sequence, token_id in zip(sequences, first, strict=True):
        sequence.token_ids[-1] = token_id
        sequence.num_pending_tokens = 0
    assert found == Sampler().sample(logits.flip(0), sequences[::-1]).collect().token_ids


def test_bad_rows_fail_alone() -> None:
    logits, sequences = logits_of(len(KINDS), 5), batch()
    expected = DeviceSampler(CPU).sample(logits, sequences).collect().token_ids
    logits[2, 17] = torch.nan
    samples = DeviceSampler(CPU).sample(logits, sequences).collect()
    assert list(samples.errors) == [2]
    assert [t for row, t in enumerate(samples.token_ids) if row != 2] == [
        t for row, t in enumerate(expected) if row != 2
    ]
