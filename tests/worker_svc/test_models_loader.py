"""How weights come to a model: slices of fused tensors, parts of several kinds, and floats where these are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from worker_svc import rope
from worker_svc.backends.torch_backend import TorchBackend
from worker_svc.models.loader import Asked, ExpertParts, Loader, Part, Recorder, Shape
from worker_svc.quantization import Reordered, StoredWeight, dequantize, quantize_int4, quantize_int8

BACKEND = TorchBackend(torch.device("cpu"), torch.float32)
HIDDEN, INNER = 8, 6


@dataclass
class Held:
    """A source of what is put into it."""

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def check(self, asked: Asked) -> None:
        pass

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        assert self.tensors[name].shape == shape
        return self.tensors[name]

    def weight(self, name: str, shape: Shape) -> StoredWeight:
        return self.weights[name]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_slices_of_a_fused_tensor_are_what_separate_tensors_are() -> None:
    weight, bias, x = torch.randn(20, HIDDEN), torch.randn(20), torch.randn(3, HIDDEN)
    fused = Held({"qkv": weight}, {"qkv.bias": bias})
    apart = Held(
        {"q": weight[:8], "k": weight[8:16], "v": weight[16:]},
        {"q.bias": bias[:8], "k.bias": bias[8:16], "v.bias": bias[16:]},
    )
    slices = [
        Part("qkv", 8, 4, 4, has_bias=True, num_tensor_rows=20),
        Part("qkv", 8, 4, 2, has_bias=True, first_row=8, num_tensor_rows=20),
        Part("qkv", 4, has_bias=True, first_row=16, num_tensor_rows=20),
    ]
    wholes = [Part("q", 8, 4, 4, has_bias=True), Part("k", 8, 4, 2, has_bias=True), Part("v", 4, has_bias=True)]
    expected = Loader(apart, BACKEND).linear(wholes, HIDDEN)(x)
    torch.testing.assert_close(Loader(fused, BACKEND).linear(slices, HIDDEN)(x), expected)
    order = rope.interleaved_order(2, 4, 4)
    torch.testing.assert_close(expected[:, :8], (x @ weight[:8].T + bias[:8])[:, order])


def test_a_fused_tensor_is_asked_for_once_and_whole() -> None:
    recorder = Recorder(BACKEND)
    slices = [Part("gate_up", 6, has_bias=True, first_row=row, num_tensor_rows=12) for row in (0, 6)]
    recorder.linear(slices, HIDDEN)
    assert recorder.asked.by_tensor() == {"gate_up.weight": (12, HIDDEN), "gate_up.bias": (12,)}


def test_a_part_without_bias_beside_one_that_has_some_adds_nothing() -> None:
    held = Held({"a": torch.randn(3, HIDDEN), "b": torch.randn(2, HIDDEN)}, {"b.bias": torch.tensor([5.0, 7.0])})
    linear = Loader(held, BACKEND).linear([Part("a", 3), Part("b", 2, has_bias=True)], HIDDEN)
    torch.testing.assert_close(linear(torch.zeros(1, HIDDEN)), torch.tensor([[0.0, 0.0, 0.0, 5.0, 7.0]]))


def test_a_matrix_is_in_float_whatever_the_checkpoint_has() -> None:
    weight = torch.randn(5, HIDDEN)
    packed, order = quantize_int8(weight), torch.randperm(HIDDEN)
    stored: dict[str, StoredWeight] = {"a": weight, "b": packed, "c": Reordered(packed, order)}
    loader = Loader(Held(stored), BACKEND)
    found = {name: loader.matrix(name, (5, HIDDEN)) for name in stored}
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], dequantize(packed))
    # Column j of what is stored is for channel order[j].
    assert torch.equal(found["c"][:, order], dequantize(packed))


@pytest.mark.parametrize("kind", ["float", "int8", "of two kinds", "reordered"])
def test_experts_compute_what_is_stored_whatever_its_kind(kind: str) -> None:
    gate, up, down = torch.randn(INNER, HIDDEN), torch.randn(INNER, HIDDEN), torch.randn(HIDDEN, INNER)
    weights: dict[str, StoredWeight] = {"gate": gate, "up": up, "down": down}
    if kind == "int8":
        weights = {name: quantize_int8(weight) for name, weight in (("gate", gate), ("up", up), ("down", down))}
    if kind == "of two kinds":
        weights = {"gate": quantize_int8(gate), "up": quantize_int4(up), "down": down}
    if kind == "reordered":
        order = torch.randperm(HIDDEN)
        weights |= {"gate": Reordered(quantize_int8(gate[:, order]), order), "up": up}
    parts = ExpertParts([Part("gate", INNER), Part("up", INNER)], Part("down", HIDDEN))
    experts = Loader(Held(weights), BACKEND).experts([parts], HIDDEN, "silu")
    x = torch.randn(3, HIDDEN)
    found = experts.add(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.zeros(3, HIDDEN))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    # 4 bits are off by up to a thirtieth of a row's range.
    tolerance = {"float": 1e-4, "int8": 0.5, "of two kinds": 3.0, "reordered": 0.5}[kind]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
