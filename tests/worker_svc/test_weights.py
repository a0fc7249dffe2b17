"""Checkpoints that are whole, and every way in which one is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import make_checkpoint
from tests.support.steps import make_runner
from weft.errors import SettingsError
from worker_svc.models.loader import Asked
from worker_svc.weights import Checkpoint

EXPECTED = {"a.weight": (2, 3), "b.weight": (4,)}


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    """Tensors by name with `_` for dots."""
    save_file({name.replace("_", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def shard(folder: Path, where: dict[str, str]) -> None:
    """Split model.safetensors by `where` (name -> file), with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file in set(where.values()):
        save_file({name: weights[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def refusal(folder: Path, expected: dict[str, tuple[int, ...]] = EXPECTED) -> str:
    with pytest.raises(SettingsError) as refused, Checkpoint(folder) as checkpoint:
        checkpoint.check(Asked(expected, {}, set()))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_tensors_are_read_as_they_were_saved(tmp_path: Path) -> None:
    saved = torch.randn(2, 3).to(torch.bfloat16)
    with Checkpoint(write(tmp_path, a_weight=saved, b_weight=torch.zeros(4))) as checkpoint:
        checkpoint.check(Asked(EXPECTED, {}, set()))
        assert torch.equal(checkpoint.tensor("a.weight", (2, 3)), saved)


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    a, b = torch.randn(2, 3), torch.randn(4)
    shard(write(tmp_path, a_weight=a, b_weight=b), {"a.weight": "x-1.safetensors", "b.weight": "x-2.safetensors"})
    # Such as Mistral's own format beside Hugging Face's: the index does not name it.
    save_file({"c": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.check(Asked(EXPECTED, {}, set()))
        assert torch.equal(checkpoint.tensor("b.weight", (4,)), b)


def test_missing_unknown_and_wrong_tensors_are_named_in_one_sentence(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, a_weight=torch.zeros(3, 2), c_bias=torch.zeros(1)))
    assert "missing: b.weight" in message
    assert "unknown: c.bias" in message
    assert "a.weight is [3, 2] instead of [2, 3]" in message


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, a_weight=torch.zeros(2, 3))
    assert refusal(folder, EXPECTED | {f"m{i}": (1,) for i in range(9)}).endswith("b.weight, m0, m1, m2 and 6 more")


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, a_weight=torch.zeros(2, 3, dtype=torch.int8), b_weight=torch.zeros(4))
    assert "a.weight is of type I8" in refusal(folder)


def test_buffers_that_follow_from_the_config_are_ignored(tmp_path: Path) -> None:
    save_file(
        {
            "a.weight": torch.zeros(2, 3),
            "b.weight": torch.zeros(4),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
        },
        tmp_path / "model.safetensors",
    )
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.check(Asked(EXPECTED, {}, set()))


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "no weights" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"{}" + b"trailing",
        (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2,3],"data_',
        (62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,9999999]}}',
    ],
    ids=["empty", "lfs_pointer", "noise", "trailing_bytes", "cut_in_the_header", "offsets_beyond_the_file"],
)
def test_broken_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors is no intact safetensors file" in refusal(tmp_path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, a_weight=torch.zeros(2, 3), b_weight=torch.zeros(4)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "no intact safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", "cannot be read"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a.weight": 7}}', "7 is no name"),
        ('{"weight_map": {"a.weight": "../model.safetensors"}}', "'../model.safetensors' is no name"),
        ('{"weight_map": {"a.weight": "gone.safetensors"}}', "gone.safetensors is missing"),
        ('{"weight_map": {"z": "model.safetensors"}}', "lacks weights that the index says it has: z"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: str, named: str) -> None:
    write(tmp_path, a_weight=torch.zeros(2, 3), b_weight=torch.zeros(4))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert named in refusal(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    assert "a.weight is in more than one file" in refusal(tmp_path)


def test_runner_names_a_tensor_that_its_model_lacks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(SettingsError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.bias$"):
        make_runner(folder)


def test_runner_refuses_weights_of_another_family(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(SettingsError, match=r"unknown: model\.layers\.0\.self_attn\.k_norm\.weight"):
        make_runner(folder)


def test_lm_head_of_a_tied_model_is_ignored(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(128, 32)}, folder / "model.safetensors")
    make_runner(folder)
