"""A model folder as the services see it: where it is, what its config says, and the digest that names its content.

Reads Hugging Face folders (config.json, generation_config.json, *.safetensors) without torch or transformers; the
weights themselves are the worker's business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from weft.errors import SettingsError
from weft.messages import SamplingParams
from weft.settings import ModelSettings

BUNDLED: Final = Path(__file__).parent / "demo_model"
DIGEST_BYTES: Final = 16
# Files up to this size are hashed whole; of larger ones, one page in every stride, since reading 16 GB takes minutes.
_WHOLE_FILE_BYTES: Final = 64 * 2**20
_STRIDE_BYTES: Final = 2**20
_PAGE_BYTES: Final = 4096
_SMALL_FILES: Final = ["*.json", "*.jinja"]
_MAX_FACTOR: Final = 1024
_NOT_CONTENT: Final = ("_name_or_path", "transformers_version", "architectures_version")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a folder's files say, weights aside."""

    path: Path
    name: str
    config: dict[str, Any]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_sampling: SamplingParams
    is_dummy: bool = False  # weights are made up, whatever files there are


def read(settings: ModelSettings) -> ModelFolder:
    """Read the folder that the settings name.

    Raises:
        SettingsError: no such folder or model, or a config that lacks or contradicts something.
    """
    is_dummy = settings.load_format == "dummy"
    path = locate(settings.model, with_weights=not is_dummy)
    config = read_json(path / "config.json")
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else {}
    if config.get("vision_config"):
        raise SettingsError(f"{path.name} is a model of images and text, and only models of text alone are served")
    context = _context(config, path)
    wanted = settings.max_model_len
    if wanted > context:
        raise SettingsError(f"max_model_len {wanted} is more than the {context} tokens that {path.name} was made for")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelFolder(
        path=path,
        name=settings.served_name or settings.model.rstrip("/").rsplit("/", 1)[-1],
        config=config,
        max_model_len=wanted or context,
        vocab_size=_positive(config, "vocab_size", path),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        default_sampling=_default_sampling(generation),
        is_dummy=is_dummy,
    )


def locate(name: str, *, with_weights: bool = True) -> Path:
    """The folder of a bundled model, a path, or a Hugging Face repository (downloaded if need be).

    Args:
        with_weights: of what is downloaded.

    Raises:
        SettingsError: there is none, or it cannot be downloaded.
    """
    if (BUNDLED / name / "config.json").exists() and "/" not in name:
        return BUNDLED / name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SettingsError(f"{name} has no config.json: it is no Hugging Face model folder")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        bundled = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))
        raise SettingsError(
            f"no model {name!r}: it is neither a folder, nor a Hugging Face name such as org/model, "
            f"nor a bundled model ({bundled})"
        )
    return _download(name, [*_SMALL_FILES, "*.safetensors"] if with_weights else _SMALL_FILES)


def digest(folder: ModelFolder) -> bytes:
    """What the KV of a token depends on besides tokens: 16 bytes over the config and the weights' content.

    Raises:
        SettingsError: the folder has no weights.
    """
    config = {key: value for key, value in folder.config.items() if key not in _NOT_CONTENT}
    state = blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    if folder.is_dummy:
        state.update(b"dummy")
        return state.digest()
    files = sorted(folder.path.glob("*.safetensors"))
    if not files:
        raise SettingsError(f"{folder.path} has no weights: no *.safetensors file in it")
    for file in files:
        size = file.stat().st_size
        state.update(size.to_bytes(8, "little"))
        step = _PAGE_BYTES if size <= _WHOLE_FILE_BYTES else _STRIDE_BYTES
        with file.open("rb") as source:
            for offset in range(0, size, step):
                source.seek(offset)
                state.update(source.read(_PAGE_BYTES))
    return state.digest()


def _download(name: str, patterns: list[str]) -> Path:
    # Heavy, and needed for hub names only.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingsError(
            f"cannot download {name} from the Hugging Face hub ({reason}); download it where there is a network "
            f"(`hf download {name}`) and give its folder instead"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises SettingsError, which names the file, if it holds no JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{path} is no JSON object")
    return value


def _context(config: dict[str, Any], path: Path) -> int:
    """Tokens that a text may have. `max_position_embeddings` may still say what they were before YaRN (as in Qwen)."""
    context = _positive(config, "max_position_embeddings", path)
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) != "yarn":
        return context
    key = "original_max_position_embeddings"
    original, factor = config.get(key) or scaling.get(key), scaling.get("factor")
    # What is wrong here, the worker says.
    if not isinstance(original, int) or not isinstance(factor, int | float) or not 1 <= factor <= _MAX_FACTOR:
        return context
    return max(context, int(original * factor))


def _positive(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise SettingsError(f"{path / 'config.json'}: {key} is {value!r}, not a positive whole number")
    return value


def _default_sampling(generation: dict[str, Any]) -> SamplingParams:
    if generation.get("do_sample") is False:
        return SamplingParams()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return SamplingParams(**{name: generation[name] for name in names if generation.get(name) is not None})
