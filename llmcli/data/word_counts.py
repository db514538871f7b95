r"""Counting the words of a text, in processes of its own, in bounded memory.

Invariant: the counts depend on the texts, their order and the limits alone, not on the number of workers or on which
of them was faster: batches are cut in the reading process and their counts are added up in order.

Two things make it fast. A word begins before every space that something other than white space follows (see
`pretokenizer.Pattern`), so `str.split` cuts the text first, equal pieces are counted as they are, and the pattern runs
over the distinct ones only, about a twelfth of English. And batches go to processes, started as plain interpreters with
a pipe: `multiprocessing` would import the caller's main module again, which fails for text piped into Python and for
scripts without a guard.

Workers import this module: the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmcli.errors import LlmcliError

BATCH = 8_000_000  # characters a worker gets at once
STEP = 100_000  # characters split at once: their pieces take 15 times their size, which the cache should hold
MAX_WORDS = 1_500_000  # distinct words held; about 250 MB
MAX_BYTES = 20_000_000  # of distinct words, in UTF-8; Chinese pieces are long and nearly all distinct
LONGEST_WORD = 128  # characters; a longer one (a ruler, base64) is counted in parts of this length
LONGEST_CLAUSE = 16  # characters; the same for scripts written without spaces (see `pretokenizer`)

_BEGIN, _KEPT = "\x01", "\0"  # marks of a text's begin, and of a space that begins no word; texts with them go slowly
_CUT = re.compile(r"(?= \S)|(?<=\n)(?=[^\s/])")


class Cutter:
    """Cuts texts with a pattern in the forms that `pretokenizer.PatternForms` has, each compiled when needed."""

    def __init__(self, forms: Sequence[str]) -> None:
        self.forms = forms
        self.whites = {"\n"}  # white space that was seen after a space
        self._compiled: dict[int, re.Pattern[str]] = {}

    def _form(self, number: int) -> re.Pattern[str]:
        if number not in self._compiled:
            self._compiled[number] = re.compile(self.forms[number])
        return self._compiled[number]

    def for_text(self, text: str) -> Callable[[str], list[str]]:
        """The `findall` that is right for this text, and for every part of it, and fastest."""
        number = 0
        if not text.isascii():  # a character above U+FFFF takes two units
            number = 1 if len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text) else 2
        return self._form(number).findall

    def parts(self, word: str) -> list[str]:
        """The parts in which a word is counted: itself, if it is not too long."""
        longest = LONGEST_WORD
        if len(word) > LONGEST_CLAUSE and not word.isascii() and self._form(3).search(word):
            longest = LONGEST_CLAUSE
        return [word[begin : begin + longest] for begin in range(0, len(word), longest)]


def count_batch(texts: list[str], cutter: Cutter) -> dict[str, int]:
    """The words of the texts, each with how often it occurs."""
    return _count_joined(_join(texts), [len(text) for text in texts], cutter)


def _join(texts: list[str]) -> str:
    return _BEGIN + f" {_BEGIN}".join(texts)


def _count_joined(joined: str, sizes: list[int], cutter: Cutter) -> dict[str, int]:
    """The same for the texts joined; `sizes` are theirs."""
    words: dict[str, int] = {}
    if _KEPT in joined or joined.count(_BEGIN) != len(sizes) or joined.count(" ") * 32 < len(joined):
        begin = 1
        for size in sizes:
            text = joined[begin : begin + size]
            for word, count in Counter(cutter.for_text(text)(text)).items():
                words[word] = words.get(word, 0) + count
            begin += size + 2
    else:
        in_ascii = cutter.for_text("")
        for piece, count in _count_pieces(joined, cutter).items():
            if piece.isascii():
                if piece.isalpha() and piece[1:].islower():  # one word in every pattern
                    words[" " + piece] = words.get(" " + piece, 0) + count
                    continue
                part = piece[1:] if piece[:1] == _BEGIN else " " + piece
                found = in_ascii(part.replace(_KEPT, " "))
            else:
                part = (piece[1:] if piece[0] == _BEGIN else " " + piece).replace(_KEPT, " ")
                found = cutter.for_text(part)(part)
            for word in found:
                words[word] = words.get(word, 0) + count
    for word in [word for word in words if len(word) > LONGEST_CLAUSE]:
        parts = cutter.parts(word)
        if len(parts) > 1:
            count = words.pop(word)
            for part in parts:
                words[part] = words.get(part, 0) + count
    return words


def _count_pieces(text: str, cutter: Cutter) -> Counter[str]:
    """Cuts before each space that no white space follows, and counts; the other spaces are marked first.

    Looking for every kind of white space takes longer than the counting. So the text is first searched for those seen
    so far; a piece that begins with another kind tells that it has to be done again.
    """
    while True:
        pieces: Counter[str] = Counter()
        begin = 0
        while begin >= 0:
            end = text.find(" ", begin + STEP)
            while end >= 0 and text[end + 1 : end + 2].isspace():
                end = text.find(" ", end + 1)
            pieces.update(_marked(text[begin:end] if end >= 0 else text[begin:], cutter.whites).split(" "))
            begin = end + 1 or -1
        new = {piece[0] for piece in pieces if piece[:1].isspace()}
        if not new:
            return pieces
        cutter.whites |= new


def _marked(text: str, whites: set[str]) -> str:
    while "  " in text:
        text = text.replace("  ", _KEPT + " ")
    for white in whites:
        text = text.replace(" " + white, _KEPT + white)
    return text.replace(" " + _KEPT, _KEPT * 2)


def cut_batches(texts: Iterable[str], size: int = BATCH) -> Iterator[list[str]]:
    """Groups texts into batches of about `size` characters; a longer text is cut where a word begins.

    Text without a space or line end for another `size` characters (nobody's prose) is cut where it stands.
    Lone surrogates, which no tokenizer can encode, become U+FFFD.
    """
    batch: list[str] = []
    held = 0
    for text in texts:
        begin = 0
        while begin < len(text):
            end = begin + size - held
            if end < len(text):
                found = _CUT.search(text, end, min(len(text), end + size))
                end = found.start() if found else end + size
            part = whole_characters(text[begin:end])
            batch.append(part)
            held += len(part)
            begin = end
            if held >= size:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def whole_characters(text: str) -> str:
    """The text with lone surrogates (JSON's "\\ud800") replaced: they are no characters and have no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class WordCounter:
    """Adds up words: `words` (word to count), `characters` read, `thinned` (how often rare words were thinned)."""

    def __init__(self, forms: Sequence[str], max_words: int = MAX_WORDS, max_bytes: int = MAX_BYTES) -> None:
        self.words: dict[str, int] = {}
        self.characters = 0
        self.thinned = 0
        self._forms = forms
        self._limits = (max_words, max_bytes)
        self._weigh_at = 0  # distinct words at which their bytes are summed up again

    def add(self, texts: Iterable[str], workers: int = 1, batch_size: int = BATCH) -> Iterator[int]:
        """Counts the texts and yields the number of characters counted so far, batch by batch."""
        batches = cut_batches(texts, batch_size)
        for size, words in _count_all(batches, self._forms, workers):
            self.characters += size
            mine = self.words
            for word, count in words.items():
                mine[word] = mine.get(word, 0) + count
            self._keep_limits()
            yield self.characters

    def _keep_limits(self) -> None:
        max_words, max_bytes = self._limits
        while len(self.words) > self._weigh_at:
            if len(self.words) <= max_words and _bytes_of(self.words) <= max_bytes:
                self._weigh_at = len(self.words) + max_words // 16
                return
            self._thin()
            self._weigh_at = 0

    def _thin(self) -> None:
        """Drops about half of the rare words and doubles the counts of their fellows that stay.

        Rare are the words of the lowest counts that together make up half of the vocabulary. Which of them go is
        decided by a hash of the word and of the round: the expected count of every word stays what it was, and the
        same text gives the same words. (Dropping the rarest without making up for it would take nearly everything
        from scripts written without spaces, and leave the others whole.)
        """
        self.thinned += 1
        salt = self.thinned * 0x9E3779B9
        sizes = Counter(self.words.values())
        limit, seen = 0, 0
        for count in sorted(sizes):
            limit, seen = count, seen + sizes[count]
            if seen * 2 >= len(self.words):
                break
        kept = {}
        for word, count in self.words.items():
            if count > limit:
                kept[word] = count
            elif (zlib.crc32(word.encode("utf-8")) ^ salt) * 0xD1342543DE82EF95 >> 63 & 1:
                kept[word] = 2 * count
        self.words = kept


def _bytes_of(words: Iterable[str]) -> int:
    return sum(len(word) if word.isascii() else len(word.encode("utf-8")) for word in words)


# ----------------------------------------------------------------------------------------------------------------
# Processes. A message is its length (8 bytes) and JSON; a batch is two, the sizes of its texts and the texts joined.


def _count_all(
    batches: Iterator[list[str]], forms: Sequence[str], workers: int
) -> Iterator[tuple[int, dict[str, int]]]:
    """(characters, words) of each batch, in order. The first batch is counted here: a small text starts no process."""
    cutter = Cutter(forms)
    first = next(batches, None)
    if first is None:
        return
    second = next(batches, None)
    if workers < 2 or second is None or not sys.executable:
        for batch in filter(None, (first, second)):
            yield sum(map(len, batch)), count_batch(batch, cutter)
        for batch in batches:
            yield sum(map(len, batch)), count_batch(batch, cutter)
        return
    helpers = [_Helper(forms) for _ in range(workers)]
    free = deque(helpers)
    pending: deque[tuple[int, Future[dict[str, int]]]] = deque()

    def count(batch: list[str]) -> dict[str, int]:
        helper = free.popleft()  # as many threads as helpers: one is free, and deques are thread-safe
        try:
            return helper.count(batch)
        finally:
            free.append(helper)

    try:
        with ThreadPoolExecutor(workers) as threads:
            try:
                for batch in _chain(first, second, batches):
                    pending.append((sum(map(len, batch)), threads.submit(count, batch)))
                    while len(pending) > 2 * workers:
                        size, future = pending.popleft()
                        yield size, future.result()
                while pending:
                    size, future = pending.popleft()
                    yield size, future.result()
            finally:  # before the threads are waited for: an interrupted training ends at once
                for helper in helpers:
                    helper.kill()
    finally:
        for helper in helpers:
            helper.close()


def _chain(first: list[str], second: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield second
    yield from rest


class _Helper:
    """A process that counts batches."""

    def __init__(self, forms: Sequence[str]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from llmcli.data.word_counts import serve; serve()"
        # A session of its own: Ctrl-C reaches the reading process, which then closes the pipes.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        _write(self._stdin, forms)

    @property
    def _stdin(self) -> BinaryIO:
        return cast(BinaryIO, self._process.stdin)

    def count(self, batch: list[str]) -> dict[str, int]:
        """The words of a batch. Raises LlmcliError when the process has died (most often for want of memory)."""
        try:
            _write(self._stdin, [len(text) for text in batch])
            _write_bytes(self._stdin, _join(batch).encode("utf-8"))
            return cast(dict[str, int], json.loads(_read(cast(BinaryIO, self._process.stdout))))
        except (OSError, EOFError) as error:
            raise LlmcliError("a process that counts words was killed, perhaps for want of memory") from error

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()

    def close(self) -> None:
        """Closes the pipes and takes leave of the process."""
        with contextlib.suppress(OSError):  # what was not sent yet
            self._stdin.close()
        cast(BinaryIO, self._process.stdout).close()
        self._process.wait()


def _write(stream: BinaryIO, value: Any) -> None:
    _write_bytes(stream, json.dumps(value, ensure_ascii=False).encode("utf-8"))


def _write_bytes(stream: BinaryIO, data: bytes) -> None:
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _read(stream: BinaryIO) -> bytes:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve() -> None:
    """The work of a helper process: pattern first, then batch after batch until the pipe is closed."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        cutter = Cutter(json.loads(_read(source)))
        while True:
            sizes = json.loads(_read(source))
            _write(sink, _count_joined(_read(source).decode("utf-8"), sizes, cutter))
    except (EOFError, BrokenPipeError):
        return
