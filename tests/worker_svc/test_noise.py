import random

import torch

from worker_svc.noise import NOISE_VALUES, NoiseWindow, full_noise, make_key

CPU = torch.device("cpu")


def test_window_gives_the_noise_of_each_position_wherever_choices_are() -> None:
    rng = random.Random(11)
    for vocab_size in (50, 700, NOISE_VALUES):
        seeds = [rng.randrange(2**64) for _ in range(3)]
        key = make_key(seeds, CPU)
        window, positions = NoiseWindow(key, vocab_size), [rng.randrange(9) for _ in seeds]
        for _ in range(30):
            counts = [rng.randrange(1, 4) for _ in seeds]
            members = [i for i, count in enumerate(counts) for _ in range(count)]
            asked = [positions[i] + j for i, count in enumerate(counts) for j in range(count)]
            found = window.take(members, asked)
            expected = full_noise((key[0][members], key[1][members]), torch.tensor(asked)[:, None], vocab_size)
            assert torch.equal(found, expected)
            positions = [position + rng.randrange(4) for position in positions]


def test_choice_that_goes_back_gets_the_same_noise_again() -> None:
    window = NoiseWindow(make_key([5], CPU), 64)
    first = window.take([0], [40]).clone()
    window.take([0], [90])
    assert torch.equal(window.take([0], [40]), first)
