"""Adapter folders as PEFT lays them out: adapter_config.json and adapter_model.safetensors.

Invariant: an adapter is put on the base that it was made for, or refused: by the hash of the base where llmcli wrote
it down, by names and shapes where others did.

Source: PEFT's `LoraConfig` and `get_peft_model_state_dict` (github.com/huggingface/peft).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import ADAPTER_CONFIG, read_json
from llmcli.files.manifest import MANIFEST, read_manifest
from llmcli.files.safetensors_header import read_header
from llmcli.files.tensors import load_tensors, save_tensors, weights_hash
from llmcli.models.classifier import Classifier, classifier_from
from llmcli.models.config import write_config
from llmcli.models.decoder import Decoder
from llmcli.models.folder import CONFIG, load_model
from llmcli.models.lora import Adapter, AdapterShape, Dropout, chosen_maps, maps_of, merge
from llmcli.models.ops import Conv1D
from llmcli.models.vocabulary import grown

ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT that change the result, with the values that are honoured; anything else is refused by name.
_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
}
_CHANGED = ("pissa", "olora", "loftq", "corda")  # ways to begin that change the base's weights too


def adapter_tensors(model: Decoder, kept: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Everything that is trained, by PEFT's names. `kept`: modules that are trained whole, by name."""
    found: dict[str, Tensor] = {}
    for name, module in maps_of(model):
        adapter: Adapter | None = module.adapter
        if adapter is not None:
            found[f"{_PREFIX}{name}.lora_A.weight"] = adapter.lora_A
            found[f"{_PREFIX}{name}.lora_B.weight"] = adapter.lora_B
            if adapter.lora_magnitude_vector is not None:
                found[f"{_PREFIX}{name}.lora_magnitude_vector"] = adapter.lora_magnitude_vector
    for name, whole in kept.items():
        found[f"{_PREFIX}{name}.weight"] = cast(Tensor, whole.weight)
    return found


def save_adapter(
    model: Decoder,
    folder: Path,
    shape: AdapterShape,
    kept: Mapping[str, nn.Module],
    *,
    base: str,
    special_ids: Mapping[str, int | None],
    facts: Mapping[str, Any],
    ends: Sequence[int],
) -> None:
    """Writes an adapter into a staged folder; beside it config.json and generation_config.json of base and adapter."""
    tensors = adapter_tensors(model, kept)
    whole = [name.rpartition(".")[2] for name in kept]
    embedding = next((name for name, module in kept.items() if module.weight is model.embedding), None)
    if embedding is not None and model.config.tie_word_embeddings and not isinstance(model, Classifier):
        # PEFT keeps a tied head as it was, unless it is among what is saved.
        tensors[f"{_PREFIX}lm_head.weight"] = model.embedding.detach().clone()
        whole.append("lm_head")
    save_tensors(tensors, folder / ADAPTER)
    targets = sorted({name.rpartition(".")[2] for name, module in maps_of(model) if module.adapter is not None})
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(model, Classifier) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": targets,
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": model.config.model_type == "gpt2",
        "use_dora": shape.dora,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    described = write_config(model.config, special_ids, "float32") | dict(facts)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    generation: dict[str, Any] = {key: value for key, value in special_ids.items() if value is not None}
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")


def restore_adapter(model: Decoder, folder: Path, kept: Mapping[str, nn.Module]) -> None:
    """Reads what `save_adapter` wrote into a model that has adapters of the same shape."""
    stored = load_tensors(folder / ADAPTER, str(model.embedding.device))
    with torch.no_grad():
        for name, tensor in adapter_tensors(model, kept).items():
            if name not in stored or stored[name].shape != tensor.shape:
                raise DataError(f"the adapter's {name} does not fit the run's settings", where=str(folder))
            tensor.copy_(stored[name])


def read_shape(folder: Path) -> AdapterShape:
    """The shape of an adapter of whatever origin. Raises ConfigError for a setting that cannot be honoured."""
    path = folder / ADAPTER_CONFIG
    values, where = read_json(path), str(path)
    if values.get("peft_type") != "LORA":
        raise ConfigError(f"peft_type is {values.get('peft_type')!r:.40}; LORA is supported", where=where)
    for key, allowed in _ONLY.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(f"{key} = {values[key]!r:.80} is not supported", where=where)
    begin = values.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(_CHANGED):
        raise ConfigError(
            f"init_lora_weights = {begin!r:.40} changes the base too, which is not supported", where=where
        )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    sound = isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0
    if not sound or isinstance(rank, bool) or isinstance(alpha, bool):
        raise ConfigError("r and lora_alpha must be numbers above 0", where=where)
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    if values.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)  # alpha / sqrt(rank), as alpha / rank
    return AdapterShape(rank, float(alpha), dora=bool(values.get("use_dora")))


