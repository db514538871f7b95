"""Pooling: vectors of token states by hand, and the files of sentence-transformers, read in both forms and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcli.errors import ConfigError, DataError
from llmcli.models.pooling import Pooling, pooled, read_pooling, write_pooling

KIND = "sentence_transformers.models."


def write(folder: Path, pooling: dict[str, Any], *kinds: str, **files: Any) -> Path:
    """A folder with modules.json, 1_Pooling/config.json, and further JSON files."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *((f"{n}_{kind}", kind) for n, kind in enumerate(kinds))]
    (folder / "1_Pooling").mkdir(parents=True)
    listed = [{"idx": n, "name": str(n), "path": path, "type": KIND + kind} for n, (path, kind) in enumerate(modules)]
    for name, content in {"modules": listed, "1_Pooling/config": pooling, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_each_mode_takes_the_tokens_that_it_names() -> None:
    states = torch.tensor([[1.0, 8.0], [3.0, 2.0], [5.0, 5.0], [-2.0, -4.0], [-6.0, -1.0]], requires_grad=True)
    lengths = torch.tensor([3, 2])
    expected = {
        "cls": [[1, 8], [-2, -4]],
        "last": [[5, 5], [-6, -1]],
        "mean": [[3, 5], [-4, -2.5]],
        "max": [[5, 8], [-2, -1]],
    }
    for mode, vectors in expected.items():
        found = pooled(states, lengths, mode)
        assert torch.allclose(found, torch.tensor(vectors, dtype=torch.float32)), mode
        (gradient,) = torch.autograd.grad(found.sum(), states)
        assert gradient.sum().item() == pytest.approx(4), mode  # what is pooled weighs one a text and dimension


def test_bfloat16_states_are_summed_in_float32() -> None:
    states = torch.full((4096, 1), 1.0078125, dtype=torch.bfloat16)
    assert pooled(states, torch.tensor([4096]), "mean").item() == pytest.approx(1.0078125, abs=1e-6)


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 4}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken", "include_prompt": True, "embedding_dimension": 4}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({}, "mean"),
    ],
)
def test_both_forms_of_the_pooling_file_are_read(tmp_path: Path, said: dict[str, Any], mode: str) -> None:
    assert read_pooling(write(tmp_path / "m", said)) == Pooling(mode)


def test_the_rest_of_the_folder_is_read(tmp_path: Path) -> None:
    files = {
        "sentence_bert_config": {"max_seq_length": 128, "do_lower_case": True},
        "config_sentence_transformers": {
            "prompts": {"query": "query: ", "document": None},
            "default_prompt_name": "query",
        },
    }
    found = read_pooling(write(tmp_path / "m", {"pooling_mode": "mean"}, "Normalize", **files))
    assert found == Pooling("mean", True, 128, True, {"query": "query: ", "document": ""}, "query")
    assert read_pooling(tmp_path) is None


def test_the_tokenizers_limit_counts_where_there_is_no_other(tmp_path: Path) -> None:
    limited = write(tmp_path / "a", {}, tokenizer_config={"model_max_length": 200})
    endless = write(tmp_path / "b", {}, tokenizer_config={"model_max_length": int(1e30)})
    assert [read_pooling(folder).longest for folder in (limited, endless)] == [200, None]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "kinds", "files", "told"),
    [
        ({"pooling_mode_mean_sqrt_len_tokens": True}, (), {}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, (), {}, "max and mean"),
        ({"pooling_mode": "weightedmean"}, (), {}, "weightedmean"),
        ({"pooling_mode": "mean", "include_prompt": False}, (), {}, "include_prompt"),
        ({}, ("Dense",), {}, "Dense"),
        ({}, ("Normalize", "Normalize", "Pooling"), {}, "Pooling"),
        ({}, (), {"sentence_bert_config": {"max_seq_length": "many"}}, "max_seq_length"),
        ({}, (), {"config_sentence_transformers": {"default_prompt_name": "query"}}, "default_prompt_name"),
    ],
)
def test_what_would_change_the_vectors_is_refused_by_name(
    tmp_path: Path, said: dict[str, Any], kinds: tuple[str, ...], files: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        read_pooling(write(tmp_path / "m", said, *kinds, **files))


@pytest.mark.parametrize(
    "content", ["{", "[1]", '[{"type": 3, "path": ""}]', '[{"type": "a.Pooling", "path": "../x"}]']
)
def test_an_odd_list_of_modules_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(DataError):
        read_pooling(tmp_path)


@pytest.mark.parametrize("mode", ["cls", "mean", "last", "max"])
def test_what_is_written_is_read_again(tmp_path: Path, mode: str) -> None:
    pooling = Pooling(mode, mode == "mean", 64, False, {"query": "q: "}, None)
    write_pooling(tmp_path, pooling, 16)
    assert read_pooling(tmp_path) == pooling


@pytest.mark.filterwarnings("ignore")  # of the library about itself
def test_sentence_transformers_reads_what_is_written(tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.models")
    write_pooling(tmp_path, Pooling("last", True, 64), 16)
    found = modules.Pooling.load(str(tmp_path / "1_Pooling"))
    assert (found.pooling_mode, found.get_embedding_dimension()) == ("lasttoken", 16)
    modules.Normalize.load(str(tmp_path / "2_Normalize"))
