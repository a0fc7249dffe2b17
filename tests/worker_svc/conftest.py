"""Torch computes with one thread here: tests run side by side, and threads that wait for a core hold up all others."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
