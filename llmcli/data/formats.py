"""Inputs: which files are meant, what they hold, and their bytes, decompressed and bounded.

Invariant: a compressed file that ends early, has something behind its end, or swells like a bomb is an error, never a
shorter text; and at no time is more than a bounded part of a file in memory.

A format is told by the name (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`; anything else is text), a compression by
the first bytes, since names lie about it.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import os
import select
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llmcli.errors import DataError, MissingExtraError, UsageError, from_os_error

STDIN = "-"
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SUFFIXES = (".gz", ".gzip", ".xz", ".zst", ".zstd")

BOMB_RATIO = 200  # text compresses 3 to 30 times; deflate's limit is 1,032
BOMB_FLOOR = 32 << 20  # bytes; below this a swelling file does no harm
_CHUNK = 1 << 16  # compressed bytes read at once
# A zstd block of 4 bytes may stand for 128 KiB and its decoder has no output limit, so it is fed little at a time:
# 1 KiB can swell to 32 MiB before the ratio is looked at.
_ZSTD_CHUNK = 1 << 10
_PIPE_PATIENCE = 10_000  # milliseconds that a named pipe may wait for somebody who writes to it


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One input: a file, a pipe, or stdin."""

    name: str  # as it was given, or found below a folder that was given
    path: str | None  # None: stdin
    size: int | None  # bytes on disk; None: not known
    format: str  # text, jsonl, json, csv, tsv, parquet; "" : told from the first bytes (stdin and pipes)
    compression: str  # "", gzip, xz, zstd; what is not a regular file is looked at when it is read
    named: bool = True  # False: found in a folder; what is no text there is skipped, not an error


def find_inputs(inputs: Sequence[str]) -> list[Source]:
    """The files that the inputs mean, each once: files, folders (whole, sorted, hidden ones left out), globs, `-`.

    Raises DataError for an input that does not exist, that matches nothing, or is neither file, folder nor pipe.
    """
    found: list[Source] = []
    seen: set[tuple[int, int]] = set()
    for given in inputs:
        before = len(found)
        if given == STDIN:
            found.append(Source("<stdin>", None, None, "", ""))
            continue
        expanded, any_file = _expand(given), False
        for path, named in expanded:
            any_file = True
            source, identity = _examine(path, named=named)
            if identity not in seen:  # the same file by two names is read once
                seen.add(identity)
                found.append(source)
        if len(found) == before and not any_file:
            raise DataError("holds no file to read", where=given)
    if not found:
        raise DataError("no input was given")
    return found


