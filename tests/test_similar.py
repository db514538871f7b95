"""`similar`: indexes that are brought up to date, exact search in floats and bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from small_vectors import make_encoder

from llmcli.config import IndexConfig, SearchConfig
from llmcli.errors import DataError, UsageError
from llmcli.files.vector_index import StoredIndex, to_bytes
from llmcli.models.pooling import Pooling
from llmcli.operations import nearest
from llmcli.operations.similar import IndexReport, Searcher, index_files

pytestmark = pytest.mark.usefixtures("one_thread")
SEA = "# The sea\n\nThe old man went to sea.\n\n# A boat\n\nHe had a boat.\n"
LAND = "A red car.\nThe dog ran home.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pooling = Pooling("mean", True, 20, False, {"query": "a: ", "document": "the "}, None)
    return make_encoder(tmp_path_factory.mktemp("similar") / "model", pooling=pooling)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "sea.md").write_text(SEA)
    (tmp_path / "texts" / "land.txt").write_text(LAND)
    return tmp_path / "texts"


def index(texts: Path, model: Path, place: Path, overwrite: bool = False, **settings: Any) -> IndexReport:
    config = IndexConfig(**{"chunk_tokens": 9, "device": "cpu", "threads": 1, **settings})
    *_, report = index_files([str(texts)], model, place, config, overwrite=overwrite)
    assert isinstance(report, IndexReport)
    return report


def searcher(place: Path, model: Path | None = None) -> Searcher:
    return Searcher(place, model, SearchConfig(device="cpu", threads=1))


@pytest.mark.parametrize("vectors", ["float32", "int8"])
def test_a_search_gives_every_piece_by_its_cosine_with_its_place(
    model: Path, texts: Path, tmp_path: Path, vectors: str
) -> None:
    report = index(texts, model, tmp_path / "index", vectors=vectors)
    opened = searcher(tmp_path / "index")
    hits = opened.search("old man", 100)
    assert len(hits) == report.pieces == report.embedded
    whole = {"sea.md": SEA.splitlines(), "land.txt": LAND.splitlines()}
    for hit in hits:
        assert "\n".join(whole[Path(hit.file).name][hit.line - 1 : hit.end_line]) == hit.text
    assert sorted({word for hit in hits for word in hit.text.split()}) == sorted(set((SEA + LAND).split()))
    # By hand: the prompts of either side, and vectors of length one.
    embedder = opened.embedder
    assert embedder.facts.prompt == "a: "
    embedder.facts = dataclasses.replace(embedder.facts, prompt="")
    query, *found = embedder.vectors(["a: old man", *(f"the {hit.text}" for hit in hits)])
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert np.allclose(scores, [vector @ query for vector in found], atol=1e-5 if vectors == "float32" else 0.02)


def test_only_what_changed_is_embedded_again(model: Path, texts: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    first = index(texts, model, place)
    before = {hit.text: hit.score for hit in searcher(place).search("boat", 100)}
    (texts / "land.txt").rename(texts / "moved.txt")
    (texts / "sea.md").write_text(SEA + "\nThere was time.\n")
    (texts / "new.txt").write_text("Once upon a time.\n")
    second = index(texts, model, place)
    kept = sum(Path(hit.file).name == "moved.txt" for hit in searcher(place).search("boat", 100))
    assert (second.kept, second.removed, second.files) == (kept, 1, 3)
    assert second.embedded == second.pieces - kept > 0
    after = {hit.text: hit.score for hit in searcher(place).search("boat", 100)}
    assert all(after[text] == pytest.approx(score, abs=1e-5) for text, score in before.items() if text in after)
    (texts / "sea.md").unlink()
    (texts / "new.txt").unlink()
    third = index(texts, model, place)
    assert (third.embedded, third.files, third.removed) == (0, 1, 2)
    assert {Path(hit.file).name for hit in searcher(place).search("boat", 100)} == {"moved.txt"}
    assert first.pieces > third.pieces == kept


def test_vectors_of_another_model_are_refused(model: Path, texts: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    index(texts, model, place)
    other = make_encoder(tmp_path / "other", seed=1)
    before = (place / "index.json").read_bytes()
    wider = make_encoder(tmp_path / "wider", size=24)
    narrower = make_encoder(tmp_path / "narrower", size=8)
    for act in (
        lambda: index(texts, other, place),
        lambda: searcher(place, other),
        lambda: searcher(place, wider),
        lambda: searcher(place, narrower),
    ):
        with pytest.raises(UsageError, match="holds vectors of another model"):
            act()
    with pytest.raises(UsageError, match="other pooling"):
        index(texts, model, place, pooling="max")
    with pytest.raises(UsageError, match="other dimensions"):
        index(texts, model, place, dimensions=8)
    assert (place / "index.json").read_bytes() == before
    assert index(texts, other, place, overwrite=True).kept == 0
    moved = shutil.copytree(other, tmp_path / "elsewhere")
    shutil.rmtree(other)
    with pytest.raises(DataError, match="no longer at"):
        searcher(place)
    assert searcher(place, moved).search("boat")


def test_other_pieces_or_vectors_are_made_anew(model: Path, texts: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    first = index(texts, model, place)
    second = index(texts, model, place, chunk_tokens=6)
    assert (second.kept, second.pieces > first.pieces) == (0, True)
    assert index(texts, model, place, chunk_tokens=6, vectors="int8").kept == 0
    assert index(texts, model, place, chunk_tokens=6, vectors="int8").embedded == 0


def test_what_is_no_text_is_skipped_or_told(model: Path, texts: Path, tmp_path: Path) -> None:
    (texts / "image.bin").write_bytes(bytes(range(256)) * 20)
    (texts / "empty.txt").write_text("")
    report = index(texts, model, tmp_path / "index")
    assert report.files == 4
    assert len(report.skipped) == 2
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text was found"):
        index(bare, model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="exists already"):
        index(bare, model, texts)


@pytest.mark.parametrize("damage", ["vectors.npy", "bytes.npy", "pieces.npy", "index.json"])
def test_a_damaged_index_is_told(model: Path, texts: Path, tmp_path: Path, damage: str) -> None:
    index(texts, model, tmp_path / "index")
    path = tmp_path / "index" / damage
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError):
        StoredIndex(tmp_path / "index")
    with pytest.raises(DataError, match="is no index"):
        StoredIndex(texts)


@pytest.mark.parametrize("kind", ["spread", "clustered", "alike"])
@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_missed_however_near_the_vectors_are(
    kind: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((20_000, 24), dtype=np.float32)
    if kind != "spread":
        centres = 20 * random.standard_normal((40 if kind == "clustered" else 1, 24), dtype=np.float32)
        vectors += centres[random.integers(0, len(centres), len(vectors))]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    codes, steps = to_bytes(vectors)
    assert np.abs((codes.astype(np.float32) - 128) * steps[:, None] - vectors).max() <= steps.max() / 2 + 1e-6
    monkeypatch.setattr(nearest, "_BLOCK", 1 << 17)  # several blocks
    opened = nearest.Nearest(codes, steps, vectors if exact else None, threads=1)
    for query in vectors[:5] + np.float32(0.01):
        query /= np.linalg.norm(query)
        places, scores = opened.search(query, 50)
        true = vectors @ query
        assert np.allclose(scores, true[places], atol=1e-6 if exact else 0.02)
        if exact:
            assert np.allclose(scores, np.sort(true)[::-1][:50], atol=1e-6)


def test_the_commands_show_places_and_scores(model: Path, texts: Path, tmp_path: Path) -> None:
    words = ("-m", model, "-o", "index", "--chunk-tokens", 9, "--threads", 1)
    made = forked.run("similar", "index", "texts", *words, cwd=tmp_path)
    assert made.stdout.startswith("index: 2 files, ")
    found = forked.run("similar", "search", "index", "a boat", "-n", 2, "--json", cwd=tmp_path)
    hits = [json.loads(line) for line in found.stdout.splitlines()]
    assert [list(hit) for hit in hits] == [["file", "line", "end_line", "score", "text"]] * 2
    plain = forked.run("similar", "search", "index", "a boat", "-n", 1, cwd=tmp_path).stdout.rstrip("\n").split("\t")
    assert plain[:2] == [f"{hits[0]['score']:.4f}", f"{hits[0]['file']}:{hits[0]['line']}"]
    assert forked.run("similar", "search", "index", " ", cwd=tmp_path, code=2).stderr.startswith(
        "Error: text 1: the text"
    )
