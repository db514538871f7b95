"""The learning rate's schedule: warm-up, flat, linear decay to zero.

Source: the trapezoidal schedule of arXiv:2405.18392 ("Scaling laws and compute-optimal training beyond fixed
training durations"); its decay may begin at any time, which is what a budget in seconds needs.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Budget:
    """When training ends: whichever bound is reached first; None where there is none."""

    steps: int | None
    seconds: float | None

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the budget that is spent before `step` (0 is the first), 0 to 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / max(self.steps, 1))
        if self.seconds is not None:
            shares.append(elapsed / self.seconds)
        return min(max(shares), 1.0)


def multiplier(step: int, progress: float, *, warmup_steps: int, decay_fraction: float) -> float:
    """What the peak learning rate is multiplied by at `step` (0 is the first)."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    decay = 1.0 if decay_fraction <= 0 else min(1.0, (1.0 - progress) / decay_fraction)
    return warm * decay
