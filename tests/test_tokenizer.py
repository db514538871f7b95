"""Tokenizers: published encodings, text given back, the proof for the fast engine, hostile files, whole characters."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llmcli.config import TokenizerConfig
from llmcli.data import fast_encoder
from llmcli.data.pretokenizer import PUBLISHED_PATTERNS
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.data.tokenizer_files import TokenizerFiles
from llmcli.data.tokenizer_training import Trained, train
from llmcli.errors import ConfigError, DataError

PUBLISHED = ROOT.parent / "shared" / "data" / "tokenizers"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock; the fox don't care!\n\n\tdef f(x):\n    return\n",
    "Der schnelle braune Fuchs springt über den faulen Hund. Ça va très bien, merci. Привет, мир! γειά σου\n",
    "我们的国家。你好，世界！ひらがなとカタカナ。สวัสดีชาวโลก नमस्ते दुनिया 안녕하세요 👩‍👩‍👧 ❤️\n",
    *(topics[name][:2000] for name in sorted(topics)[:20]),
]
KINDS = ("bpe", "unigram", "wordpiece", "char")
texts = st.text(
    st.one_of(st.sampled_from("aé 中\n👩\u200d\u0301'1.\x00\u3000"), st.characters(codec="utf-8")), max_size=40
)


@cache
def trained(kind: str = "bpe", special: tuple[str, ...] = (), size: int | None = 600) -> TextTokenizer:
    settings_of_it = TokenizerConfig(kind=kind, vocab_size=None if kind == "char" else size, special_tokens=special)
    *_, done = train(CORPUS, settings_of_it, workers=1)
    assert isinstance(done, Trained)
    return done.tokenizer


def opened(content: dict[str, Any], config: dict[str, Any] | None = None) -> TextTokenizer:
    return TextTokenizer(TokenizerFiles("made", json.dumps(content), content, config or {}))


def changed(change: Callable[[dict[str, Any]], object], kind: str = "bpe") -> dict[str, Any]:
    content: dict[str, Any] = copy.deepcopy(dict(trained(kind).files.content))
    change(content)
    return content


# ----------------------------------------------------------------------------------------------------------------
# Published encodings


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tokenizers are not here")
@pytest.mark.parametrize(("name", "engine"), [("gpt2", "tiktoken"), ("phi3", "tokenizers")])
def test_published_encodings_come_out(name: str, engine: str) -> None:
    tokenizer = load_tokenizer(PUBLISHED / name)
    given_texts = (PUBLISHED / name / "reference.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = (PUBLISHED / name / "reference.out").read_text().split("\n")
    expected = [[int(word) for word in row.split()] for row in rows]
    assert len(given_texts) == len(expected) > 40
    assert tokenizer.encode_batch(given_texts) == expected
    fast = tokenizer.fast_encoder()
    assert fast.engine == engine
    assert [ids.tolist() for ids in fast.encode_batch(given_texts)] == expected
    for text, ids in zip(given_texts, expected, strict=True):
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
        assert name == "phi3" or tokenizer.decode(ids) == text


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tokenizers are not here")
def test_gpt2s_pair_opens_with_and_without_a_version_line(tmp_path: Path) -> None:
    source = PUBLISHED / "gpt2"
    (tmp_path / "vocab.json").write_bytes((source / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + (source / "merges.txt").read_text("utf-8"), "utf-8")
    first, second = load_tokenizer(source), load_tokenizer(tmp_path / "vocab.json")
    assert first.hash == second.hash
    assert first.vocab_size == 50257
    assert first.eos_id == first.id_of("<|endoftext|>") == 50256
    first.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.hash == first.hash
    assert again.encode("Hello <|endoftext|>") == first.encode("Hello <|endoftext|>")


# ----------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_same_bytes_each_time(kind: str) -> None:
    first = trained(kind)
    *_, again = train(iter(CORPUS), TokenizerConfig(kind=kind, vocab_size=None if kind == "char" else 600), workers=1)
    assert isinstance(again, Trained)
    assert again.tokenizer.files.text == first.files.text
    assert again.tokenizer.files.config == first.files.config


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_training_in_another_process_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """Another process has another seed of its hash tables, which the tokenizers library's own trainers follow."""
    (tmp_path / "text.txt").write_text("".join(CORPUS), "utf-8")
    code = (
        "import sys; from llmcli.config import TokenizerConfig; from llmcli.data.tokenizer_training import train\n"
        f"texts = open(sys.argv[1], encoding='utf-8', newline='').read()\n"
        f"*_, done = train([texts], TokenizerConfig(kind={kind!r}, vocab_size=600), workers=1)\n"
        "print(done.tokenizer.hash)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "text.txt")]
    hashes = {subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout for _ in range(2)}
    *_, here = train(["".join(CORPUS)], TokenizerConfig(kind=kind, vocab_size=600), workers=1)
    assert isinstance(here, Trained)
    assert hashes == {here.tokenizer.hash + "\n"}


def test_the_vocabulary_has_the_size_that_was_asked_for() -> None:
    for kind in ("bpe", "unigram", "wordpiece"):
        assert trained(kind).vocab_size == 600, kind
    assert trained("char").vocab_size == len(set("".join(CORPUS))) + 2


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_never_come_out_of_text(kind: str) -> None:
    tokenizer = trained(kind, ("<|user|>", "the"))
    text = "the fox <|user|> <|endoftext|> the"
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids) or kind in ("char", "wordpiece")
    own = {tokenizer.id_of("<|user|>"), tokenizer.id_of("the"), tokenizer.eos_id}
    assert own.isdisjoint(ids)
    assert None not in own
    parsed = tokenizer.encode("fox<|user|>fox", parse_special=True)
    assert tokenizer.id_of("<|user|>") in parsed
    assert tokenizer.decode(parsed, skip_special=True).replace(" ", "") == "foxfox"


