"""Corpora: what is in them is what was read, and the split, the order and the bytes depend on nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizer import make_tokenizer

from llmcli.config import CorpusConfig, TextConfig
from llmcli.data import dedup, encode_pool, pii, readers
from llmcli.data.corpus import Corpus, PartWriter, dtype_for, open_corpus
from llmcli.data.dedup import DigestSet, band_keys
from llmcli.data.sentences import sentences_of
from llmcli.data.split import Piece, Split, SplitScan, kept_pieces
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError, LlmcliError, UsageError
from llmcli.operations.prepare import PrepareReport, prepare

ROOT = Path(__file__).resolve().parent.parent
Report = PrepareReport


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def corpus_of(
    place: Path,
    tokenizer: Path,
    documents: list[str] | Path,
    text: TextConfig = TextConfig(),  # noqa: B008
    shard_tokens: int = 1 << 28,
    **options: Any,
) -> tuple[Corpus, Report]:
    """Prepares documents, one a JSON line, and opens what came out."""
    source = documents if isinstance(documents, Path) else place / "documents.jsonl"
    if not isinstance(documents, Path):
        source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    config = CorpusConfig(**options)
    *_, report = prepare(
        [str(source)], tokenizer, place / "corpus", text, config, overwrite=True, shard_tokens=shard_tokens
    )
    assert isinstance(report, PrepareReport)
    return open_corpus(place / "corpus", check_hashes=True), report


def texts_of(corpus: Corpus, part: str = "train") -> list[str]:
    """The documents of a part, decoded."""
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    shards = getattr(corpus, part)()
    ids = np.concatenate(shards) if shards else np.array([], np.uint16)
    assert not len(ids) or ids[-1] == corpus.end_of_text
    ends = np.flatnonzero(ids == corpus.end_of_text)
    begins = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(ids[begin:end].tolist()) for begin, end in zip(begins, ends, strict=bool(len(ends)))]


def words(count: int, seed: int = 0) -> str:
    chosen = random.Random(seed)
    return " ".join("".join(chosen.choices(string.ascii_lowercase, k=chosen.randint(1, 8))) for _ in range(count))


def many(count: int) -> list[str]:
    return [f"Document {number}.\n{words(5, number)}\n" for number in range(count)]


# ----------------------------------------------------------------------------------------------------------------
# What is in it


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=12))
def test_a_corpus_decodes_to_its_documents(documents: list[str], tokenizer: Path, tmp_path: Path) -> None:
    kept = [document for document in documents if document and not document.isspace()]
    if not kept:
        with pytest.raises(DataError, match="no text is left"):
            corpus_of(tmp_path, tokenizer, documents, val_fraction=0.0)
        return
    corpus, report = corpus_of(tmp_path, tokenizer, documents, val_fraction=0.0)
    assert texts_of(corpus) == kept
    assert corpus.train_bytes == sum(len(document.encode()) for document in kept)
    assert corpus.documents == len(kept)
    assert report.dropped == ({"empty": len(documents) - len(kept)} if len(kept) < len(documents) else {})


def test_special_tokens_in_the_text_are_text(tokenizer: Path, tmp_path: Path) -> None:
    corpus, _ = corpus_of(tmp_path, tokenizer, ["a<|endoftext|>b"], val_fraction=0.0)
    assert texts_of(corpus) == ["a<|endoftext|>b"]
    assert np.count_nonzero(corpus.train()[0] == corpus.end_of_text) == 1


def test_the_folder_opens_in_numpy_and_holds_its_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    corpus, report = corpus_of(tmp_path, tokenizer, many(300))
    folder = tmp_path / "corpus"
    ids = np.load(folder / "train-00000.npy")
    assert ids.dtype == np.uint16
    assert ids.shape == (corpus.train_tokens,)
    assert (folder / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert corpus.tokenizer_hash == load_tokenizer(tokenizer).hash == report.tokenizer_hash
    lineage = json.loads((folder / "manifest.json").read_text())["lineage"]
    assert lineage["corpus"] == corpus.hash
    source = json.loads((folder / "corpus.json").read_text())["sources"][0]
    data = (tmp_path / "documents.jsonl").read_bytes()
    assert (source["sha256"], source["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert sorted(path.name for path in folder.iterdir()) == [
        "corpus.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.npy",
        "val-00000.npy",
    ]


def test_shards_are_bounded_and_join_to_the_whole(tokenizer: Path, tmp_path: Path) -> None:
    whole, _ = corpus_of(tmp_path, tokenizer, many(200), val_fraction=0.2)
    expected = {part: np.concatenate(getattr(whole, part)()).copy() for part in ("train", "val")}
    cut, _ = corpus_of(tmp_path, tokenizer, many(200), val_fraction=0.2, shard_tokens=700)
    for part, ids in expected.items():
        shards = getattr(cut, part)()
        assert [len(shard) for shard in shards[:-1]] == [700] * (len(shards) - 1)
        assert np.array_equal(np.concatenate(shards), ids)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=20),
    st.integers(1, 9),
)
def test_what_is_taken_back_leaves_no_trace(steps: list[tuple[int, bool]], shard: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        writer = PartWriter(Path(name), "train", "uint16", shard)
        kept: list[int] = []
        for number, (count, keep) in enumerate(steps):
            ids = np.arange(number * 100, number * 100 + count, dtype=np.uint16)
            mark = writer.mark()
            writer.write(ids, count)
            if keep:
                kept += ids.tolist()
            else:
                writer.return_to(mark)
        writer.close()
        found = [np.load(path).tolist() for path in sorted(Path(name).iterdir())]
        assert [identity for ids in found for identity in ids] == kept
        assert writer.tokens == writer.bytes == len(kept)
        assert [len(ids) for ids in found] == writer.counts


def test_the_dtype_fits_the_vocabulary(tokenizer: Path, tmp_path: Path) -> None:
    assert (dtype_for(65536), dtype_for(65537), dtype_for(10, "uint32")) == ("uint16", "uint32", "uint32")
    with pytest.raises(DataError, match="65537 tokens does not fit uint16"):
        dtype_for(65537, "uint16")
    corpus, _ = corpus_of(tmp_path, tokenizer, many(3), val_fraction=0.0, dtype="uint32")
    assert corpus.train()[0].dtype == np.uint32
    assert texts_of(corpus) == many(3)


def test_a_long_document_in_pieces_has_the_ids_of_the_whole(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())[:400_000]
    (tmp_path / "long.txt").write_text(text)
    expected = load_tokenizer(tokenizer).encode(text)
    monkeypatch.setattr(readers, "PIECE", 3000)
    corpus, _ = corpus_of(tmp_path, tokenizer, tmp_path / "long.txt", val_fraction=0.0)
    assert corpus.train()[0][:-1].tolist() == expected
    assert corpus.documents == 1
    assert corpus.train_bytes == len(text.encode())


# ----------------------------------------------------------------------------------------------------------------
# Sentences


def stories(count: int) -> list[str]:
    """Documents of three sentences, the last of which all have, and one of a single sentence behind each."""
    told = [
        f"The {name} number {number} was here. It saw {number} ships. Then it slept."
        for number, name in enumerate(["cat", "dog"] * (count // 2))
    ]
    return [text for pair in zip(told, many(count), strict=True) for text in pair]


def test_sentences_stand_behind_the_documents_each_once(tokenizer: Path, tmp_path: Path) -> None:
    documents = stories(100)
    plain, _ = corpus_of(tmp_path, tokenizer, documents, val_fraction=0.2)
    train, val = texts_of(plain), texts_of(plain, "val")
    corpus, report = corpus_of(tmp_path, tokenizer, documents, val_fraction=0.2, sentences=True)
    assert texts_of(corpus, "val") == val
    assert texts_of(corpus)[: len(train)] == train
    behind = texts_of(corpus)[len(train) :]
    expected = [text for document in train if document.count(". ") == 2 for text in sentences_of(document)]
    assert len(behind) == len(set(behind)) == report.train_sentences > 100
    assert set(behind) <= set(expected)
    assert len(behind) > 0.7 * len(set(expected))  # but for those that the hash holds out
    assert not set(behind) & set(val)
    assert report.train_documents == len(train)
    assert corpus.train_bytes == sum(len(text.encode()) for text in texts_of(corpus))
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text())["train_sentences"] == len(behind)


def test_a_sentence_that_is_a_document_too_is_on_one_side(tokenizer: Path, tmp_path: Path) -> None:
    alone = [f"It saw {number} ships." for number in range(100)]
    corpus, _ = corpus_of(tmp_path, tokenizer, stories(100) + alone, val_fraction=0.3, sentences=True)
    held_out = set(texts_of(corpus, "val"))
    assert len(held_out & set(alone)) > 10
    assert not held_out & set(texts_of(corpus))


def test_a_tail_gives_no_sentences(tokenizer: Path, tmp_path: Path) -> None:
    text = "".join(f"Line {number} is here. Line {number} is there.\n" for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    corpus, report = corpus_of(tmp_path, tokenizer, tmp_path / "a.txt", val_fraction=0.25, sentences=True)
    (val,), (document, *behind) = texts_of(corpus, "val"), texts_of(corpus)
    assert document + val == text
    assert behind != sentences_of(document)
    assert sorted(behind) == sorted(sentences_of(document))
    assert report.train_sentences == len(behind) > 200


def test_a_long_document_stays_whole_and_one_taken_back_takes_its_sentences_along(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE", 200)
    long = "\n".join(f"This is line {number} of many." for number in range(100))
    other = long.replace("many", "few") + "\nAnd one more line."
    for shard_tokens in (1 << 28, 50):
        corpus, report = corpus_of(
            tmp_path,
            tokenizer,
            [long, "A b c d.", long + "\nA b c d. It ends.", long, other],
            *(TextConfig(), shard_tokens),
            dedup="exact",
            val_fraction=0.0,
            sentences=True,
        )
        documents = [long, "A b c d.", long + "\nA b c d. It ends.", other]
        assert texts_of(corpus)[:4] == documents
        behind = [*long.split("\n"), "A b c d.", *other.split("\n")]
        assert sorted(texts_of(corpus)[4:]) == sorted(behind)
        assert report.dropped == {"duplicates": 1}
        assert report.train_sentences == 202
        assert not list((tmp_path / "corpus").glob("sentences*"))


# ----------------------------------------------------------------------------------------------------------------
# The split


def test_a_corpus_that_grows_keeps_its_split(tokenizer: Path, tmp_path: Path) -> None:
    documents = many(400)
    before, report = corpus_of(tmp_path, tokenizer, documents[:300], val_fraction=0.1)
    held_out = set(texts_of(before, "val"))
    assert report.split == "hash"
    assert 10 <= len(held_out) <= 60
    after, _ = corpus_of(tmp_path, tokenizer, documents[300:] + documents[:300], val_fraction=0.1)
    assert set(texts_of(after, "val")) & set(documents[:300]) == held_out
    other, _ = corpus_of(tmp_path, tokenizer, documents[:300], val_fraction=0.1, seed=1)
    assert set(texts_of(other, "val")) != held_out


@pytest.mark.parametrize("val_by", ["hash", "tail"])
def test_a_duplicate_is_never_on_both_sides(val_by: str, tokenizer: Path, tmp_path: Path) -> None:
    documents = many(60) * 2
    corpus, report = corpus_of(tmp_path, tokenizer, documents[:-7], val_by=val_by, val_fraction=0.2)
    train, val = texts_of(corpus), texts_of(corpus, "val")
    assert report.split == val_by
    if val_by == "tail":  # the one document that lies across the cut is in two halves
        assert corpus.val_documents <= 1
    else:
        assert val
        assert not set(train) & set(val)
    assert len(train) + len(val) >= len(documents[:-7])


def test_one_document_is_split_by_its_tail_at_a_line(tokenizer: Path, tmp_path: Path) -> None:
    text = "".join(f"Line {number} of the text.\n" for number in range(1000))
    (tmp_path / "a.txt").write_text(text)
    corpus, report = corpus_of(tmp_path, tokenizer, tmp_path / "a.txt", val_fraction=0.1)
    (train,), (val,) = texts_of(corpus), texts_of(corpus, "val")
    assert train + val == text
    assert train.endswith("\n")
    assert abs(len(val) / len(text) - 0.1) < 0.01
    assert report.split == "tail"
    assert report.split_place == f"{tmp_path / 'a.txt'}:{train.count(chr(10)) + 1}"


def test_a_few_documents_are_split_by_the_tail(tokenizer: Path, tmp_path: Path) -> None:
    documents = [f"Only one line, number {number}." for number in range(10)]
    corpus, report = corpus_of(tmp_path, tokenizer, documents, val_fraction=0.2)
    assert report.split == "tail"
    assert texts_of(corpus) + texts_of(corpus, "val") == documents
    assert texts_of(corpus, "val") == documents[8:]
    one, _ = corpus_of(tmp_path, tokenizer, ["no line end but some words in it"], val_fraction=0.3)
    assert texts_of(one) + texts_of(one, "val") == ["no line end but some", " words in it"]
    # Enough documents, but the hash holds out next to nothing of the text.
    lopsided = [words(2000, 1), *many(25)]
    assert corpus_of(tmp_path, tokenizer, lopsided, val_fraction=0.2)[1].split == "tail"


@given(
    st.lists(st.text("a \n", min_size=1, max_size=30), min_size=1, max_size=6),
    st.floats(0.05, 0.9),
)
def test_the_tail_never_loses_a_character(documents: list[str], fraction: float) -> None:
    kept = [document for document in documents if not document.isspace()]
    config = CorpusConfig(val_fraction=fraction, val_by="tail")

    def read() -> Any:
        return kept_pieces((readers.Document(text, "a", 1) for text in documents), 1, Counter())

    scan = SplitScan(config)
    assert all(scan.take(piece) for piece in read())
    found = list(scan.decide().divide(read()))
    assert "".join(piece.text for piece in found) == "".join(kept)
    assert [piece.part for piece in found] == sorted((piece.part for piece in found), key="train val".index)
    assert all(piece.first and piece.final for piece in found)
    assert all(piece.text for piece in found)


def test_a_text_that_changes_between_the_passes_is_an_error() -> None:
    split = Split("tail", 0.5, 0, begin=3, characters=6)
    whole = [Piece("a\nb\nc\n", "a.txt", 1, True, True)]
    assert [piece.text for piece in split.divide(whole)] == ["a\nb\n", "c\n"]
    with pytest.raises(DataError, match="changed while it was read: 8 characters, before 6"):
        list(split.divide([*whole, Piece("d\n", "a.txt", 4, True, True)]))


def test_no_validation_and_too_little_text(tokenizer: Path, tmp_path: Path) -> None:
    corpus, report = corpus_of(tmp_path, tokenizer, ["a"], val_fraction=0.0)
    assert (corpus.val(), report.split, corpus.val_tokens) == ([], "none", 0)
    with pytest.raises(DataError, match="too little text"):
        corpus_of(tmp_path, tokenizer, ["a"], val_fraction=0.1)
    with pytest.raises(DataError, match=r"none is left for validation.*--val-by tail"):
        corpus_of(tmp_path, tokenizer, ["a", "b"], val_fraction=0.01, val_by="hash")


# ----------------------------------------------------------------------------------------------------------------
# Workers


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_number_of_workers_changes_nothing(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmcli.operations.prepare as module

    monkeypatch.setattr(module, "_BATCH_BYTES", 2000)
    documents = [*many(500), "mail me: a@b.org", "call +49 30 1234567", *many(20)]
    documents += stories(20)[::2]
    options: dict[str, Any] = {"scrub_pii": True, "dedup": "exact", "sentences": True}
    corpus_of(tmp_path, tokenizer, documents, workers=1, **options)
    alone = files_of(tmp_path / "corpus")
    _, report = corpus_of(tmp_path, tokenizer, documents, workers=3, **options)
    assert files_of(tmp_path / "corpus") == alone
    assert (report.workers, report.pii, report.dropped) == (3, {"EMAIL": 1, "PHONE": 1}, {"duplicates": 20})


def slow_input(tmp_path: Path) -> Path:
    path = tmp_path / "long.jsonl"
    if not path.exists():
        path.write_text((json.dumps({"text": words(2000)}) + "\n") * 6000)  # seconds of work, on any machine
    return path


def workers_of(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if "encode_pool" in Path(f"/proc/{child}/cmdline").read_text()]


def start(tmp_path: Path, tokenizer: Path, *more: str) -> subprocess.Popen[str]:
    """`data prepare` on a long input, at the moment when its workers run."""
    inputs = ["data", "prepare", str(slow_input(tmp_path)), "-t", str(tokenizer), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmcli", *inputs, "--workers", "2", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 30
    while len(workers_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    return process


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name != "long.jsonl"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_killed_worker_is_an_error_and_an_interrupt_is_clean(tokenizer: Path, tmp_path: Path) -> None:
    process = start(tmp_path, tokenizer)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    _, complaint = process.communicate(timeout=30)
    assert "a worker process was ended by SIGKILL" in complaint
    assert (process.returncode, complaint.count("\n")) == (1, 1)
    assert leftovers(tmp_path) == []

    process = start(tmp_path, tokenizer)
    workers = workers_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in complaint) == (130, False)
    assert leftovers(tmp_path) == []
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]

    process = start(tmp_path, tokenizer)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_an_engine_that_differs_is_replaced_by_tokenizers(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = corpus_of(tmp_path, tokenizer, many(600))
    ids = expected.train()[0].tolist()
    engine = load_tokenizer(tokenizer).fast_encoder().engine
    if engine == "tokenizers":
        pytest.skip("tiktoken is not installed")
    genuine = encode_pool.FastEncoder.encode
    for needle in ("Document 3.", "Document 5"):  # among the first samples, and only later

        def wrong(self: Any, text: str, needle: str = needle) -> Any:
            found = genuine(self, text)
            late = needle != "Document 3." and not text.startswith(tuple(f"Document {n}." for n in range(30)))
            return found[::-1] if text.startswith(needle) or late else found

        monkeypatch.setattr(encode_pool.FastEncoder, "encode", wrong)
        corpus, report = corpus_of(tmp_path, tokenizer, many(600))
        assert report.engine == "tokenizers"
        assert corpus.train()[0].tolist() == ids


# ----------------------------------------------------------------------------------------------------------------
# Duplicates and personal data


def test_exact_duplicates_are_dropped_short_ones_and_long_ones(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE", 200)
    long, other = words(400, 1), words(400, 1) + " more"
    documents = ["a", "b", "a", long, other, long, "c"]
    for shard_tokens in (1 << 28, 50):
        corpus, report = corpus_of(
            tmp_path, tokenizer, documents, dedup="exact", val_fraction=0.0, shard_tokens=shard_tokens
        )
        assert texts_of(corpus) == ["a", "b", long, other, "c"]
        assert report.dropped == {"duplicates": 2}
        assert corpus.train_bytes == sum(map(len, ["a", "b", long, other, "c"]))


def test_near_duplicates_are_dropped(tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    base = words(300, 3)
    near = base.replace(" ", "\n", 5) + " extra"
    half = base[: len(base) // 2] + words(150, 4)
    documents = [base, near, half, words(300, 5), base.upper()]
    corpus, report = corpus_of(tmp_path, tokenizer, documents, dedup="near", val_fraction=0.0)
    assert texts_of(corpus) == [base, half, documents[3]]
    assert report.dropped == {"duplicates": 2}


def test_similarity_does_not_need_spaces() -> None:
    pytest.importorskip("rensa")
    chosen = random.Random(1)
    poem = "".join(chr(chosen.randint(0x4E00, 0x9000)) for _ in range(200))
    first, same, other = band_keys([poem, poem[:-2] + "。", poem[::-1]])
    assert set(first) & set(same)
    assert not set(first) & set(other)


def test_the_set_of_digests_is_a_set() -> None:
    chosen = random.Random(0)
    digests = [dedup.digest_of(str(chosen.randint(0, 4000)).encode()) for _ in range(6000)] + [bytes(16)]
    ours, theirs = DigestSet(), set()
    for digest in digests:
        assert ours.add(digest) == (digest not in theirs)
        theirs.add(digest)
        assert digest in ours
    assert ours.count == len(theirs)
    assert dedup.digest_of(b"not there") not in ours


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("write to a.b+c@ex-ample.co.uk.", "write to [EMAIL]."),
        ("x@y, @name, a@b", "x@y, @name, a@b"),
        ("card 4111 1111 1111 1111, 378282246310005", "card [CARD], [CARD]"),
        ("no card 4111 1111 1111 1112", "no card 4111 1111 1111 1112"),
        ("IBAN DE89 3704 0044 0532 0130 00 AND GB82WEST12345698765432.", "IBAN [IBAN] AND [IBAN]."),
        ("not DE88 3704 0044 0532 0130 00", "not DE88 3704 0044 0532 0130 00"),
        ("from 192.168.1.1:80 to 256.1.1.1", "from [IP]:80 to 256.1.1.1"),
        ("at 2001:db8::ff00:42:8329, fe80::1ff:fe23:4567:890a", "at [IP], [IP]"),
        ("12:30:45 a[::2] std::vector 00:1A:2B:3C:4D:5E", "12:30:45 a[::2] std::vector 00:1A:2B:3C:4D:5E"),
        ("(212) 555-0123, +49 (0)30 1234-567, 030/1234567", "[PHONE], [PHONE], [PHONE]"),
        ("1-800-555-0199 13800138000 0044 20 7946 0958", "[PHONE] [PHONE] [PHONE]"),
        ("1914-1918, 2020-01-05 12:00, 3.14159265358979", "1914-1918, 2020-01-05 12:00, 3.14159265358979"),
        ("10 000 000 and 978-3-16-148410-0 and 1699999999", "10 000 000 and 978-3-16-148410-0 and 1699999999"),
    ],
)
def test_personal_data_becomes_labels(text: str, scrubbed: str) -> None:
    found, counts = pii.scrub(text)
    assert found == scrubbed
    assert sum(counts.values()) == sum(scrubbed.count(f"[{label}]") for label in pii.LABELS)


@given(st.text("0123456789 -.()+/:@aDE\n", max_size=200))
def test_scrubbing_only_puts_labels_in(text: str) -> None:
    scrubbed, counts = pii.scrub(text)
    place = 0
    for part in re.split(r"\[[A-Z]+\]", scrubbed):
        place = text.index(part, place) + len(part)
    assert len(re.findall(r"\[[A-Z]+\]", scrubbed)) == sum(counts.values())


@pytest.mark.parametrize(
    "text", ["1 ", "(", "@", "a@", ":", "1:", "DE12", "a.", "0-", "+1", "1.1.", "+1 2 3 4 5 6 7 8"]
)
def test_scrubbing_takes_linear_time(text: str) -> None:
    began = time.perf_counter()
    pii.scrub(text * (300_000 // len(text)))
    assert time.perf_counter() - began < 2


# ----------------------------------------------------------------------------------------------------------------
# What is wrong


def test_min_chars_and_the_encoding_errors_are_counted(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün\nlong enough \xff\nab\n\n".encode("latin-1").replace(b"\xfc", "ü".encode()))
    text = TextConfig(split_on="line", errors="replace", encoding="utf-8")
    corpus, report = corpus_of(tmp_path, tokenizer, tmp_path / "a.txt", text, val_fraction=0.0, min_chars=3)
    assert texts_of(corpus) == ["grün", "long enough \ufffd"]
    assert (report.dropped, report.replaced) == ({"short": 1}, 1)


def test_a_failure_leaves_nothing_and_the_old_corpus_alone(tokenizer: Path, tmp_path: Path) -> None:
    corpus_of(tmp_path, tokenizer, many(5), val_fraction=0.0)
    before = files_of(tmp_path / "corpus")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: field 'text' holds a number"):
        corpus_of(tmp_path, tokenizer, tmp_path / "bad.jsonl", val_fraction=0.0)
    with pytest.raises(UsageError, match="exists already"):
        list(prepare([str(tmp_path / "bad.jsonl")], tokenizer, tmp_path / "corpus"))
    with pytest.raises(UsageError, match="stands in the output's place"):
        list(prepare([str(tmp_path / "corpus" / "corpus.json")], tokenizer, tmp_path / "corpus", overwrite=True))
    assert files_of(tmp_path / "corpus") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "corpus", "documents.jsonl"]


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(content).replace("<|endoftext|>", "nothing"))
    with pytest.raises(LlmcliError, match="no end-of-text token"):
        corpus_of(tmp_path, tmp_path / "bare", many(3))


def test_a_damaged_corpus_does_not_open(tokenizer: Path, tmp_path: Path) -> None:
    corpus_of(tmp_path, tokenizer, many(100), val_fraction=0.2)
    folder = tmp_path / "corpus"
    shard, description = folder / "train-00000.npy", folder / "corpus.json"
    data, content = shard.read_bytes(), json.loads(description.read_text())

    def refused(message: str, **details: Any) -> None:
        with pytest.raises(DataError, match=message):
            open_corpus(folder, **details)

    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:size])
        refused("train-00000.npy")
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    open_corpus(folder)
    refused("train-00000.npy: its sha256", check_hashes=True)
    shard.unlink()
    refused("no such file")
    shard.write_bytes(data)
    for key, value, message in (
        ("train_tokens", 1, "train_tokens is not what its shards hold"),
        ("dtype", "float32", "dtype must be"),
        ("version", 99, "this llmcli reads version 1"),
        ("vocab_size", "many", "'vocab_size' must be a whole number"),
        ("shards", [{"file": "../train-00000.npy", "tokens": 1}], "must name files of this folder"),
        ("hash", None, "'hash' is missing"),
    ):
        description.write_text(json.dumps({**content, key: value}))
        refused(message)
    description.write_text("{")
    refused(r"corpus.json:1:2: is not valid JSON")
    with pytest.raises(DataError, match="not a corpus folder"):
        open_corpus(tmp_path / "nowhere")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_does_not_grow_with_the_input(tokenizer: Path, tmp_path: Path) -> None:
    """After 5 MB, 50 MB as one document and 8 MB as many raise the process's peak by little."""
    code = (
        "import sys; from llmcli.operations.prepare import prepare; from llmcli.config import *\n"
        "tokenizer, output, *jobs = sys.argv[1:]\n"
        "for job in jobs:\n"
        "    source, split = job.split(':')\n"
        "    config = CorpusConfig(workers=2, dedup='exact')\n"
        "    for _ in prepare([source], tokenizer, output, TextConfig(split_on=split), config, overwrite=True): pass\n"
        "    print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"
    )
    line = words(15) + "\n"
    jobs = []
    for megabytes, split in ((2, "line"), (3, "file"), (8, "line"), (50, "file")):
        source = tmp_path / f"{megabytes}.txt"
        with open(source, "w") as file:
            for number in range(megabytes * 10**6 // (len(line) + 7)):
                file.write(f"{number:06} {line}")
        jobs.append(f"{source}:{split}")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer), str(tmp_path / "corpus"), *jobs],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    peaks = [float(line) for line in done.stdout.split()]
    assert peaks[-1] < peaks[1] + 40, peaks
