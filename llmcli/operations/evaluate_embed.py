"""`evaluate --task embed`: whether texts that people find alike lie close to each other as vectors.

Invariant: what correlates with the scores is the cosine of two embeddings; Pearson's and Spearman's coefficients are
scipy's, equal values sharing the mean of their ranks, and ranks are made anew for every set of examples.

To test the difference of two models, cosines are exchanged as ranks and in standard deviations from their mean, since
one model's may all lie near 1 and another's around 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmcli.config_embed import EmbedConfig
from llmcli.data.examples import Example, ScoredPairExample
from llmcli.errors import ConfigError, DataError
from llmcli.operations.embed import Embedder
from llmcli.operations.evaluate_figures import Array, Measure, Outcome, Summed
from llmcli.operations.evaluate_model import EvaluatedModel

_FEW = 1e-12  # a variance, as a share of the mean square, that is rounding


class EmbedTask:
    """Pairs of texts with a score."""

    names: tuple[str, ...] = ("spearman", "pearson")

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """Correlations over pairs."""
        return Correlations()

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        pairs = []
        for example in examples:
            if not isinstance(example, ScoredPairExample):
                raise DataError("has no score; embed is measured on two texts and a score", where=example.where)
            pairs.append(example)
        texts = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
        vectors, cut = embeddings(model, texts)
        place = {text: number for number, text in enumerate(texts)}
        for pair in pairs:
            first, second = place[pair.first], place[pair.second]
            found = cosine(vectors[first], vectors[second])
            yield Outcome(
                {"score": pair.score, "cosine": found},
                {"score": pair.score, "cosine": round(found, 6)},
                bool(cut[first] or cut[second]),
            )


class Correlations:
    """Spearman's and Pearson's coefficients of scores and cosines."""

    whole: bool = True

    def features(self, outcome: Outcome) -> list[float]:
        """The score, the cosine as Spearman's takes it, and as Pearson's does."""
        return [outcome.values["score"], outcome.values["cosine"], outcome.values["cosine"]]

    def figures(self, sums: Array) -> dict[str, Array]:
        """Of examples (R, N, 3)."""
        scores = sums[..., 0]
        return {
            "spearman": correlation(ranks(scores), ranks(sums[..., 1])),
            "pearson": correlation(scores, sums[..., 2]),
        }

    def exchangeable(self, features: Array) -> tuple[Measure, Array]:
        """Products of ranks, and of numbers in standard deviations from their mean."""
        columns = []
        for scores, cosines in ((ranks(features[:, 0]), ranks(features[:, 1])), (features[:, 0], features[:, 2])):
            x, y = _standard(scores), _standard(cosines)
            columns += [np.ones_like(x), x, y, x * x, y * y, x * y]
        return _Moments(), np.stack(columns, 1)

    def details(self, sums: Array) -> dict[str, Any]:
        """Nothing."""
        return {}


class _Moments(Summed):
    """The coefficients by sums; of an exchange the ranks stay as they were."""

    def features(self, outcome: Outcome) -> list[float]:
        raise NotImplementedError("made of all examples at once")

    def figures(self, sums: Array) -> dict[str, Array]:
        found = {}
        for name, (count, x, y, xx, yy, xy) in (("spearman", sums.T[:6]), ("pearson", sums.T[6:])):
            spread = (xx - x * x / count) * (yy - y * y / count)
            with np.errstate(invalid="ignore", divide="ignore"):
                found[name] = (xy - x * y / count) / np.sqrt(np.where(spread > _FEW * count * count, spread, np.nan))
        return found

    def details(self, sums: Array) -> dict[str, Any]:
        return {}


def _standard(values: Array) -> Array:
    centred: Array = values - values.mean()
    length = float(np.sqrt((centred**2).mean()))
    return centred / length if length else centred


def ranks(values: Array) -> Array:
    """Ranks from 1 along the last axis; equal values share the mean of theirs (scipy's rankdata)."""
    order = np.argsort(values, -1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    count = values.shape[-1]
    new = np.ones(values.shape, bool)  # where a value is another than the one before it
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    places = np.arange(count)
    first = np.maximum.accumulate(np.where(new, places, 0), -1)
    last_one = np.ones(values.shape, bool)
    last_one[..., :-1] = new[..., 1:]
    last = np.minimum.accumulate(np.where(last_one, places, count)[..., ::-1], -1)[..., ::-1]
    found = np.empty(values.shape, np.float64)
    np.put_along_axis(found, order, (first + last) / 2 + 1, -1)
    return found


def correlation(first: Array, second: Array) -> Array:
    """Pearson's coefficient along the last axis; NaN where all values of one side are equal."""
    x, y = first - first.mean(-1, keepdims=True), second - second.mean(-1, keepdims=True)
    products = (x * y).sum(-1)
    spread = np.sqrt((x * x).sum(-1)), np.sqrt((y * y).sum(-1))
    flat = np.zeros(products.shape, bool)
    for length, values in zip(spread, (first, second), strict=True):
        flat |= length**2 <= _FEW * (values * values).sum(-1)
    return np.where(flat, np.nan, products / np.where(flat, 1.0, spread[0] * spread[1]))


def cosine(first: Array, second: Array) -> float:
    """Of two vectors, in float64; 0 where one is all zeros."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length else 0.0


def embeddings(model: EvaluatedModel, texts: Sequence[str]) -> tuple[list[Array], list[bool]]:
    """Each text's vector, made as `embed` makes it, and whether the text's end was not read."""
    config = model.config
    if config.quantize is not None:
        raise ConfigError("vectors are made by the weights as they are; leave --quantize out", where=model.name)
    settings = EmbedConfig(truncate=True, device=config.device, threads=config.threads)
    embedder = Embedder(model.model, settings)
    try:
        found = list(embedder.embed(texts))
    finally:
        embedder.model.close()
    return [each.embedding.astype(np.float64) for each in found], [each.left_out > 0 for each in found]