def test_characters_that_were_not_seen_are_unknown() -> None:
    tokenizer = trained("char")
    assert tokenizer.encode("fÖx") == [tokenizer.id_of("f"), tokenizer.unk_id, tokenizer.id_of("x")]
    assert tokenizer.decode(tokenizer.encode("fox\n")) == "fox\n"


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (TokenizerConfig(vocab_size=256), "vocab_size"),
        (TokenizerConfig(special_tokens=("",)), "special_tokens"),
        (TokenizerConfig(special_tokens=("x",)), "special_tokens"),
        (TokenizerConfig(special_tokens=("<|endoftext|>",)), "special_tokens"),
        (TokenizerConfig(special_tokens=("<a>", "<a>")), "special_tokens"),
        (TokenizerConfig(special_tokens=("a\ud800",)), "special_tokens"),
        (TokenizerConfig(kind="word"), "kind"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: TokenizerConfig, where: str) -> None:
    with pytest.raises(ConfigError) as found:
        list(train(CORPUS, config, workers=1))
    assert found.value.where == where


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_an_error(kind: str) -> None:
    with pytest.raises(DataError, match="no text"):
        list(train(["", ""], TokenizerConfig(kind=kind), workers=1))


def test_a_script_without_spaces_trains_in_bounded_pieces() -> None:
    generator = random.Random(1)
    text = "".join(chr(0x4E00 + int(generator.random() ** 3 * 2000)) for _ in range(100_000))  # no space, no full stop
    started = time.perf_counter()
    *_, done = train([text], TokenizerConfig(vocab_size=3000), workers=1)
    assert time.perf_counter() - started < 20
    assert isinstance(done, Trained)
    tokens = [done.tokenizer.token_bytes(identity) for identity in range(done.tokenizer.vocab_size)]
    assert max(len(token) for token in tokens) <= 48
    assert done.tokenizer.decode(done.tokenizer.encode(text)) == text


