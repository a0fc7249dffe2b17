import pytest
import torch
import triton
import triton.language as tl

from worker_svc import noise
from worker_svc.kernels.noise import CHOICE, REPLACEMENT, gumbel, random_bits, seeds_tensor

SEEDS = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


@triton.jit
def _bits_kernel(seed_ptr, position_ptr, out_ptr, STREAM: tl.constexpr, SIZE: tl.constexpr):
    bits = random_bits(tl.load(seed_ptr), tl.arange(0, SIZE // 4), tl.load(position_ptr), STREAM)
    tl.store(out_ptr + tl.arange(0, SIZE), bits.to(tl.int64))


@triton.jit
def _gumbel_kernel(bits_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, gumbel(tl.load(bits_ptr + index).to(tl.uint32)))


def bits_of(seed: int, position: int, stream: int, size: int = 64) -> torch.Tensor:
    out = torch.empty(size, dtype=torch.int64)
    seeds = seeds_tensor([seed], torch.device("cpu"))
    _bits_kernel[(1,)](seeds, torch.tensor([position]), out, STREAM=stream, SIZE=size)
    return out


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
@pytest.mark.parametrize("position", [0, 7, 2**17 - 1])
def test_bits_are_those_of_the_torch_sampler(seed: int, position: int) -> None:
    key = noise.make_key([seed], torch.device("cpu"))
    words = noise.noise_bits(key, torch.arange(16), torch.tensor([[position]]))
    assert torch.equal(bits_of(seed, position, CHOICE.value), torch.stack(words, dim=-1).flatten())


def test_streams_share_no_bits() -> None:
    assert not torch.isin(bits_of(5, 3, CHOICE.value), bits_of(5, 3, REPLACEMENT.value)).any()


def test_gumbel_is_that_of_the_torch_sampler_from_end_to_end() -> None:
    seed = int(torch.seed() % 2**32)
    torch.manual_seed(seed)
    bits = torch.randint(2**32, (4096,))
    # All magnitudes, and both ends.
    bits[:2048] >>= torch.arange(2048) % 32
    bits[2048:2112] = torch.cat([torch.arange(32), 2**32 - 1 - torch.arange(32)])
    out = torch.empty(4096)
    _gumbel_kernel[(1,)](bits, out, SIZE=4096)
    # Three roundings more or less, of a value and of the argument of a logarithm.
    torch.testing.assert_close(out, noise.gumbel(bits), rtol=4e-7, atol=4e-7, msg=lambda text: f"seed {seed}: {text}")
