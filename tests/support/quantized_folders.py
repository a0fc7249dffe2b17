"""Quantized checkpoints, written field by field as their formats say, beside the floats that they mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import make_checkpoint
from weft import model_folder
from weft.errors import SettingsError
from weft.settings import ModelSettings
from worker_svc.backends.torch_backend import TorchBackend
from worker_svc.models import read_spec
from worker_svc.models.decoder import asked_by
from worker_svc.models.loader import Asked
from worker_svc.quantization import StoredWeight, in_float
from worker_svc.source import open_source

# The tensors of a linear by what follows its name, and the weight that they mean.
Encoded = tuple[dict[str, torch.Tensor], torch.Tensor]
Encoder = Callable[[int, int], Encoded]

AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def write_quantized(folder: Path, config: dict[str, Any], encode: Encoder, **overrides: Any) -> Path:
    """A tiny Llama whose layers' linears are encoded, with folder/"floats" beside it that holds what they mean."""
    make_checkpoint(folder, quantization_config=config, **overrides)
    tensors = load_file(folder / "model.safetensors")
    floats = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        encoded, meant = encode(*tensors.pop(name).shape)
        floats[name] = meant
        tensors |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in encoded.items()}
    save_file(tensors, folder / "model.safetensors")
    make_checkpoint(folder / "floats", **overrides)
    save_file(floats, folder / "floats/model.safetensors")
    return folder


def read_weights(folder: Path) -> dict[str, StoredWeight]:
    """What a worker reads of the linears of all layers, by name without ".weight", once it has checked the folder."""
    settings = model_folder.read(ModelSettings(model=str(folder)))
    backend = TorchBackend(torch.device("cpu"), torch.float32)
    asked: Asked = asked_by(read_spec(settings), backend)
    with open_source(settings, backend, "none", lambda share: None) as source:
        source.check(asked)
        return {name: source.weight(name, shape) for name, shape in asked.linears.items()}


def assert_means_its_floats(folder: Path) -> None:
    """To the last bit: few bits times a scale of 11 or fewer is exact in float32."""
    meant = load_file(folder / "floats/model.safetensors")
    for name, weight in read_weights(folder).items():
        assert torch.equal(in_float(weight), meant[f"{name}.weight"]), name


