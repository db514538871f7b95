"""Encoding texts to ids in several processes, in order, with bounded memory.

Invariant: results come in the order of the batches, and depend on the texts alone, so the number of workers changes the
time and nothing else. A worker that dies is an error at once; a parent that dies ends its workers, whose input closes.

Workers are plain interpreters that speak over pipes. multiprocessing would import the caller's main module again, which
fails for text piped into Python and for scripts without a guard; and an executor's queues have no bound in bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import numpy as np

from llmcli.data import dedup, pii
from llmcli.data.fast_encoder import FastEncoder, choose_engine
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import LlmcliError

_DEPTH = 2  # batches that a worker has: one in work, one waiting
_PIPE_SIZE = 1 << 20  # bytes; Linux's own 64 KiB make a batch take dozens of turns
_SETPIPE = 1031  # F_SETPIPE_SZ, which Python's fcntl has on Linux only
_CHECKED = 16384  # characters of a text that is encoded by both engines
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What a worker needs to know."""

    tokenizer: str  # its folder
    engine: str  # tiktoken, table or tokenizers; "": the fastest that is proven
    dtype: str
    end_of_text: int
    scrub_pii: bool = False
    similar: bool = False  # compute the band keys of near-duplicates


@dataclasses.dataclass(slots=True)
class Encoded:
    """A piece of text as ids."""

    ids: np.ndarray
    size: int  # UTF-8 bytes of the text that was encoded
    digest: bytes
    found: tuple[int, ...]  # personal data, in the order of pii.LABELS; empty where none was looked for
    bands: list[bytes]


class EngineMismatchError(Exception):
    """The fast engine gave other ids than the tokenizers library."""


