"""`convert`: llama2.c's models and tokenizers give here what they give there; hostile files are refused in a line."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from stories import STORIES, make_stories, reference

from llmcli.config import ConvertConfig
from llmcli.data.scored_bpe import scored_bpe
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.data.tokenizer_files import TokenizerFiles
from llmcli.errors import DataError
from llmcli.files import tensors as tensor_files
from llmcli.operations.convert import ConvertReport, convert
from llmcli.operations.verify import verify

Numbers = np.ndarray[Any, Any]
BYTES = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
# A little language: merges that reach across a space, runs of one letter, two ways to one piece, more than a byte.
WORDS = (" t", "he", " a", "aa", " th", " the", "aaa", "aaaa", "ba", "ab", "aba", "é€", "  ", "    ", " thé")
PIECES = [*BYTES, *WORDS, *" thebaé€lo"]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) - 259)]
SHAPE = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": len(PIECES)}
SHAPE["seq_len"] = 32


# ----------------------------------------------------------------------------------------------------------------
# llama2.c, as its sources have it


def encoded_as_llama2c(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """`encode` of run.c."""
    known = {piece: identity for identity, piece in enumerate(pieces)}
    ids = [1, *([known[" "]] if text else [])]
    for letter in text:
        ids += [known[letter]] if letter in known else [byte + 3 for byte in letter.encode()]
    while True:
        best, place, merged = -1e10, -1, -1
        for index in range(len(ids) - 1):
            found = known.get(pieces[ids[index]] + pieces[ids[index + 1]], -1)
            if found != -1 and scores[found] > best:
                best, place, merged = scores[found], index, found
        if place == -1:
            return ids
        ids[place : place + 2] = [merged]


def shapes(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """In the order of `legacy_export`."""
    dim, hidden, layers, vocabulary = shape["dim"], shape["hidden_dim"], shape["n_layers"], shape["vocab_size"]
    narrow = dim // shape["n_heads"] * shape["n_kv_heads"]
    return {
        "tok_embeddings": (vocabulary, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, narrow, dim),
        "wv": (layers, narrow, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "output": (vocabulary, dim),
    }


def write_bin(path: Path, version: int = 0, *, shared: bool = True, change: dict[str, int] | None = None) -> Any:
    """A model file with drawn weights, which are returned. `change`: what the header says instead."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(0, 0.4, size).astype("<f4") for name, size in shapes(SHAPE).items()}
    for name in ("attention_norm", "ffn_norm", "norm"):
        weights[name] += 1
    if shared:
        weights["output"] = weights["tok_embeddings"]
    told = {**SHAPE, **(change or {})}
    if version == 0:
        told["vocab_size"] *= 1 if shared else -1
        table = np.full(SHAPE["seq_len"] * SHAPE["dim"] // SHAPE["n_heads"], np.nan, "<f4")  # nobody reads it
        order = [weights[name] for name in weights if name != "output"] + [table]
        head = struct.pack("<7i", *told.values())
    else:
        first = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
        order = [weights[name] for name in first]
        head = struct.pack("<Ii7iB", 0x616B3432, version, *told.values(), shared).ljust(256, b"\0")
    order += [] if shared else [weights["output"]]
    path.write_bytes(head + b"".join(array.tobytes() for array in order))
    return weights


def write_tokenizer(path: Path, pieces: list[str] = PIECES, scores: list[float] = SCORES) -> Path:
    raw = [piece.encode() for piece in pieces]
    entries = [struct.pack("<fi", score, len(piece)) + piece for score, piece in zip(scores, raw, strict=True)]
    path.write_bytes(struct.pack("<i", max(map(len, raw))) + b"".join(entries))
    return path


def logits_as_llama2c(weights: dict[str, Numbers], ids: list[int]) -> Numbers:
    """`forward` of run.c for all positions, in float64; (T, V)."""
    heads, shared, size = SHAPE["n_heads"], SHAPE["n_kv_heads"], SHAPE["dim"] // SHAPE["n_heads"]
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    time = len(ids)

    def norm(x: Numbers, weight: Numbers) -> Numbers:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def turned(x: Numbers) -> Numbers:  # (T, heads, size), neighbours
        angle = np.arange(time)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        turns = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([turns.real, turns.imag], -1).reshape(x.shape)

    x = w["tok_embeddings"][ids]
    for layer in range(SHAPE["n_layers"]):
        h = norm(x, w["attention_norm"][layer])
        q = turned((h @ w["wq"][layer].T).reshape(time, heads, size))
        k, v = ((h @ w[name][layer].T).reshape(time, shared, size) for name in ("wk", "wv"))
        k, v = (array.repeat(heads // shared, 1) for array in (turned(k), v))
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(size) + np.triu(np.full((time, time), -np.inf), 1)
        chance = np.exp(scores - scores.max(-1, keepdims=True))
        chance /= chance.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", chance, v).reshape(time, -1) @ w["wo"][layer].T
        h = norm(x, w["ffn_norm"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["norm"]) @ w["output"].T  # type: ignore[no-any-return]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and its tokenizer beside it."""
    write_bin(tmp_path / "model.bin")
    write_tokenizer(tmp_path / "tokenizer.bin")
    return tmp_path


def run(source: Path, output: Path, **settings: Any) -> ConvertReport:
    *_, report = convert(source, output, ConvertConfig(**settings))
    assert isinstance(report, ConvertReport)
    return report


# ----------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_a_model_computes_what_it_computes_in_llama2c(place: Path, version: int, shared: bool) -> None:
    import torch

    from llmcli.models.folder import load_model

    weights = write_bin(place / "model.bin", version, shared=shared)
    report = run(place / "model.bin", place / "out")
    assert (report.version, report.family, report.vocab_size, report.context) == (version, "llama", len(PIECES), 32)
    assert report.parameters == sum(array.size for name, array in weights.items() if name != "output" or not shared)
    assert verify(place / "out", values=True).problems == ()
    ids = [1, 5, 260, 270, 3, 3, 280, 261, 9]
    found = load_model(place / "out")(torch.tensor([ids]))[0].numpy()
    wanted = logits_as_llama2c(weights, ids)
    assert np.abs(found - wanted).max() < 1e-4
    assert wanted.std() > 0.5


def test_the_folder_opens_in_transformers(place: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmcli.models.folder import load_model

    run(place / "model.bin", place / "out")
    theirs = AutoModelForCausalLM.from_pretrained(place / "out").eval()
    ids = torch.tensor([[1, 5, 260, 270, 3, 3, 280]])
    with torch.no_grad():
        assert (theirs(ids).logits - load_model(place / "out")(ids)).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == [2, 1]
    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    for text in ("the ab aaaaa", "é€ thé\n x"):
        assert tokenizer(text)["input_ids"] == encoded_as_llama2c(text, PIECES, SCORES)
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_weights_are_written_in_shards_where_they_are_many(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place / "model.bin", place / "whole")
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 8000)
    run(place / "model.bin", place / "out")
    assert len(list((place / "out").glob("model-*-of-*.safetensors"))) > 2
    assert verify(place / "out").problems == ()
    whole, parts = (tensor_files.load_weights(place / name) for name in ("whole", "out"))
    assert set(whole) == set(parts)
    assert all(bool((whole[name] == parts[name]).all()) for name in whole)


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers


def opened(pieces: list[str], scores: list[float]) -> TextTokenizer:
    content = scored_bpe(pieces, scores, "test")
    return TextTokenizer(TokenizerFiles("test", json.dumps(content), content, {}))


OURS = opened(PIECES, SCORES)


@given(st.text(st.sampled_from(" thebaé€lo\nxä😀<>0"), max_size=40))
def test_a_text_has_the_ids_of_llama2c(text: str) -> None:
    ids = OURS.encode(text, special=True)
    assert ids == encoded_as_llama2c(text, PIECES, SCORES)
    assert OURS.decode(ids, skip_special=True) == text


@given(st.lists(st.text(st.sampled_from("ab "), min_size=2, max_size=4), max_size=8, unique=True), st.data())
def test_so_it_is_under_any_merges(words: list[str], data: st.DataObject) -> None:
    """But for pairs that overlap and join to one piece, where merging from the left did not leave them in order."""
    pieces = [*BYTES, *words, "a", "b", " "]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) - 259)]
    text = data.draw(st.text(st.sampled_from("ab "), max_size=24))
    assert opened(pieces, scores).encode(text, special=True) == encoded_as_llama2c(text, pieces, scores)


def test_the_ids_of_a_real_tokenizer(tmp_path: Path) -> None:
    reference()
    ours = load_tokenizer(make_stories(tmp_path / "stories"))
    pieces, scores, raw, at = [], [], (STORIES / "tok512.bin").read_bytes(), 4
    while at < len(raw):
        score, size = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + size].decode())
        scores.append(score)
        at += 8 + size
    texts = [story["text"] for story in reference()["greedy"]]
    texts += ["", " ", "  two  spaces ", "a\n\tb", "naïve 😀 café", "<s> </s> <0x41>", "aaaaaaaaaaaaaaa", "\x00\x7f"]
    for text in texts:
        assert ours.encode(text, special=True) == encoded_as_llama2c(text, pieces, scores)
    for story in reference()["greedy"]:
        assert ours.encode(story["prompt"], special=True) == story["prompt_ids"]
        assert ours.decode(story["ids"], skip_special=True) == story["text"]
    for told in reference()["log_probability"]:
        assert ours.encode(told["text"], special=True) == told["ids"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda pieces, scores: pieces.__setitem__(10, "<0x0a>"), "no tokens <0x00> to <0xFF>"),
        (lambda pieces, scores: pieces.__setitem__(260, " t"), "the tokens 259 and 260 have one text"),
        (lambda pieces, scores: pieces.__setitem__(pieces.index(" "), "z"), "no token for a space"),
        (lambda pieces, scores: scores.__setitem__(260, scores[259]), "the tokens 259 and 260 have one score"),
    ],
)
def test_a_vocabulary_of_another_kind_is_refused(change: Callable[..., None], told: str) -> None:
    pieces, scores = list(PIECES), list(SCORES)
    change(pieces, scores)
    with pytest.raises(DataError, match=told):
        scored_bpe(pieces, scores, "test")


