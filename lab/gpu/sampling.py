"""Sampling and the verification of drafts, at the vocabulary of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import triton

from lab.gpu.case import Check, CompileCase, Timing, Tuning, compile_case
from worker_svc.kernels import penalties, sampling, verify, verify_rejection
from worker_svc.kernels.penalties import Bias, Penalties
from worker_svc.kernels.top_k_top_p import Filters, group_size
from worker_svc.kernels.tuning import Config

V = 128256
NUM_DRAFTS = 4
# Of logits drawn from a normal distribution; with 4, half a hundred tokens share most of the probability.
SPREAD = 4.0
# top_k, top_p, min_p; Qwen3's own are in the middle.
FILTERS: Final = {"top_p": (0, 0.9, 0.0), "top_k top_p": (20, 0.95, 0.0), "top_k min_p": (200, 1.0, 0.05)}

_ROWS = {"temperature_ptr": "*fp32", "seeds_ptr": "*i64", "positions_ptr": "*i64"}
_BEST = {"best_scores_ptr": "*fp32", "best_tokens_ptr": "*i32"}
_FILTERS = {"top_k_ptr": "*i32", "active_ptr": "*i32"} | dict.fromkeys(
    ("top_p_ptr", "min_p_ptr", "scaled_ptr", "group_max_ptr", "split_max_ptr", "split_sum_ptr"), "*fp32"
)
_PENALTIES = {"penalty_slots_ptr": "*i32", "penalty_state_ptr": "*i32"} | dict.fromkeys(
    ("repetition_ptr", "frequency_ptr", "presence_ptr"), "*fp32"
)
_BIAS = {"bias_values_ptr": "*fp32"} | dict.fromkeys(
    ("bias_offsets_ptr", "bias_token_ids_ptr", "bias_until_ptr"), "*i32"
)
_RejectionInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_DRAFTS = {"draft_token_ids_ptr": "*i64", "num_drafts_ptr": "*i64"}
_VERIFIED = {"num_accepted_ptr": "*i64", "token_ids_ptr": "*i64"}
_PROBABILITIES = {"target_probs_ptr": "*fp32", "draft_probs_ptr": "*fp32"}


def compile_cases() -> list[CompileCase]:
    """Every branch, for bfloat16 and float32 logits."""
    return [*_score_cases(), *_choose_cases(), *_count_cases(), *_verify_cases()]


def _score_cases() -> list[CompileCase]:
    kinds: dict[str, dict[str, str]] = {"plain": {}, "filters": _FILTERS, "all": _FILTERS | _PENALTIES | _BIAS}
    blocks = sampling.DEFAULT.blocks
    config = Config({"BLOCK": blocks["BLOCK"], "GROUP": blocks["GROUP"]}, sampling.DEFAULT.num_warps)
    return [
        compile_case(
            f"sample score {dtype} {name}",
            sampling._score_kernel,
            {"logits_ptr": f"*{dtype}", "vocab_size": "i32", "logits_stride": "i32"} | _ROWS | _BEST | kind,
            {},
            config,
            ("vocab_size", "logits_stride"),
        )
        for dtype in ("bf16", "fp32")
        for name, kind in kinds.items()
    ]


def _choose_cases() -> list[CompileCase]:
    """Vocabularies of Llama 3, Qwen and Gemma 3."""
    plain = _choose_case("sample choose plain", {}, V, sampling.CHOOSE_WARPS)
    return [
        plain,
        *[
            _choose_case(f"sample choose filters V{vocab_size}", _FILTERS, vocab_size, sampling.FILTER_WARPS)
            for vocab_size in (V, 151936, 262208)
        ],
    ]


def _choose_case(name: str, filters: dict[str, str], vocab_size: int, num_warps: int) -> CompileCase:
    outputs = {"token_ids_ptr": "*i64", "is_bad_ptr": "*i1"}
    integers = dict.fromkeys(("vocab_size", "num_splits", "num_groups"), "i32")
    blocks = sampling.DEFAULT.blocks
    group = group_size(vocab_size, blocks["GROUP"])
    num_splits = triton.cdiv(vocab_size, blocks["BLOCK"])
    constants = {
        "BLOCK_SPLITS": triton.next_power_of_2(num_splits),
        "BLOCK_GROUPS": triton.next_power_of_2(num_splits * blocks["BLOCK"] // group),
        "GROUP": group,
    }
    config = Config({"SCAN": blocks["SCAN"]}, num_warps)
    arguments = _ROWS | _BEST | outputs | integers | filters
    return compile_case(name, sampling._choose_kernel, arguments, constants, config, ("vocab_size",))


def _count_cases() -> list[CompileCase]:
    arguments = {"state_ptr": "*i32", "slots_ptr": "*i32", "token_ids_ptr": "*i64"}
    arguments |= {"num_tokens": "i32", "vocab_size": "i32"}
    return [
        compile_case(
            f"count {'prompt' if is_prompt else 'completion'}",
            penalties._count_kernel,
            arguments,
            {"IS_PROMPT": is_prompt},
            Config({"BLOCK": 128}),
            ("vocab_size",),
        )
        for is_prompt in (True, False)
    ]


def _verify_cases() -> list[CompileCase]:
    config = verify_rejection.DEFAULT
    shape = {"NUM_DRAFTS": NUM_DRAFTS, "BLOCK_K": triton.next_power_of_2(NUM_DRAFTS + 1)}
    verified = {"sampled_ptr": "*i64", "sampled_stride": "i32", "draft_stride": "i32"} | _DRAFTS | _VERIFIED
    replaced = _PROBABILITIES | _DRAFTS | _ROWS | _BEST | {"num_accepted_ptr": "*i64", "vocab_size": "i32"}
    finished = _DRAFTS | _VERIFIED | _BEST | {"num_splits": "i32"}
    splits = {"BLOCK_SPLITS": triton.next_power_of_2(triton.cdiv(V, config.blocks["BLOCK"]))}
    replace = verify_rejection._replace_kernel
    return [
        compile_case("verify", verify._verify_kernel, verified, shape, Config({}, num_warps=1)),
        compile_case("verify_rejection replace", replace, replaced, shape, config, ("vocab_size",)),
        compile_case("verify_rejection finish", verify_rejection._finish_kernel, finished, shape | splits, Config({})),
    ]


NEAR_TIES = "share of rows where two candidates are as near as logarithms and sums are rounded"


def checks(device: torch.device) -> list[Check]:
    """Share of rows whose tokens are not those of the reference."""
    return [
        Check("sample", partial(_sample_error, device, ()), 0.005, NEAR_TIES),
        *[Check(f"sample {name}", partial(_sample_error, device, (name,)), 0.005, NEAR_TIES) for name in FILTERS],
        Check("sample everything mixed", partial(_sample_error, device, tuple(FILTERS), True), 0.005, NEAR_TIES),
        Check("verify", partial(_verify_error, device), 0.0, "integers"),
        Check("verify_rejection", partial(_rejection_error, device), 0.005, NEAR_TIES),
    ]


def _columns(device: torch.device, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Temperatures around 1, seeds and positions."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device)
    return 0.5 + torch.rand(num_rows, device=device), seeds, torch.randint(2**17, (num_rows,), device=device)


def _filters(device: torch.device, num_rows: int, names: tuple[str, ...]) -> Filters | None:
    if not names:
        return None
    top_k, top_p, min_p = zip(*(FILTERS[names[row % len(names)]] for row in range(num_rows)), strict=True)
    return Filters(
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, dtype=torch.float32, device=device),
        torch.tensor(min_p, dtype=torch.float32, device=device),
    )


def _penalties(device: torch.device, num_rows: int) -> Penalties:
    """For every other row."""
    slots = torch.arange(num_rows, dtype=torch.int32, device=device)
    slots[::2] = -1
    state = torch.randint(100, (num_rows, V), dtype=torch.int32, device=device)
    repetition, frequency, presence = torch.rand(3, num_rows, device=device)
    return Penalties(slots, state * (state < 5), 1 + repetition, frequency, presence)


def _bias(device: torch.device, num_rows: int) -> Bias:
    """Four entries for each row."""
    count = 4 * num_rows
    token_ids = torch.randint(V, (count,), dtype=torch.int32, device=device)
    until = torch.randint(2**17, (count,), dtype=torch.int32, device=device)
    offsets = torch.arange(0, count + 1, 4, dtype=torch.int32, device=device)
    return Bias(offsets, token_ids, 10 * torch.randn(count, device=device), until)


def _logits(device: torch.device, num_rows: int) -> torch.Tensor:
    return (SPREAD * torch.randn(num_rows, V, device=device)).bfloat16()


def _sample_error(device: torch.device, filters: tuple[str, ...], is_mixed: bool = False) -> float:
    num_rows = 255
    logits, (temperature, seeds, positions) = _logits(device, num_rows), _columns(device, num_rows)
    more: dict[str, Any] = {"filters": _filters(device, num_rows, filters)}
    if is_mixed:
        temperature[::5] = 0
        logits[3, 5] = torch.nan
        more |= {"penalties": _penalties(device, num_rows), "bias": _bias(device, num_rows)}
    found = sampling.sample(logits, temperature, seeds, positions, **more)
    expected = sampling.sample_reference(logits, temperature, seeds, positions, **more)
    differs = (found[0] != expected[0]) | (found[1] != expected[1])
    return float(differs.float().mean())


def _verify_error(device: torch.device) -> float:
    sampled, drafts = (torch.randint(2, (255, width), device=device) for width in (NUM_DRAFTS + 1, NUM_DRAFTS))
    num_drafts = torch.randint(NUM_DRAFTS + 1, (255,), device=device)
    found = verify.verify(sampled, drafts, num_drafts)
    expected = verify.verify_reference(sampled, drafts, num_drafts)
    return float((found[0] != expected[0]).sum() + (found[1] != expected[1]).sum())


def _rejection_error(device: torch.device) -> float:
    inputs = _rejection_inputs(device, 33)
    found = verify_rejection.verify_rejection(*inputs)
    expected = verify_rejection.verify_rejection_reference(*inputs)
    return float((found[1] != expected[1]).any(dim=1).float().mean())


def _rejection_inputs(device: torch.device, num_rows: int) -> _RejectionInputs:
    target = (SPREAD * torch.randn(num_rows, NUM_DRAFTS + 1, V, device=device)).softmax(dim=-1)
    drafted = (target[:, :-1].log() + torch.randn(num_rows, NUM_DRAFTS, V, device=device)).softmax(dim=-1)
    drafts = drafted.flatten(0, 1).multinomial(1).view(num_rows, NUM_DRAFTS)
    _, seeds, positions = _columns(device, num_rows)
    return target, drafted, drafts, torch.full_like(positions, NUM_DRAFTS), seeds, positions


def tunings(device: torch.device) -> list[Tuning]:
    """One config for all batches, since sums are rounded as it has them: at 32 rows with filters."""
    candidates = [
        Config({"BLOCK": block, "GROUP": 64, "SCAN": scan}, num_warps)
        for block, num_warps in ((512, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
        for scan in (4096, 8192)
    ]
    splits = [Config({"BLOCK": block}, num_warps) for block in (1024, 2048, 4096) for num_warps in (4, 8)]
    return [
        Tuning("sample", "", candidates, partial(_bound_sample, device, 32, ("top_k top_p",))),
        Tuning("verify_rejection", "", splits, partial(_bound_rejection, device, 32)),
    ]


def _bound_sample(
    device: torch.device,
    num_rows: int,
    filters: tuple[str, ...] = (),
    config: Config | None = None,
    temperature: float | None = None,
) -> Callable[[], object]:
    logits, (temperatures, seeds, positions) = _logits(device, num_rows), _columns(device, num_rows)
    if temperature is not None:
        temperatures.fill_(temperature)
    columns = (temperatures, seeds, positions, _filters(device, num_rows, filters))
    return lambda: sampling.sample(logits, *columns, config=config)


def _bound_rejection(device: torch.device, num_rows: int, config: Config | None = None) -> Callable[[], object]:
    inputs = _rejection_inputs(device, num_rows)
    return lambda: verify_rejection.verify_rejection(*inputs, config)


def timings(device: torch.device) -> list[Timing]:
    """Against reading the logits once, and against torch."""
    timings = [timing for num_rows in (1, 64, 256) for timing in _sample_timings(device, num_rows)]
    # p and q at the one position whose token is replaced.
    rejection = partial(_bound_rejection, device, 32)
    return [*timings, Timing("verify_rejection B32", rejection, 32 * V * 8)]


def _sample_timings(device: torch.device, num_rows: int) -> list[Timing]:
    num_bytes = num_rows * V * 2
    greedy = partial(_bound_sample, device, num_rows, temperature=0.0)
    plain = partial(_bound_sample, device, num_rows)
    argmax, multinomial = partial(_torch_argmax, device, num_rows), partial(_torch_multinomial, device, num_rows)
    timings = [
        Timing(f"sample greedy B{num_rows}", greedy, num_bytes, rivals={"torch argmax": argmax}),
        Timing(f"sample B{num_rows}", plain, num_bytes, rivals={"torch multinomial": multinomial}),
    ]
    for name in FILTERS:
        filtered = partial(_bound_sample, device, num_rows, (name,))
        sort = partial(_torch_sort, device, num_rows, name)
        timings.append(Timing(f"sample {name} B{num_rows}", filtered, num_bytes, rivals={"torch sort": sort}))
    return timings


def _torch_argmax(device: torch.device, num_rows: int) -> Callable[[], object]:
    logits = _logits(device, num_rows)
    return lambda: logits.argmax(dim=1)


def _torch_multinomial(device: torch.device, num_rows: int) -> Callable[[], object]:
    logits, (temperature, _, _) = _logits(device, num_rows), _columns(device, num_rows)
    return lambda: (logits / temperature[:, None]).softmax(dim=1).multinomial(1)


def _torch_sort(device: torch.device, num_rows: int, name: str) -> Callable[[], object]:
    logits, (temperature, _, _) = _logits(device, num_rows), _columns(device, num_rows)
    top_k, top_p, min_p = FILTERS[name]

    def sample() -> torch.Tensor:
        values, token_ids = (logits / temperature[:, None]).sort(dim=1, descending=True)
        if top_k:
            values[:, top_k:] = -torch.inf
        likelihood = values.softmax(dim=1)
        is_kept = (likelihood.cumsum(dim=1) - likelihood < top_p) & (likelihood >= min_p * likelihood[:, :1])
        return token_ids.gather(1, (likelihood * is_kept).multinomial(1))

    return sample
