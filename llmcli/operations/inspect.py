"""`info`: what an artefact is, read from its small files and headers; no weights are loaded and no torch is imported.

Invariant: whatever is described was read from the artefact itself; a fact that it does not hold is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcli.config import read_toml
from llmcli.errors import ConfigError, LlmcliError
from llmcli.files import artefacts
from llmcli.files.manifest import MANIFEST, manifest_problems, read_manifest
from llmcli.files.onnx_header import read_onnx
from llmcli.files.safetensors_header import read_header
from llmcli.files.tensors import tensors_of
from llmcli.models.config import read_config
from llmcli.models.encoder_config import is_encoder, kind_of_head, read_encoder_config

SEARCH = ("kind", "lists", "probes", "recall_at_5", "sample")  # of an index, what is said of its search
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What an artefact is: its kind and the facts about it, in the order in which they are shown."""

    path: str
    kind: str
    facts: dict[str, Any]


def describe(path: str | Path) -> Description:
    """Describes an artefact, of whatever kind. Raises DataError for what is none."""
    kind = artefacts.kind_of(path)
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "tokenizer": _tokenizer,
        "corpus": _corpus,
        "index": _index,
        "run": _run,
        "checkpoint": _checkpoint,
        "adapter": _adapter,
        "model": _model,
        "onnx": _onnx,
    }
    return Description(str(path), kind, readers[kind](Path(path)))


def _tokenizer(path: Path) -> dict[str, Any]:
    from llmcli.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    content = tokenizer.files.content
    facts: dict[str, Any] = {
        "type": tokenizer.kind,
        "byte_level": "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]),
        "vocab_size": tokenizer.vocab_size,
    }
    if "merges" in content["model"]:
        facts["merges"] = len(content["model"]["merges"])
    facts["special_tokens"] = {tokenizer.token(identity): identity for identity in sorted(tokenizer.special_ids)}
    for role in ("bos", "eos", "pad", "unk"):
        facts[f"{role}_id"] = getattr(tokenizer, f"{role}_id")
    return {**facts, "chat_template": tokenizer.chat_template is not None, "hash": tokenizer.hash}


def _corpus(folder: Path) -> dict[str, Any]:
    content = artefacts.read_json(folder / "corpus.json")
    facts = {key: value for key, value in content.items() if not isinstance(value, list | dict)}
    for part in ("train", "val"):
        tokens, size = content.get(f"{part}_tokens"), content.get(f"{part}_bytes")
        if isinstance(tokens, int) and isinstance(size, int) and tokens:
            facts[f"{part}_bytes_per_token"] = round(size / tokens, 4)
    sources = content.get("sources")
    if isinstance(sources, list):
        facts["sources"] = len(sources)
    facts["size_bytes"] = artefacts.size_of(folder)
    return facts


def _index(folder: Path) -> dict[str, Any]:
    content = artefacts.read_json(folder / artefacts.INDEX)
    facts: dict[str, Any] = {
        key: content[key] for key in ("pieces", "dimensions", "vectors", "chunk_tokens") if key in content
    }
    if isinstance(content.get("files"), list):
        facts["files"] = len(content["files"])
    of, search = content.get("model"), content.get("search", {"kind": "exact"})
    if isinstance(search, dict):
        facts["search"] = {key: search[key] for key in SEARCH if key in search}
    if isinstance(of, dict):
        facts["model"] = {key: of.get(key) for key in ("path", "adapter", "pooling", "key")}
    return {**facts, "size_bytes": artefacts.size_of(folder)}


def _run(folder: Path) -> dict[str, Any]:
    settings = read_toml(folder / artefacts.RUN_CONFIG)
    facts: dict[str, Any] = {"settings": settings}
    records = list(artefacts.read_metrics(folder)) if (folder / artefacts.METRICS).is_file() else []
    for record in records:
        for key in ("step", "tokens", "elapsed_seconds"):
            facts[key] = record.get(key, facts.get(key))
        if record.get("event") == "step":
            for key in ("loss", "tokens_per_second", "learning_rate"):
                facts[key] = record.get(key, facts.get(key))
    checked = [record for record in records if record.get("event") == "validation" and _bits(record) is not None]
    if checked:
        best = min(checked, key=lambda record: _bits(record) or 0.0)
        facts["best"] = {key: best.get(key) for key in ("step", "loss", "bits_per_byte")}
    last = records[-1] if records else {}
    facts["finished"] = last.get("event") == "end" and last.get("reason") not in ("stopped", "not-finite")
    facts["checkpoints"] = [path.name for path in artefacts.checkpoints_of(folder)]
    result = folder / artefacts.RESULT
    facts["model"] = _model(result) if artefacts.is_model(result) else None
    if artefacts.is_adapter(result):
        facts["adapter"] = _adapter(result)
    return facts