# ----------------------------------------------------------------------------------------------------------------
# Hostile files

HEADERS: dict[str, tuple[dict[str, int], str]] = {
    "no width": ({"dim": 0}, "dim = 0 must be above 0"),
    "negative layers": ({"n_layers": -2}, "n_layers = -2 must be above 0"),
    "negative heads": ({"n_heads": -4}, "n_heads = -4 must be above 0"),
    "least vocabulary": ({"vocab_size": -(2**31)}, "its header asks for|must be above 0"),
    "greatest of all": ({"dim": 2**30, "hidden_dim": 2**31 - 1, "vocab_size": 2**31 - 1}, "its header asks for"),
    "many layers": ({"n_layers": 2**31 - 1}, "1024 is the most"),
    "heads": ({"n_heads": 3}, "dim = 16 is not divided by n_heads = 3"),
    "key/value heads": ({"n_kv_heads": 3}, "n_heads = 4 is not divided by n_kv_heads = 3"),
    "more key/value heads": ({"n_kv_heads": 8}, "n_heads = 4 is not divided by n_kv_heads = 8"),
    "odd head": ({"n_heads": 16}, "an even head size"),
    "shorter": ({"seq_len": 31}, "16 bytes follow the weights"),
    "longer": ({"seq_len": 33}, "it is cut, 16 bytes are missing"),
}


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(place: Path, case: str, version: int) -> None:
    change, told = HEADERS[case]
    if version and "seq_len" in change:
        return  # no tables, so nothing depends on it
    write_bin(place / "model.bin", version, change=change)
    with pytest.raises(DataError, match=told) as caught:
        run(place / "model.bin", place / "out", format="llama2.c")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in place.iterdir()) == ["model.bin", "tokenizer.bin"]


