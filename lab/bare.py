"""The engine alone: no bus, no HTTP, one process that steps as fast as it can. What the mesh is measured against.

`process(*flags)` starts one with a worker's flags; it reads jobs from its standard input, a JSON line each, and
answers each with the seconds it took.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from weft.columns import pack_u32
from weft.hashing import block_hashes, chain_root
from weft.messages import Choice, SamplingParams, TokenizedRequest
from weft.model_folder import digest, read
from weft.settings import WorkerSettings, load
from weft.up import WORKER_ENVIRON


@dataclasses.dataclass(frozen=True, eq=False)
class Bare:
    """A running engine process."""

    child: subprocess.Popen[str]

    def seconds(self, prompts: list[list[int]], outputs: list[int]) -> float:
        """How long it takes to give each prompt its number of output tokens, all asked for at once."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(json.dumps([prompts, outputs]) + "\n")
        self.child.stdin.flush()
        return float(json.loads(self.child.stdout.readline()))

    def tokens_per_s(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Output tokens a second."""
        return len(prompts) * num_tokens / self.seconds(prompts, [num_tokens] * len(prompts))


@contextmanager
def process(*flags: str, environ: Mapping[str, str] = WORKER_ENVIRON) -> Iterator[Bare]:
    """An engine with these worker flags, loaded and warm. `environ`: what `weft up` would set for a worker, or else."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")} | dict(environ)
    command = [sys.executable, "-m", "lab.bare", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as child:
        try:
            yield Bare(child)
        finally:
            child.kill()


def serve(argv: list[str]) -> None:
    """Run one engine on the jobs of standard input."""
    # Only the child needs torch.
    from worker_svc.engine_io import Add
    from worker_svc.torch_engine import load_engine

    settings = load(WorkerSettings, argv, {}, prog="lab.bare")
    folder = read(settings.model)
    engine = load_engine(folder, settings)
    root = chain_root(digest(folder))
    number = 0
    for line in sys.stdin:
        prompts, outputs = json.loads(line)
        started = time.perf_counter()
        for prompt, output in zip(prompts, outputs, strict=True):
            column = pack_u32(prompt)
            sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
            hashes = b"".join(block_hashes(root, column))
            choices = [Choice(slot=number, seed=0)]
            request = TokenizedRequest(f"r{number}", 0, "lab", folder.name, column, hashes, sampling, choices)
            engine.apply(Add(request))
            number += 1
        while engine.has_work:
            engine.step()
        sys.stdout.write(json.dumps(time.perf_counter() - started) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1:])
