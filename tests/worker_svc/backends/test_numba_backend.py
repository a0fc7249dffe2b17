"""The CPU's backend computes what torch's does, and is taken where it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.steps import make_runner
from weft.errors import SettingsError
from weft.hashing import BLOCK_SIZE
from worker_svc.backends.backend import AttentionKind, Batch, HeadShape
from worker_svc.backends.numba_backend import NumbaBackend
from worker_svc.backends.torch_backend import TorchBackend
from worker_svc.cpu_kernels.tiled_linear import TiledLinear
from worker_svc.loaded_model import make_backend
from worker_svc.rope import Rope
from worker_svc.step_input import StepInput

CPU = torch.device("cpu")
OURS, TORCH = NumbaBackend(CPU, torch.float32), TorchBackend(CPU, torch.float32)
SHAPE = HeadShape(num_heads=6, num_kv_heads=2, head_dim=16, rotary_dim=8)
KINDS = (AttentionKind(0.3), AttentionKind(0.3, window=7), AttentionKind(0.5, soft_cap=2.0))
# Tokens in the step and in all: a decode, drafts, more than our kernel takes, a prefill.
LENGTHS = [(1, 1), (1, 40), (3, 20), (4, 4), (5, 33), (17, 17), (30, 90)]


@pytest.fixture(autouse=True)
def poisoned(poison: None) -> None:
    torch.manual_seed(torch.seed() % 2**31)
    print(f"seed {torch.initial_seed()}")  # noqa: T201


def make_step(lengths: list[tuple[int, int]]) -> StepInput:
    blocks = iter(torch.randperm(60).tolist())
    tables = [[next(blocks) for _ in range(-(-total // BLOCK_SIZE))] for _, total in lengths]
    positions = [p for count, total in lengths for p in range(total - count, total)]
    owners = [i for i, (count, _) in enumerate(lengths) for _ in range(count)]
    slots = [tables[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for i, p in zip(owners, positions, strict=True)]
    counts, totals = (list(column) for column in zip(*lengths, strict=True))
    return StepInput([7] * len(slots), positions, slots, counts, totals, tables, list(range(len(slots))))


def batches(step: StepInput, kinds: tuple[AttentionKind, ...]) -> tuple[Batch, Batch]:
    ours, torchs = (backend.make_batch(step, kinds, 1, None) for backend in (OURS, TORCH))
    assert ours.slots.equal(torchs.slots) and ours.positions.equal(torchs.positions)
    return ours, torchs


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:4], LENGTHS[4:], LENGTHS[::-1]], ids=len)
def test_steps_of_decodes_and_chunks_attend_as_in_torch(kind: AttentionKind, lengths: list[tuple[int, int]]) -> None:
    ours, torchs = batches(make_step(lengths), (kind,))
    q, kv = torch.randn(len(ours.slots), 6, 16), torch.randn(4, 60 * BLOCK_SIZE, 16)
    found, expected = OURS.attend(q, kv, kind, ours), TORCH.attend(q, kv, kind, torchs)
    # Weighted means of values of about one, in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_several_kinds_share_a_step() -> None:
    kinds = (KINDS[0], KINDS[1])
    ours, torchs = batches(make_step(LENGTHS), kinds)
    q, kv = torch.randn(len(ours.slots), 6, 16), torch.randn(4, 60 * BLOCK_SIZE, 16)
    for kind in kinds:
        expected = TORCH.attend(q, kv, kind, torchs)
        torch.testing.assert_close(OURS.attend(q, kv, kind, ours), expected, rtol=1e-5, atol=1e-5)


def test_attention_of_latents_is_that_of_torch() -> None:
    kind = AttentionKind(0.3, value_dim=12)
    ours, torchs = batches(make_step(LENGTHS), (kind,))
    q, kv = torch.randn(len(ours.slots), 6, 16), torch.randn(1, 60 * BLOCK_SIZE, 16)
    assert OURS.attend(q, kv, kind, ours).equal(TORCH.attend(q, kv, kind, torchs))


@pytest.mark.parametrize("has_norm", [False, True])
def test_heads_are_normed_rotated_and_written_as_in_torch(has_norm: bool) -> None:
    ours, torchs = batches(make_step(LENGTHS), KINDS[:1])
    qkv, caches = torch.randn(len(ours.slots), 10 * 16), [torch.zeros(4, 60 * BLOCK_SIZE, 16) for _ in range(2)]
    weights, frequencies = (torch.randn(16), torch.randn(16)), OURS.frequencies(Rope(100.0), 8)
    found = []
    for backend, batch, kv in zip((OURS, TORCH), (ours, torchs), caches, strict=True):
        norm = backend.qk_norm(*weights, SHAPE, 1e-6) if has_norm else None
        turns = backend.turns(batch.positions, frequencies, 1.2)
        found.append(backend.rotate_and_write(qkv.clone(), SHAPE, norm, turns, kv, batch))
    # Products of a few numbers of about one.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[0], caches[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [8, 10, 11])
def test_linears_of_any_number_of_channels_are_those_of_torch(size: int) -> None:
    weight, bias, x = torch.randn(5, size), torch.randn(5), torch.randn(3, size)
    linear = OURS.linear(weight, bias)
    assert isinstance(linear, TiledLinear) == (size % 4 == 0)
    torch.testing.assert_close(linear(x), TORCH.linear(weight, bias)(x), rtol=1e-5, atol=1e-5)


def test_norms_embeddings_and_gates_are_those_of_torch() -> None:
    x, weight, token_ids = torch.randn(7, 30), torch.randn(30), torch.randint(7, (9,))
    for name, arguments in {"embed": (token_ids, x, 3.0), "gate": (x, "silu")}.items():
        found, expected = (getattr(backend, name)(*arguments) for backend in (OURS, TORCH))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(OURS.norm(weight, 1e-6)(x), TORCH.norm(weight, 1e-6)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_refused_by_name_and_left_to_torch(dtype: torch.dtype) -> None:
    with pytest.raises(SettingsError, match="kernels: numba computes in float32"):
        make_backend("numba", CPU, dtype)
    assert type(make_backend("auto", CPU, dtype)) is TorchBackend


def test_model_in_bfloat16_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    with pytest.raises(SettingsError, match="kernels: numba computes in float32"):
        make_runner(folder, kernels="numba", dtype="bfloat16")
    make_runner(folder, dtype="bfloat16")


def test_gpu_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="kernels: numba computes in float32 on a CPU"):
        make_backend("numba", torch.device("cuda"), torch.float32)


def test_machine_without_openmp_is_refused_by_name_and_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_backend("auto", CPU, torch.float32)) is NumbaBackend
    monkeypatch.setattr("worker_svc.loaded_model.IS_AVAILABLE", False)
    with pytest.raises(SettingsError, match="kernels: numba needs a torch that computes with OpenMP"):
        make_backend("numba", CPU, torch.float32)
    assert type(make_backend("auto", CPU, torch.float32)) is TorchBackend
