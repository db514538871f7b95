"""`similar`: indexes that are brought up to date, exact search in floats and bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from conftest import Run
from small_vectors import make_encoder

from llmcli.config import IndexConfig, SearchConfig
from llmcli.errors import DataError, MissingExtraError, UsageError
from llmcli.files.artefacts import resolve_model
from llmcli.files.vector_index import IndexWriter, Piece, StoredIndex, to_bytes
from llmcli.files.vector_lists import LISTS
from llmcli.models.pooling import Pooling
from llmcli.operations import approximate, nearest
from llmcli.operations.approximate import Approximate, open_search, settle_search
from llmcli.operations.inspect import describe
from llmcli.operations.similar import IndexReport, Searcher, index_files
from llmcli.operations.verify import verify

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


# ----------------------------------------------------------------------------------------------------------------
# Approximate search


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss")


@pytest.fixture
def without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)


def clustered(count: int, size: int = 16) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    found = random.standard_normal((60, size))[random.integers(0, 60, count)] + 0.4 * random.standard_normal(
        (count, size)
    )
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def stored(folder: Path, vectors: np.ndarray[Any, Any], *, exact: bool = True) -> Path:
    folder.mkdir()
    with IndexWriter(folder, vectors.shape[1], exact=exact) as writer:
        writer.write([Piece("a.txt", row + 1, row + 1, f"piece {row}") for row in range(len(vectors))], vectors)
        writer.finish({"vectors": "float32" if exact else "int8", "dimensions": vectors.shape[1], "files": []})
    return folder


def search_by(kind: str) -> SearchConfig:
    return SearchConfig(search=kind, threads=1)


@pytest.mark.parametrize("exact", [True, False])
def test_lists_find_what_they_say_and_score_as_exact_search(tmp_path: Path, faiss: Any, exact: bool) -> None:
    vectors = clustered(3000)
    folder = stored(tmp_path / "index", vectors, exact=exact)
    said, notes = settle_search(folder, IndexConfig(search="approximate", threads=1))
    assert (said["kind"], notes, said["lists"]) == ("approximate", [], 110)
    assert said["recall_at_5"] >= 0.95
    assert said["probes"] < 30  # it does not look at everything
    opened = StoredIndex(folder)
    lists, _ = open_search(opened, search_by("auto"))
    whole, _ = open_search(opened, search_by("exact"))
    assert isinstance(lists, Approximate)
    assert isinstance(whole, nearest.Nearest)
    found = 0
    queries = vectors[7::60] + 0.05 * clustered(50)
    for query in queries:
        query /= np.linalg.norm(query)
        places, scores = lists.search(query, 5)
        true, best = whole.search(query, 5)
        assert list(scores) == sorted(scores, reverse=True)
        known = dict(zip(true.tolist(), best.tolist(), strict=True))
        for place, score in zip(places.tolist(), scores.tolist(), strict=True):
            assert score == pytest.approx(float(vectors[place] @ query), abs=1e-6 if exact else 0.03)
            assert score == pytest.approx(known.get(place, score), abs=1e-6)
        found += len(set(places.tolist()) & set(true.tolist()))
    assert found / (5 * len(queries)) >= 0.9
    # The same vectors give the same file; more pieces than the lists hold that are looked at are still found.
    before = (folder / LISTS).read_bytes()
    settle_search(folder, IndexConfig(search="approximate", threads=1))
    assert (folder / LISTS).read_bytes() == before
    assert len(lists.search(queries[0], 2900)[0]) == 2900


def test_a_few_pieces_have_lists_too(tmp_path: Path, faiss: Any) -> None:
    for count in (1, 2, 9):
        folder = stored(tmp_path / str(count), clustered(count))
        settle_search(folder, IndexConfig(search="approximate", threads=1))
        lists, _ = open_search(StoredIndex(folder), search_by("approximate"))
        assert sorted(lists.search(clustered(1)[0], 5)[0]) == sorted(set(range(count)))[: max(5, count)] or count > 5


def test_auto_makes_lists_of_many_pieces_where_they_find_enough(
    tmp_path: Path, faiss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(tmp_path / "index", clustered(500))
    assert settle_search(folder, IndexConfig(threads=1)) == ({"kind": "exact"}, [])
    assert not (folder / LISTS).exists()
    monkeypatch.setattr(approximate, "ENOUGH", 500)
    assert settle_search(folder, IndexConfig(threads=1))[0]["kind"] == "approximate"
    assert settle_search(folder, IndexConfig(threads=1, search="exact")) == ({"kind": "exact"}, [])
    assert not (folder / LISTS).exists()
    monkeypatch.setattr(approximate, "LEAST", 1.1)
    said, notes = settle_search(folder, IndexConfig(threads=1))
    assert said == {"kind": "exact"}
    assert "lists found" in notes[0]
    assert not (folder / LISTS).exists()
    with pytest.raises(UsageError, match="was made for exact search"):
        open_search(StoredIndex(folder), search_by("approximate"))


def test_without_the_library_a_line_names_the_extra(
    tmp_path: Path, without_faiss: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(tmp_path / "index", clustered(50))
    with pytest.raises(MissingExtraError, match=r"faiss-cpu: pip install 'llmcli\[search\]'"):
        settle_search(folder, IndexConfig(search="approximate", threads=1))
    monkeypatch.setattr(approximate, "ENOUGH", 50)
    said, notes = settle_search(folder, IndexConfig(threads=1))
    assert said == {"kind": "exact"}
    assert "llmcli[search]" in notes[0]
    made = {"lists": 4, "probes": 1, "recall_at_5": 1.0, "sample": 50, "seconds": 0.1}
    file = {"size": 1, "head": 1, "head_sha256": ""}
    edit_index(folder, search={"kind": "approximate", **made, **file})
    found, notes = open_search(StoredIndex(folder), search_by("auto"))
    assert isinstance(found, nearest.Nearest)
    assert "llmcli[search]" in notes[0]
    with pytest.raises(MissingExtraError):
        open_search(StoredIndex(folder), search_by("approximate"))


def test_the_library_is_looked_for_before_the_model(texts: Path, tmp_path: Path, without_faiss: None) -> None:
    with pytest.raises(MissingExtraError):
        index(texts, tmp_path / "no model", tmp_path / "index", search="approximate")


def edit_index(folder: Path, **facts: Any) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, **facts}))


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "head", "facts"])
def test_lists_that_are_not_the_indexs_are_refused(tmp_path: Path, faiss: Any, damage: str) -> None:
    folder = stored(tmp_path / "index", clustered(400))
    said, _ = settle_search(folder, IndexConfig(search="approximate", threads=1))
    path = folder / LISTS
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "other":
        other = stored(tmp_path / "other", clustered(400)[::-1].copy())
        settle_search(other, IndexConfig(search="approximate", threads=1))
        path.write_bytes((other / LISTS).read_bytes())
    elif damage == "head":
        raw = bytearray(path.read_bytes())
        raw[said["head"] // 2] ^= 1
        path.write_bytes(raw)
    else:
        edit_index(folder, search={"kind": "approximate", "lists": "many"})
    with pytest.raises(DataError, match=r"lists\.faiss|index\.json"):
        open_search(StoredIndex(folder), search_by("auto"))
    assert open_search(StoredIndex(folder), search_by("exact"))[0].search(clustered(1)[0], 3)


def test_codes_that_are_damaged_lead_nowhere_else(tmp_path: Path, faiss: Any) -> None:
    folder = stored(tmp_path / "index", clustered(400))
    said, _ = settle_search(folder, IndexConfig(search="approximate", threads=1))
    path = folder / LISTS
    path.write_bytes(path.read_bytes()[: said["head"]] + b"\xee" * (said["size"] - said["head"]))
    lists, _ = open_search(StoredIndex(folder), search_by("approximate"))
    places, _ = lists.search(clustered(1)[0], 5)
    assert len(places) == 5
    assert ((places >= 0) & (places < 400)).all()


def test_an_index_that_is_brought_up_to_date_has_lists_of_what_it_holds_now(
    model: Path, texts: Path, tmp_path: Path, faiss: Any
) -> None:
    place = tmp_path / "index"
    assert index(texts, model, place, search="approximate").search["kind"] == "approximate"
    (texts / "land.txt").unlink()
    (texts / "new.txt").write_text("Once upon a time there was a red boat.\n" * 3)
    second = index(texts, model, place, search="approximate")
    assert (second.kept > 0, second.removed) == (True, 1)
    opened = searcher(place)
    assert isinstance(opened.nearest, Approximate)
    exact = Searcher(place, None, SearchConfig(search="exact", device="cpu", threads=1))
    assert opened.search("a red boat", second.pieces) == exact.search("a red boat", second.pieces)
    assert verify(place, values=True).problems == ()
    third = index(texts, model, place)  # of a few pieces auto is exact
    assert (third.embedded, third.search, (place / LISTS).exists()) == (0, {"kind": "exact"}, False)
    assert verify(place, values=True).problems == ()


def test_the_commands_tell_how_is_searched(model: Path, texts: Path, tmp_path: Path, faiss: Any) -> None:
    words = ("-m", model, "-o", "index", "--chunk-tokens", 9, "--threads", 1)
    made = forked.run("similar", "index", "texts", *words, "--search", "approximate", cwd=tmp_path)
    assert ", approximate search (" in made.stdout
    assert "recall@5" in made.stdout
    told = json.loads(forked.run("similar", "index", "texts", *words, "--json", cwd=tmp_path).stdout)
    assert told["search"] == {"kind": "exact"}
    asked = ("similar", "search", "index", "a boat", "--search", "approximate")
    assert "was made for exact search" in forked.run(*asked, cwd=tmp_path, code=2).stderr


# ----------------------------------------------------------------------------------------------------------------
# info and verify


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "texts").mkdir()
    (folder / "texts" / "sea.md").write_text(SEA)
    (folder / "texts" / "land.txt").write_text(LAND)
    index(folder / "texts", model, folder / "index")
    return folder / "index"


def test_info_and_verify_know_an_index(made: Path, model: Path, llmcli: Run) -> None:
    facts = describe(made).facts
    assert describe(made).kind == "index"
    assert (facts["files"], facts["vectors"], facts["search"]) == (2, "float32", {"kind": "exact"})
    assert (facts["pieces"], facts["dimensions"]) == StoredIndex(made).codes.shape
    assert facts["model"]["path"] == str(model)
    assert verify(made, values=True).problems == ()
    ended = llmcli("verify", made, "--strict")
    assert (ended.returncode, ended.stderr) == (0, f"{made}: this index is whole\n")
    with pytest.raises(DataError, match="is an index; a model"):
        resolve_model(made)


def vector_of(folder: Path, row: int, value: float) -> None:
    array = np.load(folder / "vectors.npy", mmap_mode="r+")
    array[row] = value
    array.flush()


def line_of(folder: Path, number: int, change: Any) -> None:
    """Changes a line of pieces.jsonl, and keeps its length."""
    lines = (folder / "pieces.jsonl").read_bytes().splitlines(keepends=True)
    lines[number] = change(lines[number]).ljust(len(lines[number]) - 1) + b"\n"
    (folder / "pieces.jsonl").write_bytes(b"".join(lines))


def entry_of(folder: Path, **facts: Any) -> None:
    first, *rest = json.loads((folder / "index.json").read_text())["files"]
    edit_index(folder, files=[{**first, **facts}, *rest])


DAMAGES: dict[str, tuple[Any, str]] = {
    "array missing": (lambda f: (f / "steps.npy").unlink(), "steps.npy: no such file"),
    "facts missing": (lambda f: (f / "index.json").unlink(), "is no index: it has no index.json"),
    "facts no JSON": (lambda f: (f / "index.json").write_text("{"), "index.json:1:2: is not valid JSON"),
    "cut": (lambda f: (f / "bytes.npy").write_bytes((f / "bytes.npy").read_bytes()[:-8]), "bytes.npy: is not a whole"),
    "counts": (lambda f: edit_index(f, pieces=3), "is not whole: its vectors are not as many"),
    "files": (lambda f: entry_of(f, pieces=1000), "pieces 0 to 1000, there are"),
    "files twice": (lambda f: entry_of(f, first=2), "its pieces are another file's too"),
    "file of none": (lambda f: entry_of(f, pieces=0), "pieces are of none of its files"),
    "text longer": (
        lambda f: (f / "pieces.jsonl").write_bytes(b" " + (f / "pieces.jsonl").read_bytes()),
        "pieces.jsonl:2: begins at byte",
    ),
    "text more": (
        lambda f: (f / "pieces.jsonl").write_bytes((f / "pieces.jsonl").read_bytes() + b"{}\n"),
        "there are",
    ),
    "text fewer": (lambda f: (f / "pieces.jsonl").write_bytes(b""), "has 0 lines"),
    "text none": (lambda f: line_of(f, 0, lambda line: b"{}"), "pieces.jsonl:1: is no piece"),
    "text elsewhere": (lambda f: line_of(f, 0, lambda line: line.replace(b"land", b"lund")), "index.json says"),
    "text lines": (lambda f: line_of(f, 0, lambda line: line.replace(b'"line": 1', b'"line": 9')), "stands on the"),
    "not finite": (lambda f: vector_of(f, 1, np.nan), "vectors.npy: vector 1 is not finite"),
    "length": (lambda f: vector_of(f, 1, 3.0), "vectors.npy: vector 1 is not of length 1"),
    "bytes": (lambda f: vector_of(f, 1, 16**-0.5), "vectors.npy: vector 1 is not what its bytes say"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_an_index_is_named(tmp_path: Path, made: Path, damage: str) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "index"))
    change, expected = DAMAGES[damage]
    change(copy)
    problems = verify(copy, values=True).problems
    assert any(problem.split(":")[0] in expected or "manifest" in problem for problem in problems), problems
    assert any(expected in problem for problem in problems), problems
    assert not any("\n" in problem or str(tmp_path) in problem for problem in problems)
    (copy / "manifest.json").unlink()  # the checks stand without it
    assert any(expected in problem for problem in verify(copy, values=True).problems)


def test_verify_holds_lists_against_the_index(tmp_path: Path, faiss: Any) -> None:
    folder = stored(tmp_path / "index", clustered(400))
    entry = {"file": "a.txt", "sha256": "", "size": 1, "first": 0, "pieces": 400}
    edit_index(folder, files=[entry])
    settle_search(folder, IndexConfig(search="approximate", threads=1))
    assert verify(folder, values=True).problems == ()
    assert describe(folder).facts["search"]["kind"] == "approximate"
    (folder / LISTS).write_bytes(b"x")
    assert verify(folder).problems == (
        "lists.faiss: is damaged, or another index's; make the index anew, or add --search exact",
    )


def test_a_missing_file_is_told_before_the_model_is_loaded(tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    (broken / "model.safetensors").write_bytes(b"")
    for words in (("embed", "-i", "none.txt"), ("similar", "index", "none.txt", "-o", "index")):
        told = forked.run(*words, "-m", broken, cwd=tmp_path, code=2).stderr
        assert told == "Error: none.txt: no such file or folder\n"
    assert "no such file" in forked.run("similar", "search", "none", "a", cwd=tmp_path, code=2).stderr
