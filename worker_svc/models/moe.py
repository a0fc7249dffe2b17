"""A mixture of experts (Shazeer et al. 2017): x + sum of weight * expert(norm(x)), and an MLP that all tokens share.

scores = softmax(W norm(x))                 in float32
experts = the k largest scores, in some models only of the groups of experts with the largest scores
weights = their scores, in some models divided by their sum
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker_svc.backends.backend import Backend, Experts, Linear, Routing
from worker_svc.models.builder import Builder
from worker_svc.models.loader import ExpertParts, Part
from worker_svc.models.mlp import GatedMlp, build_mlp
from worker_svc.models.spec import DenseMlp, Mixture


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer's."""

    backend: Backend
    router: Linear  # in float32
    routing: Routing
    experts: Experts
    shared: GatedMlp | None

    def add(self, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Returns: [T, E], `residual` with what the experts make of `normed` added."""
        expert_ids, weights = self.backend.route(self.router(normed.float()), self.routing)
        if self.shared is not None:
            residual = self.shared.add(normed, residual)
        return self.experts.add(normed, expert_ids, weights, residual)


def build_mixture(spec: Mixture, layer: str, builder: Builder) -> MixtureOfExperts:
    """`layer`: the name of the layer in the checkpoint."""
    block, hidden_size = f"{layer}.{spec.names.block}", builder.spec.hidden_size
    router = builder.reader.tensor(f"{block}.gate.weight", (spec.num_experts, hidden_size))
    shared = DenseMlp(spec.shared_size, spec.activation)
    parts = [_expert_parts(spec, f"{block}.experts.{i}", hidden_size) for i in range(spec.num_experts)]
    return MixtureOfExperts(
        backend=builder.backend,
        router=builder.backend.linear(router.float(), None),
        routing=spec.routing,
        experts=builder.reader.experts(parts, hidden_size, spec.activation),
        shared=build_mlp(shared, layer, f"{block}.shared_experts", builder) if spec.shared_size else None,
    )


def _expert_parts(spec: Mixture, name: str, hidden_size: int) -> ExpertParts:
    names = (spec.names.gate, spec.names.up)
    gate_up = [Part(f"{name}.{part}", spec.intermediate_size, is_shared=True) for part in names]
    return ExpertParts(gate_up, Part(f"{name}.{spec.names.down}", hidden_size))
