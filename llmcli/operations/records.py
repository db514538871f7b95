"""Records that several operations yield."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage of the work has come."""

    stage: str
    done: int
    total: int | None  # None: not known
    unit: str  # "bytes", "documents", "merges", ...
