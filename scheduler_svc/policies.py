"""The policies of one model by their names, and how they are made. Pure.

A name is what settings, presets and `weft policy` say; names that are switched while running make new policies, which
know nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final

from scheduler_svc.cost_model import CostModel, Transfer
from scheduler_svc.policy.admit import ADMITS, AdmitContext, AdmitPolicy, Objectives
from scheduler_svc.policy.order import ORDERS, Fair, OrderPolicy
from scheduler_svc.policy.predict import PREDICTORS, PredictPolicy
from scheduler_svc.policy.route import ROUTES, Chance, Heatmap, RouteContext, RoutePolicy
from weft.errors import InvalidRequest
from weft.hashing import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class PolicyNames:
    """One name of each family."""

    admit: str = "predicted_reject"
    order: str = "fcfs"
    route: str = "least_prefill"
    predict: str = "bucket"

    def with_changes(self, changes: Mapping[str, str]) -> PolicyNames:
        """Some names changed.

        Raises:
            InvalidRequest: there is no such family, or no such name in it.
        """
        for family, name in changes.items():
            if family not in CHOICES:
                known = ", ".join(CHOICES)
                raise InvalidRequest(f"no policy family {family!r} of schedulers; there are {known}", param="policies")
            if name not in CHOICES[family]:
                known = ", ".join(CHOICES[family])
                raise InvalidRequest(f"no {family} policy {name!r}; there are {known}", param="policies")
        return replace(self, **dict(changes))


CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "admit": tuple(ADMITS),
    "order": tuple(ORDERS),
    "route": tuple(ROUTES),
    "predict": tuple(PREDICTORS),
}
assert set(CHOICES) == {field.name for field in fields(PolicyNames)}


@dataclass(slots=True)
class Policies:
    """Those of one model."""

    names: PolicyNames
    admit: AdmitPolicy
    route: RoutePolicy
    predict: PredictPolicy
    cost: CostModel
    transfer: Transfer
    is_calibrated: bool

    @property
    def order_uses_prefix(self) -> bool:
        """Whether the order asks how much of a prompt is cached."""
        return self.names.order in ("prefix_first", "srpt")


@dataclass(frozen=True, slots=True)
class PolicyMaker:
    """What policies are made of, but for their names."""

    chance: Chance  # a `random.Random`
    max_queued_requests: int = 2048
    max_queued_tokens: int = 4_000_000
    cost: CostModel | None = None  # as calibrated; None for what workers measure
    objectives: Mapping[str, Objectives] = field(default_factory=dict)  # by SLO class
    weights: Mapping[str, float] = field(default_factory=dict)  # by tenant
    block_transfer_s: float | None = None  # as given; None for what workers measure
    heatmap: Heatmap = field(default_factory=dict)
    split_override: float = 1.5  # load at which `pd_heatmap` splits no more, of that of workers that do both
    block_size: int = BLOCK_SIZE  # tokens of a block that workers tell of
    make_predictor: Callable[[], PredictPolicy] | None = None  # instead of the name's: a simulator knows the future

    def make(self, names: PolicyNames, before: Policies | None = None) -> Policies:
        """Policies of these names. Of those before, the predictor is kept if its name is the same: it has learnt."""
        is_calibrated = self.cost is not None
        cost = self.cost or CostModel()
        if before is not None and before.names.predict == names.predict:
            predict = before.predict
        else:
            predict = (self.make_predictor or PREDICTORS[names.predict])()
        bounds = self.max_queued_requests, self.max_queued_tokens
        admit = ADMITS[names.admit](AdmitContext(*bounds, cost, self.objectives, is_calibrated))
        transfer = Transfer(self.block_transfer_s)
        context = RouteContext(self.chance, cost, transfer, self.heatmap, self.block_size, self.split_override)
        return Policies(names, admit, ROUTES[names.route](context), predict, cost, transfer, is_calibrated)

    def order(self, names: PolicyNames) -> OrderPolicy:
        """An empty queue."""
        return Fair(self.weights) if names.order == "fair" else ORDERS[names.order]()