class Encoder:
    """Texts to ids, in this process."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.engine = config.engine or choose_engine(self.tokenizer)
        self.fast = FastEncoder(self.tokenizer, self.engine) if self.engine != "tokenizers" else None
        self.end = np.array([config.end_of_text], config.dtype)

    def encode(self, batch: Sequence[tuple[bytes, bool]]) -> list[Encoded]:
        """(UTF-8, whether the document ends here) of each text. Raises EngineMismatchError where the engines differ."""
        texts = [data.decode() for data, _ in batch]
        datas = [data for data, _ in batch]
        found: list[tuple[int, ...]] = [()] * len(texts)
        if self.config.scrub_pii:
            for place, text in enumerate(texts):
                texts[place], counts = pii.scrub(text)
                if counts:
                    datas[place] = texts[place].encode()
                    found[place] = tuple(counts.get(label, 0) for label in pii.LABELS)
        bands = dedup.band_keys(texts) if self.config.similar else [[] for _ in texts]
        encoded = []
        for text, data, counts_found, keys, (_, final) in zip(texts, datas, found, bands, batch, strict=True):
            digest = dedup.digest_of(data)
            ids = self._ids(text, check=digest[0] == 0)
            encoded.append(
                Encoded(np.concatenate((ids, self.end)) if final else ids, len(data), digest, counts_found, keys)
            )
        return encoded

    def _ids(self, text: str, *, check: bool) -> np.ndarray:
        if self.fast is None:
            return self.reference(text)
        if check and self.differs(text[:_CHECKED]):
            raise EngineMismatchError
        return np.asarray(self.fast.encode(text), self.config.dtype)

    def reference(self, text: str) -> np.ndarray:
        """The ids by the tokenizers library; special tokens in the text are ordinary text."""
        return np.asarray(self.tokenizer.encode(text), self.config.dtype)

    def differs(self, text: str) -> bool:
        """Whether the fast engine gives other ids than the tokenizers library."""
        if self.fast is None:
            return False
        return not np.array_equal(np.asarray(self.fast.encode(text), self.config.dtype), self.reference(text))


# ----------------------------------------------------------------------------------------------------------------
# Messages: 8 bytes of length, then the body


def _pack_batch(batch: Sequence[tuple[bytes, bool]]) -> list[bytes]:
    head = array("Q", [len(batch), *(len(data) * 2 + final for data, final in batch)]).tobytes()
    return [head, *(data for data, _ in batch)]


def _unpack_batch(body: bytes) -> list[tuple[bytes, bool]]:
    count = int.from_bytes(body[:8], "little")
    sizes = array("Q", body[8 : 8 + 8 * count])
    batch, place = [], 8 + 8 * count
    for size in sizes:
        batch.append((body[place : place + size // 2], bool(size % 2)))
        place += size // 2
    return batch


_OK, _MISMATCH, _FAILED = b"k", b"m", b"f"
_NO_BANDS: list[bytes] = []
_NOTHING = (0,) * len(pii.LABELS)


def _pack_result(encoded: Sequence[Encoded], config: EncoderConfig) -> list[bytes]:
    numbers = array("Q", [len(encoded)])
    numbers.extend([len(item.ids) for item in encoded])
    numbers.extend([item.size for item in encoded])
    if config.scrub_pii:
        for item in encoded:
            numbers.extend(item.found or _NOTHING)
    parts = [_OK, numbers.tobytes(), b"".join([item.digest for item in encoded])]
    if config.similar:
        parts += [key for item in encoded for key in item.bands]
    parts.append(np.concatenate([item.ids for item in encoded]).tobytes())
    return parts


def _unpack_result(body: bytes, config: EncoderConfig) -> list[Encoded]:
    status = body[:1]
    if status == _MISMATCH:
        raise EngineMismatchError
    if status == _FAILED:
        raise LlmcliError(f"encoding failed: {body[1:].decode()}")
    count = int.from_bytes(body[1:9], "little")
    place = 9 + count * 8 * (2 + len(_NOTHING) * config.scrub_pii)
    numbers = array("Q", body[9:place])
    digests, place = body[place : place + dedup.DIGEST * count], place + dedup.DIGEST * count
    keys = [
        body[place + n * dedup.DIGEST : place + (n + 1) * dedup.DIGEST]
        for n in range(count * dedup.BANDS * config.similar)
    ]
    place += len(keys) * dedup.DIGEST
    ids = np.frombuffer(body, config.dtype, offset=place)
    encoded, start = [], 0
    found: tuple[int, ...] = ()
    for n in range(count):
        end = start + numbers[n]
        if config.scrub_pii:
            first = 2 * count + n * len(_NOTHING)
            found = tuple(numbers[first : first + len(_NOTHING)])
        digest = digests[n * dedup.DIGEST : (n + 1) * dedup.DIGEST]
        bands = keys[n * dedup.BANDS : (n + 1) * dedup.BANDS] if keys else _NO_BANDS
        encoded.append(Encoded(ids[start:end], numbers[count + n], digest, found, bands))
        start = end
    return encoded


def _send(file: BinaryIO, parts: Sequence[bytes]) -> None:
    file.write(sum(map(len, parts)).to_bytes(8, "little") + b"".join(parts))
    file.flush()


def _receive(file: BinaryIO) -> bytes | None:
    """A message's body; None where the other side is gone."""
    head = file.read(8)
    size = int.from_bytes(head, "little")
    body = file.read(size) if len(head) == 8 else b""
    return body if len(head) == 8 and len(body) == size else None


# ----------------------------------------------------------------------------------------------------------------
# The worker's side


