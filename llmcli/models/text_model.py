"""A decoder or an encoder, whichever a folder holds: its shape, its weights, and saving it.

Invariant: what differs between the two when a model is loaded, saved or gone on with is told apart here alone, so those
who train a model need not know its kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from llmcli.files.artefacts import read_json
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import EncoderConfig, is_encoder
from llmcli.models.encoder_folder import encoder_names, head_of, load_encoder, load_encoder_config, save_encoder
from llmcli.models.folder import CONFIG, load_config, load_model, save_model

TextModel: TypeAlias = Decoder | Encoder
Shape: TypeAlias = DecoderConfig | EncoderConfig


def holds_encoder(folder: Path) -> bool:
    """Whether a model folder is an encoder's."""
    path = folder / CONFIG
    return path.is_file() and is_encoder(read_json(path))


def load_shape(folder: Path) -> Shape:
    """The model's shape."""
    return load_encoder_config(folder) if holds_encoder(folder) else load_config(folder)


def most_tokens(shape: Shape) -> int:
    """Tokens of a text at most."""
    return shape.longest if isinstance(shape, EncoderConfig) else shape.max_position_embeddings


def load_to_train(folder: Path, dtype: torch.dtype | None, *, keep: Sequence[str] = ()) -> TextModel:
    """A decoder, or an encoder without its head. `keep`: the kinds of heads that an encoder comes with if it has one.

    Raises DataError and ConfigError as `load_model` and `load_encoder` do.
    """
    if not holds_encoder(folder):
        return load_model(folder, "cpu", dtype)
    head = head_of(folder)
    return load_encoder(folder, "cpu", dtype, kind=head if head in keep else "base")


def save_text_model(
    model: TextModel,
    folder: Path,
    *,
    special_ids: Mapping[str, int | None],
    facts: Mapping[str, Any] | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Writes a model's files into a staged folder; see `save_model` and `save_encoder`."""
    if isinstance(model, Encoder):
        save_encoder(model, folder, special_ids=special_ids, facts=facts)
    else:
        save_model(model, folder, special_ids=special_ids, facts=facts, ends=ends)


def restore(model: TextModel, tensors: Mapping[str, Tensor]) -> None:
    """Takes on weights that were saved. Raises RuntimeError where they do not fit."""
    named = encoder_names(model.config, tensors) if isinstance(model.config, EncoderConfig) else dict(tensors)
    model.load_state_dict(named)
