"""Models on our kernels, in the interpreter, against the same models in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.steps import Driver, make_runner
from worker_svc.backends.triton_backend import TritonBackend
from worker_svc.kernels.matmul_fp8 import quantize_fp8
from worker_svc.quantization import QUANTIZERS, dequantize

LENS = (1, 18)
SEQUENCES = [[(7 * i + 3 * j) % 128 for j in range(length)] for i, length in enumerate(LENS)]


# Sigmoids and soft caps saturate by way of an infinite exponential, which is silent on a device.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "deepseek_v2", "gemma3_text", "mixtral"])
def test_kernels_compute_what_torch_does(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family, head_dim=16, num_hidden_layers=1, sliding_window=7)
    # Prefill chunks beside a whole prompt, then decodes alone.
    schedule: list[dict[int, int]] = [{1: 15}, {0: 1, 1: 2}, {1: 1}]
    expected = Driver(make_runner(folder), SEQUENCES).play(schedule)
    found = Driver(make_runner(folder, kernels="triton"), SEQUENCES).play(schedule)
    for one, other in zip(expected, found, strict=True):
        # Float32 in another order, at logits of magnitude 10.
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
    driver = Driver(make_runner(folder, kernels="triton"), SEQUENCES)
    for counts in schedule:
        ends = driver.step_to_ends(counts)
        wanted = torch.stack([expected[i][driver.num_computed[i] - 1] for i in counts])
        torch.testing.assert_close(ends, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("count", [3, 20], ids=["few rows", "many rows"])
def test_quantized_linears_compute_what_their_weights_say(quantize: str, count: int) -> None:
    weight = QUANTIZERS[quantize](torch.randn(24, 128) / 8)
    x, residual, bias = torch.randn(count, 128), torch.randn(count, 24), torch.randn(24)
    linear = TritonBackend(torch.device("cpu"), torch.float32).linear(weight, bias)
    values, scales = quantize_fp8(x)
    expected = (values.float() * scales[:, None] if quantize == "fp8" else x) @ dequantize(weight).T + bias
    # int4 rounds its scales to 20 bits.
    tolerance = {"int8": 1e-4, "int4": 1e-3, "fp8": 1e-4}[quantize]
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(linear.add(x, residual.clone()), expected + residual, rtol=0, atol=tolerance)
