"""The gate of `export` for encoders: the graph beside the model in torch, on real text of many lengths, filled up.

In float hidden states, vectors and the head's scores must be equal; quantized, their directions must be close, and a
text among others must be what it is alone.

Invariant: what is reported was computed by the files that were written, opened anew.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmcli.config import ExportConfig, TextConfig
from llmcli.data.python_text import python_texts
from llmcli.data.readers import read_documents
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import CheckError, DataError
from llmcli.models.pooling import read_pooling
from llmcli.operations.records import Progress

if TYPE_CHECKING:
    from llmcli.models.encoder import Encoder

Array = npt.NDArray[np.float32]
_EQUAL = 1e-3  # of hidden states and scores, where they spread by 1 or less; by more: times that
_LEAST = {"fp32": 0.99999, "int8": 0.97, "int4": 0.90}  # mean cosine of states and vectors, where none is set
_TEXTS = 64
_CHARACTERS = 1 << 19  # that are read
_MOST_BITS = 6.5  # of the words of a text
_LONGEST = 256  # tokens of most texts; one is as long as the model allows, up to four times that
_TOGETHER = 8  # texts of a batch
_ALONE = 8


@dataclasses.dataclass(frozen=True, slots=True)
class EncoderCheckReport:
    """What the gate found. Cosines are means over tokens or texts, differences the largest of any number."""

    texts: int
    tokens: int
    longest: int  # tokens of a text
    state_difference: float
    state_cosine: float
    vector_cosine: float | None  # None: the graph has a head, and gives no vectors
    least_vector_cosine: float | None
    alone_cosine: float  # of a text's states in a batch to those that it has alone, by the graph
    head_difference: float | None
    head_agreement: float | None  # how often the head's first choice is the model's
    texts_before: float  # per second, of the model in torch
    texts_after: float


def reference_texts(tokenizer: TextTokenizer, path: str | None, config: TextConfig, longest: int) -> list[list[int]]:
    """Texts of many lengths, in ids with what the tokenizer puts around them; from Python's own where no path is given.

    Raises DataError where there is too little.
    """
    texts = python_texts() if path is None else (document.text for document in read_documents([path], config))
    words: list[str] = []
    taken = 0
    for text in texts:
        words += text.split()
        taken += len(text)
        if taken >= _CHARACTERS // (4 if path is None else 1):
            break
    chosen = random.Random(0)
    found: list[list[int]] = []
    place = 0
    while len(found) < _TEXTS and place < len(words):
        count = max(longest, _LONGEST) if len(found) == 1 else int(2 ** chosen.uniform(0, _MOST_BITS))
        ids = tokenizer.encode(" ".join(words[place : place + count]), special=True)
        found.append(ids[: longest if len(found) == 1 and longest <= 4 * _LONGEST else min(longest, _LONGEST)])
        place += count
    found = [ids for ids in found if ids]
    if len(found) < 4:
        raise DataError("holds too little text to check an export on", where=path)
    return found


def check_encoder(
    source: Path, staged: Path, kind: str, texts: Sequence[Sequence[int]], config: ExportConfig
) -> Iterator[Progress | EncoderCheckReport]:
    """Compares the folder that was written with its model. Yields Progress, last an EncoderCheckReport.

    Raises CheckError for the first thing that does not hold.
    """
    from llmcli.runtime.encoder_session import EncoderSession

    ours = EncoderSession(staged, threads=config.threads)
    theirs = _Model(source, kind, ours.facts.outputs, config.threads)
    try:
        tally = _Tally()
        slow = 0.0
        for begin in range(0, len(texts), _TOGETHER):
            rows = texts[begin : begin + _TOGETHER]
            began = time.perf_counter()
            expected = theirs.run(rows)
            slow += time.perf_counter() - began
            for before, after in zip(expected, ours.together(rows), strict=True):
                tally.add(before, after)
            yield Progress("check", min(begin + _TOGETHER, len(texts)), len(texts), "texts")
        alone = _alone(ours, texts)
        _expect(tally, alone, config)
        began = time.perf_counter()
        ours.run_all(texts, ours.facts.outputs)
        fast = time.perf_counter() - began
        yield tally.report(texts, alone, len(texts) / slow, len(texts) / fast)
    finally:
        ours.close()


def _alone(ours: Any, texts: Sequence[Sequence[int]]) -> float:
    """Mean cosine of texts' states in a batch to those that they have alone."""
    rows = texts[:_TOGETHER]
    together = [found["last_hidden_state"] for found in ours.together(rows)]
    alone = [ours.together([row])[0]["last_hidden_state"] for row in rows[:_ALONE]]
    return float(np.mean([_cosines(first, second).mean() for first, second in zip(together, alone, strict=False)]))


def _cosines(first: Array, second: Array) -> Array:
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    found: Array = (first * second).sum(-1) / np.maximum(lengths, 1e-12)
    return found


