"""`evaluate --task embed`: whether texts that people find alike lie close to each other as vectors.

Invariant: what correlates with the scores is the cosine of two embeddings; Pearson's and Spearman's coefficients are
scipy's, equal values sharing the mean of their ranks, and ranks are made anew for every set of examples.

To test the difference of two models, cosines are exchanged as ranks and in standard deviations from their mean, since
one model's may all lie near 1 and another's around 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llmcli.data.cores import available_cores
from llmcli.data.examples import Example, ScoredPairExample
from llmcli.data.framed import fitted
from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import refuse_adapter
from llmcli.models.encoder_folder import load_encoder
from llmcli.models.pooling import Pooling, pooled, read_pooling
from llmcli.models.text_model import TextModel, most_tokens
from llmcli.operations.evaluate_figures import Array, Measure, Outcome, Summed
from llmcli.operations.evaluate_model import EvaluatedModel
from llmcli.runtime.torch_session import load_any, working_device
from llmcli.training.packing import pack

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


@torch.inference_mode()
def embeddings(model: EvaluatedModel, texts: Sequence[str]) -> tuple[Array, list[bool]]:
    """Each text's vector as the model's folder says it is made, else the mean of its states; and what was not read.

    (texts, C); whether a text's end was left out. Vectors are not normalized, as their cosines need no norm.
    """
    if model.is_onnx:
        raise ConfigError("embeds no texts: it is a graph that gives logits", where=model.name)
    place, config = model.place, model.config
    device = working_device(config.device)
    torch.set_num_threads(config.threads or available_cores())
    loaded: TextModel
    if model.is_encoder:
        refuse_adapter(place)
        loaded = load_encoder(place.folder, device, torch.float32)
    else:
        loaded = load_any(place.folder, device, torch.float32, adapter=place.adapter)
    pooling = read_pooling(place.texts) or Pooling()
    before = pooling.prompts.get(pooling.prompt or "", "")
    longest = min(pooling.longest or sys.maxsize, most_tokens(loaded.config))
    whole = [model.tokenizer.encode_framed(before + (text.lower() if pooling.lower else text)) for text in texts]
    cut = [len(read.ids) > longest for read in whole]
    ids = [
        np.asarray((fitted(read, longest) or read).ids if over else read.ids, np.int32)
        for read, over in zip(whole, cut, strict=True)
    ]
    order = sorted(range(len(texts)), key=lambda number: len(ids[number]))
    found = np.zeros((len(texts), loaded.config.hidden_size))
    step = config.batch_size or 64
    for begin in range(0, len(order), step):
        numbers = order[begin : begin + step]
        packed = pack([ids[number] for number in numbers], [np.array([0]) for _ in numbers]).to(loaded.embedding.device)
        states = loaded.hidden(packed.ids, segments=packed.segments)[0]
        found[numbers] = pooled(states, packed.lengths, pooling.mode).cpu().numpy()
    return found, cut
