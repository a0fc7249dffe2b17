"""The engine on a model folder, in a thread of its own: what a worker that computes runs."""

from __future__ import annotations

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
from weft.model_folder import ModelFolder
from weft.settings import WorkerSettings
from worker_svc.draft_model import DraftModel, Foresight
from worker_svc.engine import Engine
from worker_svc.engine_io import Command, EngineLoad, StepOutput
from worker_svc.engine_models import EngineModels, load_models
from worker_svc.loaded_model import LoadedModel
from worker_svc.memory import MIN_BLOCKS
from worker_svc.model_options import ModelOptions
from worker_svc.parallel.leader import ParallelRunner
from worker_svc.runner import ModelRunner, Runner
from worker_svc.speculation.prompt_lookup import PromptLookup
from worker_svc.speculation.speculation import Speculation
from worker_svc.step_input import StepInput
from worker_svc.step_log import StepLog

log = logging.getLogger(__name__)


def load_engine(
    folder: ModelFolder,
    settings: WorkerSettings,
    load: EngineLoad | None = None,
    models: EngineModels | None = None,
) -> Engine:
    """Load the model and warm it up.

    Args:
        load: numbers for the engine to keep up to date.
        models: for these settings, loaded and warmed up before; None to load them.

    Raises:
        SettingsError: names what in the folder or the settings does not work.
        Unavailable: another rank of this worker ended.
    """
    load = EngineLoad() if load is None else load
    # What torch does once has been done with models that were loaded before.
    num_warm_up_tokens = settings.max_num_batched_tokens if models is None else 1
    runner: ModelRunner
    drafter = None
    if settings.tensor_parallel > 1:
        digest = model_folder.digest(folder)
        runner = _load_ranks(folder, settings, load)
    else:
        models = load_models(folder, settings, load.on_progress) if models is None else models
        digest = models.digest
        drafter = None if models.draft is None else make_small_runner(models.draft, settings)
        runner = _make_runner(models.target, settings, 0 if drafter is None else drafter.block_bytes)
    load.loaded = 1.0
    loaded_at = time.monotonic()
    warm_up(runner, num_warm_up_tokens)
    if drafter is not None:
        drafter.resize(runner.num_blocks)
        warm_up(drafter, num_warm_up_tokens)
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


def _load_ranks(folder: ModelFolder, settings: WorkerSettings, load: EngineLoad) -> ParallelRunner:
    """The model on several devices; `load` hears how far it is, and of a rank that is lost."""

    def on_lost(error: Exception) -> None:
        load.failure = error

    if settings.speculation == "draft":
        raise SettingsError("speculation: draft works on one device, and tensor_parallel is more")
    return ParallelRunner(folder, settings, on_progress=load.on_progress, on_lost=on_lost)


def _make_runner(model: LoadedModel, settings: WorkerSettings, more_block_bytes: int) -> Runner:
    return Runner(model, ModelOptions.of(settings), more_block_bytes=more_block_bytes)


def make_small_runner(model: LoadedModel, settings: WorkerSettings) -> Runner:
    """With as few blocks as there can be. How many a drafter needs is known when the target has its own."""
    return Runner(model, ModelOptions.of(settings), agree=lambda num_blocks: MIN_BLOCKS)


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


def warm_up_models(models: EngineModels) -> None:
    """Do what torch does once, for engines to come."""
    for model in (models.target, models.draft):
        if model is not None:
            runner = make_small_runner(model, models.settings)
            warm_up(runner, runner.max_model_len)


class TorchEngine:
    """A thread around `Engine`."""

    def __init__(self, folder: ModelFolder, settings: WorkerSettings, models: EngineModels | None = None) -> None:
        """`models`: as `load_engine`."""
        self._folder = folder
        self._settings = settings
        self._models = models
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
        engine = load_engine(self._folder, self._settings, self.load, self._models)
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
