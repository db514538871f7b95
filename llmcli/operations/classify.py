"""`classify`: texts to labels, in batches of texts of a similar length, answered in the order they came in.

Invariant: a text's label and probabilities do not depend on the texts beside it, but for rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from llmcli import settings as configs
from llmcli.config_finetune import ClassifyConfig
from llmcli.data.cores import available_cores
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import Model, find_model, read_json
from llmcli.models.classifier import Classifier, labels_of
from llmcli.operations.task_classify import text_ids
from llmcli.runtime.torch_session import load_any, working_device
from llmcli.training.packing import pack

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


class Labeller:
    """A classifier with its tokenizer."""

    def __init__(self, model: Model, config: ClassifyConfig = ClassifyConfig()) -> None:  # noqa: B008  (frozen)
        configs.check(config)
        place = find_model(model)
        said = place.texts / "config.json"
        values = read_json(said)
        self.tokenizer = load_tokenizer(place.texts)
        device = working_device(config.device)
        torch.set_num_threads(config.threads or available_cores())
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        loaded = load_any(place.folder, device, dtype, adapter=place.adapter, kind="classifier")
        assert isinstance(loaded, Classifier)
        self.model, self.config = loaded, config
        self.labels = labels_of(values, str(said))
        if len(self.labels) != loaded.score.out_features:
            raise ConfigError(
                f"names {len(self.labels)} labels, the model has {loaded.score.out_features}", where=str(said)
            )
        self.several = values.get("problem_type") == "multi_label_classification"

    def classify(self, texts: Iterable[str]) -> Iterator[Classified]:
        """A record for each text, in order."""
        held: list[str] = []
        for text in texts:
            held.append(text)
            if len(held) == _AHEAD * self.config.batch_size:
                yield from self._sorted(held)
                held = []
        yield from self._sorted(held)

    def _sorted(self, texts: Sequence[str]) -> Iterator[Classified]:
        context = self.model.config.max_position_embeddings
        whole = [np.asarray(text_ids(self.tokenizer, text), np.int32) for text in texts]
        for text, ids in zip(texts, whole, strict=True):
            if not len(ids):
                raise DataError(f"the text {text!r} is empty, so there is nothing to classify")
        order = sorted(range(len(texts)), key=lambda index: len(whole[index]))
        found: dict[int, Classified] = {}
        for begin in range(0, len(order), self.config.batch_size):
            batch = order[begin : begin + self.config.batch_size]
            for index, scores in zip(batch, self._scores([whole[index][:context] for index in batch]), strict=True):
                found[index] = self._record(texts[index], scores, cut=len(whole[index]) > context)
        for index in range(len(texts)):
            yield found[index]

    @torch.inference_mode()
    def _scores(self, texts: Sequence[np.ndarray]) -> list[list[float]]:
        packed = pack(texts, [np.array([len(ids) - 1]) for ids in texts]).to(self.model.embedding.device)
        scores = self.model.scores(packed.ids, packed.segments, packed.chosen).float()
        return (scores.sigmoid() if self.several else scores.softmax(-1)).tolist()

    def _record(self, text: str, scores: Sequence[float], *, cut: bool) -> Classified:
        every = dict(zip(self.labels, scores, strict=True))
        best = max(every, key=lambda label: every[label])
        if not self.several:
            return Classified(text, best, every[best], None, every, cut)
        chosen = tuple(label for label in self.labels if every[label] >= self.config.threshold)
        return Classified(text, best if chosen else None, every[best], chosen, every, cut)


def classify(
    model: Model,
    texts: str | Iterable[str],
    config: ClassifyConfig = ClassifyConfig(),  # noqa: B008  (frozen)
) -> Iterator[Classified]:
    """The labels of a text, or of many, by a classifier: a model folder, a run, or a base with an adapter.

    Raises DataError for a model that is no classifier, and for an empty text.
    """
    yield from Labeller(model, config).classify([texts] if isinstance(texts, str) else texts)
