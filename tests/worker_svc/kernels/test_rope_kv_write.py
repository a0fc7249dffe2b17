from dataclasses import dataclass, replace

import pytest
import torch

from worker_svc import rope
from worker_svc.kernels.rope_kv_write import HeadNorms, rope_kv_write, rope_kv_write_reference
from worker_svc.kernels.tuning import Config

pytestmark = pytest.mark.usefixtures("poison", "device_rounding")

BLOCK_SIZE = 16
NUM_SLOTS = 3 * BLOCK_SIZE
# Products and sums are fused in another way, which may move a rounding by one place of the type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True, params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16

    def turns(self, positions: torch.Tensor) -> torch.Tensor:
        frequencies = rope.frequencies(rope.Rope(1e4), self.rotary_dim)
        return torch.view_as_real(rope.turns(positions, frequencies))[:, 0]

    def qkv(self, num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(num_tokens, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim).to(dtype)

    def cache(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What nobody owns is not a number, where the type has that."""
        fill = 77.0 if dtype == torch.int8 else torch.nan
        return torch.full((2 * self.num_kv_heads, NUM_SLOTS, self.head_dim), fill).to(dtype)

    def scales(self) -> torch.Tensor:
        return torch.full((2 * self.num_kv_heads, NUM_SLOTS), torch.nan)

    def norms(self, dtype: torch.dtype) -> HeadNorms:
        return HeadNorms(torch.randn(self.head_dim).to(dtype), torch.randn(self.head_dim).to(dtype), 1e-5)


SHAPES = {
    "even": Shape(),
    "one head": Shape(1, 1, 2, 2),
    "partial": Shape(rotary_dim=6),
    "96 of Phi-3": Shape(3, 1, 96, 96),
    "padded and partial": Shape(5, 1, 20, 10),
}


def assert_near(out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_is_rotated_and_k_and_v_are_written(shape: Shape, dtype: torch.dtype, normed: bool) -> None:
    qkv, kv = shape.qkv(7, dtype), shape.cache(dtype)
    turns, slots = shape.turns(torch.randint(1000, (7,))), torch.randperm(NUM_SLOTS)[:7]
    norms = shape.norms(dtype) if normed else None
    expected_qkv, expected_kv = qkv.clone(), kv.clone()
    expected = rope_kv_write_reference(expected_qkv, turns, slots, expected_kv, norms=norms)
    q = rope_kv_write(qkv, turns, slots, kv, norms=norms, config=Config({"BLOCK": 256}, num_warps=1))
    assert_near(q, expected, TOLERANCE[dtype])
    assert_near(qkv, expected_qkv, TOLERANCE[dtype])
    assert_near(kv, expected_kv, TOLERANCE[dtype])
    assert int(kv[0, :, 0].isfinite().sum()) == 7


def test_reference_rotates_as_the_models_do() -> None:
    shape, positions = Shape(rotary_dim=16), torch.tensor([0, 1, 131071])
    qkv = shape.qkv(3)
    expected = qkv.view(3, -1, 16)[:, :4].clone()
    rope.rotate_(expected, rope.turns(positions, rope.frequencies(rope.Rope(1e4), 16)))
    q = rope_kv_write_reference(qkv, shape.turns(positions), torch.arange(3), shape.cache())
    torch.testing.assert_close(q, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_cache_holds_what_the_reference_writes(dtype: torch.dtype, source: torch.dtype) -> None:
    shape = Shape(3, 2, 24, 12)
    qkv, kv, scales, slots = shape.qkv(5, source), shape.cache(dtype), shape.scales(), torch.randperm(NUM_SLOTS)[:5]
    turns, norms = shape.turns(torch.arange(5)), shape.norms(source)
    expected_kv, expected_scales = kv.clone(), scales.clone()
    rope_kv_write_reference(qkv.clone(), turns, slots, expected_kv, expected_scales, norms)
    rope_kv_write(qkv, turns, slots, kv, scales, norms)
    assert_near(scales, expected_scales, 2e-6)
    # A rounding may go the other way: by one, or by the distance of two float8 values.
    assert_near(kv, expected_kv, 1.01 if dtype == torch.int8 else 2**-3)
    assert (kv[:, slots].float() == expected_kv[:, slots].float()).float().mean() > 0.97


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2**-4)], ids=str)
def test_quantized_values_times_scale_are_the_values(dtype: torch.dtype, error: float) -> None:
    shape, slots = Shape(head_dim=32), torch.arange(4)
    qkv, kv, scales, plain = shape.qkv(4), shape.cache(dtype), shape.scales(), shape.cache()
    turns = shape.turns(torch.arange(4))
    rope_kv_write(qkv.clone(), turns, slots, plain)
    rope_kv_write(qkv, turns, slots, kv, scales)
    restored = kv[:, slots].float() * scales[:, slots, None]
    largest = plain[:, slots].abs().amax(-1, keepdim=True)
    # Half a step of int8, or half the distance of two float8 values.
    assert ((restored - plain[:, slots]).abs() <= error * largest * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_head_of_zeros_is_written_as_zeros(dtype: torch.dtype) -> None:
    shape = Shape()
    qkv, kv, scales = shape.qkv(1).zero_(), shape.cache(dtype), shape.scales()
    rope_kv_write(qkv, shape.turns(torch.tensor([3])), torch.tensor([5]), kv, scales)
    assert (kv[:, 5].float() == 0).all() and scales[:, 5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_padding_writes_nothing(dtype: torch.dtype) -> None:
    shape, slots = Shape(), torch.tensor([-1, 9, -1])
    qkv, kv = shape.qkv(3), shape.cache(dtype)
    scales = shape.scales() if dtype == torch.int8 else None
    before_qkv, before_kv = qkv.clone(), kv.clone()
    rope_kv_write(qkv, shape.turns(torch.tensor([5, 6, 7])), slots, kv, scales)
    others = torch.arange(NUM_SLOTS) != 9
    assert torch.equal(qkv[[0, 2]], before_qkv[[0, 2]])
    assert torch.equal(kv[:, others].nan_to_num(), before_kv[:, others].nan_to_num())
    assert scales is None or scales[:, others].isnan().all()


def test_strided_rows_and_heads_are_used_where_they_are() -> None:
    shape = Shape()
    wide, layers = torch.full((3, 200), torch.nan), torch.full((2 * 2, 4, NUM_SLOTS, 16), torch.nan)
    qkv, kv = wide[:, 8:136], layers[:, 1]
    qkv.normal_()
    turns, slots, expected_kv = shape.turns(torch.arange(3)), torch.tensor([40, 3, 17]), kv.clone()
    expected = rope_kv_write_reference(qkv.clone(), turns, slots, expected_kv)
    q = rope_kv_write(qkv, turns, slots, kv)
    assert_near(q, expected, 2e-6)
    assert_near(kv, expected_kv, 2e-6)
    assert q.data_ptr() == qkv.data_ptr()
    assert layers[:, [0, 2, 3]].isnan().all() and wide[:, 136:].isnan().all()


def test_no_tokens_write_nothing() -> None:
    shape, kv = Shape(), Shape().cache()
    q = rope_kv_write(shape.qkv(0), torch.empty(0, 8, 2), torch.empty(0, dtype=torch.int64), kv)
    assert q.shape == (0, 4, 16) and kv.isnan().all()


GOOD = {
    "qkv": torch.ones(2, 128),
    "turns": torch.ones(2, 8, 2),
    "slots": torch.arange(2),
    "kv": torch.ones(4, NUM_SLOTS, 16),
    "kv_scales": None,
    "norms": None,
}
NORMS = HeadNorms(torch.ones(16), torch.ones(16), 1e-5)
SCALES = torch.ones(4, NUM_SLOTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.ones(2, 130)}, r"qkv has shape \(2, 130\), expected \(2, 128\)"),
        ({"qkv": torch.ones(2, 64)}, r"qkv has shape \(2, 64\), expected \[T, \(H \+ 4\) \* 16\]"),
        ({"qkv": torch.ones(128, 2).t()}, "qkv has stride 2"),
        ({"turns": torch.ones(3, 8, 2)}, r"turns has shape \(3, 8, 2\), expected \(2, 8, 2\)"),
        ({"turns": torch.ones(2, 9, 2)}, "turns has shape"),
        ({"turns": torch.ones(2, 8, 2).double()}, "turns is torch.float64, expected torch.float32"),
        ({"slots": torch.arange(3)}, r"slots has shape \(3,\), expected \(2,\)"),
        ({"slots": torch.arange(2).int()}, "slots is torch.int32, expected torch.int64"),
        ({"kv": torch.ones(3, NUM_SLOTS, 16)}, r"kv has shape \(3, 48, 16\)"),
        ({"kv": torch.ones(4, 16, NUM_SLOTS).transpose(1, 2)}, r"kv has .* strides \(768, 1, 48\)"),
        ({"kv": torch.ones(4, NUM_SLOTS, 16).half()}, "kv is torch.float16, expected torch.float32, torch.int8"),
        ({"kv": torch.ones(4, NUM_SLOTS, 16).to(torch.int8)}, "kv_scales is missing, and kv is torch.int8"),
        ({"kv_scales": SCALES}, "kv_scales is given, and kv is torch.float32"),
        ({"kv": torch.ones(4, NUM_SLOTS, 16).to(torch.int8), "kv_scales": SCALES[1:]}, "kv_scales has shape"),
        ({"norms": replace(NORMS, k_weight=torch.ones(8))}, r"k_weight has shape \(8,\), expected \(16,\)"),
    ],
)
def test_wrong_tensor_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_kv_write(**{**GOOD, **changes})  # type: ignore[arg-type]
