"""Training tokenizers: byte-level BPE, unigram, WordPiece, and one token per character.

Invariant: the same text and settings give the same files, byte for byte, on any number of cores; memory is bounded by
the limits of `word_counts`, whatever the size and the script of the text.

Every kind but `char` learns from counted words. Special tokens can never come out of plain text: in BPE no merge may
make one, in the other kinds they stand outside the model's vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmcli.config import TokenizerConfig, check
from llmcli.data import bpe, wordpiece
from llmcli.data.cores import available_cores
from llmcli.data.frames import ENCODER_TOKENS, decoder_of, frame
from llmcli.data.pretokenizer import DEFAULT_PATTERN, UNCASED_PATTERN, Pattern
from llmcli.data.token_bytes import BYTE_OF, byte_alphabet, from_alphabet
from llmcli.data.tokenizer import TextTokenizer
from llmcli.data.tokenizer_files import END_OF_TEXT, TokenizerFiles, added_token
from llmcli.data.unigram import UnigramLearner
from llmcli.data.word_counts import MAX_BYTES, WordCounter, whole_characters
from llmcli.errors import ConfigError, DataError

DEFAULT_SIZE = 8192
UNKNOWN = {"char": "<unk>", "wordpiece": "[UNK]"}
_UNIGRAM_BYTES = 4_000_000  # of distinct words: the lattice takes a hundred times as much
_REPORT_EVERY = 64  # merges
_NO_LIMIT = 1000000000000000019884624838656  # what transformers writes for a tokenizer without a limit

Learned = Generator["TrainingStep", None, dict[str, Any]]  # the content of tokenizer.json is returned

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """How far a stage has come: `count` in characters, `merge` in merges, `prune` in pieces dropped."""

    stage: str
    done: int
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """The tokenizer, and what it was learned from."""

    tokenizer: TextTokenizer
    characters: int
    distinct_words: int  # characters, for the kind `char`
    thinned: int  # how often rare words were thinned to stay within the memory


def train(
    texts: Iterable[str],
    config: TokenizerConfig,
    *,
    workers: int | None = None,
    pattern: Pattern | None = None,
) -> Iterator[TrainingStep | Trained]:
    """Trains a tokenizer on texts, which are read once. The last record is the `Trained`.

    Raises ConfigError for settings that do not go together and DataError when there is no text.
    """
    check(config)
    special = special_tokens(config)
    if config.kind == "char":
        yield from _train_characters(texts, config, special)
        return
    if pattern is None:
        pattern = UNCASED_PATTERN if config.kind == "wordpiece" else DEFAULT_PATTERN
    counter = WordCounter(pattern.for_python(), max_bytes=_UNIGRAM_BYTES if config.kind == "unigram" else MAX_BYTES)
    for characters in counter.add(texts, available_cores() if workers is None else workers):
        yield TrainingStep("count", characters)
    if not counter.words:
        raise DataError("there is no text to train a tokenizer on")
    distinct, learn = len(counter.words), _LEARNERS[config.kind]
    content = yield from learn(counter, config, special, pattern)
    yield Trained(_opened(content, config), counter.characters, distinct, counter.thinned)


def special_tokens(config: TokenizerConfig) -> list[str]:
    """The special tokens in the order of their ids: end of text, the unknown token of kinds that need one, yours.

    For an encoder its five stand in the place of the end of text: [SEP] ends a document.
    """
    if config.lowercase and config.kind != "wordpiece":
        raise ConfigError("is for wordpiece; the other kinds keep every text as it is", where="lowercase")
    own = ENCODER_TOKENS | ({"unk": UNKNOWN[config.kind]} if config.kind in UNKNOWN else {})
    tokens = [END_OF_TEXT, *([UNKNOWN[config.kind]] if config.kind in UNKNOWN else [])]
    tokens = [*(own.values() if config.encoder else tokens), *config.special_tokens]
    for token in tokens:
        if not token or token != whole_characters(token):
            raise ConfigError("must not be empty, nor hold half a surrogate pair", where="special_tokens")
        if len(token) == 1:
            raise ConfigError(f"{token!r} is a single character; text is full of it", where="special_tokens")
    twice = sorted(token for token, count in Counter(tokens).items() if count > 1)
    if twice:
        raise ConfigError(f"{twice[0]!r} is given twice, or always there", where="special_tokens")
    return tokens


def _size(config: TokenizerConfig, special: list[str], least: int) -> int:
    """The vocabulary without the special tokens. Raises ConfigError when it could not even hold the alphabet."""
    size = (DEFAULT_SIZE if config.vocab_size is None else config.vocab_size) - len(special)
    if size < least:
        needed = f"{least} symbols and {len(special)} special tokens"
        raise ConfigError(f"must be at least {least + len(special)}: {needed}", where="vocab_size")
    return size


# ----------------------------------------------------------------------------------------------------------------
# The kinds: each returns the content of tokenizer.json


def _learn_bpe(counter: WordCounter, config: TokenizerConfig, special: list[str], pattern: Pattern) -> Learned:
    alphabet = byte_alphabet()
    size = _size(config, special, len(alphabet))
    tokens = [*special, *sorted(alphabet)]
    forbidden = [from_alphabet(token) for token in special if all(letter in BYTE_OF for letter in token)]
    merges: list[list[str]] = []
    wanted = size - len(alphabet)
    words, counter.words = counter.words, {}
    found = bpe.learn_merges(words, wanted, min_frequency=_frequency(config, 2), forbidden=forbidden)
    del words
    yield TrainingStep("merge", 0, wanted)
    for merge in found:
        pair = ["".join(alphabet[value] for value in part) for part in (merge.left, merge.right)]
        merges.append(pair)
        tokens.append("".join(pair))
        if len(merges) % _REPORT_EVERY == 0 or len(merges) == wanted:
            yield TrainingStep("merge", len(merges), wanted)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }
    return _content(model, enumerate(special), **_byte_level(pattern))


def _learn_unigram(counter: WordCounter, config: TokenizerConfig, special: list[str], pattern: Pattern) -> Learned:
    alphabet = byte_alphabet()
    learner = UnigramLearner(counter.words, _size(config, special, len(alphabet)))
    first: int | None = None
    for step in learner.run():
        first = step.pieces if first is None else first
        yield TrainingStep("prune", first - step.pieces, max(0, first - step.wanted))
    pieces = [["".join(alphabet[value] for value in piece), score] for piece, score in learner.pieces]
    pieces = [piece for piece in pieces if piece[0] not in special]
    model = {"type": "Unigram", "unk_id": None, "vocab": pieces, "byte_fallback": False}
    return _content(model, enumerate(special, start=len(pieces)), **_byte_level(pattern))


def _learn_wordpiece(counter: WordCounter, config: TokenizerConfig, special: list[str], pattern: Pattern) -> Learned:
    steps: dict[str, Any] = {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": config.lowercase,
            "lowercase": config.lowercase,
        },
        # Numbers in groups of three, as in the pattern that counted, whose other cuts BERT's rules make anyway.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
                {"type": "BertPreTokenizer"},
            ],
        },
        "decoder": {"type": "WordPiece", "prefix": wordpiece.MARK, "cleanup": True},
    }
    size = _size(config, special, 1)
    min_frequency = _frequency(config, 2)
    words = _rewritten(counter.words, steps)
    alphabet = wordpiece.alphabet_of(words, max(1, size // 4), 1)
    own = set(special)
    tokens = [UNKNOWN["wordpiece"], *alphabet, *(wordpiece.MARK + letter for letter in alphabet)]
    tokens = [token for token in dict.fromkeys(tokens) if token not in own or token == UNKNOWN["wordpiece"]][: size + 1]
    wanted = size + 1 - len(tokens)
    yield TrainingStep("merge", 0, wanted)
    for piece in wordpiece.learn_pieces(words, alphabet, wanted, min_frequency):
        if piece not in own:
            tokens.append(piece)
        if len(tokens) % _REPORT_EVERY == 0:
            yield TrainingStep("merge", wanted - (size + 1 - len(tokens)), wanted)
    model = {
        "type": "WordPiece",
        "unk_token": UNKNOWN["wordpiece"],
        "continuing_subword_prefix": wordpiece.MARK,
        "max_input_chars_per_word": 100,
        "vocab": {token: index for index, token in enumerate(tokens)},
    }
    outside = [token for token in special if token != UNKNOWN["wordpiece"]]
    added = [(0, UNKNOWN["wordpiece"]), *enumerate(outside, start=len(tokens))]
    return _content(model, added, **steps)


def _rewritten(words: Mapping[str, int], steps: Mapping[str, Any]) -> dict[str, int]:
    """The words as the steps before the model make them: without white space, punctuation apart."""
    from tokenizers import Tokenizer

    bare = {"type": "WordPiece", "unk_token": "", "continuing_subword_prefix": "", "max_input_chars_per_word": 1}
    content = _content({**bare, "vocab": {}}, (), normalizer=steps["normalizer"], pre_tokenizer=steps["pre_tokenizer"])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    rewritten: dict[str, int] = {}
    for word, count in words.items():
        for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(word)):
            rewritten[part] = rewritten.get(part, 0) + count
    return rewritten


_LEARNERS = {"bpe": _learn_bpe, "unigram": _learn_unigram, "wordpiece": _learn_wordpiece}


def _train_characters(
    texts: Iterable[str], config: TokenizerConfig, special: list[str]
) -> Iterator[TrainingStep | Trained]:
    """One token per character; characters that are too rare, or beyond the size, are unknown."""
    counts: Counter[str] = Counter()
    characters = 0
    for text in texts:
        counts.update(whole_characters(text))
        characters += len(text)
        yield TrainingStep("count", characters)
    if not counts:
        raise DataError("there is no text to train a tokenizer on")
    size = len(counts) if config.vocab_size is None else _size(config, special, 1)
    common = sorted(counts, key=lambda character: (-counts[character], character))[:size]
    known = sorted(character for character in common if counts[character] >= _frequency(config, 1))
    model: dict[str, Any] = {
        "type": "BPE",  # without merges: the library's only model that takes a text apart by characters in one go
        "dropout": None,
        "unk_token": UNKNOWN["char"],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate([*special, *known])},
        "merges": [],
    }
    content = _content(model, enumerate(special), decoder={"type": "Fuse"})
    yield Trained(_opened(content, config), characters, len(counts), 0)


# ----------------------------------------------------------------------------------------------------------------
# The files


def _frequency(config: TokenizerConfig, usual: int) -> int:
    return usual if config.min_frequency is None else config.min_frequency


def _byte_level(pattern: Pattern) -> dict[str, Any]:
    """The steps of a byte-level tokenizer that cuts with a pattern."""
    if pattern.name == "gpt2":
        before: dict[str, Any] = _BYTE_LEVEL
    else:
        split = {"type": "Split", "pattern": {"Regex": pattern.regex}, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}
    return {"pre_tokenizer": before, "decoder": _BYTE_LEVEL}


def _content(
    model: dict[str, Any],
    added: Iterable[tuple[int, str]],
    *,
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(identity, token) for identity, token in added],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _opened(content: dict[str, Any], config: TokenizerConfig) -> TextTokenizer:
    """The tokenizer of a tokenizer.json, which for an encoder gets its frame."""
    roles: dict[str, str | None] = {"bos": None, "eos": END_OF_TEXT, "pad": END_OF_TEXT}
    if config.encoder:
        ids = {token["content"]: token["id"] for token in content["added_tokens"]}
        content["post_processor"] = frame(
            *((ENCODER_TOKENS[role], ids[ENCODER_TOKENS[role]]) for role in ("cls", "sep"))
        )
        roles = {"bos": None, "eos": ENCODER_TOKENS["sep"], **ENCODER_TOKENS}
    roles["unk"] = content["model"].get("unk_token") or roles.get("unk")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _NO_LIMIT,
        **{f"{role}_token": token for role, token in roles.items()},
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": decoder_of(content),
    }
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return TextTokenizer(TokenizerFiles("", text, content, settings))
