"""The bundled demo models: two tiny storytellers of nonsense, trained from scratch for trying the system."""

from pathlib import Path

TALES_6M = Path(__file__).parent / "tales-6m"
TALES_1M = Path(__file__).parent / "tales-1m"