def test_transformers_opens_the_folders(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = (
        "import sys; from transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        "for folder in sys.argv[1:]:\n"
        "    t = AutoTokenizer.from_pretrained(folder, local_files_only=True)\n"
        "    assert isinstance(t, PreTrainedTokenizerFast)\n"
        "    print(t.eos_token_id, t.pad_token_id, t.unk_token_id, t('Hello 中文')['input_ids'])"
    )
    expected = []
    for kind in KINDS:
        tokenizer = trained(kind)
        tokenizer.save(tmp_path / kind)
        ids = tokenizer.encode("Hello 中文")
        expected.append(f"{tokenizer.eos_id} {tokenizer.pad_id} {tokenizer.unk_id} {ids}")
    command = [sys.executable, "-c", code, *(str(tmp_path / kind) for kind in KINDS)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.stdout.splitlines() == expected, ended.stderr


# ----------------------------------------------------------------------------------------------------------------
# Text given back


@given(texts)
@settings(max_examples=100)
def test_byte_level_kinds_give_every_text_back(text: str) -> None:
    for kind in ("bpe", "unigram"):
        tokenizer = trained(kind)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(st.lists(st.integers(0, 599), max_size=30))
@settings(max_examples=100)
def test_the_stream_gives_whole_characters_and_the_same_text(ids: list[int]) -> None:
    for kind in ("bpe", "unigram"):
        tokenizer = trained(kind)
        stream = tokenizer.stream()
        pieces = [stream.push(identity) for identity in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_a_character_over_several_tokens_comes_at_its_last() -> None:
    *_, done = train(["abc"], TokenizerConfig(vocab_size=257), workers=1)
    assert isinstance(done, Trained)
    stream = done.tokenizer.stream()
    assert [stream.push(identity) for identity in done.tokenizer.encode("中👩a")] == [
        *["", "", "中"],
        *["", "", "", "👩"],
        "a",
    ]
    assert stream.push(done.tokenizer.encode("中")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_the_stream_leaves_special_tokens_out_when_asked() -> None:
    tokenizer = trained()
    assert tokenizer.eos_id is not None
    ids = [*tokenizer.encode("fox"), tokenizer.eos_id]
    for skip, expected in ((True, "fox"), (False, "fox<|endoftext|>")):
        stream = tokenizer.stream(skip_special=skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == expected == tokenizer.decode(ids, skip)


DECODERS: dict[str, tuple[dict[str, Any] | None, list[str]]] = {
    "llama": (
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        ["▁Hello", "▁", "<0xE4>", "<0xB8>", "<0xAD>", "world", "▁▁a"],
    ),
    "t5": (
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        ["▁Hello", "wor", "▁ld"],
    ),
    "bert": ({"type": "WordPiece", "prefix": "##", "cleanup": True}, ["Hello", "wor", "##ld", ".", "n't"]),
    "none": (None, ["Hello", "world"]),
    "fuse": ({"type": "Fuse"}, ["Hello", " ", "中"]),
    "clip": ({"type": "BPEDecoder", "suffix": "</w>"}, ["Hel", "lo</w>", "world</w>"]),
    "ctc": ({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}, ["a", "a", "|", "b"]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_streams_what_it_decodes(name: str) -> None:
    decoder, tokens = DECODERS[name]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(["[UNK]", *tokens]))}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    tokenizer = opened(content)
    ids = [vocabulary[token] for token in tokens]
    if name in ("clip", "ctc"):  # these look at more than one token
        assert not tokenizer.bytes_table.exact
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)).split() == tokenizer.decode(ids).split() or name == "clip"
        return
    for cut in range(1, len(ids) + 1):
        stream = tokenizer.stream()
        streamed = "".join(map(stream.push, ids[:cut])) + stream.flush()
        # Of a cut character the library's ByteFallback makes one U+FFFD a byte, UTF-8's own rule one in all.
        assert streamed == re.sub("\ufffd+", "\ufffd", tokenizer.decode(ids[:cut])), ids[:cut]


# ----------------------------------------------------------------------------------------------------------------
# The fast engines


def test_our_tokenizers_are_proven_or_tables() -> None:
    assert {kind: trained(kind).fast_encoder().engine for kind in KINDS} == {
        "bpe": "tiktoken",
        "unigram": "tokenizers",
        "wordpiece": "tokenizers",
        "char": "table",
    }


@given(texts)
@settings(max_examples=100)
def test_fast_engines_give_the_same_ids(text: str) -> None:
    for kind in ("bpe", "char"):
        fast = _fast(kind)
        ids = fast.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == trained(kind).encode(text)


@cache
def _fast(kind: str) -> fast_encoder.FastEncoder:
    return trained(kind).fast_encoder()


def test_a_fast_encoder_travels_to_another_process() -> None:
    for kind in KINDS:
        copied = pickle.loads(pickle.dumps(_fast(kind)))
        assert copied.engine == _fast(kind).engine
        assert copied.encode("Hello 中文").tolist() == trained(kind).encode("Hello 中文")


@pytest.mark.parametrize("pattern", PUBLISHED_PATTERNS, ids=PUBLISHED_PATTERNS.values())
def test_both_engines_cut_alike_with_the_published_patterns(pattern: str) -> None:
    """tiktoken gives each word one id when its vocabulary has all words; so its cuts show."""
    tiktoken = pytest.importorskip("tiktoken")
    library = pre_tokenizers.Split(Regex(pattern), "isolated")
    pool = (
        "aAB\u017f\u212a'sStTlLvVeErRmMdD 12\u0663 \n\r\t.,/!\u2019éǅʰ中文〇ーひกำ\u0301\u200d👩"
        "\u00a0\u3000\x1c\x85\u1c89\U00020000"
    )
    generator = random.Random(11)
    cuts = []
    for _ in range(3000):
        letters = [generator.choice(pool) for _ in range(20)]
        letters += [chr(generator.choice((0, 0xE000)) + generator.randrange(0x2000)) for _ in range(3)]
        generator.shuffle(letters)
        cuts.append([word.encode() for word, _ in library.pre_tokenize_str("".join(letters))])
    alone = {bytes([value]): value for value in range(256)}
    longer = {word for words in cuts for word in words} - alone.keys()
    ranks = alone | {word: 256 + index for index, word in enumerate(sorted(longer))}
    engine = tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for words in cuts:
        ids = engine.encode_ordinary(b"".join(words).decode())
        assert [engine.decode_single_token_bytes(identity) for identity in ids] == words


def test_classes_of_both_engines_agree() -> None:
    for pattern in PUBLISHED_PATTERNS:
        assert fast_encoder._same_classes(pattern)


def _swap_merges(content: dict[str, Any]) -> None:
    """A token is made of a token that is made later."""
    merges = content["model"]["merges"]
    made = {left + right for left, right in merges}
    late = next(index for index, (left, right) in enumerate(merges) if left in made or right in made)
    merges.insert(0, merges.pop(late))


def _unreachable(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["zqzq"] = len(content["model"]["vocab"])


def _shadowed(content: dict[str, Any]) -> None:
    """abc by (ab, c), though bc is merged before ab: alone it becomes a, bc."""
    model = content["model"]
    model["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    model["vocab"] = {token: index for index, token in enumerate([*_alphabet(model), "bc", "ab", "abc"])}


def _alphabet(model: dict[str, Any]) -> list[str]:
    return [token for token in model["vocab"] if len(token) == 1] + ["<|endoftext|>"]


@pytest.mark.parametrize(
    "change",
    [
        _swap_merges,
        _unreachable,
        _shadowed,
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["model"].update(end_of_word_suffix="</w>"),
        lambda content: content["model"].update(dropout=0.1),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+"),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda content: content["added_tokens"][0].update(special=False),
        lambda content: content["model"]["vocab"].pop("Ā"),
        lambda content: content["model"]["merges"].append(content["model"]["merges"][0]),
    ],
)
def test_what_is_not_proven_is_left_to_the_library(change: Callable[[dict[str, Any]], object]) -> None:
    assert fast_encoder.is_proven(trained().files.content)
    assert not fast_encoder.is_proven(changed(change))


@pytest.mark.parametrize("ids", ["ascending", "shuffled"])
def test_ids_may_be_in_any_order(ids: str) -> None:
    def renumber(content: dict[str, Any]) -> None:
        tokens = list(content["model"]["vocab"])
        if ids == "shuffled":
            random.Random(2).shuffle(tokens)
        content["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
        content["added_tokens"][0]["id"] = tokens.index("<|endoftext|>")

    tokenizer = opened(changed(renumber))
    fast = tokenizer.fast_encoder()
    assert fast.engine == "tiktoken"
    assert fast.encode(CORPUS[2]).tolist() == tokenizer.encode(CORPUS[2])


@pytest.mark.parametrize(
    "text", [" " * 1_200_000, "a" + "\n" * 1_200_000 + "b", "a" * 300_000, "^" * 300_000, "中" * 300_000]
)
def test_endless_runs_are_encoded(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    fast = _fast("bpe")
    assert trained().decode(fast.encode(text).tolist()) == text
    assert capfd.readouterr().err == ""


def test_without_tiktoken_the_library_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    fast = trained().fast_encoder()
    assert fast.engine == "tokenizers"
    assert fast.encode("Hello").tolist() == trained().encode("Hello")


# ----------------------------------------------------------------------------------------------------------------
# Hostile files and texts

HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not valid JSON"),
    "half": ('{"model": ', "not valid JSON"),
    "list": ("[]", "no model"),
    "null": ("null", "no model"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "number": ('{"model": ' + "1" * 5000 + "}", "not valid JSON"),
    "bytes": (b'{"model": "\xff"}', "not valid UTF-8"),
    "no vocabulary": ('{"model": {"type": "BPE"}}', "no vocabulary"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_tokenizer_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as found:
        load_tokenizer(tmp_path)
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version="9.9"), "version"),
        (lambda content: content["model"].update(type="Magic"), "cannot be opened|can be opened"),
        (lambda content: content["model"]["merges"].append(["zq", "qz"]), "can be opened"),
        (lambda content: content["model"]["merges"].append("no"), "can be opened"),
        (lambda content: content["model"]["vocab"].update(zz=2**32 - 1), "not a whole number"),
        (lambda content: content["model"]["vocab"].update(zz=-1), "not a whole number"),
        (lambda content: content["model"]["vocab"].update(zz="a"), "not a whole number"),
        (lambda content: content["model"]["vocab"].update(zz=5), "one id to two tokens"),
        (lambda content: content["added_tokens"].append({"id": 5, "content": ""}), "is empty"),
        (lambda content: content["added_tokens"].append({"id": 2**40, "content": "x"}), "no id below"),
        (lambda content: content["added_tokens"].append({"id": 5}), "no content"),
        (lambda content: content["added_tokens"].append("x"), "no content"),
        (
            lambda content: content.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}),
            "unknown token",
        ),
        (
            lambda content: content.update(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}),
            "unknown token",
        ),
        (lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("), "can be opened"),
    ],
)
def test_a_malformed_tokenizer_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(change)), "utf-8")
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


JUNK: list[Any] = [
    None,
    -1,
    1.5,
    "",
    "x",
    "(",
    "(a+)+$",
    [],
    [["a", 1]],
    {"type": "x"},
    True,
    2**40,
    "\ud800",
    {"Regex": "("},
]


def _places(value: Any, place: tuple[Any, ...], generator: random.Random) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something may be changed; of a long list or object, some places."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) < 30 else generator.sample(keys, 5):
        yield (*place, key)
        if isinstance(value[key], dict | list):
            yield from _places(value[key], (*place, key), generator)


def test_a_changed_file_opens_or_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(0)
    opened_ones, refusals = 0, []
    for _ in range(150):
        files = trained(generator.choice(KINDS)).files
        both = copy.deepcopy({"content": dict(files.content), "config": dict(files.config)})
        place = generator.choice([place for place in _places(both, (), generator) if len(place) > 1])
        inner: Any = both
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = copy.deepcopy(generator.choice(JUNK))
        (tmp_path / "tokenizer.json").write_text(json.dumps(both["content"]))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(both["config"]))
        try:
            tokenizer = load_tokenizer(tmp_path)
            ids = tokenizer.encode("the fox 中 12345 aaaaaaaaaaab")
            assert tokenizer.fast_encoder().encode("the fox 中 12345 aaaaaaaaaaab").tolist() == ids, place
            stream = tokenizer.stream()
            assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids), place
            tokenizer.save(tmp_path / "copy")
            assert load_tokenizer(tmp_path / "copy").hash == tokenizer.hash
            opened_ones += 1
        except DataError as error:
            refusals.append(str(error))
    assert opened_ones > 20
    assert not any("\n" in refusal for refusal in refusals)
    assert capfd.readouterr().err == ""


