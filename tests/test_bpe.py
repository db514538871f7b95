"""Byte-pair encoding: the published merges, the plain algorithm, and counting that no shortcut changes."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llmcli.config import TokenizerConfig
from llmcli.data import word_counts
from llmcli.data.bpe import learn_merges
from llmcli.data.cores import available_cores
from llmcli.data.pretokenizer import DEFAULT_PATTERN, GPT2_PATTERN, PATTERNS, Pattern
from llmcli.data.tokenizer_training import Trained, train
from llmcli.data.word_counts import LONGEST_CLAUSE, LONGEST_WORD, Cutter, WordCounter, count_batch, cut_batches
from llmcli.errors import LlmcliError

REFERENCE = ROOT.parent / "shared" / "data" / "tokenizers" / "bpe_training_reference"
# Every kind of character that a pattern tells apart, in every neighbourhood.
ALPHABET = (
    "aBC zé\u0301  \n\r\t'\u2019sSdtreLl\u017f/12\u0663.,!-=\x00\x01\x1c\x85\u00a0\u3000\u2028\u200d中文〇々ーアひ"
    "กำไ๑ខ្မនမြ한हिعَ❤️👨\U00020000\U0001d7d8\U000e0100"
)
texts = st.text(st.one_of(st.sampled_from(ALPHABET), st.characters(codec="utf-8")), max_size=60)


def forms(pattern: Pattern = DEFAULT_PATTERN) -> tuple[str, str, str, str]:
    made: tuple[str, str, str, str] = pattern.for_python()
    return made


def counted(given: Iterable[str], pattern: Pattern = DEFAULT_PATTERN, **limits: int) -> WordCounter:
    counter = WordCounter(forms(pattern), **limits)
    for _ in counter.add(given):
        pass
    return counter


def plain_merges(words: dict[str, int], count: int, least: int) -> list[tuple[bytes, bytes]]:
    """The algorithm as it is told: count all pairs, merge the commonest, the greatest among equals."""
    split = {tuple(bytes([value]) for value in word.encode()): weight for word, weight in words.items()}
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, weight in split.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += weight
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < least:
            break
        merges.append(best)
        merged: Counter[tuple[bytes, ...]] = Counter()
        for word, weight in split.items():
            parts, place = [], 0
            while place < len(word):
                step = 2 if word[place : place + 2] == best else 1
                parts.append(b"".join(word[place : place + step]))
                place += step
            merged[tuple(parts)] += weight
        split = dict(merged)
    return merges


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published result is not here")
def test_the_published_merges_come_out() -> None:
    corpus = (REFERENCE / "corpus.en").read_text("utf-8")
    published = json.loads((REFERENCE / "train-bpe-reference-vocab.json").read_text("utf-8"))
    merges = (REFERENCE / "train-bpe-reference-merges.txt").read_text("utf-8").split("\n")
    *_, done = train([corpus], TokenizerConfig(vocab_size=500), pattern=GPT2_PATTERN, workers=1)
    assert isinstance(done, Trained)
    model = done.tokenizer.files.content["model"]
    assert [" ".join(pair) for pair in model["merges"]] == [line for line in merges if line]
    assert model["vocab"] == published


@given(
    st.dictionaries(st.text(st.sampled_from("abcé"), min_size=1, max_size=12), st.integers(1, 30), max_size=12),
    st.integers(1, 3),
)
@settings(max_examples=100)
def test_merges_are_those_of_the_plain_algorithm(words: dict[str, int], least: int) -> None:
    found = [(merge.left, merge.right) for merge in learn_merges(words, 40, min_frequency=least)]
    assert found == plain_merges(words, 40, least)


def test_merges_of_a_larger_text_are_those_of_the_plain_algorithm() -> None:
    generator = random.Random(3)
    stems = ["".join(generator.choices("aabcdeinst", k=generator.randrange(1, 9))) for _ in range(300)]
    words = {stem: int(20000 / (rank + 1)) + 1 for rank, stem in enumerate(dict.fromkeys(stems))}
    found = [(merge.left, merge.right) for merge in learn_merges(words, 250)]
    assert found == plain_merges(words, 250, 2)
    assert len(set(found)) == len(found) > 200


def test_a_merge_that_would_make_a_special_token_is_passed_over() -> None:
    made = {merge.left + merge.right for merge in learn_merges({"<|end|>": 9}, 20, forbidden=[b"<|end|>"])}
    assert b"<|end|>" not in made
    assert len(made) >= 3


@given(st.lists(texts, max_size=6), st.sampled_from(sorted(PATTERNS)))
@settings(max_examples=120)
def test_counting_cuts_as_encoding_does(given_texts: list[str], name: str) -> None:
    pattern = PATTERNS[name]
    library = pre_tokenizers.Split(Regex(pattern.regex), "isolated")
    words = [word for text in given_texts for word, _ in library.pre_tokenize_str(text)]
    cutter = Cutter(forms(pattern))
    assert count_batch(given_texts, cutter) == Counter(part for word in words for part in cutter.parts(word))


@given(st.lists(st.text(st.sampled_from("a  .\n\t\u3000é中"), max_size=50), max_size=4))
@settings(max_examples=100)
def test_white_space_is_counted_as_it_is_cut(given_texts: list[str]) -> None:
    whole = re.compile(forms()[2]).findall
    padded = [f"{'word and word ' * 20}{text}{' more words' * 20}" for text in given_texts]  # few enough marks
    assert count_batch(padded, Cutter(forms())) == Counter(word for text in padded for word in whole(text))


def test_pieces_of_spaceless_scripts_and_numbers_are_short() -> None:
    words = counted(
        ["我们的国家" * 50 + "กำลังไปโรงเรียน" * 30 + "ひらがなカタカナ" * 30 + " 1234567 x" + "٠١٢٣٤٥"]
    ).words
    assert max(map(len, words)) == LONGEST_CLAUSE == 16
    assert Cutter(forms()).parts("Donaudampfschifffahrtsgesellschaft") == ["Donaudampfschifffahrtsgesellschaft"]
    assert {"123", "456", "7", "٠١٢", "٣٤٥"} <= set(words)


def test_a_word_without_end_is_counted_in_parts() -> None:
    words = counted(["a" * 1000 + " " + "=" * 300]).words
    assert max(map(len, words)) == LONGEST_WORD
    assert sum(len(word) * count for word, count in words.items()) == 1301


def test_batches_hold_every_character_and_are_cut_where_words_begin() -> None:
    given_texts = ["one two three " * 30, "", "four\nfive.\n" * 20]
    batches = list(cut_batches(given_texts, 50))
    assert "".join(part for batch in batches for part in batch) == "".join(given_texts)
    assert all(sum(map(len, batch)) <= 100 for batch in batches)
    counts = Counter[str]()
    for batch in batches:
        counts.update(count_batch(batch, Cutter(forms())))
    assert counts == count_batch(given_texts, Cutter(forms()))


def test_a_text_without_a_place_to_cut_is_cut_all_the_same() -> None:
    batches = list(cut_batches(["x" * 950], 50))
    assert sum(len(part) for batch in batches for part in batch) == 950
    assert max(sum(map(len, batch)) for batch in batches) <= 100


def test_processes_count_what_one_counts() -> None:
    given_texts = [f"text {number} of many, {number * 7919 % 101} words\n" * 40 for number in range(60)]
    alone, together = WordCounter(forms()), WordCounter(forms())
    assert list(alone.add(given_texts, 1, batch_size=5000)) == list(together.add(given_texts, 2, batch_size=5000))
    assert alone.words == together.words
    assert list(alone.words) == list(together.words)


@pytest.mark.parametrize("ending", ["closed", "killed"])
def test_no_process_outlives_the_counting(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(*words: Any, **details: Any) -> subprocess.Popen[bytes]:
        started.append(real(*words, **details))
        return started[-1]

    monkeypatch.setattr(word_counts.subprocess, "Popen", start)
    counting = WordCounter(forms()).add(("some words and more " * 5000 for _ in range(40)), 2, batch_size=100_000)
    next(counting)
    assert len(started) == 2
    if ending == "closed":
        counting.close()  # type: ignore[attr-defined]
    else:
        started[0].kill()
        with pytest.raises(LlmcliError, match="was killed"):
            list(counting)
    assert all(process.returncode is not None for process in started)


def test_memory_is_bounded_and_the_sample_is_fair() -> None:
    generator = random.Random(5)
    han = [chr(0x4E00 + generator.randrange(3000)) for _ in range(60_000)]
    text = "".join(character + ("。" if generator.random() < 0.1 else "") for character in han)
    whole, bounded = counted([text]), WordCounter(forms(), max_words=1000)
    for _ in bounded.add([text], batch_size=5000):
        assert len(bounded.words) <= 1000
    assert bounded.thinned > 1

    def characters(counter: WordCounter) -> int:
        return sum(len(word) * count for word, count in counter.words.items())

    assert characters(bounded) == pytest.approx(characters(whole), rel=0.15)
    again = WordCounter(forms(), max_words=1000)
    for _ in again.add([text], batch_size=5000):
        pass
    assert again.words == bounded.words


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, files: dict[str, str], cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_cores(tmp_path) == (64 if cores is None else cores)
