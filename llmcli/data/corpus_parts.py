"""A corpus being filled: which of the encoded pieces are kept, and in which part.

Invariant: equal documents are in one part. The sentences of documents, where they are asked for, stand behind the last
document, those of documents that are trained on alone, and in a drawn order: each is to be understood by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from llmcli.config import CorpusConfig
from llmcli.data import pii
from llmcli.data.corpus import PARTS, Mark, PartWriter
from llmcli.data.dedup import DigestSet, SimilarSet
from llmcli.data.encode_pool import Encoded, EncoderConfig
from llmcli.data.split import Split
from llmcli.errors import DataError


class Meta(NamedTuple):
    """Of a piece, what is to be known beside its text."""

    first: bool
    final: bool
    part: str
    sentence: bool


class CorpusParts:
    """Takes the encoded pieces in order and writes what is to be kept. A context: its files are closed at the end."""

    def __init__(
        self,
        folder: Path,
        encoder: EncoderConfig,
        shard_tokens: int,
        split: Split,
        config: CorpusConfig,
        dropped: Counter[str],
    ) -> None:
        self.writers = {part: PartWriter(folder, part, encoder.dtype, shard_tokens) for part in PARTS}
        self.split, self.dropped = split, dropped
        self.end, self.seed = encoder.end_of_text, config.seed
        self.seen = DigestSet() if config.dedup != "off" else None
        self.similar = SimilarSet() if config.dedup == "near" else None
        # By tail a document in the tail that was trained on already follows its first copy.
        self.trained = DigestSet() if split.by == "tail" else None
        self.pii: Counter[str] = Counter()
        self.said = PartWriter(folder, "sentences", encoder.dtype, sys.maxsize)  # until the last document is written
        self.known = DigestSet()  # of sentences
        self.part = "train"  # of the last document, which its sentences follow
        self.repeated = False  # it was left out
        # Of a document in several pieces:
        self.marks: tuple[Mark, Mark, int] | None = None  # of its part, of the sentences, and how many these are
        self.joined = hashlib.blake2b(digest_size=16)
        self.found: Counter[str] = Counter()

    def __enter__(self) -> CorpusParts:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as stack:
            for writer in (*self.writers.values(), self.said):
                stack.callback(writer.close)

    def finish(self) -> None:
        """To be called behind the last piece."""
        self.said.pour_into(self.writers["train"], self.end, self.seed)

    @property
    def sentences(self) -> int:
        """How many stand behind the documents."""
        return self.said.documents

    def take(self, result: Encoded, meta: Meta) -> None:
        """Writes a piece, or takes its document back when its end shows that it is a duplicate."""
        first, final, part, sentence = meta
        if sentence:
            self._take_sentence(result)
            return
        if first and final:
            self.repeated = self._is_duplicate(result.digest, result.bands)
            if self.repeated:
                return
            self.part = self._part_of(part, result.digest)
            writer = self.writers[self.part]
            writer.write(result.ids, result.size)
            writer.documents += 1
            if result.found:
                self._count_pii(result, self.pii)
            return
        if first:
            self.part = part or self.split.part_of(result.digest)
            self.marks = self.writers[self.part].mark(), self.said.mark(), self.said.documents
            self.joined, self.found = hashlib.blake2b(digest_size=16), Counter()
            # Similarity is judged by the first piece: a million characters say enough.
            self.repeated = self.similar is not None and not self.similar.add(result.bands)
        self.joined.update(result.digest)
        self.writers[self.part].write(result.ids, result.size)
        self._count_pii(result, self.found)
        if final:
            assert self.marks is not None
            if self.repeated or self._is_duplicate(self.joined.digest(), None):
                before, said, self.said.documents = self.marks
                self.writers[self.part].return_to(before)
                self.said.return_to(said)
                self.dropped["duplicates"] += self.repeated
                self.repeated = True
            else:
                self.writers[self.part].documents += 1
                self.pii.update(self.found)

    def _take_sentence(self, result: Encoded) -> None:
        """Writes a sentence of a document that is trained on, unless it was written, or is held out where it is alone.

        So equal texts stay on one side here too.
        """
        if self.repeated or self.part != "train" or self.split.part_of(result.digest) != "train":
            return
        if self.known.add(result.digest):
            if self.trained is not None:
                self.trained.add(result.digest)
            self.said.write(result.ids, result.size)
            self.said.documents += 1

    def _is_duplicate(self, digest: bytes, bands: list[bytes] | None) -> bool:
        if self.seen is None or (
            self.seen.add(digest) and (self.similar is None or bands is None or self.similar.add(bands))
        ):
            return False
        self.dropped["duplicates"] += 1
        return True

    def _part_of(self, part: str, digest: bytes) -> str:
        if self.trained is None:
            return self.split.part_of(digest)
        if part == "train":
            self.trained.add(digest)
        return "train" if digest in self.trained else part

    @staticmethod
    def _count_pii(result: Encoded, counts: Counter[str]) -> None:
        for label, count in zip(pii.LABELS, result.found, strict=False):
            counts[label] += count

    def pii_counts(self) -> dict[str, int]:
        """Label: how many; only those found."""
        return {label: self.pii[label] for label in pii.LABELS if self.pii[label]}

    def refuse_empty(self, config: CorpusConfig) -> None:
        """Raises DataError where a part that was asked for holds nothing."""
        train, val = self.writers["train"], self.writers["val"]
        if not train.tokens and not val.tokens:
            left = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
            raise DataError(f"no text is left: {left or 'all is empty'}")
        if not train.tokens or (config.val_fraction > 0 and not val.tokens):
            empty = "training" if not train.tokens else "validation"
            raise DataError(
                f"too little text: of {train.documents + val.documents} documents none is left for {empty}; "
                "give more, another --val-fraction (0: no validation), or --val-by tail"
            )
