"""Dropout: drawn while a model trains and at no other time, whatever the family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_encoder import VOCABULARY, draw
from small_tuning import go, make_base, reviews, tiny

from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.dropout import dropout_of, set_dropout
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import EncoderConfig
from llmcli.models.text_model import TextModel

IDS = torch.arange(24)[None]


def small(family: str) -> TextModel:
    model: TextModel
    if family == "bert":
        model = Encoder(EncoderConfig("bert", VOCABULARY, 16, 2, 2, 32, 32, hidden_dropout=0.1, attention_dropout=0.0))
    else:
        model = Decoder(DecoderConfig(family, VOCABULARY, 16, 2, 2, 2, 8, 32, 32))
    draw(model)
    return model


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "bert"])
def test_a_share_is_left_out_in_training_alone(family: str) -> None:
    model, plain = small(family), small(family).eval()
    set_dropout(model, 0.5)
    with torch.no_grad():
        expected = plain.hidden(IDS)
        torch.testing.assert_close(model.eval().hidden(IDS), expected, rtol=0, atol=0)
        model.train()
        torch.manual_seed(1)
        once = model.hidden(IDS)
        other = model.hidden(IDS)
        torch.manual_seed(1)
        torch.testing.assert_close(model.hidden(IDS), once, rtol=0, atol=0)
    assert not torch.equal(once, other)
    assert (once - expected).abs().mean() > 0.05
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize(("family", "own"), [("llama", 0.0), ("bert", 0.1)])
def test_none_is_left_out_at_a_share_of_zero(family: str, own: float) -> None:
    model = small(family)
    assert dropout_of(model) == own
    set_dropout(model, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(model.train().hidden(IDS), small(family).eval().hidden(IDS), rtol=0, atol=0)


def test_a_run_says_what_it_took(tmp_path: Path) -> None:
    base, data = make_base(tmp_path / "base"), reviews(tmp_path / "reviews.tsv")
    go("classify", base, data, tmp_path / "run", config=tiny(max_steps=2))
    assert "dropout = 0.0\n" in (tmp_path / "run" / "config.toml").read_text()