def is_classifier_adapter(folder: Path) -> bool:
    """Whether an adapter brings a classifier's head."""
    return f"{_PREFIX}score.weight" in read_header(folder / ADAPTER)


def refuse_other_base(base: Path, adapter: Path) -> None:
    """Raises DataError where an adapter says by hash that it was made for another base."""
    if (adapter / MANIFEST).is_file():
        wanted = read_manifest(adapter)["lineage"].get("parent")
        if isinstance(wanted, str) and wanted != weights_hash(base):
            recorded = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise DataError(f"was made for another base than {base}: for {recorded!r:.200}", where=str(adapter))


def load_adapted(
    base: Path, adapter: Path, device: str = "cpu", dtype: torch.dtype | None = None, *, kind: str = "model"
) -> Decoder:
    """A base with an adapter merged into it; `dtype` None keeps the base's. Raises DataError where they do not fit."""
    shape = read_shape(adapter)
    refuse_other_base(base, adapter)
    tensors = load_tensors(adapter / ADAPTER, device)
    model = load_model(base, device)
    stored = model.embedding.dtype
    model = model.float()
    score = tensors.get(f"{_PREFIX}score.weight")
    if (score is not None) != (kind == "classifier"):
        told = "is a classifier: llmcli classify runs it" if kind == "model" else "is no classifier"
        raise DataError(told, where=str(adapter))
    if score is not None:
        model = classifier_from(model, score.size(0), torch.Generator())
    _put_on(model, tensors, shape, str(adapter))
    return merge(model).to(dtype or stored).eval().requires_grad_(False)


@torch.no_grad()
def _put_on(model: Decoder, tensors: Mapping[str, Tensor], shape: AdapterShape, where: str) -> None:
    """Attaches stored adapters and whole modules. Raises DataError for a name or a shape that the model has not."""
    maps = dict(chosen_maps(model, ()))
    left = dict(tensors)
    dropout = Dropout(0.0, model.embedding.device)
    _grow(model, tensors)
    for name, module in maps.items():
        down, up = (left.pop(f"{_PREFIX}{name}.lora_{part}.weight", None) for part in "AB")
        if down is None or up is None:
            if down is not None or up is not None:
                raise DataError(f"has but half of an adapter for {name}", where=where)
            continue
        rows, columns = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
        if down.ndim != 2 or down.shape[1] != columns or up.shape != (rows, down.shape[0]):
            raise DataError(
                f"does not fit this base: {name} has {rows} x {columns} weights, the adapter {tuple(up.shape)} and "
                f"{tuple(down.shape)}",
                where=where,
            )
        alpha = shape.scale * down.shape[0]  # a rank of its own (rank_pattern) leaves alpha as it is
        own = AdapterShape(down.shape[0], shape.alpha if down.shape[0] != shape.rank else alpha, dora=shape.dora)
        module.adapter = Adapter(module, own, dropout, None)
        module.adapter.lora_A.copy_(down)
        module.adapter.lora_B.copy_(up)
        if shape.dora:
            length = left.pop(f"{_PREFIX}{name}.lora_magnitude_vector", None)
            if length is None or length.numel() != rows:
                raise DataError(f"has no magnitudes for {name}, and is a DoRA", where=where)
            module.adapter.lora_magnitude_vector.copy_(length.flatten())
    parameters = dict(model.named_parameters())
    for name, tensor in left.items():
        own_name = name.removeprefix(_PREFIX)
        if own_name == "lm_head.weight" and model.config.tie_word_embeddings:
            if not torch.equal(tensor, model.embedding.to(tensor)) and f"{_PREFIX}{_embedding(model)}" not in tensors:
                raise DataError("has a head of its own, and the base shares head and embedding", where=where)
            continue
        if own_name not in parameters or parameters[own_name].shape != tensor.shape:
            raise DataError(f"does not fit this base: it has no {own_name} of {tuple(tensor.shape)}", where=where)
        parameters[own_name].copy_(tensor)


def _embedding(model: Decoder) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is model.embedding)


def _grow(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Makes room for tokens that the adapter brings."""
    stored = tensors.get(f"{_PREFIX}{_embedding(model)}")
    if stored is not None and stored.ndim == 2 and stored.size(1) == model.embedding.size(1):
        grown(model, stored.size(0))