def _bits(record: dict[str, Any]) -> float | None:
    value = record.get("bits_per_byte")
    return float(value) if isinstance(value, int | float) and value == value else None


def _checkpoint(folder: Path) -> dict[str, Any]:
    state = artefacts.read_json(folder / "state.json")
    facts = {key: value for key, value in state.items() if isinstance(value, int | float | str | None)}
    described = _adapter if artefacts.is_adapter(folder) else _model
    return {**facts, **described(folder), "sound": not manifest_problems(folder)}


def _model(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        facts.update(_shape(artefacts.read_json(folder / "config.json"), str(folder / "config.json")))
    entries = tensors_of(folder)
    facts["parameters"] = sum(entry.count for entry in entries.values())
    embeddings = [entry for name, entry in entries.items() if name.endswith(EMBEDDINGS)]
    facts["embedding_parameters"] = sum(entry.count for entry in embeddings)
    facts["tensors"] = len(entries)
    facts["dtype"] = ", ".join(sorted({entry.dtype for entry in entries.values()}))
    facts["weight_bytes"] = sum(entry.end - entry.start for entry in entries.values())
    return {**facts, **_beside(folder)}


def _adapter(folder: Path) -> dict[str, Any]:
    said = artefacts.read_json(folder / artefacts.ADAPTER_CONFIG)
    keys = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_dora", "target_modules")
    header = read_header(folder / "adapter_model.safetensors")
    counted = {"parameters": sum(entry.count for entry in header.values()), "tensors": len(header)}
    return {**{key: said[key] for key in keys if key in said}, **counted, **_beside(folder)}


def _onnx(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        facts.update(_shape(artefacts.read_json(folder / "config.json"), str(folder / "config.json")))
    header = read_onnx(folder / artefacts.GRAPH)
    facts |= {name.removeprefix("llmcli."): value for name, value in header.metadata.items()}
    facts["context"] = int(header.metadata.get("llmcli.context", 0)) or None
    facts["nodes"], facts["operators"] = sum(header.operators.values()), header.operators
    if (folder / artefacts.PREFILL).is_file():  # a second graph reads prompts
        facts["prefill_operators"] = read_onnx(folder / artefacts.PREFILL).operators
    facts["size_bytes"] = sum(path.stat().st_size for path in artefacts.onnx_paths(folder))
    if (folder / "export.json").is_file():
        report = artefacts.read_json(folder / "export.json")
        facts |= {key: report[key] for key in ("parameters", "bits_per_weight", "matrices", "checks") if key in report}
    return {**facts, **_beside(folder)}


def _beside(folder: Path) -> dict[str, Any]:
    """What stands beside a model: its tokenizer, its manifest."""
    facts: dict[str, Any] = {}
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = _tokenizer(folder)
            facts["tokenizer"] = {key: tokenizer[key] for key in ("type", "vocab_size", "hash")}
        except LlmcliError as error:
            facts["tokenizer"] = {"problem": str(error)}
    if (folder / MANIFEST).is_file():
        facts["lineage"] = read_manifest(folder)["lineage"]
    return facts


def _shape(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The model's shape; of a family that llmcli cannot run, what it is called."""
    try:
        if is_encoder(values):
            return _encoder_shape(values, where)
        config = read_config(values, where)
    except ConfigError as error:
        return {"family": values.get("model_type"), "supported": False, "reason": error.message}
    return {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "ffn_size": config.intermediate_size,
        "context": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
    }


def _encoder_shape(values: dict[str, Any], where: str) -> dict[str, Any]:
    config = read_encoder_config(values, where)
    facts = {
        "family": config.model_type,
        "head": kind_of_head(values),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "ffn_size": config.intermediate_size,
        "context": config.longest,
        "vocab_size": config.vocab_size,
        "token_types": config.type_vocab_size,
        "activation": config.activation,
    }
    labels = values.get("id2label")
    if facts["head"] == "classifier" and isinstance(labels, dict):
        facts["labels"] = list(labels.values())
    return facts
