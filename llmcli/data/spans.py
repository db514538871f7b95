"""Where a text says what somebody says it says: the place of an answer in its context. Standard library only.

Invariant: what is found is one piece of the text, and where the answer stands in it letter for letter, it is that.
"""

from __future__ import annotations

import difflib
import re

_ALIKE = 0.8  # of letters in order, as difflib counts them, so that a place supports an answer
_WORD = re.compile(r"\w+")


def find_span(text: str, answer: str) -> tuple[int, int] | None:
    """The characters (begin, end) of the text that say the answer; None where nothing does.

    Letter for letter where it stands so, whole words first; else whatever case and white space; else the words that
    are most like it, if they are alike enough.
    """
    answer = answer.strip()
    if not answer:
        return None
    exact = re.escape(answer)
    loose = r"\s+".join(map(re.escape, answer.split()))
    for pattern, flags in ((exact, re.NOFLAG), (loose, re.IGNORECASE)):
        for around in (rf"(?<!\w){pattern}(?!\w)", pattern):
            if found := re.search(around, text, flags):
                return found.span()
    return _most_alike(text, answer)


def _most_alike(text: str, answer: str) -> tuple[int, int] | None:
    """The words that are most like an answer: as many as it has, one fewer or one more."""
    places = [word.span() for word in _WORD.finditer(text)]
    count = len(_WORD.findall(answer))
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(answer.casefold())  # of this one it keeps what it counts
    best: tuple[int, int] | None = None
    least = _ALIKE
    for size in (count, count - 1, count + 1):
        if size < 1 or not count:
            continue
        for (begin, _), (_, end) in zip(places, places[size - 1 :], strict=False):
            matcher.set_seq1(text[begin:end].casefold())
            if matcher.real_quick_ratio() < least or matcher.quick_ratio() < least:
                continue
            alike = matcher.ratio()
            if alike > least or (best is None and alike >= least):
                best, least = (begin, end), alike
    return best
