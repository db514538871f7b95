"""Encoders as ONNX folders: what transformers gives, of every family and head, filled up or alone; the gate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoder_text import WORDS, write_tokenizer

from llmcli.config import ExportConfig
from llmcli.errors import CheckError, ConfigError, DataError, UsageError
from llmcli.operations.export import ExportReport, export
from llmcli.operations.inspect import describe
from llmcli.operations.verify import verify
from llmcli.runtime.encoder_session import EncoderSession, batched

FAMILIES = ("bert", "roberta", "distilbert")
HEADS = {
    "base": "Model",
    "masked": "ForMaskedLM",
    "classifier": "ForSequenceClassification",
    "span": "ForQuestionAnswering",
}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
TEXTS = [[2, 7, 9, 3], [2, 5, 3], [2, *range(5, 25), 3], [2, 11, 12, 13, 14, 15, 3]]


def make(folder: Path, family: str, kind: str = "base", *, scale: float = 1.0, **more: Any) -> Path:
    """A random model of two blocks, saved by transformers, with a tokenizer of words."""
    import transformers

    shape: dict[str, Any] = {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 40, "pad_token_id": 0}
    if family == "distilbert":
        shape |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    else:
        shape |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        shape |= {"type_vocab_size": 2 if family == "bert" else 1}
    if kind == "classifier":
        shape["num_labels"] = 3
    config = getattr(transformers, f"{CLASSES[family]}Config")(**{**shape, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[family]}{HEADS[kind]}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2).mul_(scale)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def exported(model: Path, output: Path, **settings: Any) -> ExportReport:
    *_, report = export(model, output, ExportConfig(**{"precision": "fp32", "threads": 1, **settings}))
    assert isinstance(report, ExportReport)
    return report


def theirs(folder: Path, family: str, kind: str, texts: list[list[int]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """What transformers gives for each text alone."""
    import transformers

    model = getattr(transformers, f"{CLASSES[family]}{HEADS[kind]}").from_pretrained(folder).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            made = model(input_ids=torch.tensor([text]), output_hidden_states=True)
            row = {"last_hidden_state": made.hidden_states[-1][0].numpy()}
            for name in ("logits", "start_logits", "end_logits"):
                if name in made:
                    row[name] = made[name][0].numpy()
            found.append(row)
    return found


def plain(folder: Path, texts: list[list[int]], names: list[str]) -> list[np.ndarray[Any, Any]]:
    """By onnxruntime itself, filled up in one batch; what fills a row up is not the padding's id."""
    import onnxruntime

    engine = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    shape = (len(texts), max(map(len, texts)))
    ids, mask = np.full(shape, 6, np.int64), np.zeros(shape, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}
    taken = {item.name for item in engine.get_inputs()}
    found: list[np.ndarray[Any, Any]] = engine.run(names, {name: given[name] for name in taken})
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HEADS)
def test_the_graph_gives_what_transformers_gives(tmp_path: Path, family: str, kind: str) -> None:
    model = make(tmp_path / "model", family, kind)
    report = exported(model, tmp_path / "onnx")
    assert report.checks is not None
    expected = theirs(model, family, kind, TEXTS)
    session = EncoderSession(tmp_path / "onnx", threads=2)
    names = [name for name in session.facts.outputs if name != "sentence_embedding"]
    found = session.run_all(TEXTS, names)
    session.close()
    filled_up = plain(tmp_path / "onnx", TEXTS, names)
    for row, text in enumerate(TEXTS):
        assert set(expected[row]) == set(names)
        for place, name in enumerate(names):
            wanted = expected[row][name]
            np.testing.assert_allclose(found[row][name], wanted, atol=1e-4)
            by_token = name != "logits" or kind == "masked"
            np.testing.assert_allclose(
                filled_up[place][row][: len(text)] if by_token else filled_up[place][row], wanted, atol=1e-4
            )


def write_pooling(folder: Path, mode: str, normalize: bool) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode": mode})
    )


