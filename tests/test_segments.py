"""Many texts in one row: each gives what it gives alone, forward and backward, and no text sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.segments import segments_of

LENGTHS = (3, 40, 1, 9, 33, 50, 2)


def drawn(family: str, **changes: Any) -> Decoder:
    gpt2 = family == "gpt2"
    config = DecoderConfig(
        family, 50, 16, 2, 2, 2 if gpt2 else 1, 8, 24, 64, attention_bias=gpt2, mlp_bias=gpt2, **changes
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def texts(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("mistral", {"sliding_window": 5}), ("gpt2", {})])
def test_side_by_side_is_as_alone(family: str, changes: dict[str, Any]) -> None:
    model, rows = drawn(family, **changes), texts()
    segments = segments_of(LENGTHS)
    assert len(segments.groups) > 1
    weights = torch.randn(sum(LENGTHS), 16, generator=torch.Generator().manual_seed(2))
    packed = model.hidden(torch.cat(rows)[None], segments=segments)[0]
    alone = torch.cat([model.hidden(row[None])[0] for row in rows])
    assert (packed - alone).abs().max() <= 1e-5
    parameters = list(model.parameters())
    theirs = torch.autograd.grad((alone * weights).sum(), parameters)
    for ours, wanted in zip(torch.autograd.grad((packed * weights).sum(), parameters), theirs, strict=True):
        assert (ours - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
    with torch.no_grad():
        assert (model.hidden(torch.cat(rows)[None], segments=segments)[0] - alone).abs().max() <= 1e-5


def test_a_text_does_not_see_its_neighbours() -> None:
    model, rows, others = drawn("qwen3"), texts(), texts(seed=9)
    others[4] = rows[4]
    begin = sum(LENGTHS[:4])
    with torch.no_grad():
        found = [model.hidden(torch.cat(each)[None], segments=segments_of(LENGTHS))[0] for each in (rows, others)]
    assert torch.equal(found[0][begin : begin + 33], found[1][begin : begin + 33])
    assert not torch.equal(found[0][:begin], found[1][:begin])
