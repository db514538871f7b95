"""`classify`: texts to labels, in batches of texts of a similar length, answered in the order they came in.

A graph of onnxruntime is run without torch.

Invariant: a text's label and probabilities do not depend on the texts beside it, but for rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from llmcli import settings as configs
from llmcli.config_finetune import ClassifyConfig
from llmcli.data.framed import FramedEncoding, fitted
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.files.artefacts import Model, ModelPlace, find_model, is_onnx, read_json
from llmcli.models.encoder_config import is_encoder
from llmcli.models.labels import gives_several, is_classifier, labels_of
from llmcli.runtime.session import Logits

_AHEAD = 16  # batches that are read and sorted together


@dataclasses.dataclass(frozen=True, slots=True)
class Classified:
    """A text's most probable label; of a model with several labels a text, all that are probable enough."""

    text: str
    label: str | None  # the most probable one; None: none reaches the threshold
    probability: float  # of the most probable one
    labels: tuple[str, ...] | None = None  # of a model with several labels a text
    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)
    cut: bool = False  # the text was longer than the context, and its end was not read


class Scorer(Protocol):
    """What gives texts scores: a model in torch, or a graph."""

    context: int  # tokens of a text at most
    labels: int

    def scores(self, texts: Sequence[npt.NDArray[np.integer[Any]]]) -> Logits:
        """Of texts of at least one id and at most `context`: (texts, labels)."""
        ...


@runtime_checkable
class FrameScorer(Protocol):
    """A scorer that is told which text of a pair a token is of: an encoder."""

    context: int
    labels: int
    names: list[str]  # of the labels

    def framed_scores(self, texts: Sequence[FramedEncoding]) -> Logits:
        """Of texts of at most `context` tokens: (texts, labels)."""
        ...


class Labeller:
    """A classifier with its tokenizer."""

    def __init__(self, model: Model, config: ClassifyConfig = ClassifyConfig()) -> None:  # noqa: B008  (frozen)
        configs.check(config)
        place = find_model(model)
        said = place.texts / "config.json"
        values = read_json(said)
        self.tokenizer = load_tokenizer(place.texts)
        self.scorer, self.config = _opened(place, values, config), config
        self.labels = self.scorer.names if isinstance(self.scorer, FrameScorer) else labels_of(values, str(said))
        if len(self.labels) != self.scorer.labels:
            raise ConfigError(f"names {len(self.labels)} labels, the model has {self.scorer.labels}", where=str(said))
        self.several = gives_several(values)

    def classify(self, texts: Iterable[str | tuple[str, str]]) -> Iterator[Classified]:
        """A record for each text or pair of texts, in order; of a pair `text` has the second one on a line below."""
        held: list[str | tuple[str, str]] = []
        for text in texts:
            held.append(text)
            if len(held) == _AHEAD * self.config.batch_size:
                yield from self._sorted(held)
                held = []
        yield from self._sorted(held)

    def _sorted(self, given: Sequence[str | tuple[str, str]]) -> Iterator[Classified]:
        context = self.scorer.context
        texts = [each if isinstance(each, str) else "\n".join(each) for each in given]
        whole = [self._read(each) for each in given]
        for text, read in zip(texts, whole, strict=True):
            if all(of is None for of in read.texts):
                raise DataError(f"the text {text!r} is empty, so there is nothing to classify")
        order = sorted(range(len(texts)), key=lambda index: len(whole[index].ids))
        found: dict[int, Classified] = {}
        for begin in range(0, len(order), self.config.batch_size):
            batch = order[begin : begin + self.config.batch_size]
            for index, scores in zip(batch, self._scores([whole[index] for index in batch]), strict=True):
                found[index] = self._record(texts[index], scores, cut=len(whole[index].ids) > context)
        for index in range(len(texts)):
            yield found[index]

    def _read(self, given: str | tuple[str, str]) -> FramedEncoding:
        """A text's ids; of a pair, an encoder reads both in one frame, a decoder one on a line below the other."""
        if isinstance(given, str):
            return self.tokenizer.encode_framed(given)
        first, second = given
        if isinstance(self.scorer, FrameScorer):
            return self.tokenizer.encode_framed(first, second)
        return self.tokenizer.encode_framed(f"{first}\n{second}")

    def _scores(self, texts: Sequence[FramedEncoding]) -> list[list[float]]:
        """Probabilities of each text's labels."""
        context = self.scorer.context
        if isinstance(self.scorer, FrameScorer):
            kept = [text if len(text.ids) <= context else fitted(text, context) or text for text in texts]
            scores = self.scorer.framed_scores(kept)
        else:
            scores = self.scorer.scores([np.asarray(text.ids[:context], np.int32) for text in texts])
        found: list[list[float]] = probabilities(scores, several=self.several).tolist()
        return found

    def _record(self, text: str, scores: Sequence[float], *, cut: bool) -> Classified:
        every = dict(zip(self.labels, scores, strict=True))
        best = max(every, key=lambda label: every[label])
        if not self.several:
            return Classified(text, best, every[best], None, every, cut)
        chosen = tuple(label for label in self.labels if every[label] >= self.config.threshold)
        return Classified(text, best if chosen else None, every[best], chosen, every, cut)


def _opened(place: ModelPlace, values: dict[str, Any], config: ClassifyConfig) -> Scorer | FrameScorer:
    """The model, on the engine that its files ask for."""
    if not is_onnx(place.folder):
        from llmcli.operations.label_scores import EncoderScorer, TorchClassifier

        if is_encoder(values):
            return EncoderScorer(place, device=config.device, threads=config.threads)
        return TorchClassifier(place, device=config.device, threads=config.threads)
    if is_encoder(values):
        from llmcli.operations.graph_scores import GraphEncoderScorer

        return GraphEncoderScorer(Path(place.folder), device=config.device, threads=config.threads)
    if config.device == "mps":
        raise UsageError("ONNX folders run on cpu or cuda; mps needs the model that was exported", where="--device")
    if not is_classifier(values):
        raise DataError("is no classifier, but a model that writes", where=str(place.folder))
    from llmcli.runtime.onnx_classifier import OnnxClassifier

    device = "cuda" if config.device == "cuda" else "cpu"
    return OnnxClassifier(Path(place.folder), threads=config.threads, device=device)


def probabilities(scores: Logits, *, several: bool) -> Logits:
    """Scores (texts, labels) as probabilities: of one label a text, or of each label by itself."""
    scores = scores.astype(np.float64)
    odds = np.exp(-np.logaddexp(0, -scores)) if several else np.exp(scores - scores.max(-1, keepdims=True))
    found: Logits = odds if several else odds / odds.sum(-1, keepdims=True)
    return found


def text_ids(tokenizer: TextTokenizer, text: str, pair: str | None = None) -> list[int]:
    """The ids of a text to classify, as transformers' tokenizers give them; the second text stands on a line below."""
    return tokenizer.encode(text if pair is None else f"{text}\n{pair}", special=True)


def classify(
    model: Model,
    texts: str | Iterable[str | tuple[str, str]],
    config: ClassifyConfig = ClassifyConfig(),  # noqa: B008  (frozen)
) -> Iterator[Classified]:
    """The labels of a text, or of many, by a classifier: a model or ONNX folder, a run, or a base with an adapter.

    Raises DataError for a model that is no classifier, and for an empty text.
    """
    yield from Labeller(model, config).classify([texts] if isinstance(texts, str) else texts)