@pytest.mark.parametrize(("mode", "normalize"), [("mean", True), ("cls", False), ("lasttoken", False), ("max", True)])
def test_pooling_and_norm_are_in_the_graph(tmp_path: Path, mode: str, normalize: bool) -> None:
    model = make(tmp_path / "model", "bert")
    write_pooling(model, mode, normalize)
    exported(model, tmp_path / "onnx")
    assert (tmp_path / "onnx" / "1_Pooling" / "config.json").read_bytes() == (
        model / "1_Pooling" / "config.json"
    ).read_bytes()
    session = EncoderSession(tmp_path / "onnx", threads=1)
    vectors = session.vectors(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        states = theirs(model, "bert", "base", [text])[0]["last_hidden_state"]
        wanted = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1], "max": states.max(0)}[mode]
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted) if normalize else wanted, atol=1e-4)
    np.testing.assert_allclose(plain(tmp_path / "onnx", TEXTS, ["sentence_embedding"])[0], vectors, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("precision", "quantizer", "least"),
    [("int8", "round", 0.995), ("int8", "weight-only", 0.999), ("int4", "round", 0.95)],
)
def test_quantized_states_are_close(tmp_path: Path, family: str, precision: str, quantizer: str, least: float) -> None:
    model = make(tmp_path / "model", family)
    report = exported(model, tmp_path / "onnx", precision=precision, quantizer=quantizer)
    assert report.checks is not None
    assert report.bits_per_weight < (10 if precision == "int8" else 6)
    session = EncoderSession(tmp_path / "onnx", threads=1)
    for expected, found in zip(theirs(model, family, "base", TEXTS), session.states(TEXTS), strict=True):
        wanted = expected["last_hidden_state"]
        cosines = (wanted * found).sum(-1) / np.linalg.norm(wanted, axis=-1) / np.linalg.norm(found, axis=-1)
        assert cosines.mean() > least
    said = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert said["checks"]["state_cosine"] > least
    assert said["precision"] == precision


def test_a_graph_that_is_too_far_off_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "bert")
    with pytest.raises(CheckError, match="min-cosine"):
        exported(model, tmp_path / "onnx", precision="int4", min_cosine=0.99999)
    assert not (tmp_path / "onnx").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "bert", scale=float("nan"))
    with pytest.raises(CheckError, match="not finite"):
        exported(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_pair_is_told_apart_by_its_types(tmp_path: Path) -> None:
    import transformers

    model = make(tmp_path / "model", "bert", "classifier")
    exported(model, tmp_path / "onnx")
    ids, types = [2, 7, 9, 3, 8, 12, 3], [0, 0, 0, 0, 1, 1, 1]
    reference = transformers.BertForSequenceClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        wanted = reference(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0].numpy()
    session = EncoderSession(tmp_path / "onnx", threads=1)
    found = session.run([ids, [2, 3]], "logits", [types, [0, 0]])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(session.run([ids], "logits")[0] - wanted).max() > 1e-3


def test_a_head_may_be_left_out_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "roberta", "masked")
    exported(model, tmp_path / "onnx", head="base")
    assert EncoderSession(tmp_path / "onnx").facts.outputs == ("last_hidden_state", "sentence_embedding")
    with pytest.raises(DataError, match=r"qa_outputs"):
        exported(model, tmp_path / "other", head="span", check=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "settings", [{"precision": "fp16"}, {"target": "portable"}, {"quantizer": "calibrated", "precision": "int8"}]
)
def test_settings_for_decoders_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        exported(make(tmp_path / "model", "bert"), tmp_path / "onnx", **settings)


def test_a_text_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    exported(make(tmp_path / "model", "bert"), tmp_path / "onnx", check=False)
    session = EncoderSession(tmp_path / "onnx", threads=1)
    with pytest.raises(UsageError, match="40 positions"):
        session.vectors([[5] * 41])
    with pytest.raises(UsageError, match="at least one token"):
        session.vectors([[2, 3], []])
    assert session.vectors([]).shape == (0, 32)
    assert session.vectors([[5] * 40]).shape == (1, 32)


def test_batches_hold_every_text_once_and_little_that_fills_up() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 300, 500)]
    batches = list(batched(lengths, tokens=512))
    assert sorted(place for batch in batches for place in batch) == list(range(500))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or longest * len(batch) <= 512
        assert sum(lengths[place] for place in batch) >= 0.8 * longest * len(batch)


def test_running_an_encoder_imports_no_torch(tmp_path: Path) -> None:
    exported(make(tmp_path / "model", "distilbert"), tmp_path / "onnx", check=False)
    code = (
        "import sys; from pathlib import Path; from llmcli.runtime.encoder_session import EncoderSession; "
        f"assert EncoderSession(Path({str(tmp_path / 'onnx')!r})).vectors([[2, 5, 3]]).shape == (1, 32); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_exported_encoder_is_described_and_verified(tmp_path: Path) -> None:
    exported(make(tmp_path / "model", "roberta"), tmp_path / "onnx", check=False)
    facts = describe(tmp_path / "onnx").facts
    assert (facts["target"], facts["kind"], facts["pooling"], facts["context"]) == ("encoder", "base", "mean", 39)
    assert verify(tmp_path / "onnx", values=True).problems == ()
    said = json.loads((tmp_path / "onnx" / "config.json").read_text())
    (tmp_path / "onnx" / "config.json").write_text(json.dumps({**said, "max_position_embeddings": 20}))
    assert any("39 tokens of context" in problem for problem in verify(tmp_path / "onnx").problems)
