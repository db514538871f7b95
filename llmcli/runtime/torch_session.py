"""A session on torch: the decoder and its cache, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llmcli.data.cores import available_cores
from llmcli.errors import DataError, UsageError
from llmcli.models.cache import KeyValueCache
from llmcli.models.decoder import Decoder
from llmcli.models.folder import load_model
from llmcli.models.ops import cuda_kernels
from llmcli.models.quantized import BITS, fuse
from llmcli.models.quantized import quantize as quantized
from llmcli.runtime.session import FLOAT_ERROR, QUANTIZED_ERROR, Ids, Logits, Mask, States
from llmcli.runtime.torch_steps import Steps

_SCORED = 1 << 23  # logits that scoring holds at once


class TorchSession:
    """A `Session` over a Decoder: float32 on the CPU, where equality is promised, bfloat16 on CUDA."""

    def __init__(self, model: Decoder, *, static: bool | None = None) -> None:
        """`static`: steps of one token a row in shapes that do not change, captured on CUDA; None: on CUDA alone."""
        self.model = model
        self.static = model.embedding.is_cuda if static is None else static
        self._steps: Steps | None = None
        self.vocab_size, self.context = model.config.vocab_size, model.config.max_position_embeddings
        exact = (model.compute_dtype or model.embedding.dtype) == torch.float32
        self.run_error: float | None = FLOAT_ERROR if exact else QUANTIZED_ERROR
        self._cache: KeyValueCache | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return [] if self._cache is None else [int(length) for length in self._cache.lengths]

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Begins anew with a row for each prompt; logits after their last tokens: (rows, V)."""
        sizes = [len(prompt) for prompt in prompts]
        if not sizes or min(sizes) < 1:
            raise UsageError("a prompt needs at least one token")
        longest = max(sizes)
        self._cache = cache = self._emptied(len(prompts), longest + 64)
        # Shorter rows are filled up on the right: causal attention never looks there, and the rewind forgets it.
        padded = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        states = self.model.hidden(self._tensor(padded), cache)  # (rows, longest, C)
        last = torch.tensor(sizes, device=states.device) - 1
        chosen = states[torch.arange(len(prompts), device=states.device), last]
        cache.rewind(sizes)
        return self._logits(chosen)

    @torch.inference_mode()
    def feed(self, ids: Ids, keep: int = 1) -> Logits:
        """Appends (rows, n) ids to the rows; logits of the last `keep` positions: (rows, keep, V)."""
        if self._cache is None:
            raise UsageError("the session was not started")
        if self.static and ids.shape[1] == 1:
            self._cache.make_room(1)
            if self._steps is None or not self._steps.fit(self._cache):
                self._steps = None  # lets the graph's memory go before there is a new one
                self._steps = Steps(self.model, self._cache)
            return self._steps.run(ids)
        return self._logits(self.model.hidden(self._tensor(ids), self._cache)[:, -keep:])

    def _emptied(self, rows: int, capacity: int) -> KeyValueCache:
        """A cache that holds nothing: the one there is where it will do, as a captured step goes with its memory."""
        cache = self._cache
        if self.static and cache is not None and cache.rows == rows and cache.capacity >= min(capacity, self.context):
            cache.rewind(0)
            return cache
        self._cache = self._steps = None
        return self.model.cache(rows=rows, capacity=capacity)

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Forgets what lies beyond these lengths, one for all rows or one for each."""
        if self._cache is not None:
            self._cache.rewind(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the rows named, in that order; a row named twice is copied."""
        if self._cache is not None:
            self._cache.select(rows)

    @torch.inference_mode()
    def replace(self, row: int, prompt: Sequence[int]) -> Logits:
        """Puts a prompt in the place of what a row holds; logits after its last token: (V,)."""
        if self._cache is None:
            raise UsageError("the session was not started")
        if not prompt:
            raise UsageError("a prompt needs at least one token")
        alone = self._cache.emptied(row, len(prompt))
        return self._logits(self.model.hidden(self._tensor(np.array([prompt], np.int64)), alone)[0, -1])

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Puts the first `length` tokens that a row holds in the place of what another one holds."""
        if self._cache is not None:
            self._cache.copy(source, target, length)

    def export_row(self, row: int) -> list[States]:
        """What a row holds: layer by layer its keys and then its values, each (K, length, D)."""
        if self._cache is None:
            raise UsageError("the session was not started")
        length = int(self._cache.lengths[row])
        pairs = zip(self._cache.keys, self._cache.values, strict=True)
        return [held[row, :, :length].float().cpu().numpy().copy() for pair in pairs for held in pair]

    @torch.inference_mode()
    def import_row(self, states: Sequence[States]) -> None:
        """Begins anew with one row that holds these."""
        config = self.model.config
        length = states[0].shape[1] if states and states[0].ndim == 3 else 0
        shape = (config.num_key_value_heads, length, config.head_dim)
        if len(states) != 2 * config.num_hidden_layers or any(array.shape != shape for array in states):
            raise DataError(f"states of {2 * config.num_hidden_layers} times {shape} are needed")
        if not 0 < length <= self.context:
            raise DataError(f"{length} tokens do not fit the model's context of {self.context}")
        cache = self._emptied(1, length + 64)
        held = [array for pair in zip(cache.keys, cache.values, strict=True) for array in pair]
        for target, source in zip(held, states, strict=True):
            target[0, :, :length] = torch.from_numpy(np.ascontiguousarray(source))
        cache.lengths[:] = length
        self._cache = cache

    @torch.inference_mode()
    def score(self, ids: Ids, wanted: Mask) -> Logits:
        """Log-probabilities of ids[:, 1:] where `wanted`, 0 elsewhere: (rows, n - 1)."""
        if ids.shape[1] > self.context + 1:
            raise UsageError(f"{ids.shape[1] - 1} tokens do not fit the model's context of {self.context}")
        mask = torch.from_numpy(wanted)
        targets = self._tensor(ids[:, 1:])[mask]
        states = self.model.hidden(self._tensor(ids[:, :-1]))[mask]  # (wanted, C)
        found = np.zeros(wanted.shape, np.float32)
        pieces = []
        size = max(1, _SCORED // self.vocab_size)
        for first in range(0, len(targets), size):
            logits = self.model.logits(states[first : first + size]).float()
            pieces.append(-F.cross_entropy(logits, targets[first : first + size], reduction="none"))
        found[wanted] = torch.cat(pieces).cpu().numpy() if pieces else 0
        return found

    def close(self) -> None:
        """Lets the cache go."""
        self._cache = self._steps = None

    def _tensor(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self.model.embedding.device)

    def _logits(self, states: torch.Tensor) -> Logits:
        return self.model.logits(states).float().cpu().numpy()


def open_session(
    folder: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    quantize: str | None = None,
    adapter: Path | None = None,
) -> TorchSession:
    """Loads a model folder. `device`: auto, cpu, cuda or mps; one that does not work is an error, never another.

    `quantize`: int8 or int4, the weights alone, rounded as they are read. `adapter`: of PEFT, which is merged
    into the weights as they are loaded.
    """
    device = working_device(device)
    torch.set_num_threads(threads or available_cores())
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if quantize is None:
        model = load_any(Path(folder), device, dtype, adapter=adapter)
        return TorchSession(fuse(model) if device == "cuda" else model)
    if quantize not in BITS:
        raise UsageError(f"is {quantize!r}; weights are rounded to {' or '.join(BITS)}", where="--quantize")
    if device == "cuda" and cuda_kernels() is None:
        raise UsageError(
            "on CUDA this needs triton and a C compiler, and a kernel did not run: pip install triton, or leave it out",
            where="--quantize",
        )
    # Matrix by matrix to the device: what a card holds decides about the rounded weights, not about the whole ones.
    whole = load_any(Path(folder), "cpu", dtype, adapter=adapter)
    return TorchSession(quantized(fuse(whole), BITS[quantize], device))


def load_any(
    folder: Path, device: str, dtype: torch.dtype, *, adapter: Path | None = None, kind: str = "model"
) -> Decoder:
    """A model, with an adapter merged into it where one is given."""
    if adapter is None:
        return load_model(folder, device, dtype, kind=kind)
    from llmcli.models.adapter_folder import load_adapted

    return load_adapted(folder, adapter, device, dtype, kind=kind)


def working_device(device: str) -> str:
    """The device for "auto", or the one that is wanted. Raises UsageError where it does not work."""
    works = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if works[name])
    if not works.get(device, False):
        raise UsageError(f"no working {device} device was found; see llmcli doctor", where="--device")
    return device
