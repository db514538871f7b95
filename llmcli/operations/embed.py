"""`embed`: texts to vectors, or to the state of each of their tokens; sorted by length within a window, out in order.

Invariant: a text's vector does not depend on the texts beside it, but for rounding; and no more than a window of texts
is held, so the input may be of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llmcli import settings as configs
from llmcli.config_embed import EmbedConfig
from llmcli.data.text_rows import TextRow
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError, LlmcliError, UsageError
from llmcli.files.artefacts import Model, find_model
from llmcli.models.pooling import Pooling
from llmcli.runtime.vectors import Floats, Ids, VectorModel, open_vectors

_TEXTS, _CHARACTERS = 2048, 1 << 22  # of a window; more texts are sorted together, and more is held
_STATES = 1 << 26  # bytes of states that a window of --pooling none makes, where a token is a character
_LEAST = 1e-12  # a shorter vector is divided by this, as torch and sentence-transformers do


@dataclasses.dataclass(frozen=True, slots=True)
class Embedded:
    """A text's vector: (C,); of several layers (layers, C); a vector a token: (tokens, C) or (layers, tokens, C)."""

    text: str
    embedding: Floats
    id: str | int | float | None = None
    tokens: tuple[str, ...] | None = None  # where there is a vector a token
    ids: tuple[int, ...] | None = None
    left_out: int = 0  # tokens that were not read


@dataclasses.dataclass(frozen=True, slots=True)
class VectorFacts:
    """How vectors were made: what has to be equal for two of them to be compared."""

    pooling: str
    normalize: bool
    dimensions: int
    layers: tuple[int, ...]  # from 0, the embedding's output, on; the last one: the model's number of blocks
    prompt: str
    longest: int  # tokens of a text that are read


