"""`fill-mask`: what a missing word of a text may be, by an encoder's masked-language-model head.

Invariant: a text's candidates do not depend on the texts beside it, but for rounding; a probability is the head's own,
over the whole vocabulary. The mask is the tokenizer's own token, written in the text; other special tokens in it count
as such too, as they do in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmcli import settings as configs
from llmcli.config_generation import FillMaskConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import Model, ModelPlace, find_model, is_onnx, read_json
from llmcli.models.encoder_config import is_encoder
from llmcli.runtime.session import Logits


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A token for the place of the mask, and the text with it."""

    token: str
    id: int
    probability: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Filled:
    """A text and its candidates, the most probable first."""

    text: str
    candidates: tuple[Candidate, ...]


class MaskScorer(Protocol):
    """What scores the tokens for a place of a text: a model in torch, or a graph."""

    longest: int  # tokens of a text at most

    def scores(self, texts: Sequence[npt.NDArray[np.integer[Any]]], places: Sequence[int]) -> Logits:
        """Of the token at a place of each text: (texts, vocabulary)."""
        ...


class MaskFiller:
    """An encoder with its masked-language-model head and its tokenizer."""

    def __init__(self, model: Model, config: FillMaskConfig = FillMaskConfig()) -> None:  # noqa: B008  (frozen)
        configs.check(config)
        place = find_model(model)
        if place.adapter is not None:
            raise UsageError("an encoder takes no adapter")
        values = read_json(place.folder / "config.json")
        if not is_encoder(values):
            told = f"is a {values.get('model_type')!r:.80}, which has no mask: an encoder is needed"
            raise DataError(told, where=str(place.folder))
        self.tokenizer = load_tokenizer(place.texts)
        if self.tokenizer.mask_id is None:
            raise DataError("the tokenizer has no mask token", where=self.tokenizer.files.where)
        self.mask_id, self.mask = self.tokenizer.mask_id, self.tokenizer.token(self.tokenizer.mask_id)
        self.scorer = _opened(place, config)
        self.config = config

    def fill(self, texts: Iterable[str]) -> Iterator[Filled]:
        """A record for each text, in order. Raises DataError for a text without exactly one mask, or too long."""
        held: list[tuple[str, np.ndarray]] = []
        for text in texts:
            held.append((text, self._ids(text)))
            if len(held) == self.config.batch_size:
                yield from self._filled(held)
                held = []
        if held:
            yield from self._filled(held)

    def _ids(self, text: str) -> np.ndarray:
        ids = np.asarray(self.tokenizer.encode(text, special=True, parse_special=True), np.int64)
        masks = int((ids == self.mask_id).sum())
        if masks != 1:
            told = f"has {masks} mask tokens" if masks else "has no mask token"
            raise DataError(f"the text {text!r:.120} {told}; write {self.mask} once, for what is missing")
        longest = self.scorer.longest
        if len(ids) > longest:
            raise DataError(f"the text {text!r:.120} has {len(ids):,} tokens, the model has positions for {longest:,}")
        return ids

    def _filled(self, texts: Sequence[tuple[str, np.ndarray]]) -> Iterator[Filled]:
        places = [int(np.flatnonzero(ids == self.mask_id)[0]) for _, ids in texts]
        scores = self.scorer.scores([ids for _, ids in texts], places).astype(np.float64)
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities = (odds / odds.sum(-1, keepdims=True))[:, : self.tokenizer.vocab_size]
        for (text, _), shares in zip(texts, probabilities, strict=True):
            best = np.argsort(-shares, kind="stable")[: self.config.top].tolist()
            yield Filled(text, tuple(self._candidate(text, identity, float(shares[identity])) for identity in best))

    def _candidate(self, text: str, identity: int, probability: float) -> Candidate:
        before, _, after = text.partition(self.mask)
        token = self.tokenizer.token(identity)
        if token.startswith("##"):  # WordPiece: the rest of a word
            shown, filled = token, before.rstrip() + token[2:] + after
        elif self.tokenizer.kind == "WordPiece":
            shown, filled = token, before + token + after
        else:  # a token brings the space before it, or there is none
            shown = self.tokenizer.token_text(identity)
            filled = (before.rstrip() + shown + after).lstrip()
        return Candidate(shown.strip() or shown, identity, probability, filled)


def _opened(place: ModelPlace, config: FillMaskConfig) -> MaskScorer:
    """The encoder, on the engine that its files ask for."""
    if not is_onnx(place.folder):
        from llmcli.operations.mask_scores import TorchMaskScorer

        return TorchMaskScorer(place.folder, device=config.device, threads=config.threads)
    from llmcli.operations.graph_scores import GraphMaskScorer

    return GraphMaskScorer(Path(place.folder), device=config.device, threads=config.threads)


def fill_mask(
    model: Model,
    texts: str | Iterable[str],
    config: FillMaskConfig = FillMaskConfig(),  # noqa: B008  (frozen)
) -> Iterator[Filled]:
    """What may stand in the place of a text's mask, or of many texts' each, by an encoder's folder or run.

    Raises DataError for a model without a masked-language-model head, and for a text without exactly one mask.
    """
    yield from MaskFiller(model, config).fill([texts] if isinstance(texts, str) else texts)
