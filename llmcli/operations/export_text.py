"""The text that an export is calibrated and measured on, as windows of ids.

Invariant: no window is both calibrated on and measured on, and the same text and counts give the same windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmcli.config import TextConfig
from llmcli.data.corpus import CORPUS, open_corpus
from llmcli.data.python_text import python_texts
from llmcli.data.readers import read_documents
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError

Ids = npt.NDArray[np.int64]
LONGEST = 512  # tokens of a window
_CHARACTERS = 8 << 20  # that are read at most
_MEASURED = 4  # every fourth window is measured on, the others are calibrated on
_FEWEST = 64  # tokens


class ReferenceText:
    """A text in windows of at most `context` tokens; the one that Python brings where no path is given.

    Of a corpus it is the part held out for validation, or what was trained on where that is too short.
    """

    def __init__(self, tokenizer: TextTokenizer, path: str | None, config: TextConfig, context: int) -> None:
        if path is not None and (Path(path) / CORPUS).is_file():
            ids = _corpus_ids(tokenizer, path)
        else:
            texts = python_texts() if path is None else (document.text for document in read_documents([path], config))
            wanted = _CHARACTERS if path is not None else _CHARACTERS // 16  # more of Python's takes seconds to collect
            ids = np.fromiter(_ids(tokenizer, texts, wanted), np.int64)
        if len(ids) < _FEWEST:
            raise DataError(f"holds {len(ids)} tokens; a check needs {_FEWEST} or more", where=path)
        size = min(context, LONGEST, len(ids) // 2)
        count = len(ids) // size
        self._windows = ids[: count * size].reshape(count, size)

    def measured(self, tokens: int) -> list[Ids]:
        """Windows of about so many tokens, spread over the text."""
        return _spread(self._windows[::_MEASURED], tokens)

    def calibrated(self, tokens: int) -> list[Ids]:
        """Windows of about so many tokens, spread over the rest of the text."""
        rest = np.arange(len(self._windows)) % _MEASURED != 0
        return _spread(self._windows[rest], tokens)


def _ids(tokenizer: TextTokenizer, texts: Iterable[str], characters: int) -> Iterator[int]:
    """Documents, each with the token that ends a text behind it."""
    for text in texts:
        yield from tokenizer.encode(text[:characters])
        if tokenizer.eos_id is not None:
            yield tokenizer.eos_id
        characters -= len(text)
        if characters <= 0:
            return


def _corpus_ids(tokenizer: TextTokenizer, path: str) -> Ids:
    corpus = open_corpus(path)
    if corpus.tokenizer_hash != tokenizer.hash:
        raise DataError("was made with another tokenizer than the model's", where=path)
    shards = corpus.val() if corpus.val_tokens >= _FEWEST else corpus.train()
    found, wanted = [np.empty(0, np.int64)], _CHARACTERS // 4
    for shard in shards:
        found.append(shard[:wanted].astype(np.int64))
        wanted -= len(found[-1])
    return np.concatenate(found)


def _spread(windows: Ids, tokens: int) -> list[Ids]:
    count = min(len(windows), max(1, tokens // windows.shape[1]))
    return [windows[place * len(windows) // count] for place in range(count)]
