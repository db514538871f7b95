"""Masked batches: windows of a corpus in a frame, with tokens hidden that are to be found (BERT, arXiv:1810.04805).

Invariant: which tokens are hidden, and by what, depends on (seed, step, rank) alone; a window that is seen again is
masked anew, and a resumed run sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmcli.data.tokenizer import TextTokenizer
from llmcli.training.batches import TokenWindows, validation_windows
from llmcli.training.losses import IGNORED

Ids = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]

_LONGEST_WORD = 16  # tokens; text without spaces would be one word
_STREAM = 0x6D61736B  # keeps what is drawn here apart from the order of the windows, which has the same seed
_VALIDATION = 2**63  # the first number of a validation's batches: no step has such


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are hidden; see ObjectiveConfig."""

    fraction: float
    whole_words: bool
    mask_share: float
    random_share: float


@dataclasses.dataclass(frozen=True)
class Masked:
    """Rows in which tokens are hidden, and the places of these, counted through all rows."""

    ids: Tensor  # (B, T)
    chosen: Tensor  # (M,)
    number: int  # of the batch, for what is drawn at random

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Masked:
        """The same on a device."""
        ids = self.ids.to(device, non_blocking=non_blocking)
        return Masked(ids, self.chosen.to(device, non_blocking=non_blocking), self.number)

    def pin_memory(self) -> Masked:
        """The same in memory that a device can read by itself."""
        return Masked(self.ids.pin_memory(), self.chosen.pin_memory(), self.number)


class Words:
    """What a tokenizer's ids say of words: where one goes on, which tokens are none."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        count = tokenizer.vocab_size
        self.special = np.zeros(count, np.bool_)
        self.special[list(tokenizer.special_ids)] = True
        self.ordinary = np.flatnonzero(~self.special)
        prefix = tokenizer.files.content["model"].get("continuing_subword_prefix")
        if tokenizer.kind == "WordPiece" and prefix:
            self.goes_on = np.array([tokenizer.token(index).startswith(prefix) for index in range(count)])
            self.is_open = ~self.special
        else:  # a word is letters, digits and what is beyond ASCII; a space or a mark parts words
            table = [tokenizer.token_bytes(index) for index in range(count)]
            self.goes_on = np.array([_in_word(each[:1]) for each in table]) & ~self.special
            self.is_open = np.array([_in_word(each[-1:]) for each in table]) & ~self.special

    def begins(self, ids: Ids) -> Flags:
        """Where a word begins: (B, T) -> (B, T)."""
        begins = np.ones(ids.shape, np.bool_)
        begins[:, 1:] = ~(self.goes_on[ids[:, 1:]] & self.is_open[ids[:, :-1]])
        flat = begins.ravel()
        places = np.arange(flat.size)
        since = places - np.maximum.accumulate(np.where(flat, places, 0))
        return begins | (since % _LONGEST_WORD == 0).reshape(ids.shape)


def _in_word(byte: bytes) -> bool:
    return bool(byte) and (byte.isalnum() or byte[0] >= 0x80)


def hidden_tokens(
    ids: Ids, words: Words, masking: Masking, mask_id: int, random: np.random.Generator
) -> tuple[Ids, Ids, Ids]:
    """Hides tokens of rows (B, T). Returns the rows with them hidden, their places (M,), and what they were (M,).

    M is the same for all rows of a shape: where whole words do not fill it, the rest has the place 0 and IGNORED.
    """
    flat = ids.ravel()
    most = max(1, int(masking.fraction * flat.size))
    maskable = ~words.special[flat]
    begins = words.begins(ids).ravel() if masking.whole_words else np.ones(flat.size, np.bool_)
    unit = np.cumsum(begins) - 1  # of each token; a special token is one of its own, and never chosen
    lengths = np.bincount(unit[maskable], minlength=int(unit[-1]) + 1)
    order = random.permutation(len(lengths))
    order = order[lengths[order] > 0]
    wanted = max(1, min(most, round(masking.fraction * int(maskable.sum()))))
    taken = order[: max(1, int(np.searchsorted(np.cumsum(lengths[order]), wanted, side="right")))]
    chance = random.random(len(lengths))  # one for each unit: a word is replaced as a whole, or stays as a whole
    strangers = words.ordinary[random.integers(0, len(words.ordinary), most)]
    is_taken = np.zeros(len(lengths), np.bool_)
    is_taken[taken] = True
    places = np.flatnonzero(is_taken[unit] & maskable)[:most]
    fates = chance[unit[places]]
    hidden = flat.copy()
    hidden[places[fates < masking.mask_share]] = mask_id
    strange = (fates >= masking.mask_share) & (fates < masking.mask_share + masking.random_share)
    hidden[places[strange]] = strangers[: int(strange.sum())]
    rest = most - len(places)
    targets = np.concatenate([flat[places], np.full(rest, IGNORED, flat.dtype)])
    return hidden.reshape(ids.shape), np.concatenate([places, np.zeros(rest, places.dtype)]), targets


class MaskedWindows:
    """Windows of `length` tokens, the frame among them."""

    def __init__(
        self,
        shards: Sequence[Ids],
        tokenizer: TextTokenizer,
        masking: Masking,
        *,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert tokenizer.cls_id is not None
        assert tokenizer.sep_id is not None
        assert tokenizer.mask_id is not None
        self.first, self.last, self.mask_id = tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id
        self.length, self.seed, self.masking = length, seed, masking
        self.rank, self.world = rank, world
        self.words, self.vocab_size = Words(tokenizer), tokenizer.vocab_size
        ranks = {"rank": rank, "world": world}
        self.windows = TokenWindows(
            shards, context=length - 2, batch_size=batch_size, seed=seed, vocab_size=self.vocab_size, **ranks
        )

    def batch(self, number: int) -> tuple[Masked, Tensor]:
        """Inputs and targets of micro-batch `number`. Raises DataError for an id beyond the vocabulary."""
        rows, _ = self.windows.batch(number)
        return self._made(rows, number * self.world + self.rank, self.seed)

    def validation(self, shards: Sequence[Ids], *, batch_size: int, tokens: int) -> Iterator[tuple[Masked, Tensor]]:
        """Batches of at most `tokens` tokens, from windows spread over the shards: always the same, the masks too."""
        found = validation_windows(
            shards, context=self.length - 2, batch_size=batch_size, tokens=tokens, vocab_size=self.vocab_size
        )
        for number, (rows, _) in enumerate(found):
            yield self._made(rows, _VALIDATION + number, 0)

    def _made(self, rows: Tensor, number: int, seed: int) -> tuple[Masked, Tensor]:
        plain = rows.numpy()
        framed = np.empty((len(plain), plain.shape[1] + 2), np.int64)
        framed[:, 0], framed[:, 1:-1], framed[:, -1] = self.first, plain, self.last
        random = np.random.Generator(np.random.Philox(key=[seed ^ _STREAM, number]))
        hidden, places, targets = hidden_tokens(framed, self.words, self.masking, self.mask_id, random)
        return Masked(torch.from_numpy(hidden), torch.from_numpy(places), number), torch.from_numpy(targets)
