"""All that a scheduler knows and decides: one method for each event, which returns what is to be done. Pure.

It holds the backlog and dispatches only what a worker has room for, so order means something and a dead worker loses
little. Nothing here is remembered beyond the process: workers, blocks and requests are learnt anew from messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from scheduler_svc.actions import Action, Decision, Dispatch, Dropped, Lost, Queued, Reject, WantSnapshot
from scheduler_svc.backlog import Backlog
from scheduler_svc.block_index import NO_MATCH, BlockIndex
from scheduler_svc.policy.admit import AdmitPolicy, BacklogView
from scheduler_svc.policy.order import Fcfs, Waiting
from scheduler_svc.policy.route import RoutePolicy
from scheduler_svc.workers import InFlight, Worker
from weft.columns import split_hashes, unpack_u32
from weft.errors import InvalidRequest, InvariantViolation, Unavailable, WeftError
from weft.hashing import HASH_BYTES
from weft.holder import Cancelled, MissingGateways
from weft.messages import (
    HEARTBEAT_TIMEOUT_S,
    Cancel,
    Declined,
    Heartbeat,
    KvEvents,
    TokenizedRequest,
    WorkerStatus,
)
from weft.roster import Change, Roster
from weft.subjects import Returned


class ClusterState:
    """Workers, blocks, backlog and roster of one scheduler."""

    def __init__(self, scheduler: str, *, admit: AdmitPolicy, order: type[Fcfs], route: RoutePolicy) -> None:
        self._scheduler = scheduler
        self._admit = admit
        self._route = route
        self._roster = Roster()
        self._workers: dict[str, Worker] = {}
        # The workers with room, by model: their names, and the mask of their bits.
        self._open: dict[str, dict[str, Worker]] = {}
        self._open_masks: dict[str, int] = {}
        self._blocks = BlockIndex()
        self._backlog = Backlog(order)
        self._cancelled = Cancelled()
        self._in_flight: dict[tuple[str, int], str] = {}  # (request id, epoch) → worker
        self._missing = MissingGateways(self._roster)
        self._num_schedulers = 1
        self._num_dispatches = 0
        self._next_ticket = 0
        self._is_draining = False
        self.num_lost = 0  # assignments that no status accounted for

    # ---- events ----

    def on_request(self, request: TokenizedRequest, now: float) -> list[Action]:
        """A tokenizer hands a request on."""
        actions, is_stale = self._supersede(request)
        if is_stale:
            return actions
        if self._is_draining:
            return [*actions, Lost(request, _draining())]
        error = self._impossible(request)
        if error is not None:
            return [*actions, Reject(request, error)]
        self._next_ticket += 1
        waiting = Waiting(request, self._next_ticket, now)
        candidates = [] if self._backlog.count(request.model) else self._candidates(request)
        if candidates:
            return [*actions, self._place(waiting, candidates, now)]
        if request.epoch == 0 and (error := self._admit.decide(request, self._view(request.model))) is not None:
            return [*actions, Reject(request, error)]
        return [*actions, *self._wait(waiting, now)]

    def on_status(self, status: WorkerStatus, now: float) -> list[Action]:
        """A worker tells its room and load."""
        known = self._workers.get(status.worker)
        if known is not None and status.worker_epoch < known.epoch:
            return []
        actions: list[Action] = []
        is_over = known is not None and (status.worker_epoch > known.epoch or status.model != known.status.model)
        if known is not None and (is_over or status.state == "dead"):
            actions += self._worker_gone(status.worker)
            known = None
        if status.state == "dead":
            return actions
        worker = known or self._add_worker(status, now)
        for flight in list(worker.in_flight.values()):
            del self._in_flight[flight.key]
        self.num_lost += len(worker.apply(status, self._scheduler, now))
        self._in_flight |= dict.fromkeys(worker.in_flight, worker.name)
        self._refresh(worker)
        if self._blocks.check_sequence(worker.name, status.kv_sequence, now):
            actions.append(WantSnapshot(worker.name))
        return actions + self._pump(status.model, now)

    def on_kv(self, events: KvEvents, now: float) -> list[Action]:
        """A worker tells which blocks it gained and lost, or answers with all it holds."""
        return [WantSnapshot(events.holder)] if self._blocks.apply(events, now) else []

    def on_declined(self, declined: Declined, now: float) -> list[Action]:
        """A worker without room hands an assignment back: to the backlog, and nothing more there for now."""
        request, worker = declined.request, self._workers.get(declined.worker)
        flight = None
        if worker is not None:
            flight = self._take_back(worker, (request.request_id, request.epoch))
            worker.is_full = True
            self._refresh(worker)
        if flight is None:
            self._next_ticket += 1
            flight = InFlight(request, self._next_ticket, now)
        return self._put_back(flight, now)

    def on_returned(self, hop: Returned, error: WeftError, now: float) -> list[Action]:
        """An assignment of ours came back: nobody listens there, or it could not be sent, or read."""
        name = self._in_flight.get((hop.request_id, hop.epoch))
        if name is None:
            return []
        worker = self._workers[name]
        flight = self._take_back(worker, (hop.request_id, hop.epoch))
        assert flight is not None
        if isinstance(error, Unavailable):
            return self._worker_gone(name) + self._put_back(flight, now)
        self._refresh(worker)
        request = flight.request
        end = Reject(request, error) if isinstance(error, InvalidRequest) else Lost(request, error)
        return [end, *self._pump(request.model, now)]

    def on_cancel(self, cancel: Cancel, now: float) -> list[Action]:
        """A gateway drops a request, or some of its choices."""
        slots = set(unpack_u32(cancel.slots))
        if not slots:
            self._cancelled.remember(cancel.request_id, cancel.epoch)
        waiting = self._backlog.get(cancel.request_id)
        if waiting is None or waiting.request.epoch > cancel.epoch:
            return []
        request = waiting.request
        left = [choice for choice in request.choices if choice.slot not in slots] if slots else []
        if len(left) == len(request.choices):
            return []
        self._backlog.remove(cancel.request_id)
        if not left:
            return [Dropped(request, "cancelled"), *self._pump(request.model, now)]
        smaller = Waiting(msgspec.structs.replace(request, choices=left), waiting.ticket, waiting.since)
        self._backlog.add(smaller, now)
        return self._pump(request.model, now)

    def on_heartbeat(self, beat: Heartbeat, now: float) -> list[Action]:
        """Anyone tells that it lives, or the supervisor that it does not."""
        return self._apply(self._roster.apply(beat, now), now)

    def on_tick(self, now: float) -> list[Action]:
        """Twice a second, while the others could have been heard."""
        actions = self._apply(self._roster.expire(now), now)
        for worker in list(self._workers.values()):
            unheard = self._roster.get("worker", worker.name) is None
            if unheard and now - worker.seen_at > HEARTBEAT_TIMEOUT_S:
                actions += self._worker_gone(worker.name)
        for gateway in self._missing.find({request.gateway for request in self.waiting()}, now):
            actions += self._drop_gateway(gateway)
        return actions + self._pump_all(now)

    def forgive(self, now: float) -> None:
        """After this scheduler was cut off, or slept: the others' silence proves nothing."""
        self._roster.forgive(now)
        self._missing.forgive()
        for worker in self._workers.values():
            worker.seen_at = now

    def drain(self) -> list[Action]:
        """Hand everything on, and whatever comes from now on."""
        self._is_draining = True
        requests = [self._backlog.remove(waiting.request.request_id).request for waiting in self._backlog]
        return [Lost(request, _draining()) for request in requests]

    # ---- what is known ----

    @property
    def num_waiting(self) -> int:
        return len(self._backlog)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def waiting(self) -> Iterator[TokenizedRequest]:
        """The backlog, in no order."""
        return (waiting.request for waiting in self._backlog)

    def models(self) -> list[str]:
        """What ready workers serve."""
        return sorted({worker.status.model for worker in self._workers.values() if worker.status.state == "ready"})

    def stats(self) -> dict[str, float]:
        return {
            "waiting_requests": float(len(self._backlog)),
            "waiting_tokens": float(sum(self._backlog.num_tokens(model) for model in self._backlog.models())),
            "in_flight_requests": float(len(self._in_flight)),
            "workers": float(len(self._workers)),
            "workers_with_room": float(sum(map(len, self._open.values()))),
            "schedulers": float(self._num_schedulers),
            "blocks": float(self._blocks.num_blocks),
            "assignments_lost_total": float(self.num_lost),
        }

    def check(self) -> None:
        """Raises InvariantViolation if the books do not balance."""
        flights = {key: worker.name for worker in self._workers.values() for key in worker.in_flight}
        if flights != self._in_flight:
            raise InvariantViolation("assignments on their way differ from those of the workers")
        for worker in self._workers.values():
            counted = sum(flight.num_choices for flight in worker.in_flight.values())
            is_open = worker.name in self._open.get(worker.status.model, {})
            if counted != worker.num_on_the_way or is_open != bool(worker.room):
                raise InvariantViolation(f"the room of {worker.name} is not what its books say")
        for model in self._backlog.models():
            head = self._backlog.head(model, 0.0)
            if head is not None and self._candidates(head.request):
                raise InvariantViolation(f"a request for {model} waits although there is room")

    # ---- requests ----

    def _supersede(self, request: TokenizedRequest) -> tuple[list[Action], bool]:
        """Of a request id only the highest epoch lives; True if this one does not."""
        request_id, epoch = request.request_id, request.epoch
        waiting = self._backlog.get(request_id)
        if self._cancelled.covers(request_id, epoch):
            return [Dropped(request, "cancelled")], True
        if (waiting is not None and waiting.request.epoch >= epoch) or (request_id, epoch) in self._in_flight:
            return [Dropped(request, "superseded")], True
        if epoch:
            # Should a lower epoch still be handed back to us.
            self._cancelled.remember(request_id, epoch - 1)
        if waiting is None:
            return [], False
        return [Dropped(self._backlog.remove(request_id).request, "superseded")], False

    def _impossible(self, request: TokenizedRequest) -> WeftError | None:
        sizes = [w.status.max_num_seqs for w in self._workers.values() if w.status.model == request.model]
        if len(request.block_hashes) % HASH_BYTES:
            return InvalidRequest("block hashes are no whole number of hashes", param="prompt")
        if not sizes or len(request.choices) <= max(sizes):
            return None
        return InvalidRequest(
            f"{len(request.choices)} choices are more than the {max(sizes)} that a worker runs at once", param="n"
        )

    def _wait(self, waiting: Waiting, now: float) -> list[Action]:
        """Add to the backlog, send on what can go, and tell the gateway if that is not this request."""
        request = waiting.request
        self._backlog.add(waiting, now)
        actions = self._pump(request.model, now)
        return [*actions, Queued(request)] if self._backlog.get(request.request_id) is waiting else actions

    def _put_back(self, flight: InFlight, now: float) -> list[Action]:
        """What is known not to have been taken waits again, in its old place."""
        request = flight.request
        if self._cancelled.covers(*flight.key):
            return [Dropped(request, "cancelled"), *self._pump(request.model, now)]
        if self._backlog.get(request.request_id) is not None:
            return [Dropped(request, "superseded"), *self._pump(request.model, now)]
        if self._is_draining:
            return [Lost(request, _draining())]
        return self._wait(Waiting(request, flight.ticket, now), now)

    def _pump_all(self, now: float) -> list[Action]:
        return [action for model in self._backlog.models() for action in self._pump(model, now)]

    def _pump(self, model: str, now: float) -> list[Action]:
        """Dispatch from the head of a model's backlog until it is empty or finds no room."""
        actions: list[Action] = []
        while (head := self._backlog.head(model, now)) is not None:
            error = self._impossible(head.request)
            candidates = self._candidates(head.request) if error is None else []
            if error is None and not candidates:
                break
            self._backlog.remove(head.request.request_id)
            actions.append(Reject(head.request, error) if error else self._place(head, candidates, now))
        return actions

    def _candidates(self, request: TokenizedRequest) -> list[Worker]:
        workers = self._open.get(request.model, {}).values()
        num_choices = len(request.choices)
        if num_choices == 1:
            return list(workers)
        return [worker for worker in workers if worker.has_room(num_choices, self._num_schedulers)]

    def _place(self, waiting: Waiting, candidates: list[Worker], now: float) -> Dispatch:
        request = waiting.request
        decision = self._decide(request, candidates)
        worker = self._workers[decision.worker]
        self._num_dispatches += 1
        flight = InFlight(request, waiting.ticket, now)
        worker.send(flight, self._num_dispatches)
        self._in_flight[flight.key] = worker.name
        self._refresh(worker)
        return Dispatch(request, decision)

    def _decide(self, request: TokenizedRequest, candidates: list[Worker]) -> Decision:
        num_blocks = len(request.block_hashes) // HASH_BYTES
        if not self._route.uses_prefix or not num_blocks:
            return self._route.decide(candidates, NO_MATCH, num_blocks)
        mask = self._open_masks[request.model]
        if len(candidates) < len(self._open[request.model]):
            mask = sum(1 << worker.bit for worker in candidates)
        match = self._blocks.match(split_hashes(request.block_hashes), mask)
        return self._route.decide(candidates, match, num_blocks)

    def _view(self, model: str) -> BacklogView:
        ready = [
            worker.status
            for worker in self._workers.values()
            if worker.status.model == model and worker.status.state == "ready"
        ]
        return BacklogView(
            num_requests=self._backlog.count(model),
            num_tokens=self._backlog.num_tokens(model),
            num_new_tokens=self._backlog.num_new_tokens(model),
            prefill_tokens_per_s=sum(status.prefill_tokens_per_s for status in ready),
            decode_tokens_per_s=sum(status.decode_tokens_per_s for status in ready),
        )

    # ---- workers ----

    def _add_worker(self, status: WorkerStatus, now: float) -> Worker:
        bit = self._blocks.add(status.worker, status.worker_epoch)
        worker = self._workers[status.worker] = Worker(status.worker, bit, status, now)
        return worker

    def _worker_gone(self, name: str) -> list[Action]:
        """Forget a worker's room and blocks.

        What was on its way there may have arrived, and may even run still: only the gateway can make sure that it
        does not run twice, by a higher epoch.
        """
        worker = self._workers.pop(name)
        worker.is_full = True
        self._refresh(worker)
        self._blocks.remove(name)
        actions: list[Action] = []
        for flight in worker.in_flight.values():
            del self._in_flight[flight.key]
            if self._cancelled.covers(*flight.key):
                actions.append(Dropped(flight.request, "cancelled"))
            else:
                actions.append(Lost(flight.request, Unavailable(f"worker {name} is gone")))
        return actions

    def _take_back(self, worker: Worker, key: tuple[str, int]) -> InFlight | None:
        flight = worker.take_back(key)
        if flight is not None:
            del self._in_flight[key]
        return flight

    def _refresh(self, worker: Worker) -> None:
        """After anything about a worker changed: its room, and whether it is among those that have some."""
        worker.refresh(self._num_schedulers)
        model = worker.status.model
        workers = self._open.setdefault(model, {})
        if bool(worker.room) == (worker.name in workers):
            return
        mask = self._open_masks.get(model, 0)
        self._open_masks[model] = mask ^ (1 << worker.bit)
        if worker.room:
            workers[worker.name] = worker
        else:
            del workers[worker.name]

    # ---- who is there ----

    def _apply(self, changes: Iterable[Change], now: float) -> list[Action]:
        actions: list[Action] = []
        for change in changes:
            member = change.member
            if member.role == "scheduler":
                actions += self._count_schedulers(now)
            elif change.kind == "left" and member.role == "gateway":
                actions += self._drop_gateway(member.instance) + self._pump_all(now)
            elif change.kind == "left" and member.role == "worker":
                worker = self._workers.get(member.instance)
                if worker is not None and worker.epoch <= member.epoch:
                    actions += self._worker_gone(member.instance)
        return actions

    def _count_schedulers(self, now: float) -> list[Action]:
        ready = {member.instance for member in self._roster.members("scheduler") if member.state == "ready"}
        self._num_schedulers = len(ready | {self._scheduler})
        for worker in self._workers.values():
            self._refresh(worker)
        return self._pump_all(now)

    def _drop_gateway(self, gateway: str) -> list[Action]:
        """Nobody is left to read these streams."""
        for worker in self._workers.values():
            for flight in worker.in_flight.values():
                if flight.request.gateway == gateway:
                    self._cancelled.remember(*flight.key)
        waiting = [waiting.request for waiting in self._backlog if waiting.request.gateway == gateway]
        return [Dropped(self._backlog.remove(request.request_id).request, "gateway gone") for request in waiting]


def _draining() -> Unavailable:
    return Unavailable("the scheduler is draining")
