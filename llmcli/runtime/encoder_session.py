"""A session on onnxruntime for encoders: ids of texts to vectors, hidden states or a head's scores. No torch.

Texts are sorted by length and batched by tokens, so that little is filled up; as many batches run side by side as there
are cores, each on one thread, which beats one batch on all of them: nothing waits for anything (docs/log.md).

Invariant: results come in the order of the texts, whatever the batches were. Where the graph's rows are coupled (int8),
a text's numbers depend, by less than the quantization's own error, on those that share its batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmcli.data.cores import available_cores
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import GRAPH
from llmcli.files.onnx_header import read_onnx
from llmcli.runtime.onnx_session import CONTEXT, PRECISION, ROWS, TARGET, open_graph

Array = npt.NDArray[np.float32]
ENCODER = "encoder"  # what TARGET says of an encoder's graph
KIND, POOLING, NORMALIZE = "llmcli.kind", "llmcli.pooling", "llmcli.normalize"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = {
    "base": ("last_hidden_state", "sentence_embedding"),
    "masked": ("logits", "last_hidden_state"),
    "classifier": ("logits", "last_hidden_state"),
    "span": ("start_logits", "end_logits", "last_hidden_state"),
}
_TOKENS = 256  # of a batch, those that fill it up among them; what a core's cache holds at the usual widths
_FILLED = 8  # a text that is this much shorter than the longest of a batch begins another


@dataclasses.dataclass(frozen=True)
class EncoderFacts:
    """What an encoder's graph says of itself, checked before the library sees it."""

    kind: str  # base, masked, classifier, span
    pooling: str
    normalize: bool
    precision: str
    context: int  # tokens of a text at most
    independent: bool  # whether a text's numbers are those that it has alone
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def is_encoder_graph(graph: Path) -> bool:
    """Whether a graph is an encoder's, as llmcli exports it. Raises DataError for what is no graph of llmcli's."""
    return read_onnx(graph).metadata.get(TARGET) == ENCODER


def read_facts(graph: Path) -> EncoderFacts:
    """The facts of a graph. Raises DataError where it is no encoder's."""
    header = read_onnx(graph)
    said = header.metadata
    kind, context = said.get(KIND, ""), said.get(CONTEXT, "")
    if said.get(TARGET) != ENCODER or kind not in OUTPUTS or header.outputs != OUTPUTS[kind]:
        raise DataError("is not an encoder as llmcli exports it", where=str(graph))
    if header.inputs not in (INPUTS, INPUTS[:2]):
        raise DataError(f"asks for {', '.join(header.inputs)[:200]}", where=str(graph))
    if not (context.isascii() and context.isdigit() and 0 < int(context) < 2**31):
        raise DataError(f"names {context[:40]!r} as its context", where=str(graph))
    return EncoderFacts(
        kind=kind,
        pooling=said.get(POOLING, ""),
        normalize=said.get(NORMALIZE) == "true",
        precision=said.get(PRECISION, ""),
        context=int(context),
        independent=said.get(ROWS) == "independent",
        inputs=header.inputs,
        outputs=header.outputs,
    )


