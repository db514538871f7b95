"""Model folders as Hugging Face lays them out: config.json, model.safetensors, generation_config.json.

Invariant: a folder that loads has exactly the tensors that its config asks for, each of the right shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmcli.errors import DataError
from llmcli.files.artefacts import read_json
from llmcli.files.safetensors_header import TensorEntry
from llmcli.files.tensors import load_weights, save_weights, tensors_of
from llmcli.models.classifier import builder_for
from llmcli.models.config import DecoderConfig, read_config, write_config
from llmcli.models.decoder import Decoder
from llmcli.models.labels import is_classifier

T = TypeVar("T")
Build = Callable[[DecoderConfig], Decoder]

CONFIG = "config.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that old checkpoints carry


def load_config(folder: Path) -> DecoderConfig:
    """The decoder's shape from a model folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"is not a model folder: it has no {CONFIG}", where=str(folder))
    return read_config(read_json(path), str(path))


def expected_shapes(config: DecoderConfig, build: Build = Decoder) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}


def weight_problems(config: DecoderConfig, found: Mapping[str, TensorEntry], build: Build = Decoder) -> list[str]:
    """What is wrong with a checkpoint's tensors, a line each. `build`: makes the module that they are for."""
    expected = expected_shapes(config, build)
    problems = [f"{name}: missing" for name in expected if name not in found]
    for name, entry in found.items():
        if name in expected and entry.shape != expected[name]:
            problems.append(f"{name}: shape {list(entry.shape)}, the config asks for {list(expected[name])}")
        elif name in expected and entry.dtype not in _DTYPES:
            problems.append(f"{name}: holds {entry.dtype}; a weight is one of {', '.join(_DTYPES)}")
        elif name not in expected and not _is_ignored(config, name):
            problems.append(f"{name}: not a parameter of {config.model_type}")
    return problems


def _is_ignored(config: DecoderConfig, name: str) -> bool:
    return name.endswith(_IGNORED) or (config.tie_word_embeddings and name == "lm_head.weight")


def family_names(config: DecoderConfig, tensors: Mapping[str, T]) -> dict[str, T]:
    """GPT-2's own checkpoint has no `transformer.` prefix; everything else is named as it should be."""
    if config.model_type == "gpt2" and "wte.weight" in tensors:
        return {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    return dict(tensors)


def load_model(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, *, kind: str = "model"
) -> Decoder:
    """Reads a model folder into a Decoder in evaluation mode; `dtype` None keeps the stored one.

    `kind`: "model", or "classifier", which gives a Classifier. Raises DataError for a model of the other kind, and when
    a tensor is missing, odd or of a wrong shape; ConfigError for an unsupported config.
    """
    place = Path(folder)
    config = load_config(place)
    values = read_json(place / CONFIG)
    if is_classifier(values) != (kind == "classifier"):
        told = "is a classifier: llmcli classify runs it" if kind == "model" else "is no classifier: finetune classify"
        raise DataError(told + (" makes one" if kind != "model" else ""), where=str(place))
    build = builder_for(values, str(place / CONFIG))
    problems = weight_problems(config, family_names(config, tensors_of(place)), build)
    if problems:
        more = f" (and {len(problems) - 1} more; see llmcli verify)" if len(problems) > 1 else ""
        raise DataError(f"the weights do not fit {CONFIG}: {problems[0]}{more}", where=str(place))
    tensors = family_names(config, load_weights(place, device))
    with torch.device("meta"):
        model = build(config)
    kept = {name: tensor for name, tensor in tensors.items() if not _is_ignored(config, name)}
    if dtype is not None:
        kept = {name: tensor.to(dtype) for name, tensor in kept.items()}
    model.load_state_dict(kept, assign=True)
    _restore_buffers(model, device)
    return model.eval().requires_grad_(False)


def _restore_buffers(model: Decoder, device: str) -> None:
    """What is computed from the config is not in a checkpoint, and was made on the meta device."""
    from llmcli.models.decoder import LlamaModel, rope_frequencies

    body = model.body
    if isinstance(body, LlamaModel):
        body.frequencies = rope_frequencies(model.config).to(device)


def save_model(
    model: Decoder,
    folder: Path,
    *,
    special_ids: Mapping[str, int | None],
    tensors: Mapping[str, torch.Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Writes config.json, model.safetensors and generation_config.json into a staged folder.

    `special_ids`: bos_token_id, eos_token_id, pad_token_id. `tensors`: the weights to write instead of the model's own.
    `facts`: further keys of config.json, which beat the model's. `ends`: tokens that end a text, where there are
    others than eos_token_id.
    """
    weights = dict(tensors if tensors is not None else model.state_dict())
    kinds = {tensor.dtype for tensor in weights.values()}
    dtype = str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "float32"
    save_weights(weights, folder)
    content = write_config(model.config, special_ids, dtype) | dict(facts or {})
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    named = {key: value for key, value in special_ids.items() if value is not None}
    generation: dict[str, Any] = {"_from_model_config": True, **named}
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")
