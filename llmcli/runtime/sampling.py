"""Sampling: from the logits of one position to the next token. Numpy only, the same for every engine.

Invariant: what is drawn depends on the logits and the row's own random numbers alone, never on other rows of a batch.
The order is that of transformers (repetition penalty, temperature, top-k, top-p, min-p), so settings carry over.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmcli.config import SamplingConfig
from llmcli.errors import LlmcliError

Vector = npt.NDArray[np.float32]
_HEAD = 512  # the most probable tokens that top-p looks at first: sorting a vocabulary of 150,000 costs 10 ms


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A token that was chosen: its log-probability and those of the most probable tokens, before any setting."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenMask(Protocol):
    """Which tokens may come next in a text that grows: a grammar, or whole characters."""

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        ...

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next: (V,)."""
        ...

    def accept(self, identity: int) -> None:
        """Takes a token, one of those that are allowed."""
        ...

    def copy(self) -> TokenMask:
        """Another text that stands where this one stands."""
        ...


class Sampler:
    """Chooses a row's tokens. `stream` tells the rows of a seed apart, so that each draws numbers of its own.

    What `matcher` does not allow has no probability: it is left out before temperature, top-k and the rest.
    """

    def __init__(
        self,
        config: SamplingConfig,
        *,
        seed: int = 0,
        stream: Sequence[int] = (),
        seen: Sequence[int] = (),
        matcher: TokenMask | None = None,
    ) -> None:
        self.config, self.matcher = config, matcher
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *stream])))
        self._seen = set(seen) if config.repetition_penalty != 1 else None

    def choose(self, logits: Vector, *, top: int | None = None) -> Choice:
        """The next token of (V,) logits. `top`: report its log-probability and those of so many tokens; None: neither.

        Raises LlmcliError where the logits are not numbers.
        """
        if not np.isfinite(logits.max()):
            raise LlmcliError("the model's logits are not finite: its weights are broken, or its precision too low")
        scores = self._penalised(logits)
        kept: npt.NDArray[np.int64] | None = None  # the ids of the scores, where they are not all there
        if self.matcher is not None:
            allowed = self.matcher.allowed()
            if self.config.temperature > 0 and 2 * np.count_nonzero(allowed) < len(allowed):
                kept = np.flatnonzero(allowed)  # few are drawn from faster than many
                scores = scores[kept]
            else:
                scores = np.where(allowed, scores, -np.inf)
        if self.config.temperature == 0:
            identity = int(scores.argmax())
        else:
            ids, probabilities = distribution(scores, self.config)
            # The sum of the probabilities is 1 but for rounding; the last token must not lie beyond it.
            bounds = probabilities.cumsum()
            place = int(bounds.searchsorted(self._random.random() * bounds[-1], side="right"))
            identity = int(ids[min(place, len(ids) - 1)])
        if kept is not None:
            identity = int(kept[identity])
        if self.matcher is not None:
            self.matcher.accept(identity)
        if self._seen is not None:
            self._seen.add(identity)
        if top is None:
            return Choice(identity, 0.0)
        logprobs = logits.astype(np.float64) - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        best = most_probable(logits, top)
        alternatives = tuple((int(item), float(logprobs[item])) for item in best)
        return Choice(identity, float(logprobs[identity]), alternatives)

    def fork(self) -> Sampler:
        """A sampler that, given the same logits, chooses what this one is going to."""
        twin = copy.copy(self)
        if self.config.temperature > 0:
            twin._random = np.random.Generator(np.random.PCG64(0))
            twin._random.bit_generator.state = self._random.bit_generator.state
        twin._seen = None if self._seen is None else set(self._seen)
        twin.matcher = None if self.matcher is None else self.matcher.copy()
        return twin

    def is_close(self, logits: Vector, error: float) -> bool:
        """Whether the most probable token leads by less than rounding may move it: `error` of its height."""
        scores = self._penalised(logits)
        if self.matcher is not None:
            scores = np.where(self.matcher.allowed(), scores, -np.inf)
        height = max(float(logits.max()) - float(logits[::32].mean()), 1.0)  # over the others; some are enough
        return bool(np.count_nonzero(scores >= scores.max() - error * height) > 1)

    def _penalised(self, logits: Vector) -> npt.NDArray[np.floating]:
        """Keskar et al. 2019 (CTRL), section 4.1: a token that occurred loses, whatever its logit's sign."""
        if not self._seen:
            return logits
        ids = np.fromiter(self._seen, np.int64, len(self._seen))
        scores = logits.astype(np.float64)
        found, penalty = scores[ids], self.config.repetition_penalty
        scores[ids] = np.where(found < 0, found * penalty, found / penalty)
        return scores


def distribution(
    logits: npt.NDArray[np.floating], config: SamplingConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn and their probabilities; `temperature` must not be 0.

    top-k keeps the k most probable, top-p the fewest most probable whose sum reaches p (Holtzman et al. 2020), min-p
    those of at least p times the largest probability (Nguyen et al. 2024). One token always stays.
    """
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # by a temperature near 0 the others fall to minus infinity, as they should
        scores = (scores - scores.max()) / config.temperature
    if 0 < config.top_k < len(scores):
        ids = np.sort(most_probable(scores, config.top_k))
        weights = np.exp(scores[ids])
    else:
        ids, weights = np.arange(len(scores)), np.exp(scores)
    weights /= weights.sum()
    if config.top_p < 1:
        kept = np.sort(_nucleus(weights, config.top_p))
        ids, weights = ids[kept], weights[kept]
    if config.min_p > 0:
        likely = weights >= config.min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights / weights.sum()


def _nucleus(weights: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.int64]:
    """The fewest most probable places whose sum reaches the share; at least one."""
    head = min(_HEAD, len(weights))
    while True:
        order = most_probable(weights, head)
        reached = int(weights[order].cumsum().searchsorted(share)) + 1
        if reached <= head or head == len(weights):
            return order[:reached]
        head = min(8 * head, len(weights))


def most_probable(scores: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """The places of the `count` greatest, greatest first, equal ones in order of place."""
    count = min(count, len(scores))
    if count < 1:
        return np.empty(0, np.int64)
    if count == len(scores):
        return np.argsort(-scores, kind="stable")
    # Among equals at the border the partition takes any; all of them are looked at, so that the first ones win.
    border = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= border)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]
