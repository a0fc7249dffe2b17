"""The models that an engine computes with: the one that answers and, with speculation by one, the one that drafts.

They are loaded before there is an engine, and an engine only reads them: any number may share them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from weft import model_folder
from weft.errors import SettingsError
from weft.model_folder import BUNDLED, ModelFolder
from weft.settings import WorkerSettings
from worker_svc.loaded_model import LoadedModel, load_model
from worker_svc.model_options import ModelOptions


@dataclass(frozen=True, slots=True, eq=False)
class EngineModels:
    """As they were loaded, whatever has become of their files since."""

    folder: ModelFolder
    settings: WorkerSettings
    digest: bytes
    target: LoadedModel
    draft: LoadedModel | None

    def are_for(self, folder: ModelFolder, settings: WorkerSettings) -> bool:
        """Whether a worker with these settings would load the same."""
        mine = self.settings
        of_a_worker = dataclasses.replace(settings, mesh=mine.mesh, role=mine.role, threads=mine.threads)
        return folder == self.folder and of_a_worker == mine


def load_models(
    folder: ModelFolder, settings: WorkerSettings, on_progress: Callable[[float], None] = lambda share: None
) -> EngineModels:
    """Load them.

    Args:
        on_progress: called with the share of the larger one's weights that is loaded so far.

    Raises:
        SettingsError: names what in a folder or the settings does not work.
    """
    draft = load_draft(folder, settings) if settings.speculation == "draft" else None
    target = load_model(folder, ModelOptions.of(settings), on_progress=on_progress)
    return EngineModels(folder, settings, model_folder.digest(folder), target, draft)


def load_draft(target: ModelFolder, settings: WorkerSettings) -> LoadedModel:
    """Load the model that drafts for another.

    Raises:
        SettingsError: there is none, or it does not go with the target.
    """
    # What `quantize` says is of the model that answers.
    options = dataclasses.replace(ModelOptions.of(settings), quantize="none")
    return load_model(_find_draft_folder(target, settings), options)


def _find_draft_folder(target: ModelFolder, settings: WorkerSettings) -> ModelFolder:
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
