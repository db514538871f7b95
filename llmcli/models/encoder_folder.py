"""Encoder folders as transformers lays them out: config.json and model.safetensors of BERT, RoBERTa, DistilBERT.

Invariant: a head that is asked for is in the weights, or loading fails and names it: nothing is drawn at random.
Of other heads' weights no notice is taken, and older names of the same weights are understood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch

from llmcli.errors import DataError
from llmcli.files.artefacts import read_json
from llmcli.files.safetensors_header import TensorEntry
from llmcli.files.tensors import load_weights, save_weights, tensors_of
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import CALLED, EncoderConfig, kind_of_head, read_encoder_config, write_encoder_config
from llmcli.models.encoder_heads import EncoderClassifier, MaskedLM, SpanReader, build_encoder
from llmcli.models.ops import PackedLinear

T = TypeVar("T")

CONFIG = "config.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_BODY = ("embeddings.", "encoder.", "transformer.", "pooler.")  # what a base's own checkpoint has without a prefix
_BUFFERS = (".position_ids", ".token_type_ids")  # that old checkpoints carry
_OLD = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in checkpoints that came from TensorFlow

# Where each kind of head begins, in whatever family.
_HEADS = {
    "masked": ("cls.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    "classifier": ("classifier.", "pre_classifier."),
    "span": ("qa_outputs.",),
}
_MATRICES = ("cls.predictions.decoder", "lm_head.decoder", "vocab_projector")  # tied to the token embedding


def load_encoder_config(folder: Path) -> EncoderConfig:
    """The encoder's shape from a model folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"is not a model folder: it has no {CONFIG}", where=str(folder))
    return read_encoder_config(read_json(path), str(path))


