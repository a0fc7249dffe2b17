"""All that a scheduler knows and decides: one method for each event, which returns what is to be done. Pure.

It holds the backlog and dispatches only what a worker has room for, so order means something and a dead worker loses
little. Nothing here is remembered beyond the process: workers, blocks and requests are learnt anew from messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from scheduler_svc.actions import Action, Dispatch, Dropped, Lost, Queued, Reject, WantSnapshot
from scheduler_svc.backlog import Backlog
from scheduler_svc.block_index import NO_MATCH, BlockIndex, Match
from scheduler_svc.fleet import Fleet
from scheduler_svc.held import HeldBook
from scheduler_svc.policies import Policies, PolicyMaker, PolicyNames
from scheduler_svc.policy.admit import BacklogView, LoadView, objectives_of
from scheduler_svc.policy.order import OrderPolicy, Waiting
from scheduler_svc.policy.route import Arrival
from scheduler_svc.pool import Pool
from scheduler_svc.scaling import Demand
from scheduler_svc.workers import InFlight, Worker
from weft.columns import unpack_u32
from weft.errors import InvalidRequest, InvariantViolation, Unavailable, WeftError
from weft.hashing import HASH_BYTES
from weft.holder import Cancelled, MissingGateways
from weft.messages import (
    HEARTBEAT_TIMEOUT_S,
    BacklogPlace,
    Cancel,
    Decision,
    Declined,
    Ended,
    Heartbeat,
    KvEvents,
    TokenizedRequest,
    WorkerStatus,
)
from weft.roster import Change, Roster
from weft.subjects import Returned


class ClusterState:
    """Workers, blocks, backlog and roster of one scheduler."""

    def __init__(self, scheduler: str, maker: PolicyMaker, names: PolicyNames | None = None) -> None:
        """`names`: the policies of a model for which nothing else was said."""
        self._scheduler = scheduler
        self._maker = maker
        self._names = names or PolicyNames()
        self._names_of: dict[str, PolicyNames] = {}  # models for which something else was said
        self._policies: dict[str, Policies] = {}
        self._roster = Roster()
        self._fleet = Fleet()
        self._blocks = BlockIndex()
        self._backlog = Backlog(self._make_order)
        self._held = HeldBook()
        self._cancelled = Cancelled()
        self._missing = MissingGateways(self._roster)
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
        candidates = Pool() if self._backlog.count(request.model) else self._candidates(request)
        admit = self._policies_of(request.model).admit
        if request.epoch == 0 and (admit.uses_load or not candidates):
            view = self._view(request.model)
            error = admit.decide(request, view, lambda: self._load_view(view, request.model, now))
            if error is not None:
                return [*actions, Reject(request, error)]
        self._next_ticket += 1
        match = self._match(request, candidates) if candidates else None
        waiting = self._waiting(request, self._next_ticket, now, match)
        if candidates:
            return [*actions, self._place(waiting, candidates, now, match)]
        return [*actions, *self._wait(waiting, now)]

    def on_status(self, status: WorkerStatus, now: float) -> list[Action]:
        """A worker tells its room and load."""
        known = self._fleet.get(status.worker)
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
        self.num_lost += self._fleet.apply(worker, status, self._scheduler, now)
        self._held.on_status(status, now)
        policies = self._policies_of(status.model)
        if not policies.is_calibrated:
            policies.cost.follow(status.prefill_tokens_per_s, status.step_s)
        if self._maker.block_transfer_s is None:
            policies.transfer.block_s = self._fleet.ready(status.model).sums.block_load_s
        if self._blocks.check_sequence(worker.name, status.kv_sequence, now):
            actions.append(WantSnapshot(worker.name))
        return actions + self._pump(status.model, now)

    def on_ended(self, ended: Ended) -> None:
        """A worker tells of choices that have generated all they will: predictions and fairness learn from them."""
        policies, order = self._policies_of(ended.model), self._backlog.order(ended.model)
        prompts, outputs = unpack_u32(ended.num_prompt_tokens), unpack_u32(ended.num_output_tokens)
        for request_id, tenant, prompt, output in zip(ended.request_ids, ended.tenants, prompts, outputs, strict=True):
            held = self._held.end_choice(request_id)
            policies.predict.learn(tenant, prompt, output, held.guess if held else None)
            if held is not None:
                order.on_ended(tenant, held.remaining_each, output - held.num_generated_each)

    def on_kv(self, events: KvEvents, now: float) -> list[Action]:
        """A worker tells which blocks it gained and lost, or answers with all it holds."""
        return [WantSnapshot(events.holder)] if self._blocks.apply(events, now) else []

    def on_declined(self, declined: Declined, now: float) -> list[Action]:
        """A worker without room hands an assignment back: to the backlog, and nothing more there for now."""
        request, worker = declined.request, self._fleet.get(declined.worker)
        flight = None
        if worker is not None:
            flight = self._fleet.take_back(worker, (request.request_id, request.epoch))
            worker.is_full = True
            self._fleet.refresh(worker)
        if flight is None:
            self._next_ticket += 1
            flight = InFlight(self._waiting(request, self._next_ticket, now), now)
        return self._put_back(flight, now)

    def on_returned(self, hop: Returned, error: WeftError, now: float) -> list[Action]:
        """An assignment of ours came back: nobody listens there, or it could not be sent, or read."""
        worker = self._fleet.bound_for((hop.request_id, hop.epoch))
        if worker is None:
            return []
        flight = self._fleet.take_back(worker, (hop.request_id, hop.epoch))
        assert flight is not None
        if isinstance(error, Unavailable):
            return self._worker_gone(worker.name) + self._put_back(flight, now)
        self._fleet.refresh(worker)
        request = flight.request
        end = Reject(request, error) if isinstance(error, InvalidRequest) else Lost(request, error)
        return [end, *self._pump(request.model, now)]

    def on_cancel(self, cancel: Cancel, now: float) -> list[Action]:
        """A gateway drops a request, or some of its choices."""
        slots = set(unpack_u32(cancel.slots))
        if not slots:
            self._cancelled.remember(cancel.request_id, cancel.epoch)
        if not cancel.num_output_tokens:
            self._forget_held(cancel.request_id, len(slots))
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
        smaller = self._waiting(msgspec.structs.replace(request, choices=left), waiting.ticket, waiting.since)
        self._backlog.add(smaller, now)
        return self._pump(request.model, now)

    def on_heartbeat(self, beat: Heartbeat, now: float) -> list[Action]:
        """Anyone tells that it lives, or the supervisor that it does not."""
        return self._apply(self._roster.apply(beat, now), now)

    def on_tick(self, now: float) -> list[Action]:
        """Twice a second, while the others could have been heard."""
        actions = self._apply(self._roster.expire(now), now)
        for worker in self._fleet:
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
        for worker in self._fleet:
            worker.seen_at = now

    def drain(self) -> list[Action]:
        """Hand everything on, and whatever comes from now on."""
        self._is_draining = True
        requests = [self._backlog.remove(waiting.request.request_id).request for waiting in self._backlog]
        return [Lost(request, _draining()) for request in requests]

    # ---- policies ----

    def set_policies(self, changes: Mapping[str, str], model: str | None, now: float) -> list[Action]:
        """Switch some policies, of one model or of all; what waits is ordered anew.

        Raises:
            InvalidRequest: an unknown family or name; nothing has changed.
        """
        if model is None:
            self._names = self._names.with_changes(changes)
            self._names_of = {name: names.with_changes(changes) for name, names in self._names_of.items()}
        else:
            self._names_of[model] = self.policy_names(model).with_changes(changes)
        for name in list(self._policies) if model is None else [model]:
            before = self._policies.get(name)
            if before is not None and before.names != self.policy_names(name):
                self._policies[name] = self._maker.make(self.policy_names(name), before)
                if before.names.order != self.policy_names(name).order:
                    self._backlog.reorder(name, now)
        return self._pump_all(now)

    def policy_names(self, model: str | None = None) -> PolicyNames:
        """Of a model; of those for which nothing else was said without one."""
        return self._names if model is None else self._names_of.get(model, self._names)

    def _policies_of(self, model: str) -> Policies:
        if model not in self._policies:
            self._policies[model] = self._maker.make(self.policy_names(model))
        return self._policies[model]

    def _make_order(self, model: str) -> OrderPolicy:
        return self._maker.order(self.policy_names(model))

    # ---- what is known ----

    @property
    def num_waiting(self) -> int:
        return len(self._backlog)

    @property
    def num_in_flight(self) -> int:
        return self._fleet.num_in_flight

    def waiting(self) -> Iterator[TokenizedRequest]:
        """The backlog, in no order."""
        return (waiting.request for waiting in self._backlog)

    def models(self) -> list[str]:
        """What ready workers serve."""
        return sorted({worker.status.model for worker in self._fleet if worker.status.state == "ready"})

    def schedulers(self) -> set[str]:
        """Those that are ready, this one among them."""
        ready = {member.instance for member in self._roster.members("scheduler") if member.state == "ready"}
        return ready | {self._scheduler}

    def demands(self) -> list[Demand]:
        """What scaling may know, of each model that anybody serves, tokenizes or waits for."""
        models = {*self._backlog.models(), *self._fleet.models()}
        models |= {model for member in self._roster.members("tokenizer") for model in member.models}
        starting = [member for member in self._roster.members("worker") if member.state == "starting"]
        return [
            Demand(
                model=model,
                num_waiting=self._backlog.count(model),
                num_waiting_tokens=self._backlog.num_tokens(model),
                ready=self._fleet.ready(model),
                # One that starts does not say which model before it has read its folder.
                num_starting=sum(not member.models or model in member.models for member in starting),
                count_only_blocks=self._blocks.num_only,
            )
            for model in sorted(models)
        ]

    def stats(self) -> dict[str, float]:
        return {
            "waiting_requests": float(len(self._backlog)),
            "waiting_tokens": float(sum(self._backlog.num_tokens(model) for model in self._backlog.models())),
            "in_flight_requests": float(self._fleet.num_in_flight),
            "workers": float(len(self._fleet)),
            "workers_with_room": float(sum(len(self._fleet.open(model)) for model in self._fleet.models())),
            "schedulers": float(self._fleet.num_schedulers),
            "blocks": float(self._blocks.num_blocks),
            "assignments_lost_total": float(self.num_lost),
            **self._prediction_stats(),
        }

    def _prediction_stats(self) -> dict[str, float]:
        found = [policies.predict.accuracy for policies in self._policies.values()]
        ended = sum(accuracy.num_ended for accuracy in found)
        return {
            "predictions_total": float(ended),
            "predictions_in_bucket_total": float(sum(accuracy.num_same_bucket for accuracy in found)),
            "prediction_error_tokens_total": sum(accuracy.sum_error for accuracy in found),
        }

    def check(self) -> None:
        """Raises InvariantViolation if the books do not balance."""
        self._fleet.check()
        self._held.check()
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
        is_on_its_way = self._fleet.bound_for((request_id, epoch)) is not None
        if (waiting is not None and waiting.request.epoch >= epoch) or is_on_its_way:
            return [Dropped(request, "superseded")], True
        if epoch:
            # Should a lower epoch still be handed back to us.
            self._cancelled.remember(request_id, epoch - 1)
        if waiting is None:
            return [], False
        return [Dropped(self._backlog.remove(request_id).request, "superseded")], False

    def _impossible(self, request: TokenizedRequest) -> WeftError | None:
        if len(request.block_hashes) % HASH_BYTES:
            return InvalidRequest("block hashes are no whole number of hashes", param="prompt")
        if len(request.choices) == 1:
            # Nobody need look at every worker.
            return None
        sizes = [worker.status.max_num_seqs for worker in self._fleet if worker.status.model == request.model]
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
        if self._backlog.get(request.request_id) is not waiting:
            return actions
        model, policies = request.model, self._policies_of(request.model)
        place = BacklogPlace(
            self._backlog.count(model), self._fleet.count(model), policies.names.admit, policies.names.order
        )
        return [*actions, Queued(request, place)]

    def _put_back(self, flight: InFlight, now: float) -> list[Action]:
        """What is known not to have been taken waits again, in its old place."""
        request = flight.request
        if self._cancelled.covers(*flight.key):
            return [Dropped(request, "cancelled"), *self._pump(request.model, now)]
        if self._backlog.get(request.request_id) is not None:
            return [Dropped(request, "superseded"), *self._pump(request.model, now)]
        if self._is_draining:
            return [Lost(request, _draining())]
        self._held.end(request.request_id)
        self._backlog.order(request.model).on_put_back(flight.waiting)
        return self._wait(self._waiting(request, flight.ticket, flight.waiting.since), now)

    def _pump_all(self, now: float) -> list[Action]:
        return [action for model in self._backlog.models() for action in self._pump(model, now)]

    def _pump(self, model: str, now: float) -> list[Action]:
        """Dispatch from the head of a model's backlog until it is empty or finds no room."""
        actions: list[Action] = []
        while (head := self._backlog.head(model, now)) is not None:
            error = self._impossible(head.request)
            candidates = self._candidates(head.request) if error is None else Pool()
            if error is None and not candidates:
                break
            self._backlog.remove(head.request.request_id)
            actions.append(Reject(head.request, error) if error else self._place(head, candidates, now))
        return actions

    def _candidates(self, request: TokenizedRequest) -> Pool:
        pool = self._fleet.open(request.model)
        num_choices = len(request.choices)
        if num_choices == 1:
            return pool
        return Pool(worker for worker in pool if worker.has_room(num_choices, self._fleet.num_schedulers))

    def _waiting(self, request: TokenizedRequest, ticket: int, since: float, match: Match | None = None) -> Waiting:
        """What order policies may know of a request."""
        policies = self._policies_of(request.model)
        guesses = [policies.predict.guess(request, len(choice.emitted) // 4) for choice in request.choices]
        num_matched = 0
        if policies.order_uses_prefix:
            found = match or self._blocks.match(request.block_hashes, -1)
            num_matched = found.longest * self._maker.block_size
        deadline = since + objectives_of(request, self._maker.objectives).ttft_s
        remaining = sum([guess.remaining for guess in guesses])
        return Waiting(request, ticket, since, remaining, num_matched, deadline, guesses[0])

    def _match(self, request: TokenizedRequest, candidates: Pool) -> Match:
        if not self._policies_of(request.model).route.uses_prefix or not request.block_hashes:
            return NO_MATCH
        return self._blocks.match(request.block_hashes, candidates.mask)

    def _forget_held(self, request_id: str, num_choices: int) -> None:
        """Of what a worker has, so many choices will never be told to have ended; with none, the whole request."""
        if not num_choices:
            self._held.end(request_id)
        for _ in range(num_choices):
            self._held.end_choice(request_id)

    def _place(self, waiting: Waiting, candidates: Pool, now: float, match: Match | None = None) -> Dispatch:
        request = waiting.request
        decision = self._decide(waiting, candidates, self._match(request, candidates) if match is None else match, now)
        worker = self._fleet[decision.worker]
        self._num_dispatches += 1
        self._fleet.send(worker, InFlight(waiting, now), self._num_dispatches)
        order = self._backlog.order(request.model)
        stop_after = min(filter(None, (decision.stop_after, order.quantum(waiting))), default=None)
        order.on_sent(waiting)
        self._held.send(waiting, worker, decision.expected_ttft_s, now)
        return Dispatch(request, decision, stop_after)

    def _decide(self, waiting: Waiting, candidates: Pool, match: Match, now: float) -> Decision:
        request = waiting.request
        arrival = Arrival(
            num_tokens=request.num_tokens,
            num_blocks=len(request.block_hashes) // HASH_BYTES,
            remaining=waiting.remaining,
            now=now,
            match=match,
            is_decode=request.yield_epoch > 0,
        )
        return self._policies_of(request.model).route.decide(arrival, candidates)

    def _load_view(self, backlog: BacklogView, model: str, now: float) -> LoadView:
        ready = self._fleet.ready(model).sums
        return LoadView(
            backlog=backlog,
            num_prefilling=ready.num_prefilling,
            num_decoding=ready.num_decoding,
            num_queued_tokens=backlog.num_tokens + ready.waiting_tokens,
            num_running=ready.load,
            now=now,
            ends=self._held.ends(model),
        )

    def _view(self, model: str) -> BacklogView:
        ready = self._fleet.ready(model).sums
        return BacklogView(
            num_requests=self._backlog.count(model),
            num_tokens=self._backlog.num_tokens(model),
            num_new_tokens=self._backlog.num_new_tokens(model),
            prefill_tokens_per_s=ready.prefill_tokens_per_s,
            decode_tokens_per_s=ready.decode_tokens_per_s,
        )

    # ---- workers ----

    def _add_worker(self, status: WorkerStatus, now: float) -> Worker:
        worker = Worker(status.worker, self._blocks.add(status.worker, status.worker_epoch), status, now)
        self._fleet.add(worker)
        return worker

    def _worker_gone(self, name: str) -> list[Action]:
        """Forget a worker's room and blocks.

        What was on its way there may have arrived, and may even run still: only the gateway can make sure that it
        does not run twice, by a higher epoch.
        """
        worker = self._fleet.remove(name)
        self._blocks.remove(name)
        self._held.worker_gone(name)
        if not self._fleet.count(worker.status.model):
            self._forget_model(worker.status.model)
        actions: list[Action] = []
        for flight in worker.in_flight.values():
            if self._cancelled.covers(*flight.key):
                actions.append(Dropped(flight.request, "cancelled"))
            else:
                actions.append(Lost(flight.request, Unavailable(f"worker {name} is gone")))
        return actions

    def _forget_model(self, model: str) -> None:
        """Its last worker is gone: of what was learnt, only lengths are of requests and not of workers."""
        self._backlog.forget(model)
        before = self._policies.pop(model, None)
        if before is not None and before.predict.accuracy.num_ended:
            self._policies[model] = self._maker.make(self.policy_names(model), before)

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
                worker = self._fleet.get(member.instance)
                if worker is not None and worker.epoch <= member.epoch:
                    actions += self._worker_gone(member.instance)
        return actions

    def _count_schedulers(self, now: float) -> list[Action]:
        self._fleet.num_schedulers = len(self.schedulers())
        for worker in self._fleet:
            self._fleet.refresh(worker)
        return self._pump_all(now)

    def _drop_gateway(self, gateway: str) -> list[Action]:
        """Nobody is left to read these streams."""
        for worker in self._fleet:
            for flight in worker.in_flight.values():
                if flight.request.gateway == gateway:
                    self._cancelled.remember(*flight.key)
        waiting = [waiting.request for waiting in self._backlog if waiting.request.gateway == gateway]
        return [Dropped(self._backlog.remove(request.request_id).request, "gateway gone") for request in waiting]


def _draining() -> Unavailable:
    return Unavailable("the scheduler is draining")
