"""SentencePiece's BPE as a tokenizer.json: pieces merged by score, a space put before the text, bytes for what is left.

Of all neighbours whose joined text is a piece, the pair of the greatest score is merged, the leftmost first. Merges of
tokenizer.json are pairs of pieces in an order, so each way to cut a piece in two becomes a pair, in the order of the
scores.

Invariant: the ids are those of llama2.c's `encode` (`run.c`), and of SentencePiece with its dummy prefix and no other
normalisation. A vocabulary whose ids would depend on more than that order is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmcli.data.tokenizer_files import added_token
from llmcli.errors import DataError

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPACE = "▁"
FIRST_PIECE = 259  # ids before it: unknown, begin, end, then a token for each byte
ROLES = {"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN}


def scored_bpe(pieces: Sequence[str], scores: Sequence[float], where: str) -> dict[str, Any]:
    """The content of a tokenizer.json. `pieces`: spaces written as such; `where`: what an error names.

    Raises DataError where the pieces are not of this kind.
    """
    names = [UNKNOWN, BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256))]
    if list(pieces[3:FIRST_PIECE]) != names[3:]:
        raise DataError("has no tokens <0x00> to <0xFF> for bytes at the ids 3 to 258", where=where)
    names += [piece.replace(" ", SPACE) for piece in pieces[FIRST_PIECE:]]
    vocabulary = {name: identity for identity, name in enumerate(names)}
    if len(vocabulary) != len(names):
        twice = next(identity for identity, name in enumerate(names) if vocabulary[name] != identity)
        raise DataError(f"the tokens {twice} and {vocabulary[names[twice]]} have one text", where=where)
    if SPACE not in vocabulary:
        raise DataError("has no token for a space", where=where)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(identity, name) for identity, name in enumerate(names[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(BEGIN, 0), _sequence("A", 0)],
            "pair": [_special(BEGIN, 0), _sequence("A", 0), _special(BEGIN, 1), _sequence("B", 1)],
            "special_tokens": {BEGIN: {"id": BEGIN, "ids": [1], "tokens": [BEGIN]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(names, vocabulary, scores, where),
        },
    }


def _merges(
    names: Sequence[str], vocabulary: dict[str, int], scores: Sequence[float], where: str
) -> list[tuple[str, str]]:
    """Every pair whose joined text is a piece, best first.

    Of one piece's ways the one with the longer left part is first: pairs that overlap (aa a, a aa) meet in runs of one
    text, which merging from the left keeps in falling order.
    """
    known, found, owner = set(names[3:]), list[tuple[str, str]](), dict[float, int]()
    for identity in sorted(range(3, len(names)), key=lambda identity: -scores[identity]):
        name = names[identity]
        cuts = [(name[:cut], name[cut:]) for cut in range(len(name) - 1, 0, -1)]
        pairs = [(left, right) for left, right in cuts if left in known and right in known]
        if pairs and owner.setdefault(scores[identity], identity) != identity:
            other = owner[scores[identity]]
            raise DataError(f"the tokens {other} and {identity} have one score: which goes first?", where=where)
        found += pairs
    return found


def _special(token: str, kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": kind}}


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}
