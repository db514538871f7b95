"""A classifier as an ONNX folder: scores and labels beside the model's, the gate, and the commands that take it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small_encoder_text import WORDS
from small_tokenizer import make_tokenizer
from small_tuning import go, make_base, reviews, tiny
from test_encoder_export import exported
from test_encoder_export import make as make_encoder
from test_onnx_session import make_model as make_bare

from llmcli.cli.main import main
from llmcli.config import ClassifyConfig, EvaluateConfig, ExportConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import CheckError, ConfigError, DataError, UsageError
from llmcli.models.classifier import classifier_facts, classifier_from
from llmcli.models.folder import load_model, save_model
from llmcli.operations.classify import Labeller, classify
from llmcli.operations.evaluate import evaluate
from llmcli.operations.evaluate_labelled import TaskReport
from llmcli.operations.export import ExportReport, export
from llmcli.operations.export_scores import ScoreReport
from llmcli.operations.generate import open_generator
from llmcli.operations.inspect import describe
from llmcli.operations.verify import verify
from llmcli.runtime.onnx_classifier import OnnxClassifier

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ["bad", "good", "so so"]
TEXTS = [
    "The list type is a mutable sequence.",
    "it",
    "Objects of a class are made by a call of it, mostly.",
    "The fox",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 60)
    return str(path)


def make_classifier(folder: Path, family: str = "qwen3", **more: Any) -> Path:
    """A classifier of random weights with three labels."""
    tokenizer = load_tokenizer(make_tokenizer(folder.with_name(f"{folder.name}-tokenizer")))
    make_bare(folder.with_name(f"{folder.name}-base"), family, vocab_size=tokenizer.vocab_size)
    base = load_model(folder.with_name(f"{folder.name}-base"))
    model = classifier_from(base, len(LABELS), torch.Generator().manual_seed(0))
    model.load_state_dict({"score.weight": 20 * model.score.weight}, strict=False)
    folder.mkdir()
    facts = classifier_facts(base.config.model_type, LABELS, several=False, pad_id=tokenizer.pad_id)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    save_model(model, folder, special_ids=ids, facts={**facts, **more})
    tokenizer.save(folder)
    return folder


def run(model: Path, output: Path, **settings: Any) -> ExportReport:
    *_, last = export(model, output, ExportConfig(threads=1, **settings))
    assert isinstance(last, ExportReport)
    return last


def labelled(model: Path, texts: list[str], **settings: Any) -> list[tuple[str | None, dict[str, float]]]:
    found = classify(model, texts, ClassifyConfig(threads=1, **settings))
    return [(each.label, each.probabilities) for each in found]


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen2", "gpt2"])
def test_the_graph_gives_the_models_scores(tmp_path: Path, text: str, family: str, target: str) -> None:
    source = make_classifier(tmp_path / "model", family)
    report = run(source, tmp_path / "out", precision="fp32", target=target, calibration=text)
    assert isinstance(report.checks, ScoreReport)
    assert report.checks.label_agreement == 1.0
    assert report.checks.score_difference < 1e-3
    assert report.checks.batch_difference < 1e-3
    assert verify(tmp_path / "out", values=True).problems == ()
    for expected, found in zip(labelled(source, TEXTS), labelled(tmp_path / "out", TEXTS), strict=True):
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], abs=1e-4)
    chances = [found["good"] for _, found in labelled(source, TEXTS)]
    assert max(chances) - min(chances) > 0.01  # else any text's scores would do


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_scores_do_not_depend_on_the_texts_beside_them(tmp_path: Path, text: str, precision: str) -> None:
    source = make_classifier(tmp_path / "model")
    report = run(source, tmp_path / "out", precision=precision, calibration=text, max_label_changes=60)
    assert isinstance(report.checks, ScoreReport)
    assert report.checks.score_difference > 0
    assert report.bits_per_weight < 9
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["checks"]["label_agreement"] == report.checks.label_agreement
    assert written["matrices"]["float32"] == 1  # the head
    together = labelled(tmp_path / "out", TEXTS)
    for one, expected in zip(TEXTS, together, strict=True):
        assert labelled(tmp_path / "out", [one])[0][1] == pytest.approx(expected[1], abs=2e-2)


def test_a_folder_says_what_it_is(tmp_path: Path, text: str) -> None:
    source = make_classifier(tmp_path / "model")
    run(source, tmp_path / "out", precision="fp32", calibration=text)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "genai_config.json" not in names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["1"] == "good"
    assert describe(tmp_path / "out").facts["context"] == 80
    with pytest.raises(DataError, match=r"model\.onnx: is a classifier, which writes no text; llmcli classify uses it"):
        open_generator(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    said["id2label"] = {"0": "bad", "1": "good"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(said))
    assert "model.onnx: 3 labels, config.json says 2" in verify(tmp_path / "out").problems
    with pytest.raises(ConfigError, match="names 2 labels, the model has 3"):
        labelled(tmp_path / "out", TEXTS)


def test_a_graph_that_gives_other_scores_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_classifier(tmp_path / "model")
    real = OnnxClassifier.scores
    monkeypatch.setattr(OnnxClassifier, "scores", lambda self, texts: real(self, texts) + np.float32(0.01))
    with pytest.raises(CheckError, match=r"scores differ by 0\.01, 0\.00\d* is allowed"):
        run(source, tmp_path / "out", precision="fp32", calibration=text)
    monkeypatch.setattr(OnnxClassifier, "scores", lambda self, texts: real(self, texts)[:, ::-1])
    with pytest.raises(CheckError, match=r"% of the texts get another label than by float32, 1 % is allowed"):
        run(source, tmp_path / "out", precision="int4", calibration=text, max_label_changes=1)
    with pytest.raises(ConfigError, match="a second graph is no use"):
        run(source, tmp_path / "out", precision="int4", prefill="int8", calibration=text)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, text: str) -> None:
    source = make_classifier(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["score.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckError, match="the model gives scores that are not finite"):
        run(source, tmp_path / "out", precision="int4", calibration=text)


def test_of_several_labels_each_has_a_probability_of_its_own(tmp_path: Path, text: str) -> None:
    source = make_classifier(tmp_path / "model", problem_type="multi_label_classification")
    run(source, tmp_path / "out", precision="fp32", calibration=text)
    found = labelled(tmp_path / "out", TEXTS)
    for (_, expected), (_, chances) in zip(labelled(source, TEXTS), found, strict=True):
        assert chances == pytest.approx(expected, abs=1e-4)
    assert any(sum(chances.values()) > 1.01 for _, chances in found)


def test_a_tuned_classifier_is_measured_before_and_after(tmp_path: Path, text: str) -> None:
    data = reviews(tmp_path / "learn.tsv")
    at = tmp_path / "run"
    go("classify", make_base(tmp_path / "base"), data, at, config=tiny(max_steps=16, learning_rate=0.02))
    run(at, at / "int4", precision="int4", calibration=text, max_label_changes=90)
    scores = []
    for place in (at, at / "int4"):
        *_, report = evaluate(place, [str(data)], EvaluateConfig(task="classify", threads=1))
        assert isinstance(report, TaskReport)
        scores.append(report.metrics["accuracy"])
    assert scores[0] > 0.8
    assert scores[1] >= scores[0] - 0.1
    found = CliRunner().invoke(main, ["classify", "-m", str(at / "int4"), "a good thing", "--json"])
    assert json.loads(found.stdout)["label"] == "pos"
    (tmp_path / "plain.tsv").write_text("a good thing\t7\na bad thing\t8\n")
    words = ["classify", "-m", str(at / "int4"), "--input", str(tmp_path / "plain.tsv")]
    found = CliRunner().invoke(main, [*words, "--text-field", "1"])
    assert [line.split("\t")[2] for line in found.stdout.splitlines()] == ["a good thing", "a bad thing"]
    assert "--text-field 1" in str(CliRunner().invoke(main, words).exception)
    found = CliRunner().invoke(main, ["generate", "-m", str(at / "int4"), "-p", "a good thing"])
    assert isinstance(found.exception, DataError)
    assert "llmcli classify uses it" in str(found.exception)


def test_classifying_by_a_graph_imports_no_torch(tmp_path: Path, text: str) -> None:
    run(make_classifier(tmp_path / "model"), tmp_path / "out", precision="fp32", calibration=text)
    (tmp_path / "a.tsv").write_text("text\tlabel\na good thing\tgood\na bad thing\tbad\n")
    script = """
        import sys
        from click.testing import CliRunner
        from llmcli.cli.main import main
        for words in (["classify", "-m", "out", "it"], ["evaluate", "out", "a.tsv", "--task", "classify", "--json"]):
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output
        print(*sys.modules)
    """
    words = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
    assert "onnxruntime" in found.stdout.split()
    assert "torch" not in found.stdout.split()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoders_graph_gives_the_labels_of_its_model(tmp_path: Path, family: str) -> None:
    source = make_encoder(tmp_path / "model", family, "classifier")
    exported(source, tmp_path / "out")
    texts: list[Any] = [" ".join(WORDS[:5]), WORDS[6], (WORDS[2], " ".join(WORDS[3:9])), " ".join(WORDS[:20] * 4)]
    config = ClassifyConfig(threads=1)
    expected, found = (list(Labeller(place, config).classify(texts)) for place in (source, tmp_path / "out"))
    assert [each.cut for each in found] == [False, False, False, True]
    for one, other in zip(found, expected, strict=True):
        assert (one.label, one.cut) == (other.label, other.cut)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{texts[0]}\tLABEL_0\n{texts[1]}\tLABEL_1\n")
    *_, report = evaluate(tmp_path / "out", [str(tmp_path / "a.tsv")], EvaluateConfig(task="classify", threads=1))
    assert isinstance(report, TaskReport)
    right = [each.label == label for each, label in zip(found, ("LABEL_0", "LABEL_1"), strict=False)]
    assert report.metrics["accuracy"] == sum(right) / 2
    with pytest.raises(UsageError, match="exported encoders run on the CPU"):
        labelled(tmp_path / "out", ["it"], device="cuda")
