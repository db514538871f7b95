"""The most probable continuations: a beam of a session's rows, level by level, token ids only.

What may follow, where a continuation ends and which ones are the same is the caller's, behind `Rules`. The probability
of a result is the sum over all token paths that lead to it and were followed; a path is given up when it is outside the
beam, or less probable than `floor` times the least of the best `count` results, so sums err on the low side, if at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmcli.errors import LlmcliError
from llmcli.runtime.session import Session

Path = tuple[int, ...]  # the ids of a continuation
Mask = npt.NDArray[np.bool_]  # (size,): one for each token


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What may follow a path."""

    allowed: Mask | None = None  # None: every token
    meets: Mask | None = None  # tokens with which the path meets what was required; None: it was met before
    ends: Mask | None = None  # tokens before which the path is over as it stands; None: there is none


class Rules(Protocol):
    """What is asked of a continuation."""

    size: int  # ids at or above it never come

    def step(self, path: Path) -> Step:
        """What may follow the path."""
        ...

    def finished(self, path: Path) -> Hashable | None:
        """The result where the path's last token made it complete; None: it goes on."""
        ...

    def standing(self, path: Path) -> Hashable | None:
        """The result where the path is over as it stands; None: it is none."""
        ...


@dataclasses.dataclass(slots=True)
class Found:
    """A result: its probability, and how much of that was cut off by the limit of tokens."""

    key: Hashable
    probability: float = 0.0
    cut: float = 0.0


def search(
    session: Session,
    prompt: Sequence[int],
    rules: Rules,
    *,
    count: int,
    max_tokens: int,
    width: int | None = None,
    floor: float = 0.02,
) -> list[Found]:
    """The `count` most probable results, best first.

    Probabilities are of continuations that meet what the rules require, given that they meet it. `max_tokens` is the
    length at which a path is cut; prompt and path must fit the context but for the path's last token. Raises
    LlmcliError where the logits are not numbers.
    """
    width = width or min(max(4 * count, 16), 256)
    results: dict[Hashable, Found] = {}
    met = 0.0  # probability of everything that meets the requirement
    paths: list[Path] = [()]
    weights: list[float] = [1.0]
    logits = session.start([prompt])

    def add(key: Hashable | None, probability: float, *, cut: bool = False) -> None:
        if key is not None and probability > 0:
            found = results.setdefault(key, Found(key))
            found.probability += probability
            found.cut += probability if cut else 0.0

    def least() -> float:
        """What a path must have to be followed."""
        if len(results) < count:
            return 0.0
        return floor * sorted((found.probability for found in results.values()), reverse=True)[count - 1]

    for depth in range(1, max_tokens + 1):
        shares = _softmax(logits)[:, : rules.size] * np.asarray(weights, np.float32)[:, None]
        for row, path in enumerate(paths):
            step = rules.step(path)
            if step.allowed is not None:
                shares[row, ~step.allowed] = 0
            if step.meets is not None:
                met += float(shares[row, step.meets].sum(dtype=np.float64))
            if step.ends is not None:
                add(rules.standing(path), float(shares[row, step.ends].sum(dtype=np.float64)))
                shares[row, step.ends] = 0
        rows: list[int] = []
        followed: list[Path] = []
        followed_weights: list[float] = []
        for place in _largest(shares.reshape(-1), 4 * width, least()):
            row, identity = divmod(int(place), rules.size)
            probability, path = float(shares[row, identity]), (*paths[row], identity)
            key = rules.finished(path)
            if key is not None:
                add(key, probability)
            elif depth == max_tokens:
                add(rules.standing(path), probability, cut=True)
            elif len(rows) < width and probability >= least():
                rows.append(row)
                followed.append(path)
                followed_weights.append(probability)
        if not rows:
            break
        paths, weights = followed, followed_weights
        session.select(rows)
        logits = session.feed(np.array([[path[-1]] for path in paths], np.int64))[:, 0]

    best = sorted(results.values(), key=lambda found: (-found.probability, str(found.key)))[:count]
    return [Found(found.key, found.probability / met, found.cut / met) for found in best]


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with np.errstate(invalid="ignore"):
        raised = np.exp(logits - logits.max(-1, keepdims=True))
    shares: npt.NDArray[np.float32] = raised / raised.sum(-1, keepdims=True)
    if not np.isfinite(shares).all():
        raise LlmcliError("the model's logits are not finite: its weights are broken, or its precision too low")
    return shares


def _largest(values: npt.NDArray[np.float32], count: int, least: float) -> npt.NDArray[np.intp]:
    """Places of the largest values above 0 and not below `least`, largest first, equal ones in their order."""
    places = np.flatnonzero((values > 0) & (values >= least))
    if len(places) > count:
        places = np.sort(places[np.argpartition(-values[places], count)[:count]])
    return places[np.argsort(-values[places], kind="stable")]