class EncoderSession:
    """An exported encoder. It may be used by one thread at a time."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """Opens a folder. `threads`: how many batches run side by side (default: the cores this process may use)."""
        self.facts = read_facts(folder / GRAPH)
        self.threads = threads or available_cores()
        self._engine = open_graph(folder / GRAPH, 1, "cpu")
        self._sizes = {item.name: item.shape[1:] for item in self._engine.get_outputs()}
        self.hidden_size = int(self._sizes["last_hidden_state"][-1])
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def size_of(self, output: str) -> int:
        """Numbers in a row of an output: the labels of a classifier."""
        return int(self._sizes[output][-1])

    def vectors(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> Array:
        """A vector a text, pooled and normalised as the graph does it: (texts, C)."""
        return np.stack(self.run(texts, "sentence_embedding", types)) if texts else self._none()

    def states(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> list[Array]:
        """The last hidden states of each text's tokens: (tokens, C) each."""
        return self.run(texts, "last_hidden_state", types)

    def run(
        self, texts: Sequence[Sequence[int]], output: str, types: Sequence[Sequence[int]] | None = None
    ) -> list[Array]:
        """One output of the graph for each text; where it has a row a token, as many as the text has.

        `types`: 0 for the tokens of a first text, 1 for those of a second; all 0 where it is not given.
        """
        return [found[output] for found in self.run_all(texts, (output,), types)]

    def run_all(
        self, texts: Sequence[Sequence[int]], outputs: Sequence[str], types: Sequence[Sequence[int]] | None = None
    ) -> list[Mapping[str, Array]]:
        """Several outputs at once, by name, for each text."""
        self._check(texts, outputs)
        found: list[Mapping[str, Array]] = [{}] * len(texts)
        batches = list(batched([len(text) for text in texts]))

        def one(batch: list[int]) -> None:
            made = self._batch([texts[row] for row in batch], outputs, types and [types[row] for row in batch])
            for place, row in enumerate(batch):
                length = len(texts[row])
                found[row] = {name: self._cut(name, made[name][place], length) for name in outputs}

        if self._pool is None or len(batches) == 1:
            for batch in batches:
                one(batch)
        else:
            list(self._pool.map(one, batches))
        return found

    def together(
        self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
    ) -> list[Mapping[str, Array]]:
        """Every output for texts that share one batch, whatever their lengths are."""
        self._check(texts, ())
        made = self._batch(texts, self.facts.outputs, types)
        return [
            {name: self._cut(name, values[place], len(text)) for name, values in made.items()}
            for place, text in enumerate(texts)
        ]

    def _cut(self, name: str, values: Array, length: int) -> Array:
        """Without what fills the row up."""
        return values[:length] if self._by_token(name) else values

    def _by_token(self, name: str) -> bool:
        return bool(self._sizes[name][:1] == ["tokens"])

    def _batch(
        self, rows: Sequence[Sequence[int]], outputs: Sequence[str], types: Sequence[Sequence[int]] | None
    ) -> dict[str, Array]:
        """Runs rows side by side; every array that is bound stays alive until the run has ended."""
        shape = (len(rows), max(len(row) for row in rows))
        fed = {name: np.zeros(shape, np.int64) for name in self.facts.inputs}
        for place, row in enumerate(rows):
            fed["input_ids"][place, : len(row)] = row
            fed["attention_mask"][place, : len(row)] = 1
            if types is not None and INPUTS[2] in fed:
                fed[INPUTS[2]][place, : len(row)] = types[place]
        binding = self._engine.io_binding()
        made = {}
        for name, array in fed.items():
            binding.bind_input(name, "cpu", 0, np.int64, shape, array.ctypes.data)
        for name in outputs:
            rest = [shape[1] if size == "tokens" else size for size in self._sizes[name]]
            made[name] = np.empty((shape[0], *rest), np.float32)
            binding.bind_output(name, "cpu", 0, np.float32, made[name].shape, made[name].ctypes.data)
        self._engine.run_with_iobinding(binding)
        return made

    def _check(self, texts: Sequence[Sequence[int]], outputs: Sequence[str]) -> None:
        for name in outputs:
            if name not in self.facts.outputs:
                raise UsageError(f"the model gives no {name}; it gives {', '.join(self.facts.outputs)}")
        longest, shortest = max(map(len, texts), default=1), min(map(len, texts), default=1)
        if shortest < 1:
            raise UsageError("a text needs at least one token")
        if longest > self.facts.context:
            raise UsageError(f"a text of {longest} tokens does not fit the model's {self.facts.context} positions")

    def _none(self) -> Array:
        return np.empty((0, self.hidden_size), np.float32)

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def batched(lengths: Sequence[int], tokens: int = _TOKENS, filled: int = _FILLED) -> Iterator[list[int]]:
    """Places of texts that share a batch, the longest first.

    A batch holds at most so many tokens, those that fill it up among them, and texts of nearly one length.
    """
    batch: list[int] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        if batch and (longest * (len(batch) + 1) > tokens or length < longest - longest // filled):
            yield batch
            batch = []
        if not batch:
            longest = length
        batch.append(place)
    if batch:
        yield batch
