"""Framed texts: a text or a pair with what a tokenizer's template puts around it, token by token, and cut to a length.

Invariant: what is cut away is of the texts, from their ends, and never of the frame.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class FramedEncoding:
    """A text, or a pair of texts, with what the tokenizer puts around it. An entry a token each."""

    ids: list[int]
    types: list[int]  # what an encoder is told of the token's text: 0, or 1 in a second text, as the template has it
    texts: list[int | None]  # the text that the token is of, 0 or 1; None: it is of the frame
    offsets: list[tuple[int, int]]  # the characters of that text


def fitted(framed: FramedEncoding, length: int) -> FramedEncoding | None:
    """The same with the ends of its texts cut off, the longer one's first; None where no token of a text would be left.

    As transformers' truncation by "longest_first".
    """
    left = [framed.texts.count(text) for text in (0, 1)]
    excess = len(framed.ids) - length
    if excess >= sum(left):
        return None
    for _ in range(max(excess, 0)):
        left[int(left[1] > left[0])] -= 1
    kept: list[int] = []
    seen = [0, 0]
    for place, text in enumerate(framed.texts):
        if text is not None:
            seen[text] += 1
        if text is None or seen[text] <= left[text]:
            kept.append(place)
    return FramedEncoding(
        [framed.ids[at] for at in kept],
        [framed.types[at] for at in kept],
        [framed.texts[at] for at in kept],
        [framed.offsets[at] for at in kept],
    )