def test_a_role_that_is_not_in_the_vocabulary_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    for value in ("<nowhere>", {"content": "<nowhere>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        with pytest.raises(DataError, match="eos token '<nowhere>'"):
            load_tokenizer(tmp_path)


def test_a_pattern_that_makes_the_engine_give_up_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = opened(
        changed(lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+$"))
    )
    with pytest.raises(DataError, match="give up on this text"):
        tokenizer.encode("a" * 40 + "b")
    with pytest.raises(DataError, match="give up on this text"):
        tokenizer.fast_encoder().encode("a" * 40 + "b")
    assert capfd.readouterr().err == ""
    assert tokenizer.encode("fox")


def test_half_a_surrogate_pair_is_refused_by_its_place() -> None:
    for kind in KINDS:
        for encode in (trained(kind).encode, _fast(kind).encode):
            with pytest.raises(DataError, match=r"U\+D800.*at character 2"):
                encode("ab\ud800c")


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    for identity in (-1, 600, 2**40):
        with pytest.raises(DataError, match=re.escape(f"the id {identity} is not below 600")):
            trained().decode([5, identity])


def test_a_text_is_never_truncated_or_padded_in_silence() -> None:
    def limit(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

    assert opened(changed(limit)).encode(CORPUS[0]) == trained().encode(CORPUS[0])


def test_a_run_gives_its_models_tokenizer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = run / "model"
    trained().save(model)
    (run / "checkpoints").mkdir()
    (run / "config.toml").write_text("")
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    assert load_tokenizer(run).hash == trained().hash
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(run / "checkpoints")
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")


def test_the_chat_template_travels(tmp_path: Path) -> None:
    trained().save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").chat_template == "{{ messages }}"
