"""How many tokens to guess: by what guesses turned out to be worth and what runs of the model cost, both measured.

Invariant: what was lost by guessing, in steps of the model, never passes `_FREE` and `_SHARE` of the tokens made, but
for the guess under way. So where nothing can be gained, little is lost. What a drafter takes to read a row comes on
top; rows after one in which that was not won back go without guesses: one, then three, then `_RESTS`.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics

LONGEST = 14  # guesses of a run; with the token before them fewer than a prompt, which a second graph may read
LENGTHS = (1, 2, 3, 5, 7, 10, LONGEST)
_FREE, _SHARE = 1.5, 0.015
_RESTS = 4
_GAIN = 1.04  # how much faster a run must promise to be
_FIRST = 3  # steps whose cost is known before anything is guessed
_STALE = 300  # runs after which a cost is no longer believed
_FORGET = 0.9  # what remains of a level's past after a run
_DOUBT = 0.012, 0.98  # share of choices within rounding at which nothing is guessed, and what remains of it by a token
_PATIENCE = 8, 256  # chances that are let pass before a level is tried again, at first and at most


@dataclasses.dataclass
class _Level:
    """Guesses of one likelihood."""

    right: float = 1.0  # a little trust to begin with
    tested: float = 1.5
    longest: int = 3  # grows as guesses hold
    passed: int = 0
    patience: int = _PATIENCE[0]

    def tokens(self, guesses: int) -> float:
        """Tokens that a run with so many guesses may be expected to give (arXiv:2211.17192, equation 1)."""
        rate = min(self.right / self.tested, 0.999)
        return float((1 - rate ** (guesses + 1)) / (1 - rate))


class Pace:
    """Decides for one model; what it learned goes on from row to row. A level is the drafter's own sort of guess."""

    def __init__(self) -> None:
        self._steps: collections.deque[float] = collections.deque(maxlen=15)
        self._runs: dict[int, collections.deque[float]] = {}
        self._seen: dict[int, int] = {}  # when a run of that length was last made
        self._levels: dict[int, _Level] = {}
        self._made = self._since = 0  # steps and runs; runs since the last step
        self._table: dict[int, float] = {}  # steps that runs cost, by their guesses; empty: to be computed
        self._balance = self._tokens = self._doubt = 0.0
        self._read = 0.0  # steps that the drafter took to read this row
        self._rests = self._resting = 0  # rows without guesses: after a loss, and still to come

    def begin(self) -> None:
        """Another row: its account is its own."""
        if self._resting:
            self._resting -= 1
        elif self._read:
            lost = self._balance < self._read
            self._rests = min(2 * self._rests + 1, _RESTS) if lost else 0
            self._resting = self._rests
        self._balance = self._tokens = self._read = 0.0

    def read(self, seconds: float) -> None:
        """The drafter has read what it had not seen of the row."""
        if self._steps:
            self._read += seconds / statistics.median(self._steps)

    def guesses(self, level: int, most: int) -> int:
        """How many tokens to guess, at most `most`; 0: none."""
        if most < 1 or len(self._steps) < _FIRST or self._since >= 64:  # a step now and then tells what one costs
            return 0
        if self._resting or self._balance < -(_FREE + _SHARE * self._tokens) or self._doubt > _DOUBT[0]:
            return 0
        known = self._levels.setdefault(level, _Level())
        best, gain = 0, _GAIN
        for length, cost in (self._table or self._costs()).items():
            if length > most or length > known.longest:
                break
            promised = known.tokens(length) / cost
            best, gain = (length, promised) if promised > gain else (best, gain)
        if best:
            return best
        known.passed += 1
        if known.passed <= known.patience:
            return 0
        known.passed, known.patience = 0, min(2 * known.patience, _PATIENCE[1])
        return min(2, most)

    def step(self, seconds: float) -> None:
        """A token was made without a guess."""
        self._steps.append(seconds)
        self._made, self._since, self._tokens = self._made + 1, 0, self._tokens + 1
        if self._made % 32 == 0:
            self._table.clear()

    def run(self, level: int, guesses: int, right: int, seconds: float) -> None:
        """So many guesses were looked at in one run, the first `right` of which held."""
        self._made, self._since = self._made + 1, self._since + 1
        self._runs.setdefault(guesses, collections.deque(maxlen=5)).append(seconds)
        self._seen[guesses] = self._made
        self._table.clear()
        known = self._levels.setdefault(level, _Level())
        known.right = _FORGET * known.right + right
        known.tested = _FORGET * known.tested + right + (right < guesses)
        if right == guesses:
            known.longest = min(max(known.longest, 2 * guesses + 1), LONGEST)
            known.patience = max(known.patience // 2, _PATIENCE[0])
        else:
            known.longest = max(right + 2, 2)
        self._tokens += right + 1
        self.lost(seconds)
        self._balance += right + 1

    def choice(self, close: bool) -> None:
        """Whether rounding may decide a choice: a run before it is then made again in steps, and nothing is won."""
        self._doubt = _DOUBT[1] * self._doubt + (1 - _DOUBT[1]) * close

    def lost(self, seconds: float) -> None:
        """Time that went without a token."""
        if self._steps:
            self._balance -= seconds / statistics.median(self._steps)

    def _costs(self) -> dict[int, float]:
        """By number of guesses, the cost of a run in steps: measured, between two that were, or (in hope) of fewer."""
        step = statistics.median(self._steps)
        known = {0: 1.0}
        for made, times in self._runs.items():
            if self._made - self._seen[made] <= _STALE:
                known[made] = statistics.median(times) / step
        for length in LENGTHS:
            low = max(made for made in known if made <= length)
            high = min((made for made in known if made >= length), default=low)
            share = (length - low) / (high - low) if high > low else 0.0
            self._table[length] = known[low] + (known[high] - known[low]) * share
        return self._table
