"""`fill-mask`: candidates beside transformers, alone and among others, and every text or model that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from click.testing import CliRunner
from small_encoder import make_encoder, save_theirs, write_byte_level, write_wordpiece

from llmcli.cli.fill_mask import fill_mask as command
from llmcli.config import ExportConfig, FillMaskConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError
from llmcli.operations.classify import classify
from llmcli.operations.export import export
from llmcli.operations.fill_mask import MaskFiller, fill_mask

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "Paris is the [MASK] of France."


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bert") / "model")


def test_candidates_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = save_theirs("bert", "masked", tmp_path)
    write_wordpiece(tmp_path)
    ids = torch.tensor([load_tokenizer(tmp_path).encode(TEXT, True, parse_special=True)])
    assert ids[0, 4] == 4  # the mask
    with torch.no_grad():
        expected = theirs(ids).logits[0, 4].softmax(-1).topk(7)
    (found,) = fill_mask(tmp_path, TEXT, FillMaskConfig(top=7))
    assert [each.id for each in found.candidates] == expected.indices.tolist()
    for each, wanted in zip(found.candidates, expected.values.tolist(), strict=True):
        assert abs(each.probability - wanted) < 1e-5


def test_a_text_is_filled_as_among_others(bert: Path) -> None:
    texts = [TEXT, "a [MASK]", "[MASK] is the capital of the capital of the capital of France.", TEXT]
    many = list(fill_mask(bert, texts, FillMaskConfig(batch_size=3)))
    assert [each.text for each in many] == texts
    for record in many:
        (alone,) = fill_mask(bert, record.text)
        assert [each.id for each in alone.candidates] == [each.id for each in record.candidates]
        assert all(
            abs(one.probability - other.probability) < 1e-5
            for one, other in zip(alone.candidates, record.candidates, strict=True)
        )


def test_an_exported_encoder_fills_as_the_model_does(bert: Path, tmp_path: Path) -> None:
    list(export(bert, tmp_path / "graph", ExportConfig(precision="fp32", threads=1)))
    texts = [TEXT, "a [MASK]"]
    config = FillMaskConfig(top=97, threads=1)
    for mine, theirs in zip(fill_mask(tmp_path / "graph", texts, config), fill_mask(bert, texts, config), strict=True):
        found = {each.id: each.probability for each in mine.candidates}
        assert found == pytest.approx({each.id: each.probability for each in theirs.candidates}, abs=1e-5)
    list(export(bert, tmp_path / "headless", ExportConfig(precision="fp32", threads=1, head="base")))
    with pytest.raises(DataError, match="headless: has no masked-language-model head"):
        fill_mask(tmp_path / "headless", TEXT).__next__()
    with pytest.raises(DataError, match="headless: has no sequence-classification head"):
        next(classify(tmp_path / "headless", TEXT))


def test_piped_lines_are_read_in_the_encoding_that_their_bytes_tell(bert: Path, tmp_path: Path) -> None:
    piped = tmp_path / "piped.txt"
    for content in ("Paris\u00a0is [MASK]\n\n".encode("utf-16"), "Paris\u00a0is [MASK]\r\n".encode()):
        piped.write_bytes(content)
        run = forked.run("fill-mask", "-m", bert, "--json", "--threads", 1, cwd=tmp_path, stdin=str(piped))
        assert [json.loads(line)["text"] for line in run.stdout.splitlines()] == ["Paris\u00a0is [MASK]"]
    piped.write_bytes(b"\x00\xff\x9f [MASK]\n")
    run = forked.run("fill-mask", "-m", bert, "--threads", 1, cwd=tmp_path, stdin=str(piped), code=2)
    assert run.stderr.startswith("Error: <stdin>: looks binary")


def test_the_text_is_shown_with_the_candidate_in_its_place(bert: Path, tmp_path: Path) -> None:
    (found,) = fill_mask(bert, "The [MASK] of France.", FillMaskConfig(top=97))
    shown = {each.token: each.text for each in found.candidates}
    assert shown["capital"] == "The capital of France."
    assert shown["##s"] == "Thes of France."
    assert abs(sum(each.probability for each in found.candidates) - 1) < 1e-4

    size = write_byte_level(tmp_path)
    save_theirs("roberta", "masked", tmp_path, vocab_size=size)
    (found,) = fill_mask(tmp_path, "one <mask> it", FillMaskConfig(top=size))
    shown = {each.token: each.text for each in found.candidates if each.id > 3}
    assert (shown["of"], shown["x"]) == ("one of it", "onex it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Paris is the capital.", r"has no mask token; write \[MASK\] once"),
        ("The [MASK] of [MASK].", r"has 2 mask tokens; write \[MASK\] once"),
        ("", r"the text '' has no mask token"),
        ("[MASK]" + " the" * 60, r"has 63 tokens, the model has positions for 40"),
    ],
)
def test_a_text_that_cannot_be_filled_is_refused(bert: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(fill_mask(bert, ["a [MASK]", text]))


def test_a_model_that_cannot_fill_is_refused(bert: Path, tmp_path: Path) -> None:
    save_theirs("bert", "base", tmp_path)
    write_wordpiece(tmp_path)
    with pytest.raises(DataError, match=r"has no masked-language-model head: there is no weight of cls"):
        MaskFiller(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    with pytest.raises(DataError, match="is a 'gpt2', which has no mask"):
        MaskFiller(tmp_path)


def test_the_mask_is_found_where_the_settings_do_not_name_it(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "old")
    (tmp_path / "old" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert list(fill_mask(tmp_path / "old", TEXT)) == list(fill_mask(bert, TEXT))


def test_the_command_prints_lines_and_json(bert: Path) -> None:
    runner = CliRunner()
    found = runner.invoke(command, ["-m", str(bert), TEXT, "-n", "3", "--threads", "1"], catch_exceptions=False)
    lines = [line.split("\t") for line in found.stdout.splitlines()]
    assert len(lines) == 3
    assert lines[0][2] == TEXT.replace("[MASK]", lines[0][1])
    piped = runner.invoke(
        command, ["-m", str(bert), "--json", "--top", "2", "-"], input=f"{TEXT}\n\na [MASK]\n", catch_exceptions=False
    )
    records = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [record["text"] for record in records] == [TEXT, "a [MASK]"]
    assert set(records[0]["candidates"][0]) == {"token", "id", "probability", "text"}
    assert f"{records[0]['candidates'][0]['probability']:.4f}" == lines[0][0]
    assert isinstance(runner.invoke(command, ["-m", str(bert), "no word"]).exception, DataError)
