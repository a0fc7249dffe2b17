"""The engine on a model folder, in a thread of its own: what a worker that computes runs."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from weft import model_folder
from weft.errors import SettingsError
from weft.hashing import BLOCK_SIZE
from weft.model_folder import BUNDLED, ModelFolder
from weft.settings import WorkerSettings
from worker_svc.draft_model import DraftModel, Foresight
from worker_svc.engine import Engine
from worker_svc.engine_io import Command, EngineLoad, StepOutput
from worker_svc.memory import MIN_BLOCKS
from worker_svc.parallel.leader import ParallelRunner
from worker_svc.runner import ModelRunner, Runner
from worker_svc.speculation.prompt_lookup import PromptLookup
from worker_svc.speculation.speculation import Speculation
from worker_svc.step_input import StepInput
from worker_svc.step_log import StepLog

log = logging.getLogger(__name__)


def load_engine(folder: ModelFolder, settings: WorkerSettings, load: EngineLoad | None = None) -> Engine:
    """Load the model and warm it up.

    Args:
        load: numbers for the engine to keep up to date.

    Raises:
        SettingsError: names what in the folder or the settings does not work.
        Unavailable: another rank of this worker ended.
    """
    load = EngineLoad() if load is None else load
    digest = model_folder.digest(folder)
    drafter = load_drafter(folder, settings) if settings.speculation == "draft" else None
    runner = make_runner(folder, settings, load, 0 if drafter is None else drafter.block_bytes)
    loaded_at = time.monotonic()
    warm_up(runner, settings.max_num_batched_tokens)
    if drafter is not None:
        drafter.resize(runner.num_blocks)
        warm_up(drafter, settings.max_num_batched_tokens)
    load.warm_up_s = time.monotonic() - loaded_at
    overlaps = runner.device.type == "cuda"
    sampler = runner.make_sampler()
    return Engine(
        runner,
        settings,
        digest=digest,
        eos_token_ids=folder.eos_token_ids,
        load=load,
        overlaps=overlaps,
        sampler=sampler,
        speculation=make_speculation(settings, drafter, sampler, overlaps),
    )


def make_runner(
    folder: ModelFolder, settings: WorkerSettings, load: EngineLoad, more_block_bytes: int = 0
) -> ModelRunner:
    """The model on as many devices as the settings say; `load` hears how far it is, and of a rank that is lost."""

    def on_progress(share: float) -> None:
        load.loaded = share

    def on_lost(error: Exception) -> None:
        load.failure = error

    if settings.tensor_parallel > 1:
        return ParallelRunner(folder, settings, on_progress=on_progress, on_lost=on_lost)
    return Runner(
        folder,
        device=settings.device,
        dtype=settings.dtype,
        kv_memory=settings.kv_memory,
        threads=settings.threads,
        kernels=settings.kernels,
        quantize=settings.quantize,
        more_block_bytes=more_block_bytes,
        on_progress=on_progress,
    )


def load_drafter(target: ModelFolder, settings: WorkerSettings) -> Runner:
    """The draft model, with as few blocks as there can be: how many it needs is known when the target is loaded.

    Raises:
        SettingsError: there is none, or it does not go with the target.
    """
    if settings.tensor_parallel > 1:
        raise SettingsError("speculation: draft works on one device, and tensor_parallel is more")
    folder = find_draft_folder(target, settings)
    return Runner(
        folder,
        device=settings.device,
        dtype=settings.dtype,
        kv_memory=settings.kv_memory,
        threads=settings.threads,
        kernels=settings.kernels,
        agree=lambda num_blocks: MIN_BLOCKS,
    )


def find_draft_folder(target: ModelFolder, settings: WorkerSettings) -> ModelFolder:
    """Raises SettingsError as `load_drafter`."""
    name = settings.draft_model
    if not name and target.path.resolve() == (BUNDLED / "tales-6m").resolve():
        name = "tales-1m"
    if not name:
        raise SettingsError(f"draft_model: which model drafts for {target.name} must be said")
    folder = model_folder.read(dataclasses.replace(settings.model, model=name, served_name="", max_model_len=0))
    if folder.vocab_size != target.vocab_size:
        raise SettingsError(
            f"draft_model: {folder.name} has {folder.vocab_size} tokens and {target.name} {target.vocab_size}, so one "
            "cannot draft for the other"
        )
    return folder


def make_speculation(
    settings: WorkerSettings, drafter: Runner | None, sampler: Foresight, overlaps: bool
) -> Speculation | None:
    """What the settings say drafts tokens."""
    if drafter is not None:
        return DraftModel(
            drafter,
            sampler,
            max_length=settings.speculation_tokens,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            overlaps=overlaps,
        )
    if settings.speculation == "ngram":
        return PromptLookup(settings.speculation_tokens, overlaps=overlaps)
    return None


def warm_up(runner: ModelRunner, max_num_batched_tokens: int) -> None:
    """Compute a short and a long step, so that the first request does not wait for what torch does once."""
    for count in (1, min(max_num_batched_tokens, runner.max_model_len)):
        ids = list(range(count))
        table = list(range(-(-count // BLOCK_SIZE)))
        runner.forward(StepInput([0] * count, ids, ids, [count], [count], [table], [count - 1]))


class TorchEngine:
    """A thread around `Engine`."""

    def __init__(self, folder: ModelFolder, settings: WorkerSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._step_log: StepLog | None = None
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.load = EngineLoad()
        # What a block's bytes mean, and how many they are; known after `start`.
        self.layout = b""
        self.block_bytes = 0
        # Set by the service.
        self.remote_cache_available = False
        self.load_bytes_per_s = 0.0

    def start(self, on_output: Callable[[StepOutput], None]) -> None:
        if self._settings.step_log:
            self._step_log = StepLog(self._settings.step_log, self._settings.mesh.instance or "worker")
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(loaded, on_output), name="engine", daemon=True)
        self._thread.start()
        loaded.result()

    def submit(self, command: Command) -> None:
        self._inbox.put(command)

    def stop(self) -> None:
        self._inbox.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            gc.unfreeze()

    def _run(self, loaded: Future[None], on_output: Callable[[StepOutput], None]) -> None:
        try:
            # In this thread from the start: OpenMP keeps threads for each one that computed. Those of another would
            # still count, and with more threads than cores waiting ones go to sleep at once: a step of 16 decodes took
            # 55 ms where it takes 36 (125M parameters, AMD EPYC, 2026).
            engine = self._load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            self._step(engine, on_output)
        except Exception as error:
            log.exception("engine failed")
            # Of a rank that was lost this is the consequence.
            self.load.failure = self.load.failure or error
        finally:
            engine.close()
            if self._step_log is not None:
                self._step_log.close()

    def _step(self, engine: Engine, on_output: Callable[[StepOutput], None]) -> None:
        """Step until told to stop."""
        ended_at = time.monotonic()
        while True:
            had_work = engine.has_work
            commands = self._receive(had_work)
            if commands is None:
                return
            began = ended_at if had_work else time.monotonic()
            engine.exchange.set_available(self.remote_cache_available)
            engine.exchange.load_bytes_per_s = self.load_bytes_per_s
            output = engine.step(commands)
            if output is not None:
                on_output(output)
            ended_at = time.monotonic()
            if self._step_log is not None and engine.landed is not None:
                self._step_log.add(engine.landed, ended_at - began)

    def _load(self) -> Engine:
        engine = load_engine(self._folder, self._settings, self.load)
        self.layout, self.block_bytes = engine.layout, engine.block_bytes
        # What is loaded by now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        return engine

    def _receive(self, has_work: bool) -> list[Command] | None:
        """All commands that are there, or, without work, the next one that comes; None ends the thread."""
        commands: list[Command] = []
        try:
            command = self._inbox.get_nowait() if has_work else self._inbox.get()
            while command is not None:
                commands.append(command)
                command = self._inbox.get_nowait()
        except Empty:
            return commands
        return None
