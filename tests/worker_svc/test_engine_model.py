"""The engine with real models: the text is the same however it is computed, and is what transformers generates."""

import queue
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import make_checkpoint
from tests.support.engine_requests import make_request, make_settings
from tests.support.engine_runs import Record, run, step
from weft import model_folder
from weft.messages import FINISH_STOP, SamplingParams
from weft.model_folder import ModelFolder
from weft.settings import ModelSettings
from worker_svc.engine import Engine
from worker_svc.engine_io import Add, BlocksLoaded, Drop, StepOutput
from worker_svc.model_options import ModelOptions
from worker_svc.runner import load_runner
from worker_svc.torch_engine import TorchEngine

COUNT = 24
BLOCK_BYTES = 4096


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    changes = {"sliding_window": 24} if request.param == "mistral" else {}
    path = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **changes)
    return model_folder.read(ModelSettings(model=str(path)))


@pytest.fixture(scope="module")
def prompts(folder: ModelFolder) -> list[list[int]]:
    rng = random.Random(3)
    shared = [rng.randrange(2, 128) for _ in range(40)]
    fresh = [[rng.randrange(2, 128) for _ in range(length)] for length in (1, 15, 16, 33, 70)]
    return [*fresh, shared + [7, 8], shared + [9]]


@pytest.fixture(scope="module")
def expected(folder: ModelFolder, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, end-of-sequence token included."""
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def make_engine(folder: ModelFolder, *, num_blocks: int = 64, **changes: object) -> Engine:
    settings = make_settings(**changes)
    runner = load_runner(
        folder,
        ModelOptions(device="cpu", dtype="float32", threads=1, kv_memory=num_blocks * BLOCK_BYTES),
    )
    assert runner.num_blocks == num_blocks
    return Engine(runner, settings, digest=model_folder.digest(folder), eos_token_ids=folder.eos_token_ids)


def adds(folder: ModelFolder, prompts: list[list[int]], **changes: object) -> list[Add]:
    chosen = {"sampling": SamplingParams(temperature=0.0, max_tokens=COUNT), **changes}
    digest = model_folder.digest(folder)
    return [
        Add(make_request(prompt, request_id=f"r{i}", slots=[i], digest=digest, **chosen))
        for i, prompt in enumerate(prompts)
    ]


def texts(record: Record, count: int) -> list[list[int]]:
    return [record.tokens(f"r{i}", i) for i in range(count)]


def test_alone_each_prompt_gives_what_transformers_generates(
    folder: ModelFolder, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine, record = make_engine(folder), Record()
    for command in adds(folder, prompts):
        run(engine, [command], record=record)
    assert texts(record, len(prompts)) == expected
    for i, text in enumerate(expected):
        assert (record.outcomes[f"r{i}", i].finish == FINISH_STOP) is (text[-1] in folder.eos_token_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 5},
        {"max_num_batched_tokens": 17},
        {"batching": "static", "max_num_seqs": 3},
        {"prefix_cache": False},
        {"num_blocks": 9},
    ],
    ids=["batched", "tiny chunks", "odd chunks", "static", "no prefix cache", "preempted"],
)
def test_batched_text_is_what_transformers_generates(
    folder: ModelFolder, prompts: list[list[int]], expected: list[list[int]], changes: dict[str, object]
) -> None:
    engine = make_engine(folder, **changes)
    record = run(engine, adds(folder, prompts))
    assert texts(record, len(prompts)) == expected
    assert bool(engine.load.num_preemptions) is ("num_blocks" in changes)
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_prefix_hits_change_no_token(folder: ModelFolder, prompts: list[list[int]], expected: list[list[int]]) -> None:
    engine = make_engine(folder)
    run(engine, adds(folder, prompts))
    record = run(engine, adds(folder, prompts))
    assert texts(record, len(prompts)) == expected
    assert [record.started[f"r{i}"].num_cached_tokens for i in range(7)] == [0, 0, 15, 32, 64, 32, 32]


def test_neighbours_that_are_dropped_change_no_token(
    folder: ModelFolder, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine, record = make_engine(folder, max_num_batched_tokens=20), Record()
    step(engine, adds(folder, prompts), record)
    for i in (0, 4, 2):
        step(engine, [Drop(f"r{i}", 0)], record)
        step(engine, (), record)
    run(engine, record=record)
    for i in (1, 3, 5, 6):
        assert record.tokens(f"r{i}", i) == expected[i]


def test_recovered_streams_go_on_as_if_undisturbed(
    folder: ModelFolder, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    digest = model_folder.digest(folder)
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT)
    commands = [
        Add(
            make_request(
                p, request_id=f"r{i}", slots=[i], digest=digest, sampling=sampling, emitted=[text[:k]], epoch=1
            )
        )
        for i, (p, text) in enumerate(zip(prompts, expected, strict=True))
        for k in [min(3 * i, len(text) - 1)]
    ]
    record = run(make_engine(folder), commands)
    for i, text in enumerate(expected):
        outcome = record.outcomes[f"r{i}", i]
        assert text[: outcome.first_index] + outcome.token_ids == text


def test_blocks_loaded_from_the_cache_service_give_the_same_text(
    folder: ModelFolder, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    source = make_engine(folder, kv_load="never")
    source.exchange.set_available(True)
    outputs = run(source, adds(folder, prompts)).outputs
    kept = {block_hash: data for output in outputs for block_hash, data in output.offload}

    engine, record = make_engine(folder, kv_load="always"), Record()
    engine.exchange.set_available(True)
    step(engine, adds(folder, prompts), record)
    answers = []
    for load in [load for output in record.outputs for load in output.load]:
        found = [block_hash for block_hash in load.hashes if block_hash in kept]
        answers.append(BlocksLoaded(load.request_id, load.epoch, tuple(found), tuple(kept[h] for h in found)))
    run(engine, answers, record=record)
    assert texts(record, len(prompts)) == expected
    assert record.started["r4"].num_cached_tokens == 64


def test_sampled_text_is_the_same_alone_batched_and_resumed(folder: ModelFolder, prompts: list[list[int]]) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.1, max_tokens=COUNT, ignore_eos=True)
    commands = adds(folder, prompts, sampling=sampling, seeds=[99])
    alone = Record()
    for command in commands:
        run(make_engine(folder), [command], record=alone)
    batched = run(make_engine(folder, max_num_batched_tokens=30), commands)
    assert texts(alone, len(prompts)) == texts(batched, len(prompts))
    resumed = run(
        make_engine(folder),
        adds(folder, [prompts[3]], sampling=sampling, seeds=[99], emitted=[alone.tokens("r3", 3)[:10]]),
    )
    assert resumed.tokens() == alone.tokens("r3", 3)[10:]


@pytest.mark.parametrize("index", [1, 3, 4])
def test_choices_of_one_request_get_what_they_would_get_alone(
    folder: ModelFolder, prompts: list[list[int]], index: int
) -> None:
    digest, prompt = model_folder.digest(folder), prompts[index]
    sampling = SamplingParams(max_tokens=COUNT, ignore_eos=True)
    together = run(make_engine(folder), [Add(make_request(prompt, digest=digest, sampling=sampling, emitted=[()] * 3))])
    for slot in range(3):
        alone = Add(make_request(prompt, digest=digest, sampling=sampling, seeds=[slot]))
        assert together.tokens(slot=slot) == run(make_engine(folder), [alone]).tokens()


def test_thread_serves_a_folder(tmp_path: Path) -> None:
    folder = model_folder.read(ModelSettings(model=str(make_checkpoint(tmp_path))))
    settings = make_settings(device="cpu", threads=1, kv_memory=64 * BLOCK_BYTES)
    engine = TorchEngine(folder, settings)
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    engine.start(outputs.put)
    assert engine.block_bytes == BLOCK_BYTES and engine.layout
    assert engine.load.loaded == 1.0
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    engine.submit(Add(make_request([5, 6, 7], digest=model_folder.digest(folder), sampling=sampling)))
    record = Record()
    while not record.ended:
        record.take(outputs.get(timeout=20))
    engine.stop()
    assert len(record.tokens()) == 5 and engine.load.failure is None
    assert engine.load.num_free_blocks == engine.load.num_blocks == 64
