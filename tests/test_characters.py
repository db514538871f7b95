"""Whole characters: what a model writes is UTF-8, however little it learned; nothing else is kept from it."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_model import make_model
from small_tokenizer import make_tokenizer

from llmcli.config import GenerateConfig, SamplingConfig
from llmcli.operations.generate import Generated, Piece, generate
from llmcli.runtime.characters import Characters

BYTES = [bytes([value]) for value in range(256)]
TOKENS = [*BYTES, b"ab", "é".encode(), "漢字".encode(), "漢".encode()[:2], b"\x9f\x98\x80", b"a\xf0", b"\xbc\xe6", b""]
CHARACTERS = Characters(TOKENS, special=[len(TOKENS) - 1])


def is_begin(data: bytes) -> bool:
    """Whether bytes are UTF-8 but for a character that is begun at their end."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return True


@given(st.lists(st.integers(0, 2**31), max_size=12))
def test_what_is_allowed_is_exactly_what_keeps_the_text_utf8(choices: list[int]) -> None:
    matcher, text = CHARACTERS.matcher(), b""
    assert matcher is not None
    for choice in choices:
        allowed = matcher.allowed()
        for identity, piece in enumerate(TOKENS[:-1]):
            assert allowed[identity] == is_begin(text + piece), (text, piece)
        assert allowed[-1] == is_whole(text)  # an end, or another special token, stands between characters
        fitting = np.flatnonzero(allowed)
        identity = int(fitting[choice % len(fitting)])
        matcher.accept(identity)
        text += TOKENS[identity]


def is_whole(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def test_a_vocabulary_of_whole_characters_needs_no_watching() -> None:
    assert Characters([b"a", "é".encode(), b""], special=[2]).matcher() is None


def test_a_vocabulary_that_lacks_a_byte_is_not_stuck() -> None:
    matcher = Characters([b"a", b"\xe6"], special=[]).matcher()
    assert matcher is not None
    matcher.accept(1)
    assert matcher.allowed().all()
    matcher.accept(0)
    assert matcher.allowed().tolist() == [True, True]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: left alone, most of what it writes is no text."""
    place = tmp_path_factory.mktemp("characters")
    return make_model(place / "model", make_tokenizer(place / "tokenizer"), context=64, scale=0.2)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_model_that_learned_nothing_writes_whole_characters(model: Path, temperature: float) -> None:
    config = GenerateConfig(max_new_tokens=40, num_samples=8, seed=5, threads=1, ignore_eos=True)
    records = list(generate(model, "The ", config, SamplingConfig(temperature=temperature, top_p=1.0)))
    samples = [record for record in records if isinstance(record, Generated)]
    assert len(samples) == 8
    for sample in samples:
        assert "\ufffd" not in sample.text
        assert sample.valid is None  # no constraint was asked for
        pieces = "".join(piece.text for piece in records if isinstance(piece, Piece) and piece.sample == sample.sample)
        assert pieces == sample.text
    assert temperature == 0 or any(not sample.text.isascii() for sample in samples)
