"""Load as a template does, fork, and compute with two threads: `python forked_engine.py`, in a process without threads.

Writes, as JSON: the tokens of the child's engine, those of an engine that loaded for itself, and the child's threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from tests.support.engine_requests import make_request
from tests.support.engine_runs import run
from weft import model_folder
from weft.messages import SamplingParams
from weft.settings import WorkerSettings, load
from worker_svc.engine_io import Add
from worker_svc.engine_models import EngineModels
from worker_svc.template import load_models_to_share
from worker_svc.torch_engine import load_engine

SETTINGS = load(WorkerSettings, ["--device", "cpu", "--threads", "2", "--kv-memory", "32MiB"], {})
FOLDER = model_folder.read(SETTINGS.model)


def greedy(models: EngineModels | None) -> list[int]:
    """Of a prompt that is long enough for two threads, by a thread of its own as in a worker."""
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompt = [300 + 7 * i % 1000 for i in range(400)]
    request = make_request(prompt, digest=model_folder.digest(FOLDER), sampling=sampling)
    found: list[int] = []
    thread = threading.Thread(
        target=lambda: found.extend(run(load_engine(FOLDER, SETTINGS, models=models), [Add(request)]).tokens())
    )
    thread.start()
    thread.join()
    return found


def count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


if __name__ == "__main__":
    shared = load_models_to_share(FOLDER, SETTINGS)
    assert count_threads() == 1
    read, write = os.pipe()
    child = os.fork()
    # Threads that are waited for in vain are waited for for ever.
    signal.alarm(30)
    if child == 0:
        before = count_threads()
        os.write(write, json.dumps([greedy(shared), before, count_threads()]).encode())
        os._exit(0)
    os.close(write)
    tokens, before, after = json.loads(os.read(read, 4096) or "[[], 0, 0]")
    os.waitpid(child, 0)
    sys.stdout.write(json.dumps({"forked": tokens, "plain": greedy(None), "before": before, "after": after}))