def encoder_names(config: EncoderConfig, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors by the names that the modules have, whatever their checkpoint calls them."""
    named: dict[str, T] = {}
    for name, tensor in tensors.items():
        for old, new in _OLD.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        named[f"{config.model_type}.{name}" if name.startswith(_BODY) else name] = tensor
    for matrix in _MATRICES[:2]:
        bias = named.pop(f"{matrix}.bias", None)
        if bias is not None:
            named.setdefault(f"{matrix.removesuffix('.decoder')}.bias", bias)
    return named


def encoder_problems(
    config: EncoderConfig, found: Mapping[str, TensorEntry], kind: str, *, labels: int | None = None
) -> list[str]:
    """What is wrong with a checkpoint's tensors for a kind of head, a line each."""
    named = encoder_names(config, found)
    if kind != "base" and not any(name.startswith(_HEADS[kind]) for name in named):
        return [f"has no {CALLED[kind]}: there is no weight of {' or '.join(_expected_head(config, kind))}"]
    expected = _shapes(config, named, kind, labels)
    problems = [f"{name}: missing" for name in expected if name not in named]
    for name, entry in named.items():
        if name in expected and entry.shape != expected[name]:
            problems.append(f"{name}: shape {list(entry.shape)}, the config asks for {list(expected[name])}")
        elif name in expected and entry.dtype not in _DTYPES:
            problems.append(f"{name}: holds {entry.dtype}; a weight is one of {', '.join(_DTYPES)}")
        elif name not in expected and not _is_ignored(config, name):
            problems.append(f"{name}: not a parameter of {config.model_type}")
    return problems


def _expected_head(config: EncoderConfig, kind: str) -> list[str]:
    names = _names_of(build_meta(config, kind, labels=1))
    return sorted({name.split(".")[0] for name in names if name.startswith(_HEADS[kind])})


def build_meta(config: EncoderConfig, kind: str, *, labels: int = 0, pooler: bool = False) -> Encoder:
    """The module of a kind, without memory for its weights."""
    with torch.device("meta"):
        return build_encoder(config, kind, labels=labels, pooler=pooler)


def _names_of(model: Encoder) -> list[str]:
    return list(model.state_dict())


def _shapes(
    config: EncoderConfig, named: Mapping[str, TensorEntry], kind: str, labels: int | None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is needed."""
    count = labels if labels is not None else _labels_in(named)
    model = build_meta(config, kind, labels=count, pooler=_has_pooler(config, named))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _has_pooler(config: EncoderConfig, named: Mapping[str, object]) -> bool:
    return f"{config.model_type}.pooler.dense.weight" in named


def _labels_in(named: Mapping[str, TensorEntry]) -> int:
    """How many labels a classifier's last matrix gives."""
    last = named.get("classifier.out_proj.weight", named.get("classifier.weight"))
    return last.shape[0] if last is not None and last.shape else 1


def _is_ignored(config: EncoderConfig, name: str) -> bool:
    others = tuple(start for starts in _HEADS.values() for start in starts)
    return name.endswith(_BUFFERS) or name.startswith((*others, f"{config.model_type}.pooler."))


@overload
def load_encoder(
    folder: str | Path, device: str = ..., dtype: torch.dtype | None = ..., *, kind: Literal["masked"]
) -> MaskedLM: ...
@overload
def load_encoder(
    folder: str | Path, device: str = ..., dtype: torch.dtype | None = ..., *, kind: Literal["classifier"]
) -> EncoderClassifier: ...
@overload
def load_encoder(
    folder: str | Path, device: str = ..., dtype: torch.dtype | None = ..., *, kind: Literal["span"]
) -> SpanReader: ...
@overload
def load_encoder(
    folder: str | Path, device: str = ..., dtype: torch.dtype | None = ..., *, kind: str = ...
) -> Encoder: ...
def load_encoder(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, *, kind: str = "base"
) -> Encoder:
    """Reads an encoder folder in evaluation mode; `dtype` None keeps the stored one.

    `kind`: one of encoder_config.KINDS, which gives Encoder, MaskedLM, EncoderClassifier or SpanReader. Raises
    DataError where the weights lack that head, or do not fit the config; ConfigError for an unsupported config.
    """
    place = Path(folder)
    config = load_encoder_config(place)
    labels = len(encoder_labels(place)) if kind == "classifier" else None
    entries = tensors_of(place)
    problems = encoder_problems(config, entries, kind, labels=labels)
    if problems:
        more = f" (and {len(problems) - 1} more; see llmcli verify)" if len(problems) > 1 else ""
        told = problems[0] if problems[0].startswith("has no ") else f"the weights do not fit {CONFIG}: {problems[0]}"
        raise DataError(told + more, where=str(place))
    tensors = encoder_names(config, load_weights(place, device))
    model = build_meta(config, kind, labels=labels or 0, pooler=_has_pooler(config, tensors))
    kept = {name: tensors[name] for name in _names_of(model)}
    if dtype is not None:
        kept = {name: tensor.to(dtype) for name, tensor in kept.items()}
    model.load_state_dict(kept, assign=True)
    if device == "cpu" and model.embedding.dtype == torch.bfloat16 and PackedLinear.works():
        for layer in model.layers:
            layer.pack()  # type: ignore[operator]
    return model.eval().requires_grad_(False)


def encoder_labels(folder: Path) -> list[str]:
    """The labels of a classifier's folder; where config.json names none, as transformers calls them: LABEL_0, ..."""
    from llmcli.models.labels import labels_of

    values = read_json(folder / CONFIG)
    if values.get("id2label") is not None:
        return labels_of(values, str(folder / CONFIG))
    count = _labels_in(encoder_names(read_encoder_config(values, str(folder / CONFIG)), tensors_of(folder)))
    return [f"LABEL_{index}" for index in range(count)]


def head_of(folder: Path) -> str:
    """The kind of head that the folder's config.json names, see encoder_config.KINDS."""
    return kind_of_head(read_json(folder / CONFIG))


def save_encoder(
    model: Encoder,
    folder: Path,
    *,
    special_ids: Mapping[str, int | None],
    tensors: Mapping[str, torch.Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and model.safetensors into a staged folder, as the family's own checkpoints have them.

    `special_ids`: bos_token_id, eos_token_id, pad_token_id. `tensors`: the weights to write instead of the model's own.
    `facts`: further keys of config.json, which beat the model's.
    """
    weights = dict(tensors if tensors is not None else model.state_dict())
    kinds = {tensor.dtype for tensor in weights.values()}
    dtype = str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "float32"
    if model.kind == "base":
        weights = {name.removeprefix(f"{model.config.model_type}."): tensor for name, tensor in weights.items()}
    save_weights(weights, folder)
    content = write_encoder_config(model.config, model.kind, special_ids, dtype) | dict(facts or {})
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
