"""A session on onnxruntime: the graph that `llmcli/onnx` builds, its cache updated in place. Never imports torch.

Everything that a run reads or writes is a numpy array of the session's own, bound by its address once and kept alive as
long as the binding is; the cache's inputs and outputs are the same arrays, so a step copies none of it.

Invariant: entry j of a row's cache holds its position j, and the row's mask is 1 for what it holds and 0 beyond.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.data.cores import available_cores
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import GRAPH, PREFILL
from llmcli.files.onnx_header import EXPECTED, read_onnx
from llmcli.runtime.onnx_device import (
    DeviceCache,
    Engines,
    HostCache,
    as_cpu_likes,
    check_device,
    check_graph,
    providers,
)
from llmcli.runtime.portable_rows import PortableRows
from llmcli.runtime.session import FLOAT_ERROR, HALF_ERROR, QUANTIZED_ERROR, Ids, Logits, Mask, States

# Facts of the graph: its context; whether its rows are "independent" (those of older folders in int8 share a scale, so
# they run one by one); whether it is "portable"; of a classifier, how
# many labels it has.
CONTEXT, ROWS, TARGET, PRECISION = "llmcli.context", "llmcli.rows", "llmcli.target", "llmcli.precision"
LABELS = "llmcli.labels"
LEAST = "llmcli.least"  # of a second graph: how many tokens a prompt must have for it
_SCORED = 1 << 23  # logits that scoring holds at once
_CHUNK = 256  # tokens of a row that one run takes: attention holds heads x chunk x capacity numbers
_SCORES = 1 << 20  # chunk x capacity where chunks become smaller
_PROMPT = 16  # tokens from which a second graph reads them; fewer may be a draft, which must come out as it would alone
_SPIN = "50"  # microseconds
_HEADROOM = 64  # entries beyond the prompt that the cache begins with


class OnnxSession:
    """A `Session` over a graph of onnxruntime, on the CPU or on CUDA."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        prefill: bool = True,
        device: str = "cpu",
    ) -> None:
        """Opens a folder. `prefill`: with its second graph for prompts, where it has one. `device`: cpu or cuda."""
        facts = GraphFacts(folder / GRAPH)
        if device == "cuda":
            check_graph(facts.precision, str(folder))
        engine = open_graph(folder / GRAPH, threads, device)
        self._shape = _GraphShape(engine, facts, device)
        self._engines = Engines(engine)
        if prefill and (folder / PREFILL).is_file():
            second = GraphFacts(folder / PREFILL)
            if (second.layers, second.context) != (facts.layers, facts.context):
                raise DataError(f"is of another model than {GRAPH}", where=str(folder / PREFILL))
            self._engines = Engines(engine, second.least, lambda: open_graph(folder / PREFILL, threads, device))
        self.vocab_size, self.context = self._shape.vocab_size, self._shape.context
        error = QUANTIZED_ERROR if facts.quantized else FLOAT_ERROR if self._shape.dtype is np.float32 else HALF_ERROR
        self.run_error = error if facts.independent else None
        self._rows = self._new_rows(0, 1)
        self._started = False

    def _new_rows(self, count: int, capacity: int, engines: Engines | None = None) -> Rows | PortableRows:
        engines = engines or self._engines
        if self._shape.portable:
            return PortableRows(engines.step, self._shape, count, _CHUNK)
        return Rows(engines, self._shape, count, capacity)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return list(self._rows.lengths)

    def start(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Begins anew with a row for each prompt; logits after their last tokens: (rows, V)."""
        sizes = [len(prompt) for prompt in prompts]
        if not sizes or min(sizes) < 1:
            raise UsageError("a prompt needs at least one token")
        self._check_room(max(sizes))
        self._rows = self._new_rows(len(sizes), max(sizes) + _HEADROOM)
        self._started = True
        return np.stack([self._rows.extend(row, np.array(ids, np.int64), 1)[0] for row, ids in enumerate(prompts)])

    def feed(self, ids: Ids, keep: int = 1) -> Logits:
        """Appends (rows, n) ids to the rows; logits of the last `keep` positions: (rows, keep, V)."""
        if not self._started:
            raise UsageError("the session was not started")
        count = ids.shape[1]
        self._check_room(max(self._rows.lengths) + count)
        self._rows.reserve(max(self._rows.lengths) + count)
        if count == 1 and (self._shape.independent or len(ids) == 1):
            return self._rows.step(ids)
        before = self.lengths
        try:
            return np.stack([self._rows.extend(row, ids[row], keep) for row in range(len(ids))])
        except BaseException:
            self.rewind(before)
            raise

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Forgets what lies beyond these lengths, one for all rows or one for each."""
        rows = self._rows
        wanted = [lengths] * len(rows.lengths) if isinstance(lengths, int) else list(lengths)
        for row, (held, length) in enumerate(zip(rows.lengths, wanted, strict=True)):
            rows.cut(row, min(held, max(length, 0)))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the rows named, in that order; a row named twice is copied."""
        if list(rows) != list(range(len(self._rows.lengths))):
            self._rows.resize(rows, self._rows.capacity)

    def replace(self, row: int, prompt: Sequence[int]) -> Logits:
        """Puts a prompt in the place of what a row holds; logits after its last token: (V,)."""
        if not self._started:
            raise UsageError("the session was not started")
        if not prompt:
            raise UsageError("a prompt needs at least one token")
        self._check_room(len(prompt))
        self._rows.reserve(len(prompt))
        self._rows.cut(row, 0)
        logits: Logits = self._rows.extend(row, np.array(prompt, np.int64), 1)[0]
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        """Puts the first `length` tokens that a row holds in the place of what another one holds."""
        if source == target:
            self._rows.cut(target, length)
        else:
            self._rows.hold(target, [held[:, :length] for held in self._rows.held(source)])

    def export_row(self, row: int) -> list[States]:
        """What a row holds: layer by layer its keys and then its values, each (K, length, D)."""
        if not self._started:
            raise UsageError("the session was not started")
        return [np.asarray(held, np.float32).copy() for held in self._rows.held(row)]

    def import_row(self, states: Sequence[States]) -> None:
        """Begins anew with one row that holds these."""
        shape = self._shape
        length = states[0].shape[1] if states and states[0].ndim == 3 else 0
        size = (shape.heads, length, shape.head_dim)
        if len(states) != 2 * shape.layers or any(array.shape != size for array in states):
            raise DataError(f"states of {2 * shape.layers} times {size} are needed")
        if not 0 < length <= self.context:
            raise DataError(f"{length} tokens do not fit the model's context of {self.context}")
        rows = self._new_rows(1, length + _HEADROOM)
        rows.hold(0, states)
        self._rows, self._started = rows, True

    def score(self, ids: Ids, wanted: Mask) -> Logits:
        """Log-probabilities of ids[:, 1:] where `wanted`, 0 elsewhere: (rows, n - 1)."""
        self._check_room(ids.shape[1] - 1)
        found = np.zeros(wanted.shape, np.float32)
        step = max(1, min(_CHUNK, _SCORED // self.vocab_size))
        for row in range(len(ids)):
            places = np.flatnonzero(wanted[row])
            if not len(places):
                continue
            scratch = self._new_rows(1, int(places[-1]) + 1, Engines(self._engines.step))
            first = int(places[0])
            if first:
                scratch.extend(0, ids[row, :first], 1)
            for begin in range(first, int(places[-1]) + 1, step):
                end = min(begin + step, int(places[-1]) + 1)
                logits = scratch.extend(0, ids[row, begin:end], end - begin)
                found[row, begin:end] = _log_probabilities(logits, ids[row, begin + 1 : end + 1])
        found[~wanted] = 0
        return found

    def close(self) -> None:
        """Lets the cache go."""
        self._rows = self._new_rows(0, 1)
        self._started = False

    def _check_room(self, count: int) -> None:
        if count > self.context:
            raise UsageError(f"{count} tokens do not fit the model's context of {self.context}")


def _log_probabilities(logits: Logits, targets: Ids) -> Logits:
    """Of the targets (n,) by the logits (n, V)."""
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, targets[:, None], -1)[:, 0]
    found: Logits = chosen - np.log(np.exp(shifted, out=shifted).sum(-1))
    return found


def open_graph(graph: Path, threads: int | None, device: str) -> Any:
    """A graph in onnxruntime. Raises DataError where the library refuses it."""
    import onnxruntime

    wanted = providers(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, as one line
    # Threads that wait for the next product by turning over: long enough for the gap between two products, and no
    # longer, as on a busy machine they take the cores from whom they wait for (docs/log.md).
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN)
    try:
        with as_cpu_likes(graph) if device == "cpu" else contextlib.nullcontext():
            engine = onnxruntime.InferenceSession(str(graph), options, wanted)
    except Exception as error:  # the library raises its own kinds
        raise DataError(f"cannot be opened: {' '.join(str(error).split())[:300]}", where=str(graph)) from error
    check_device(engine, device)
    return engine


class GraphFacts:
    """What the graph's file says, checked before the library sees it."""

    def __init__(self, graph: Path) -> None:
        header = read_onnx(graph)
        if LABELS in header.metadata:
            raise DataError("is a classifier, which writes no text; llmcli classify uses it", where=str(graph))
        self.layers = sum(name.endswith(".key") for name in header.inputs)
        inputs = ["input_ids", "attention_mask", *self._caches("past_key_values"), "num_logits_to_keep"]
        outputs = ["logits", *self._caches("present")]
        missing = [name for name in inputs if name not in header.inputs]
        missing += [name for name in outputs if name not in header.outputs]
        missing += [f"the fact {name}" for name in (CONTEXT, ROWS) if name not in header.metadata]
        odd = sorted(set(header.inputs) - set(inputs))
        if missing or odd or not self.layers:
            told = f"lacks {', '.join(missing[:4])}" if missing else f"asks for {', '.join(odd[:4])}"
            raise DataError(
                f"is not a decoder as llmcli exports it: it {told}; expected are {EXPECTED}",
                where=str(graph),
            )
        context = header.metadata[CONTEXT]
        if not (context.isascii() and context.isdigit() and 0 < int(context) < 2**31):
            raise DataError(f"names {context[:40]!r} as its context", where=str(graph))
        least = header.metadata.get(LEAST, "")
        self.least = max(_PROMPT, int(least)) if least.isascii() and least.isdigit() and len(least) < 10 else _PROMPT
        self.context, self.independent = int(context), header.metadata[ROWS] == "independent"
        self.portable = header.metadata.get(TARGET) == "portable"
        self.quantized = any("NBits" in name or "Quantize" in name or "Integer" in name for name in header.operators)

        self.precision = "a portable graph" if self.portable else header.metadata.get(PRECISION, "of another precision")

    def _caches(self, stem: str) -> list[str]:
        return [f"{stem}.{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]


class _GraphShape:
    """The sizes of the graph's cache and logits."""

    def __init__(self, engine: Any, facts: GraphFacts, device: str) -> None:
        self.device = device
        cache = next(item for item in engine.get_inputs() if item.name == "past_key_values.0.key")
        logits = next(item for item in engine.get_outputs() if item.name == "logits")
        self.layers, self.context, self.independent = facts.layers, facts.context, facts.independent
        self.portable = facts.portable
        self.dtype: Any = np.float16 if cache.type == "tensor(float16)" else np.float32
        self.heads, self.head_dim = int(cache.shape[1]), int(cache.shape[3])
        self.vocab_size = int(logits.shape[-1])


class _Binding:
    """A run of some rows and tokens: its arrays, bound by address."""

    def __init__(self, engine: Any, rows: Rows, first: int, count: int, tokens: int, keep: int) -> None:
        shape, self._engine = rows.shape, engine
        self.ids = np.zeros((count, tokens), np.int64)
        self._keep = np.array([keep], np.int64)
        self.logits = np.empty((count, min(keep, tokens), shape.vocab_size), np.float32)
        self._alive = [rows.mask[first : first + count], *rows.caches]
        self._io = self._engine.io_binding()
        self._bind("input_ids", self.ids)
        self._bind("num_logits_to_keep", self._keep)
        self._bind("attention_mask", rows.mask[first : first + count])
        self._bind("logits", self.logits, output=True)
        names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
        for name, cache in zip(names, rows.caches, strict=True):
            place = (cache.device, 0, cache.dtype, (count, *cache.shape[1:]), cache.address(first))
            self._io.bind_input(f"past_key_values.{name}", *place)
            self._io.bind_output(f"present.{name}", *place)

    def _bind(self, name: str, array: npt.NDArray[Any], *, output: bool = False) -> None:
        bind = self._io.bind_output if output else self._io.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> Logits:
        """Runs the graph; the logits are the binding's own until the next run."""
        self._engine.run_with_iobinding(self._io)
        return self.logits


class Rows:
    """Rows side by side: cache, mask and lengths."""

    def __init__(self, engines: Engines, shape: _GraphShape, count: int, capacity: int) -> None:
        self.engines, self.shape = engines, shape
        self.capacity = min(max(capacity, 1), shape.context)
        self.lengths = [0] * count
        self.mask = np.zeros((count, self.capacity), np.int64)
        size = (count, shape.heads, self.capacity, shape.head_dim)
        self.caches = [
            HostCache(size, shape.dtype) if shape.device == "cpu" else DeviceCache(size, shape.dtype, shape.device)
            for _ in range(2 * shape.layers)
        ]
        self._bindings: dict[tuple[int, ...], _Binding] = {}

    def step(self, ids: Ids) -> Logits:
        """Appends a token to each row: (rows, 1) -> (rows, 1, V). There must be room."""
        return self._run(self.engines.step, 0, ids, 1).copy()

    def extend(self, row: int, ids: Ids, keep: int) -> Logits:
        """Appends tokens (n,) to one row; logits of the last `keep`: (keep, V). There must be room."""
        found: list[Logits] = []
        engine = self.engines.of(len(ids))
        chunk = min(_CHUNK, max(_PROMPT, _SCORES // self.capacity))
        for begin in range(0, len(ids), chunk):
            piece = ids[begin : begin + chunk]
            kept = keep - (len(ids) - begin - len(piece))  # how many of this piece's are wanted
            logits = self._run(engine, row, piece[None], max(kept, 1))[0]
            if kept > 0:
                found.append(logits.copy())
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _run(self, engine: Any, first: int, ids: Ids, keep: int) -> Logits:
        """Appends (count, n) ids to `count` rows from `first` on. What is interrupted leaves the rows as they were."""
        count, tokens = ids.shape
        binding = self._binding(engine, first, count, tokens, keep)
        binding.ids[:] = ids
        rows = range(first, first + count)
        for row in rows:
            self.mask[row, self.lengths[row] : self.lengths[row] + tokens] = 1
        try:
            logits = binding.run()
        except BaseException:
            for row in rows:
                self.cut(row, self.lengths[row])
            raise
        for row in rows:
            self.lengths[row] += tokens
        return logits

    def _binding(self, engine: Any, first: int, count: int, tokens: int, keep: int) -> _Binding:
        """A binding of these sizes: steps and drafts come again and again, prompts do not."""
        if tokens >= _PROMPT:
            return _Binding(engine, self, first, count, tokens, keep)
        key = (first, count, tokens, keep)
        if key not in self._bindings:
            if len(self._bindings) > len(self.lengths) + _PROMPT:
                self._bindings.pop(next(iter(self._bindings)))
            self._bindings[key] = _Binding(engine, self, first, count, tokens, keep)
        return self._bindings[key]

    def held(self, row: int) -> list[States]:
        """The keys and values of a row, layer by layer: each (K, length, D)."""
        return [cache.read(row, self.lengths[row]) for cache in self.caches]

    def hold(self, row: int, states: Sequence[States]) -> None:
        """Puts keys and values into a row, in place of what it holds. There must be room."""
        length = states[0].shape[1]
        for cache, array in zip(self.caches, states, strict=True):
            cache.write(row, array)
        self.mask[row, :length] = 1
        self.cut(row, length)

    def cut(self, row: int, length: int) -> None:
        """Forgets what a row holds beyond a length."""
        self.mask[row, length:] = 0
        self.lengths[row] = length

    def reserve(self, length: int) -> None:
        """Makes room for rows of this length: at least twice as much as there was, up to the context."""
        if length > self.capacity:
            self.resize(range(len(self.lengths)), min(max(2 * self.capacity, length), self.shape.context))

    def resize(self, chosen: Sequence[int], capacity: int) -> None:
        """Puts the chosen rows into new arrays, cache after cache, so that one alone is there twice at a time."""
        self._bindings.clear()
        lengths = [self.lengths[row] for row in chosen]
        held = max(lengths, default=0)
        new_mask = np.zeros((len(chosen), capacity), np.int64)
        new_mask[:, :held] = self.mask[list(chosen), :held]
        caches = list(self.caches)
        self.caches = []
        for place, old in enumerate(caches):
            self.caches.append(old.chosen(chosen, lengths, capacity))
            caches[place] = self.caches[-1]
        self.lengths, self.mask, self.capacity = lengths, new_mask, capacity