class Embedder:
    """A model with its tokenizer, settled how it makes vectors."""

    def __init__(
        self,
        model: Model,
        config: EmbedConfig = EmbedConfig(),  # noqa: B008  (frozen)
        *,
        purposes: Sequence[str] = (),
    ) -> None:
        """`purposes`: of the model's prompts the first of these is taken, where the settings name none."""
        configs.check(config)
        self.name = str(model)
        self.place = find_model(model)
        self.config = config
        self.tokenizer = load_tokenizer(self.place.texts)
        self.model: VectorModel = open_vectors(
            self.place, device=config.device, threads=config.threads, precision=config.precision
        )
        self.own = self.model.own or Pooling()
        self.facts = _settled(self.model, self.own, config, purposes)
        self.several = config.layer == "all"
        self._before, self._behind = self.tokenizer.around
        self.room = self.facts.longest - len(self._before) - len(self._behind)
        if self.room < 1:
            raise UsageError(f"the model reads {self.facts.longest} tokens, which leaves no room for a text")

    @property
    def said(self) -> dict[str, Any]:
        """How the vectors are made, as it is stored with them."""
        facts = dataclasses.asdict(self.facts)
        facts["layers"] = list(self.facts.layers)
        chunk = {} if self.config.chunk is None else {"chunk": self.config.chunk}
        return {"model": self.name, "hidden_size": self.model.hidden_size, **facts, **chunk}

    @property
    def described(self) -> str:
        """The same in words, on one line."""
        facts, count = self.facts, self.model.layers
        norm = "normalized" if facts.normalize else "not normalized"
        whose = "" if self.config.pooling else " (the model's own)" if self.model.own else " (the model names none)"
        pooling = "a vector a token" if facts.pooling == "none" else f"pooling {facts.pooling}{whose}"
        layers = "" if facts.layers == (count,) else f", layers {', '.join(map(str, facts.layers))} of {count}"
        prompt = f", after {facts.prompt!r}" if facts.prompt else ""
        return f"{pooling}, {norm}, {facts.dimensions:,} dimensions{layers}{prompt}"

    def embed(self, texts: Iterable[str | TextRow], done: int = 0) -> Iterator[Embedded]:
        """A record for each text, in order. Raises DataError for an empty text, and for one that is too long.

        Of the first `done` texts the vectors are known: a window of these alone is not computed, and its records have
        none. So the vectors behind them are, bit for bit, those that are made in one go.
        """
        width = 4 * self.model.hidden_size * len(self.facts.layers)
        most = max(1, _STATES // width) if self.facts.pooling == "none" else _CHARACTERS
        held: list[TextRow] = []
        characters = number = 0
        for number, given in enumerate(texts, start=1):
            text = TextRow(given, f"text {number:,}") if isinstance(given, str) else given
            if held and (len(held) == _TEXTS or characters + len(text.text) > most):
                yield from self._window(held, known=number - 1 <= done)
                held, characters = [], 0
            held.append(text)
            characters += len(text.text)
        yield from self._window(held, known=number <= done)

    def ids(self, text: str) -> Ids:
        """A text's ids with what stands around it. Raises DataError where it is empty or too long."""
        row = TextRow(text)
        (piece,) = self._pieces(row, self._ids([row])[0])
        return np.asarray([*self._before, *piece, *self._behind], np.int32)

    def vectors(self, texts: Sequence[str]) -> Floats:
        """The vectors of some texts: (texts, dimensions)."""
        found = [each.embedding for each in self.embed(texts)]
        return np.stack(found) if found else np.empty((0, self.facts.dimensions), np.float32)

    def _window(self, texts: Sequence[TextRow], *, known: bool) -> Iterator[Embedded]:
        if not texts:
            return
        pieces: list[Ids] = []  # each with what stands around it
        ends, left_out = [0], []
        for text, ids in zip(texts, self._ids(texts), strict=True):
            cut = self._pieces(text, ids)
            left_out.append(len(ids) - sum(map(len, cut)))
            pieces += [np.asarray([*self._before, *piece, *self._behind], np.int32) for piece in cut]
            ends.append(len(pieces))
        if known:
            none = np.empty(0, np.float32)
            for text, less in zip(texts, left_out, strict=True):
                yield Embedded(text.text, none, text.id, left_out=less)
            return
        found: list[Any] = [None] * len(pieces)
        for batch in self._batches([len(piece) for piece in pieces]):
            chosen = [pieces[place] for place in batch]
            for place, made in zip(batch, self._run(chosen), strict=True):
                found[place] = made
        for text, begin, end, less in zip(texts, ends, ends[1:], left_out, strict=False):
            yield self._record(text, pieces[begin:end], found[begin:end], less)

    def _ids(self, texts: Sequence[TextRow]) -> list[list[int]]:
        prompt, lower = self.facts.prompt, self.own.lower
        whole = [prompt + (text.text.lower() if lower else text.text) for text in texts]
        try:
            return self.tokenizer.encode_batch(whole)
        except DataError:
            for text, each in zip(texts, whole, strict=True):  # which of them it is
                try:
                    self.tokenizer.encode_batch([each])
                except DataError as error:
                    raise DataError(error.message, where=text.where or error.where) from error
            raise

    def _pieces(self, text: TextRow, ids: Sequence[int]) -> list[Sequence[int]]:
        """The ids in as many pieces as are read, none of them longer than there is room."""
        if not text.text.strip() or not ids:
            raise DataError("the text is empty, so there is nothing to embed", where=text.where)
        if len(ids) <= self.room:
            return [ids]
        if self.config.chunk:
            count = -(-len(ids) // self.room)
            ends = [len(ids) * (number + 1) // count for number in range(count)]
            return [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        if self.config.truncate:
            return [ids[: self.room]]
        size = len(ids) + self.facts.longest - self.room
        raise DataError(
            f"the text has {size:,} tokens, the model reads {self.facts.longest:,}; "
            "--truncate reads its begin, --chunk mean all of it in pieces",
            where=text.where,
        )

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of pieces that run together: of a similar length, and of no more tokens than is set."""
        held: list[int] = []
        filled = 0
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            if held and filled + lengths[place] > self.config.batch_tokens:
                yield held
                held, filled = [], 0
            held.append(place)
            filled += lengths[place]
        yield held

    def _run(self, pieces: Sequence[Ids]) -> Sequence[Floats]:
        """(layers, C) or, of each token, (layers, tokens, C); finished but for a mean of pieces."""
        facts = self.facts
        if facts.pooling == "none":
            return [finished(each, facts) for each in self.model.states(pieces, facts.layers)]
        made = self.model.vectors(pieces, facts.layers, facts.pooling, normalized=facts.normalize)
        return [finished(each, facts) for each in made]

    def _record(self, text: TextRow, pieces: Sequence[Ids], made: Sequence[Floats], left_out: int) -> Embedded:
        if len(made) == 1:
            whole = made[0]
        else:
            weights = np.array([len(piece) for piece in pieces], np.float32)
            whole = finished(np.average(np.stack(made), axis=0, weights=weights).astype(np.float32), self.facts)
        if not np.isfinite(whole).all():
            raise LlmcliError("the model gave numbers that are not finite", where=text.where)
        vector = whole if self.several else whole[0]
        if self.facts.pooling != "none":
            return Embedded(text.text, vector, text.id, left_out=left_out)
        ids = tuple(pieces[0].tolist())
        return Embedded(text.text, vector, text.id, tuple(map(self.tokenizer.token, ids)), ids, left_out)


def finished(vectors: Floats, facts: VectorFacts) -> Floats:
    """Cut to the dimensions that are kept, and of length 1 where that is wanted: (..., C) -> (..., dimensions)."""
    kept = vectors[..., : facts.dimensions]
    if facts.normalize:
        kept = kept / np.maximum(np.linalg.norm(kept, axis=-1, keepdims=True), _LEAST)
    return kept


def _settled(model: VectorModel, own: Pooling, config: EmbedConfig, purposes: Sequence[str]) -> VectorFacts:
    """What is made of the model's own ways and the settings. Raises UsageError for what does not fit."""
    mode = config.pooling or own.mode
    as_own = own.normalize and mode != "none"  # what the model normalizes is a text's vector, not a token's state
    normalize = as_own if config.normalize is None else config.normalize
    if mode == "cls" and model.causal:
        raise UsageError("does not fit a decoder, whose first token has seen nothing else", where="--pooling cls")
    if mode == "none" and config.chunk:
        raise UsageError("is a mean of vectors, and --pooling none makes one a token", where="--chunk")
    if config.chunk and config.truncate:
        raise UsageError("and --chunk exclude each other", where="--truncate")
    if config.dimensions is not None and config.dimensions > model.hidden_size:
        raise UsageError(f"is {config.dimensions:,}, the model has {model.hidden_size:,}", where="--dimensions")
    meant = next((name for name in purposes if name in own.prompts), own.prompt)
    prompt = config.prompt_name or meant
    if prompt is not None and prompt not in own.prompts:
        known = ", ".join(own.prompts) or "none"
        raise UsageError(f"the model has no prompt of the name {prompt!r}; it has: {known}", where="--prompt-name")
    return VectorFacts(
        pooling=mode,
        normalize=normalize,
        dimensions=config.dimensions or model.hidden_size,
        layers=_layers(model.layers, config.layer),
        prompt="" if prompt is None else own.prompts[prompt],
        longest=min(model.longest, own.longest or model.longest),
    )


def _layers(count: int, asked: str) -> tuple[int, ...]:
    if asked == "last":
        return (count,)
    if count == 0:
        raise UsageError("this model gives its last states alone", where="--layer")
    if asked == "all":
        return tuple(range(count + 1))
    try:
        number = int(asked)
    except ValueError:
        raise UsageError(f"is {asked!r}; it must be a number, last or all", where="--layer") from None
    if not -count - 1 <= number <= count:
        raise UsageError(f"is {number}; the model has 0 to {count} (or -1 to -{count + 1})", where="--layer")
    return (number % (count + 1),)


def embed(
    model: Model,
    texts: str | Iterable[str | TextRow],
    config: EmbedConfig = EmbedConfig(),  # noqa: B008  (frozen)
) -> Iterator[Embedded]:
    """The vectors of a text, or of many, by an encoder or a decoder: a model folder, a run, or a base with an adapter.

    Raises DataError for an empty text and for one longer than the model reads, UsageError for what does not fit.
    """
    embedder = Embedder(model, config)
    try:
        yield from embedder.embed([texts] if isinstance(texts, str) else texts)
    finally:
        embedder.model.close()
