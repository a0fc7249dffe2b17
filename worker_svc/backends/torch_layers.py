"""Linear layers and norms, as fast as plain torch has them on the device at hand."""

from __future__ import annotations

import math
import warnings
from typing import Any, Final

import torch
import torch.nn.functional as F

from worker_svc.backends.backend import Linear
from worker_svc.quantization import Int8Weight, Weight, as_int8, dequantize

# oneDNN's kernels for AVX-512 take 1.25 times as long for one row as for four, since four have more reads of weights
# under way (weights of 768x768 to 32000x768, AMD EPYC, 2026). Those for AVX2 do not.
PADDED_ROWS: Final = 4
# A weight in the second-level cache is not waited for.
MIN_PADDED_BYTES: Final = 2**20


def make_linear(weight: Weight, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> Linear:
    """The best kind that torch has for device and type.

    All quantized weights are computed as int8. Torch's own product with int4 took 0.85, 1.6, 10 and 29 ms for 1, 4, 16
    and 64 rows, one in int8 1.3, 0.9, 2.1 and 6.3 ms, one in bfloat16, which holds fp8 exactly, 2.6, 2.2, 3.6 and 11 ms
    (4096x4096, one thread, AMD EPYC with AVX-512 VNNI, 2026). What that costs, `lab.perplexity` shows: hardly anything.

    Args:
        weight: [out, in], on the device it will run on.
        bias: [out].
        dtype: what quantized weights become where there is no int8.
    """
    if not isinstance(weight, torch.Tensor):
        if can_multiply_int8(weight.values.device):
            return Int8Linear(as_int8(weight), bias)
        weight = dequantize(weight).to(dtype)
    return PackedLinear(weight, bias) if can_pack(weight) else PlainLinear(weight, bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can hold this weight in its own layout."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def can_multiply_int8(device: torch.device) -> bool:
    """Whether fbgemm is there."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """As `Backend.embed`."""
    rows = F.embedding(token_ids, table)
    return rows if scale == 1.0 else rows * scale


class PlainLinear:
    """`F.linear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias).add_(residual)


class PackedLinear:
    """A weight that oneDNN reordered once, 1.6 to 1.9 times as fast as `F.linear`.

    All linears of the 6M-parameter demo, one after the other: 1.7 against 2.8 ms for one row, 3.1 against 5.9 ms for 16
    (one thread, AMD EPYC with AVX2, torch 2.13).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_add = torch.ops.mkldnn._linear_pointwise.binary
        is_padded = weight.nbytes > MIN_PADDED_BYTES and torch.backends.cpu.get_cpu_capability() == "AVX512"
        self._min_rows = PADDED_ROWS if is_padded else 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = len(x)
        if num_rows < self._min_rows:
            return self._apply(_pad_rows(x, self._min_rows)).narrow(0, 0, num_rows)
        return self._apply(x)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if len(x) < self._min_rows:
            return self(x).add_(residual)
        y: torch.Tensor = self._linear_add(x, residual, self._weight, self._bias, "add")
        return y

    def _apply(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._linear(x, self._weight, self._bias, "none", [], "")
        return y


def _pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows that do not matter below those of x."""
    return x.expand(num_rows, -1) if len(x) == 1 else F.pad(x, (0, 0, 0, num_rows - len(x)))


class Int8Linear:
    """Weights and inputs in int8, sums in int32: a quarter of the bytes to read, and four products an instruction.

    Every row of x gets a scale of its own, so that none depends on what else is in the step; with one scale for all,
    as torch's dynamic linear has it, rows were off by 1.2 to 2 times as much. A step of a 125M-parameter Llama with one
    row took 7.4 ms, with 16 rows 24 ms, in float32 15 and 35 ms (two threads, AMD EPYC with AVX-512 VNNI, 2026).
    oneDNN's int8 took 9.3 and 24 ms, but 0.85 times as long for 256 rows. Torch's dynamic linear took 7.0 and 23 ms.
    """

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        self._weight = _pack_int8(weight)
        self._bias = bias
        # Without VNNI products are added up in pairs in 16 bits, which two of 8 by 8 bits overflow.
        self._limit = 127 if torch.cpu._is_vnni_supported() else 63
        self._linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        products, largest = self._multiply(x)
        return products.mul_(largest) if self._bias is None else torch.addcmul(self._bias, products, largest)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        products, largest = self._multiply(x)
        return residual.addcmul_(products, largest) if self._bias is None else residual.add_(self(x))

    def _multiply(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x W^T / largest, and the largest value of each row of x: [T, 1]."""
        # `abs` and `amax` took 7 us for [16, 2048] where one norm took 88. A row of zeros comes out times zero.
        largest = x.abs().amax(-1, keepdim=True)
        products = self._linear((x / largest).float(), 1 / self._limit, self._limit + 1, self._weight)
        return products.to(x.dtype), largest


def _pack_int8(weight: Int8Weight) -> Any:
    """The weight in fbgemm's own layout."""
    scales = weight.scales[:, 0].double()
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            # Tensors of quantized types will be gone from some later torch. Only the way into fbgemm is through one.
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(weight.values, scales, zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine


class RmsNorm:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019).

    In float32 as weight' * x / hypot(|x|, sqrt(n eps)) with weight' = weight * sqrt(n): 4 kernels instead of the 6 of
    `F.rms_norm`, 5 against 10 us a call for [1, 256] (AMD EPYC, 2026).
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """`weight`: [..., n]; leading dimensions broadcast against those of x."""
        size = weight.shape[-1]
        self._weight = weight
        self._scaled_weight = weight * math.sqrt(size)
        self._floor = torch.tensor(math.sqrt(size * eps), dtype=weight.dtype, device=weight.device)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return F.rms_norm(x, x.shape[-1:], None, self._eps).mul_(self._weight)
        return x.div(self._root(x)).mul_(self._scaled_weight)

    def norm_(self, x: torch.Tensor) -> None:
        """The same in place."""
        if x.dtype != torch.float32:
            x.copy_(F.rms_norm(x, x.shape[-1:], None, self._eps)).mul_(self._weight)
            return
        x.div_(self._root(x)).mul_(self._scaled_weight)

    def _root(self, x: torch.Tensor) -> torch.Tensor:
        length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return length.hypot_(self._floor)
