"""Prompts that are too long: their middle, the text that is asked about, is cut; what stands around it never is.

Invariant: what is left of the middle is one piece of it, at its begin where nothing says otherwise.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from llmcli.data.tokenizer import TextTokenizer

Parts = tuple[str, str, str]  # as those of `task_prompts`


def cut_prompt(tokenizer: TextTokenizer, parts: Parts, room: int, keep: tuple[int, int] = (0, 0)) -> Parts | None:
    """A prompt's parts, of `room` tokens at most. `keep`: characters of the middle that stay where they can.

    None where there is no room for the parts around the middle and one token of it.
    """
    first, middle, last = parts
    while (excess := len(tokenizer.encode(first + middle + last, special=True)) - room) > 0:
        offsets = tokenizer.encode_in_detail(middle).offsets
        count = len(offsets) - excess
        if count < 1:
            return None
        start = _start(offsets, count, keep)
        begin = offsets[start][0] if start else 0
        kept = middle[begin : offsets[start + count - 1][1]]
        if kept == middle:  # the last token is no character of its own
            kept = middle[:-1]
        keep = max(keep[0] - begin, 0), max(keep[1] - begin, 0)
        middle = kept
    return (first, middle, last) if middle else None


def _start(offsets: list[tuple[int, int]], count: int, keep: tuple[int, int]) -> int:
    """The first of `count` tokens in a row that hold what is to be kept, as near to the begin as they can stand.

    Where the begin is cut, a quarter stands behind what is kept: answers must not be learnt to stand at the end.
    """
    before = bisect_right([begin for begin, _ in offsets], keep[0]) - 1  # the token in which it begins
    behind = bisect_left([end for _, end in offsets], keep[1]) + 1  # the token behind its last one
    return max(0, min(before, behind - count + count // 4, len(offsets) - count))
