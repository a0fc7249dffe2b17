"""What a worker tells schedulers of choices that have ended, on a real NATS server: whole lengths, each once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from tests.support import nats, ring
from tests.support.ring import Neighbours, make_request
from tests.support.wait import until
from weft import subjects
from weft.columns import pack_u32, unpack_u32
from weft.messages import FINISH_LENGTH, FINISH_YIELD, Assignment, Choice, Ended, TokenizedRequest
from weft.service import Context
from weft.settings import MeshSettings, ModelSettings, WorkerSettings
from worker_svc.service import WorkerService


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nats.running(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@dataclass
class Ring:
    near: Neighbours
    ended: list[Ended] = field(default_factory=list)

    def assign(self, request: TokenizedRequest, stop_after: int | None) -> None:
        self.near.scheduler_bus.send(subjects.assign("w1"), Assignment(request, "s1", stop_after))

    async def flush(self) -> None:
        """Return when all that the worker has said before has been heard."""
        known = len(self.near.statuses)
        await until(lambda: len(self.near.statuses) > known)

    def rows(self) -> list[tuple[str, str, int, int]]:
        return [
            row
            for ended in self.ended
            for row in zip(
                ended.request_ids,
                ended.tenants,
                unpack_u32(ended.num_prompt_tokens),
                unpack_u32(ended.num_output_tokens),
                strict=True,
            )
        ]


@asynccontextmanager
async def running(url: str) -> AsyncIterator[Ring]:
    mesh = MeshSettings(nats_url=url, instance="w1")
    settings = WorkerSettings(mesh=mesh, model=ModelSettings(), engine="null", null_tokens_per_s=1000.0)
    context = Context("worker", mesh)
    async with ring.neighbours(url) as near:
        made = Ring(near)
        await near.scheduler_bus.on(subjects.ENDED_ALL, Ended, made.ended.append)
        await near.scheduler_bus.flush()
        async with ring.running(context, WorkerService(settings, context)):
            yield made


async def test_a_choice_that_is_handed_back_has_not_ended(url: str) -> None:
    async with running(url) as made:
        made.assign(replace(make_request(max_tokens=20), tenant="ann"), 5)
        await until(made.near.finishes)
        assert made.near.finishes() == {0: FINISH_YIELD} and len(made.near.tokens(0)) == 5
        await made.flush()
        assert made.ended == []
        rest = [Choice(0, 0, pack_u32(made.near.tokens(0)))]
        made.assign(replace(make_request(max_tokens=20, epoch=1), tenant="ann", yield_epoch=1, choices=rest), None)
        await until(made.rows)
        assert made.rows() == [("r1", "ann", 3, 20)]


async def test_of_several_choices_each_is_told_when_it_ends_and_none_that_is_cancelled(url: str) -> None:
    async with running(url) as made:
        choices = [Choice(0, 0), Choice(1, 1, pack_u32([7] * 17)), Choice(2, 2)]
        made.assign(replace(make_request("r1", max_tokens=20), choices=choices), 5)
        made.assign(make_request("r2", max_tokens=2000, slots=[9]), None)
        await until(lambda: len(made.near.finishes()) == 3)
        made.near.cancel("r2")
        await made.flush()
        assert made.near.finishes() == {0: FINISH_YIELD, 1: FINISH_LENGTH, 2: FINISH_YIELD}
        assert made.rows() == [("r1", "", 3, 20)]


async def test_a_choice_that_the_gateway_ends_is_told_once_with_the_tokens_up_to_its_end(url: str) -> None:
    async with running(url) as made:
        made.assign(replace(make_request(max_tokens=2000, slots=(3, 4)), tenant="ann"), None)
        await until(lambda: made.near.tokens(3) and made.near.tokens(4))
        for _ in range(2):
            made.near.cancel("r1", slots=[4], num_output_tokens=[11])
        await until(made.rows)
        # The last one that is left needs no name.
        for _ in range(2):
            made.near.cancel("r1", num_output_tokens=[12])
        await until(lambda: made.near.statuses[-1].accepted and not made.near.statuses[-1].num_running)
        await made.flush()
        assert made.rows() == [("r1", "ann", 3, 11), ("r1", "ann", 3, 12)]


async def test_what_was_handed_back_makes_room(url: str) -> None:
    async with running(url) as made:
        made.assign(make_request(max_tokens=20, slots=(0, 1)), 5)
        await until(lambda: len(made.near.finishes()) == 2)
        await until(lambda: made.near.statuses[-1].accepted == {"s1": 2} and not made.near.statuses[-1].num_running)
        assert made.near.statuses[-1].num_waiting == 0
        assert made.near.kinds() == ["started"]
