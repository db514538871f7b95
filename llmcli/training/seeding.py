"""Random state of what torch draws by itself: dropout, which depends on (seed, number of the batch) alone."""

from __future__ import annotations

import torch

_MIXED = 0x9E3779B97F4A7C15


def seeded(seed: int, number: int, part: int = 0) -> None:
    """Sets torch's random state for part `part` of micro-batch `number`, so that a resumed run draws the same."""
    torch.manual_seed(((seed * _MIXED + number) * _MIXED + part) % 2**63)