class _Model:
    """The model in torch, by the names of the graph's outputs; each text goes through it alone."""

    def __init__(self, folder: Path, kind: str, outputs: Sequence[str], threads: int | None) -> None:
        import torch

        from llmcli.data.cores import available_cores
        from llmcli.models.encoder_folder import load_encoder

        torch.set_num_threads(threads or available_cores())
        self.kind, self.outputs = kind, outputs
        self.model: Encoder = load_encoder(folder, dtype=torch.float32, kind=kind)
        self.pooling = read_pooling(folder)

    def run(self, texts: Sequence[Sequence[int]]) -> list[Mapping[str, Array]]:
        """The outputs of each text."""
        import torch

        with torch.inference_mode():
            return [{name: value.numpy() for name, value in self._one(torch.tensor([text])).items()} for text in texts]

    def _one(self, ids: Any) -> dict[str, Any]:
        import torch

        from llmcli.models.encoder_heads import EncoderClassifier, MaskedLM, SpanReader
        from llmcli.models.pooling import pooled

        model = self.model
        states = model.hidden(ids)[0]
        found = {"last_hidden_state": states}
        if isinstance(model, MaskedLM):
            found["logits"] = model.logits(states)
        elif isinstance(model, EncoderClassifier):
            found["logits"] = model.judged(states[:1])[0]
        elif isinstance(model, SpanReader):
            found["start_logits"], found["end_logits"] = model.spans(states).unbind(-1)
        else:
            mode = self.pooling.mode if self.pooling is not None and self.pooling.mode != "none" else "mean"
            vector = pooled(states, torch.tensor([len(states)]), mode)[0]
            normalize = self.pooling is not None and self.pooling.normalize
            found["sentence_embedding"] = vector / vector.norm().clamp_min(1e-12) if normalize else vector
        return found


class _Tally:
    """Sums over texts: what the model gives (before) and what the graph gives (after)."""

    def __init__(self) -> None:
        self.cosines: list[Array] = []
        self.vectors: list[float] = []
        self.heads: list[float] = []  # whether the first choice is the same, a text or a token
        self.difference = self.vector_difference = 0.0
        self.head_difference: float | None = None
        self.squares: list[float] = []

    def add(self, before: Mapping[str, Array], after: Mapping[str, Array]) -> None:
        """Takes the outputs of one text. Raises CheckError for numbers that are none."""
        for whose, outputs in (("model", before), ("graph", after)):
            if not all(np.isfinite(values).all() for values in outputs.values()):
                raise CheckError(f"the {whose} gives numbers that are not finite (NaN or infinite)")
        for name, first in before.items():
            second = after[name]
            largest = float(np.abs(first - second).max())
            if name == "last_hidden_state":
                self.cosines.append(_cosines(first, second))
                self.squares.append(float((first**2).mean()))
                self.difference = max(self.difference, largest)
            elif name == "sentence_embedding":
                self.vectors.append(float(_cosines(first, second)))
                self.vector_difference = max(self.vector_difference, largest)
            else:
                self.head_difference = max(self.head_difference or 0.0, largest / max(1.0, float(first.std())))
                self.heads.append(float((first.argmax(-1) == second.argmax(-1)).mean()))

    @property
    def spread(self) -> float:
        """Root mean square of the model's states."""
        return float(np.sqrt(np.mean(self.squares)))

    @property
    def state_cosine(self) -> float:
        """Mean over tokens."""
        return float(np.concatenate(self.cosines).mean())

    def report(self, texts: Sequence[Sequence[int]], alone: float, before: float, after: float) -> EncoderCheckReport:
        """The figures."""
        return EncoderCheckReport(
            texts=len(texts),
            tokens=sum(map(len, texts)),
            longest=max(map(len, texts)),
            state_difference=self.difference,
            state_cosine=self.state_cosine,
            vector_cosine=float(np.mean(self.vectors)) if self.vectors else None,
            least_vector_cosine=min(self.vectors, default=None),
            alone_cosine=alone,
            head_difference=self.head_difference,
            head_agreement=float(np.mean(self.heads)) if self.heads else None,
            texts_before=round(before, 1),
            texts_after=round(after, 1),
        )


def _expect(tally: _Tally, alone: float, config: ExportConfig) -> None:
    """Raises CheckError for what does not hold."""
    if config.precision == "fp32":
        allowed = _EQUAL * max(1.0, tally.spread)
        for what, found in (
            ("hidden states", tally.difference),
            ("vectors", tally.vector_difference),
            ("the head's scores", tally.head_difference or 0.0),
        ):
            if found > allowed:
                raise CheckError(
                    f"the graph does not give what the model gives: {what} differ by {found:.3g}, "
                    f"{allowed:.3g} is allowed"
                )
    least = _LEAST[config.precision] if config.min_cosine is None else config.min_cosine
    for what, cosine in (
        ("hidden states", tally.state_cosine),
        ("vectors", float(np.mean(tally.vectors)) if tally.vectors else 1.0),
        ("a text's states in a batch, to those it has alone,", alone),
    ):
        if cosine < least:
            raise CheckError(f"the cosine of {what} is {cosine:.5f}, {least:g} is asked for (--min-cosine)")