@pytest.mark.parametrize("version", [0, 1])
def test_a_file_cut_anywhere_or_with_more_behind_is_refused(place: Path, version: int) -> None:
    write_bin(place / "model.bin", version)
    raw = (place / "model.bin").read_bytes()
    for size in (0, 1, 4, 27, 28, 29, 255, 256, 300, len(raw) - 1):
        (place / "model.bin").write_bytes(raw[:size])
        with pytest.raises(DataError):
            run(place / "model.bin", place / "out")
    (place / "model.bin").write_bytes(raw + b"\0")
    with pytest.raises(DataError, match="1 bytes follow the weights"):
        run(place / "model.bin", place / "out")
    assert not (place / "out").exists()


def test_numbers_that_are_not_finite_are_refused_and_leave_nothing(place: Path) -> None:
    raw = bytearray((place / "model.bin").read_bytes())
    at = 28 + 4 * sum(math.prod(size) for size in list(shapes(SHAPE).values())[:2]) + 4 * 16 * 16
    raw[at : at + 4] = struct.pack("<f", math.inf)
    (place / "model.bin").write_bytes(raw)
    with pytest.raises(DataError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight holds a number that is not fini"):
        run(place / "model.bin", place / "out")
    assert sorted(path.name for path in place.iterdir()) == ["model.bin", "tokenizer.bin"]


TOKENIZERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "it has 0 bytes"),
    "cut": (lambda raw: raw[:-1], f"it ends within the token {len(PIECES) - 1}"),
    "cut in a number": (lambda raw: raw + b"\0", f"it ends within the token {len(PIECES)}"),
    "length": (lambda raw: raw[:8] + struct.pack("<i", 2**31 - 1) + raw[12:], "the token 0 has 2147483647 bytes"),
    "negative length": (lambda raw: raw[:8] + struct.pack("<i", -1) + raw[12:], "the token 0 has -1 bytes"),
    "lying longest": (lambda raw: b"\1\0\0\0" + raw[4:], "the token 0 has 5 bytes; the longest is said to have 1"),
    "score": (lambda raw: raw[:4] + struct.pack("<f", math.nan) + raw[8:], "the score of the token 0 is nan"),
    "text": (lambda raw: raw[:12] + b"\xff" + raw[13:], "the token 0 is not UTF-8"),
    "more": (lambda raw: raw + struct.pack("<fi", 0, 1) + b"z", f"has {len(PIECES) + 1} tokens, the model"),
    "no tokenizer": (lambda raw: b"{}\n\n" * 40, "is not a tokenizer of llama2.c"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_refused(place: Path, case: str) -> None:
    change, told = TOKENIZERS[case]
    path = place / "tokenizer.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=told) as caught:
        run(place / "model.bin", place / "out", tokenizer=str(path))
    assert str(caught.value).startswith(str(path))
    assert not (place / "out").exists()


# ----------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_converts_and_says_what_it_made(llmcli: Run, place: Path) -> None:
    done = llmcli("convert", "model.bin", "-o", "out", cwd=place)
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    assert "model        llama, " in done.stderr
    again = llmcli("convert", "model.bin", "-o", "out", cwd=place)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    made = json.loads(llmcli("convert", "model.bin", "-o", "out", "--overwrite", "--json", cwd=place).stdout)
    assert {key: made[key] for key in ("output", "format", "version")} == {
        "output": "out",
        "format": "llama2.c",
        "version": 0,
    }


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"GGUF\3\0\0\0" + bytes(60), "is a GGUF file of llama.cpp; expected: llama2.c"),
        (b"PK\3\4" + bytes(60), "perhaps a pickle"),
        (struct.pack("<Q", 50) + b'{"a":' + bytes(60), "is a safetensors file"),
        (b"Once upon a time there was a file of text.", "is of no known format; expected: llama2.c"),
        (struct.pack("<Ii", 0x616B3432, 2) + bytes(300), "its version is 2 (int8 in groups); versions 0 and 1"),
    ],
    ids=["gguf", "zip", "safetensors", "text", "version 2"],
)
def test_files_of_other_formats_are_named_in_a_line(llmcli: Run, place: Path, head: bytes, told: str) -> None:
    (place / "other.bin").write_bytes(head)
    done = llmcli("convert", "other.bin", "-o", "out", cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (place / "out").exists()


def test_without_a_tokenizer_it_says_how_to_name_one(place: Path) -> None:
    (place / "tokenizer.bin").rename(place / "mine.bin")
    with pytest.raises(DataError, match="--tokenizer FILE"):
        run(place / "model.bin", place / "out")
    run(place / "model.bin", place / "out", tokenizer=str(place / "mine.bin"))
    for missing in (place / "nowhere.bin", place):
        with pytest.raises(DataError):
            run(missing, place / "other")
