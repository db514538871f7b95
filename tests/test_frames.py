"""Frames: what an encoder's tokenizer puts around a text, trained so or made so of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import text
from small_tokenizer import make_tokenizer

from llmcli.config import TokenizerConfig
from llmcli.data.frames import framed, is_framed
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.data.tokenizer_training import Trained, train
from llmcli.errors import ConfigError

TEXT = text(20_000)


def trained(**settings: object) -> TextTokenizer:
    last = list(train([TEXT], TokenizerConfig(**{"vocab_size": 400, "encoder": True, **settings}), workers=1))[-1]  # type: ignore[arg-type]
    assert isinstance(last, Trained)
    return last.tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "char"])
def test_a_tokenizer_for_an_encoder_frames_a_text(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind=kind)
    assert is_framed(tokenizer)
    tokenizer.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    bare = tokenizer.encode("the value")
    assert tokenizer.encode("the value", special=True) == [tokenizer.cls_id, *bare, tokenizer.sep_id]
    assert tokenizer.decode(tokenizer.encode("the value", special=True), skip_special=True) == "the value"
    assert tokenizer.eos_id == tokenizer.sep_id  # so a corpus' documents end by it
    named = {tokenizer.token(index) for index in tokenizer.special_ids}
    assert named == {"[PAD]", "<unk>" if kind == "char" else "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert len(set(ids)) == 5
    assert None not in ids
    # What is written in a text is text.
    assert tokenizer.mask_id not in tokenizer.encode("a [MASK] in it", special=True)


def test_transformers_sees_the_same_frame_pairs_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(kind="wordpiece")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the value").input_ids == tokenizer.encode("the value", special=True)
    assert theirs.mask_token_id == tokenizer.mask_id
    pair = theirs("the value", "of it", return_token_type_ids=True)
    first, second = tokenizer.encode("the value", special=True), tokenizer.encode("of it")
    assert pair.input_ids == [*first, *second, tokenizer.sep_id]
    assert pair.token_type_ids == [0] * len(first) + [1] * (len(second) + 1)


def test_small_letters_are_wordpieces_alone() -> None:
    tokenizer = trained(kind="wordpiece", lowercase=True)
    assert tokenizer.encode("The VALUE") == tokenizer.encode("the value")
    assert not any(letter.isupper() for letter in map(tokenizer.token, range(tokenizer.vocab_size)) if letter[0] != "[")
    with pytest.raises(ConfigError, match=r"^lowercase: is for wordpiece"):
        trained(kind="bpe", lowercase=True)


def test_any_tokenizer_can_be_framed_and_its_ids_stay(tmp_path: Path) -> None:
    plain = load_tokenizer(make_tokenizer(tmp_path / "plain"))
    tokenizer = framed(plain)
    assert is_framed(tokenizer)
    assert framed(tokenizer) is tokenizer
    ids = plain.encode(TEXT)
    assert tokenizer.encode(TEXT, special=True) == [tokenizer.cls_id, *ids, tokenizer.sep_id]
    assert tokenizer.vocab_size == plain.vocab_size + 4
    assert (tokenizer.eos_id, tokenizer.token(tokenizer.eos_id or 0)) == (plain.eos_id, "<|endoftext|>")
    assert tokenizer.pad_id not in (tokenizer.eos_id, None)
    tokenizer.save(tmp_path / "framed")
    again = load_tokenizer(tmp_path / "framed")
    assert (again.hash, again.mask_id, again.eos_id) == (tokenizer.hash, tokenizer.mask_id, tokenizer.eos_id)
    assert not is_framed(plain)


def test_a_frame_in_a_role_that_the_vocabulary_lacks_is_no_fault(tmp_path: Path) -> None:
    place = make_tokenizer(tmp_path / "plain")
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "mask_token": "[none]"}))
    assert load_tokenizer(place).mask_id is None