def serve() -> None:
    """The body of a worker process: messages on stdin, results on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    first = _receive(sys.stdin.buffer)
    if first is None:
        return
    config = EncoderConfig(**json.loads(first))
    batches: queue.Queue[list[tuple[bytes, bool]] | None] = queue.Queue(1)
    results: queue.Queue[list[bytes] | None] = queue.Queue(1)
    threading.Thread(target=_read_batches, args=(sys.stdin.buffer, batches), daemon=True).start()
    writer = threading.Thread(target=_write_results, args=(answers, results), daemon=True)
    writer.start()
    try:
        encoder = Encoder(config)
        while (batch := batches.get()) is not None:
            results.put(_pack_result(encoder.encode(batch), config))
    except EngineMismatchError:
        results.put([_MISMATCH])
    except BaseException as error:
        # Rust's panics are no Exception; whatever it was, the parent says it in one line.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        results.put([_FAILED, reason.encode("utf-8", "replace")])
    results.put(None)
    writer.join()


def _read_batches(file: BinaryIO, batches: queue.Queue[list[tuple[bytes, bool]] | None]) -> None:
    while (body := _receive(file)) is not None:
        batches.put(_unpack_batch(body))
    batches.put(None)


def _write_results(file: BinaryIO, results: queue.Queue[list[bytes] | None]) -> None:
    while (parts := results.get()) is not None:
        try:
            _send(file, parts)
        except OSError:  # the parent is gone
            os._exit(1)


# ----------------------------------------------------------------------------------------------------------------
# The parent's side


class _Worker:
    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            # -P: no module of the folder that the user works in comes before the library's.
            [sys.executable, "-P", "-c", "from llmcli.data.encode_pool import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "TOKENIZERS_PARALLELISM": "false",
                "RAYON_NUM_THREADS": "1",
            },
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: BinaryIO = self.process.stdin  # type: ignore[assignment]
        self.stdout: BinaryIO = self.process.stdout  # type: ignore[assignment]
        _widen(self.stdin)
        _widen(self.stdout)
        self._send([json.dumps(dataclasses.asdict(config)).encode()])

    def send(self, batch: Sequence[tuple[bytes, bool]]) -> None:
        self._send(_pack_batch(batch))

    def _send(self, parts: Sequence[bytes]) -> None:
        try:
            _send(self.stdin, parts)
        except OSError as error:
            answer = _receive(self.stdout)  # it may have said why
            if answer is not None and answer[:1] != _OK:
                _unpack_result(answer, self.config)
            raise self._died() from error

    def receive(self) -> list[Encoded]:
        body = _receive(self.stdout)
        if body is None:
            raise self._died()
        return _unpack_result(body, self.config)

    def _died(self) -> LlmcliError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = "; the machine may be out of memory: take fewer --workers" if name == "SIGKILL" else ""
            return LlmcliError(f"a worker process was ended by {name}{hint}")
        self.complaints.seek(0)
        lines = self.complaints.read().decode("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no reason given")
        return LlmcliError(f"a worker process ended (exit code {code}): {last}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.stdin, self.stdout, self.complaints):
            with contextlib.suppress(OSError):  # what was buffered for a process that is gone
                file.close()


def _widen(pipe: BinaryIO) -> None:
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.fcntl(pipe.fileno(), _SETPIPE, _PIPE_SIZE)


class EncodePool(Generic[T]):
    """Encodes batches in `workers` processes; with 0 in this one. A context manager: leaving it ends the workers."""

    def __init__(self, config: EncoderConfig, workers: int) -> None:
        self.config = config
        self.encoder = None if workers else Encoder(config)
        self.workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self.workers.append(_Worker(config))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EncodePool[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, at once."""
        for worker in self.workers:
            worker.close()
        self.workers = []

    def encode(self, batches: Iterable[tuple[T, Sequence[tuple[bytes, bool]]]]) -> Iterator[tuple[T, list[Encoded]]]:
        """(tag, texts) of each batch gives (tag, its results), in order.

        Raises EngineMismatchError, and LlmcliError where a worker died or could not go on.
        """
        if self.encoder is not None:
            for tag, batch in batches:
                yield tag, self.encoder.encode(batch)
            return
        waiting: deque[tuple[T, _Worker]] = deque()
        for number, (tag, batch) in enumerate(batches):
            if len(waiting) >= _DEPTH * len(self.workers):
                first, busy = waiting.popleft()
                yield first, busy.receive()
            # In turn, not to whoever is free: batches are of equal size, and the order needs no sorting.
            worker = self.workers[number % len(self.workers)]
            worker.send(batch)
            waiting.append((tag, worker))
        while waiting:
            first, busy = waiting.popleft()
            yield first, busy.receive()
