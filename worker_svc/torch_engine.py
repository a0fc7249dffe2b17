"""The engine on a model folder, in a thread of its own: what a worker that computes runs."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from weft import model_folder
from weft.hashing import BLOCK_SIZE
from weft.model_folder import ModelFolder
from weft.settings import WorkerSettings
from worker_svc.engine import Engine
from worker_svc.engine_io import Command, EngineLoad, StepOutput
from worker_svc.runner import Runner
from worker_svc.step_input import StepInput

log = logging.getLogger(__name__)


def load_engine(folder: ModelFolder, settings: WorkerSettings, load: EngineLoad | None = None) -> Engine:
    """Load the model and warm it up.

    Args:
        load: numbers for the engine to keep up to date.

    Raises:
        SettingsError: names what in the folder or the settings does not work.
    """
    load = EngineLoad() if load is None else load

    def on_progress(share: float) -> None:
        load.loaded = share

    digest = model_folder.digest(folder)
    runner = Runner(
        folder,
        device=settings.device,
        dtype=settings.dtype,
        kv_memory=settings.kv_memory,
        threads=settings.threads,
        kernels=settings.kernels,
        on_progress=on_progress,
    )
    warm_up(runner, settings.max_num_batched_tokens)
    return Engine(
        runner,
        settings,
        digest=digest,
        eos_token_ids=folder.eos_token_ids,
        load=load,
        overlaps=runner.device.type == "cuda",
    )


def warm_up(runner: Runner, max_num_batched_tokens: int) -> None:
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
        engine = load_engine(self._folder, self._settings, self.load)
        self.layout, self.block_bytes = engine.layout, engine.block_bytes
        self._thread = threading.Thread(target=self._run, args=(engine, on_output), name="engine", daemon=True)
        # What is loaded by now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self._thread.start()

    def submit(self, command: Command) -> None:
        self._inbox.put(command)

    def stop(self) -> None:
        self._inbox.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            gc.unfreeze()

    def _run(self, engine: Engine, on_output: Callable[[StepOutput], None]) -> None:
        try:
            while (commands := self._receive(engine.has_work)) is not None:
                engine.exchange.set_available(self.remote_cache_available)
                engine.exchange.load_bytes_per_s = self.load_bytes_per_s
                output = engine.step(commands)
                if output is not None:
                    on_output(output)
        except Exception as error:
            log.exception("engine failed")
            self.load.failure = error

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
