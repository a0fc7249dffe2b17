"""What tokens mean for the sequences that waited for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from tests.support.engine_requests import make_sequence
from weft.errors import InvalidRequest
from weft.messages import ErrorInfo
from worker_svc.batch import StepPlan, Work
from worker_svc.flight import Flight, Landed
from worker_svc.sampler import Logprobs, Samples
from worker_svc.sequence import UNKNOWN_TOKEN, Sequence, State
from worker_svc.stopwatch import HostStopwatch

ERROR = ErrorInfo.of(InvalidRequest("not finite"))
PLAN = StepPlan({}, (), (), (), ())


@dataclass
class Known:
    """Samples that are there already."""

    samples: Samples

    def collect(self) -> Samples:
        return self.samples


def make_decode(stop_ids: Iterable[int] = ()) -> Sequence:
    """A sequence whose five tokens are computed."""
    sequence = make_sequence([1, 2, 3, 4, 5], stop_ids=stop_ids)
    sequence.num_computed_tokens = 5
    return sequence


def land(
    sequences: Ordered[tuple[Sequence, Ordered[int]]],
    token_ids: list[int],
    *,
    errors: Iterable[int] = (),
    logprobs: Mapping[int, Logprobs] | None = None,
) -> list[Landed]:
    """Await one token and a draft for each sequence, and let these come."""
    awaited = [(sequence, sequence.await_token(row), draft) for row, (sequence, draft) in enumerate(sequences)]
    samples = Samples(token_ids, dict(logprobs or {}), dict.fromkeys(errors, ERROR))
    return Flight(PLAN, Work(), awaited, Known(samples), 0.0, HostStopwatch(), is_observed=False).land()


def test_draft_stands_as_far_as_the_model_says_the_same_and_one_token_more() -> None:
    sequence = make_decode()
    (landed,) = land([(sequence, [6, 7, 8])], [6, 7, 9, 10])
    assert (landed.emitted.first_index, landed.emitted.num_drafts, landed.emitted.token_ids) == (5, 3, [6, 7, 9])
    assert sequence.token_ids == [1, 2, 3, 4, 5, 6, 7, 9]
    # The last token's own place is not computed yet.
    assert (sequence.num_computed_tokens, sequence.num_pending_tokens) == (7, 0)


def test_nothing_comes_after_a_token_that_stops() -> None:
    sequence = make_decode(stop_ids=[7])
    (landed,) = land([(sequence, [6, 7, 8])], [6, 7, 8, 9])
    assert landed.emitted.token_ids == [6, 7]


def test_first_logits_that_are_not_finite_leave_no_token_but_an_error() -> None:
    sequence = make_decode()
    (landed,) = land([(sequence, [6])], [6, 7], errors=[0])
    assert (landed.emitted.token_ids, landed.error) == ([], ERROR)
    assert UNKNOWN_TOKEN not in sequence.token_ids and sequence.num_pending_tokens == 0


def test_later_logits_that_are_not_finite_only_end_the_draft() -> None:
    (landed,) = land([(make_decode(), [6, 7])], [6, 7, 8], errors=[1])
    assert (landed.emitted.token_ids, landed.error) == ([6], None)


def test_rows_of_a_sequence_that_has_ended_are_passed_over() -> None:
    gone, other = make_decode(), make_decode()
    gone.state = State.FINISHED
    (landed,) = land([(gone, [6, 7]), (other, ())], [6, 7, 8, 9])
    assert (landed.emitted.sequence, landed.emitted.token_ids) == (other, [9])


def test_logprobs_are_those_of_the_tokens_that_stand() -> None:
    logprobs: dict[int, Logprobs] = {row: (-row, (), ()) for row in range(1, 4)}
    silent, asking = make_decode(), make_decode()
    first, second = land([(silent, ()), (asking, [6, 7])], [9, 6, 8, 9], logprobs=logprobs)
    assert first.logprobs == ()
    assert second.logprobs == (logprobs[1], logprobs[2])


def test_step_that_samples_nothing_lands_with_nothing() -> None:
    assert Flight(PLAN, Work(), [], None, 0.0, HostStopwatch(), is_observed=False).land() == []
