"""Groups that were formed in another order than that of the channels."""

from __future__ import annotations

import torch

from weft.errors import SettingsError


def channel_order(groups: torch.Tensor, num_groups: int, label: str) -> torch.Tensor | None:
    """Channels group by group; None where they stand like that.

    Args:
        groups: [in] of any integers: the group of each channel.
        label: of the tensor, for the error.

    Raises:
        SettingsError: these are not `num_groups` groups of one size.
    """
    groups = groups.long()
    size = len(groups) // num_groups
    in_order = torch.arange(len(groups), device=groups.device) // size
    if torch.equal(groups, in_order):
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], in_order):
        raise SettingsError(f"{label} does not name {num_groups} groups of {size} channels")
    return order