def refusal(folder: Path) -> str:
    """The sentence with which a worker refuses the folder before it computes anything."""
    with pytest.raises(SettingsError) as refused:
        read_weights(folder)
    assert "\n" not in str(refused.value)
    assert folder.name in str(refused.value)
    return str(refused.value)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **keys: Any) -> None:
    """Change the quantization_config of a folder; None takes a key away."""
    config = json.loads((folder / "config.json").read_text())
    wanted = config["quantization_config"] | keys
    config["quantization_config"] = {key: value for key, value in wanted.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def encode_gptq(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 16,
    less: int = 1,
    groups: Sequence[int] | None = None,
) -> Encoded:
    """`less`: what is taken off each zero before it is stored; `groups`: the group of each column."""
    num_groups = columns // group_size
    groups = groups or [column // group_size for column in range(columns)]
    values = torch.randint(0, 2**bits, (rows, columns)).tolist()
    zeros = torch.full((rows, num_groups), 128).tolist() if bits == 8 else _zeros(rows, num_groups)
    scales = _scales(rows, num_groups)
    stored_zeros = [[(zero - less) % 2**bits for zero in column] for column in zip(*zeros, strict=True)]
    tensors = {
        "qweight": pack(values, bits).t().contiguous(),
        "qzeros": pack(stored_zeros, bits),
        "scales": scales.t().contiguous(),
        "g_idx": torch.tensor(groups, dtype=torch.int32),
    }
    return tensors, _meant(values, zeros, scales, groups)


def encode_awq(rows: int, columns: int, *, group_size: int = 16) -> Encoded:
    num_groups = columns // group_size
    values = torch.randint(0, 16, (rows, columns)).tolist()
    zeros, scales = _zeros(rows, num_groups), _scales(rows, num_groups)
    tensors = {
        "qweight": pack([list(column) for column in zip(*values, strict=True)], 4, AWQ_ORDER),
        "qzeros": pack([list(column) for column in zip(*zeros, strict=True)], 4, AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    return tensors, _meant(values, zeros, scales, [column // group_size for column in range(columns)])


def encode_packed(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 16,
    is_symmetric: bool = True,
    groups: Sequence[int] | None = None,
) -> Encoded:
    """compressed-tensors, pack-quantized."""
    num_groups, half = columns // group_size, 2 ** (bits - 1)
    in_order = [column // group_size for column in range(columns)]
    values = torch.randint(-half, half, (rows, columns)).tolist()
    zeros = (
        [[0] * num_groups] * rows
        if is_symmetric
        else [[zero - half for zero in row] for row in _zeros(rows, num_groups)]
    )
    scales = _scales(rows, num_groups).to(torch.bfloat16)
    tensors = {
        "weight_packed": pack([[value + half for value in row] for row in values], bits),
        "weight_shape": torch.tensor([rows, columns]),
        "weight_scale": scales,
    }
    if not is_symmetric:
        by_group = [[zero + half for zero in column] for column in zip(*zeros, strict=True)]
        tensors["weight_zero_point"] = pack(by_group, bits).t().contiguous()
    if groups is not None:
        tensors["weight_g_idx"] = torch.tensor(groups, dtype=torch.int32)
    return tensors, _meant(values, zeros, scales, groups or in_order)


def encode_int8(rows: int, columns: int, *, num_scales: int | None = None) -> Encoded:
    """compressed-tensors, int-quantized. `num_scales`: 1, or else one a row."""
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scales = _scales(num_scales or rows, 1).to(torch.bfloat16) / 16
    return {"weight": values, "weight_scale": scales.flatten() if num_scales else scales}, values * scales.float()


def encode_fp8(rows: int, columns: int, *, scale: str = "weight_scale", num_scales: int | None = None) -> Encoded:
    """`num_scales`: 1, or else one a row."""
    values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = _scales(num_scales or rows, 1).float()
    return {"weight": values, scale: scales.reshape(()) if num_scales else scales}, values.float() * scales


def encode_fp8_blocks(rows: int, columns: int, *, scale: str = "weight_scale_inv", block: int = 20) -> Encoded:
    """Blocks that divide neither rows nor columns."""
    values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block), -(-columns // block)) + 0.1
    meant = values.float()
    for row in range(rows):
        for column in range(columns):
            meant[row, column] *= scales[row // block, column // block]
    return {"weight": values, scale: scales}, meant


def pack(rows: Sequence[Sequence[int]], bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Fields side by side into words: [n, fields] -> [n, fields * bits / 32] int32. `order`: of a word's fields."""
    per_word = 32 // bits
    order = order or range(per_word)
    packed = []
    for row in rows:
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for place, offset in enumerate(order):
                if start + offset < len(row):
                    word |= row[start + offset] << bits * place
            words.append(word - 2**32 if word >= 2**31 else word)
        packed.append(words)
    return torch.tensor(packed, dtype=torch.int32)


def scattered_groups(columns: int, group_size: int, seed: int) -> list[int]:
    """Groups of equal size whose members lie anywhere."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [0] * columns
    for place, column in enumerate(order):
        groups[column] = place // group_size
    return groups


def _zeros(rows: int, num_groups: int) -> list[list[int]]:
    zeros: list[list[int]] = torch.randint(0, 16, (rows, num_groups)).tolist()
    return zeros


def _scales(rows: int, num_groups: int) -> torch.Tensor:
    return (0.02 + 0.1 * torch.rand(rows, num_groups)).half()


def _meant(
    values: Sequence[Sequence[int]], zeros: Sequence[Sequence[int]], scales: torch.Tensor, groups: Sequence[int]
) -> torch.Tensor:
    meant = [
        [(value - zero_row[group]) * scale_row[group] for value, group in zip(row, groups, strict=True)]
        for row, zero_row, scale_row in zip(values, zeros, scales.tolist(), strict=True)
    ]
    return torch.tensor(meant)