def _expand(given: str) -> Iterator[tuple[str, bool]]:
    """(path, named) of an argument: a folder's and a glob's files in the order of their names."""
    if "\0" in given:
        raise UsageError("a path cannot hold a zero byte", where=given.replace("\0", "\\0"))
    if os.path.isdir(given):
        yield from ((path, False) for path in _walk(given))
    elif not os.path.lexists(given) and glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches:
            raise DataError("matches no file", where=given)
        for match in matches:
            if os.path.isdir(match):
                # `corpus/**` names the folders and the files in them; `corpus/*` only the folders.
                if not (given.endswith("**") or "**" + os.sep in given):
                    yield from ((path, False) for path in _walk(match))
            else:
                yield match, False
    else:
        yield given, True


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(root, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _refuse(error: OSError) -> None:
    raise from_os_error(error)


def _examine(path: str, *, named: bool) -> tuple[Source, tuple[int, int]]:
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                head = file.read(8)
        elif stat.S_ISFIFO(status.st_mode):
            return Source(path, path, None, format_of(path, pipe=True), ""), (status.st_dev, status.st_ino)
        else:
            raise DataError("is neither a file, a folder nor a pipe", where=path)
    except OSError as error:
        raise from_os_error(error, path) from error
    source = Source(path, path, status.st_size, format_of(path), compression_of(head), named)
    return source, (status.st_dev, status.st_ino)


def format_of(path: str, *, pipe: bool = False) -> str:
    """The format that a name tells; text where it tells none, or "" for a pipe, whose name means nothing."""
    name = Path(path).name.lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return FORMATS.get(Path(name).suffix, "" if pipe else "text")


def compression_of(head: bytes) -> str:
    """gzip, xz, zstd or "" by the first bytes of a file."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), "")


# ----------------------------------------------------------------------------------------------------------------
# Bytes


class Raw(io.RawIOBase):
    """A file's bytes as they lie on the disk: counted, and hashed on the way when asked for."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None] | None, *, hashed: bool) -> None:
        self.file = file
        self.on_bytes = on_bytes
        self.count = 0
        self.digest = hashlib.sha256() if hashed else None

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what there is."""
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        if self.digest is not None:
            self.digest.update(data)
        if self.on_bytes is not None and data:
            self.on_bytes(len(data))
        return len(data)

    def close(self) -> None:
        """Closes the file, but never stdin, which is not ours."""
        if self.file is not getattr(sys.stdin, "buffer", None):
            self.file.close()
        super().close()


class Decompressed(io.RawIOBase):
    """The decompressed bytes of a stream of one or more members. Raises DataError for what is not whole."""

    def __init__(self, stream: Any, compression: str, name: str) -> None:
        self.stream, self.compression, self.name = stream, compression, name
        self.make = _decoder_maker(compression)
        self.decoder: Any = self.make()
        self.pending = b""  # compressed, not yet given to the decoder
        self.output = memoryview(b"")
        self.consumed = self.produced = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Closes the compressed stream too."""
        self.stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer as far as one step of the decoder goes."""
        while not self.output:
            if self.decoder.eof and not self._next_member():
                return 0
            data = self._decode()
            self.produced += len(data)
            if self.produced > BOMB_FLOOR and self.produced > BOMB_RATIO * self.consumed:
                raise DataError(
                    f"swells to more than {BOMB_RATIO} times its size, as a decompression bomb does; "
                    "if it is sound, decompress it first",
                    where=self.name,
                )
            self.output = memoryview(data)
        count = min(len(buffer), len(self.output))
        buffer[:count] = self.output[:count]
        self.output = self.output[count:]
        return count

    def _decode(self) -> bytes:
        """One step: a bounded output from a bounded input."""
        wants_input = getattr(self.decoder, "needs_input", True)  # lzma may hold some back
        if not self.pending and wants_input:
            self.pending = self.stream.read(_ZSTD_CHUNK if self.compression == "zstd" else _CHUNK)
            self.consumed += len(self.pending)
            if not self.pending:
                raise DataError(f"its {self.compression} data end early: the file is not whole", where=self.name)
        try:
            if self.compression == "zstd":
                data, self.pending = self.decoder.decompress(self.pending), b""
            else:
                data = self.decoder.decompress(self.pending, _CHUNK * 16)
                self.pending = getattr(self.decoder, "unconsumed_tail", b"")  # zlib gives back what it did not take
        except Exception as error:  # zlib.error, lzma.LZMAError, zstandard.ZstdError have no common parent
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"its {self.compression} data are damaged: {reason}", where=self.name) from error
        return bytes(data)

    def _next_member(self) -> bool:
        """Goes on to the member that follows, if one does; gzip and xz may be padded with zero bytes."""
        self.pending = self.decoder.unused_data or self.pending
        while True:
            if self.compression != "zstd":
                self.pending = self.pending.lstrip(b"\0")
            if len(self.pending) >= 8:
                break
            more = self.stream.read(_ZSTD_CHUNK)
            self.consumed += len(more)
            self.pending += more
            if not more:
                break
        if not self.pending:
            return False
        if compression_of(self.pending) != self.compression and not self._is_skippable():
            raise DataError(f"something else follows its {self.compression} data", where=self.name)
        self.decoder = self.make()
        return True

    def _is_skippable(self) -> bool:
        """zstd's frames of other people's data (RFC 8878, 3.1.2)."""
        return self.compression == "zstd" and self.pending[1:4] == b"\x2a\x4d\x18" and self.pending[0] >> 4 == 5


def _decoder_maker(compression: str) -> Callable[[], Any]:
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    if compression == "xz":
        import lzma

        return lambda: lzma.LZMADecompressor(memlimit=256 << 20)
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data", "reading .zst") from error
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()


def open_source(
    source: Source, on_bytes: Callable[[int], None] | None = None, *, hashed: bool = False, decompress: bool = True
) -> tuple[Any, Raw]:
    """(a BufferedReader of the decompressed bytes, the raw file that counts). The caller closes the first.

    Raises DataError for a pipe that nobody writes to, LlmcliError for what the operating system refuses.
    """
    try:
        if source.path is None:
            if sys.stdin is None:  # closed by the shell: `<&-`
                raise DataError("is closed", where=source.name)
            file: BinaryIO = sys.stdin.buffer
        elif source.size is None:
            file = _open_pipe(source.path)
        else:
            file = open(source.path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise from_os_error(error, source.name) from error
    raw = Raw(file, on_bytes, hashed=hashed)
    stream: Any = io.BufferedReader(raw, 1 << 18)
    compression = source.compression or (compression_of(stream.peek(8)[:8]) if source.size is None else "")
    if compression and decompress:
        stream = io.BufferedReader(Decompressed(stream, compression, source.name), 1 << 18)
    return stream, raw


def _open_pipe(path: str) -> BinaryIO:
    """Opens a pipe without waiting for ever for somebody to write to it."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    waiting = select.poll()
    waiting.register(handle, select.POLLIN | select.POLLHUP)
    if not waiting.poll(_PIPE_PATIENCE) and _has_no_writer(handle):
        os.close(handle)
        raise DataError("is a pipe that nobody writes to", where=path)
    os.set_blocking(handle, True)
    return open(handle, "rb", buffering=0)


def _has_no_writer(handle: int) -> bool:
    """A pipe that holds nothing gives its end when it has no writer; one whose writer is slow says to try again."""
    try:
        return os.read(handle, 1) == b""
    except BlockingIOError:
        return False
