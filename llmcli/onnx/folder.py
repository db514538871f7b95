"""A model folder to a graph and its data in a folder that is being made, weight by weight; no torch.

Invariant: what is written is model.onnx with model.onnx.data beside it; no path in it leads out of the folder.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmcli.errors import from_os_error
from llmcli.files.artefacts import GRAPH, PREFILL
from llmcli.models.config import DecoderConfig
from llmcli.models.encoder_config import EncoderConfig
from llmcli.onnx.classifier import ClassifierGraph, PortableClassifier
from llmcli.onnx.decoder import DecoderGraph
from llmcli.onnx.encoder import EncoderGraph, NewerGraph
from llmcli.onnx.encoder_weights import EncoderWeights
from llmcli.onnx.external import ExternalData
from llmcli.onnx.families import Heads, ModelWeights
from llmcli.onnx.graph import Graph
from llmcli.onnx.portable import PortableDecoder, PortableGraph
from llmcli.onnx.quantize import Plan
from llmcli.onnx.weights import Weights

_FLOAT_PROMPT = 48  # tokens from which unquantized activations pay (docs/log.md)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphFigures:
    """What a graph's matrices take: numbers in them, bytes for them, and how many there are of each kind."""

    weights: int
    bytes: int
    kinds: dict[str, int]


def write_graph(
    source: Path, config: DecoderConfig, plan: Plan, folder: Path, *, prefill: str = "same", labels: int | None = None
) -> Iterator[int | GraphFigures]:
    """Writes the graph of the model in `source` into the staged `folder`.

    `prefill`: "int8" or "float", with a second graph over the same cache and the same data, which reads prompts so.
    `labels`: of a classifier. Yields the number of blocks that are done, last the figures.
    """
    weights = ModelWeights(config, Weights(source))
    with ExternalData(folder / f"{GRAPH}.data") as data:
        graph = PortableGraph(plan, data) if plan.portable else Graph(plan, data)
        decoder = _decoder(config, weights, graph, labels)
        yield from decoder.build()
        _write(decoder.finished(), folder / GRAPH)
        second = Graph(_prefill_plan(plan, weights, prefill), data, graph)
        if prefill != "same":
            decoder = DecoderGraph(config, weights, second)
            decoder.least = _FLOAT_PROMPT if prefill == "float" else 0
            yield from decoder.build()
            _write(decoder.finished(), folder / PREFILL)
    yield _figures(graph, second)


def write_encoder(
    source: Path, config: EncoderConfig, plan: Plan, folder: Path, *, kind: str, pooling: str, normalize: bool
) -> Iterator[int | GraphFigures]:
    """Writes the graph of the encoder in `source` into the staged `folder`; yields as `write_graph` does.

    `kind`: base, masked, classifier or span. `pooling` and `normalize`: how a base makes vectors.
    """
    weights = EncoderWeights(config, Weights(source))
    with ExternalData(folder / f"{GRAPH}.data") as data:
        graph = NewerGraph(plan, data)
        encoder = EncoderGraph(config, weights, graph, kind=kind, pooling=pooling, normalize=normalize)
        yield from encoder.build()
        _write(encoder.finished(), folder / GRAPH)
    yield _figures(graph)


def _figures(*graphs: Graph) -> GraphFigures:
    """Of graphs over the same data, the first of which holds every matrix."""
    matrices = [matrix for graph in graphs for matrix in graph.matrices.values()]
    kinds = Counter(str(scheme) for _, _, scheme in matrices)
    weights = sum(item[0] for item in graphs[0].matrices.values())
    return GraphFigures(weights, sum(item[1] for item in matrices), dict(kinds))


def _decoder(config: DecoderConfig, weights: ModelWeights, graph: Graph, labels: int | None) -> DecoderGraph:
    if labels is not None:
        return (PortableClassifier if graph.plan.portable else ClassifierGraph)(config, weights, graph, labels)
    return (PortableDecoder if graph.plan.portable else DecoderGraph)(config, weights, graph)


def _prefill_plan(plan: Plan, weights: ModelWeights, prefill: str) -> Plan:
    """Of the second graph; embedding and head are those of the graph beside it."""
    if prefill == "float":
        return dataclasses.replace(plan, float_prompts=True)
    kept = {weights.embedding.name: plan.scheme(weights.embedding.name, weights.embedding.shape, "embedding")}
    if not weights.config.tie_word_embeddings:
        kept[weights.head.name] = plan.scheme(weights.head.name, weights.head.shape, "head")
    return Plan(precision="int8", quantizer=plan.quantizer, schemes=kept, common=plan.common, few=0)


def _write(model: ir.Model, path: Path) -> None:
    try:
        path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    except OSError as error:
        raise from_os_error(error, path) from error


def genai_config(config: DecoderConfig, ids: dict[str, Any]) -> dict[str, Any]:
    """The content of genai_config.json, which onnxruntime-genai runs the folder by. `ids`: the special tokens'."""
    end = ids.get("eos_token_id")
    pad = ids.get("pad_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": Heads(config).size,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    model: dict[str, Any] = {
        # genai's own "gpt2" expects another cache; to it every graph of ours is a plain decoder.
        "type": "llama" if config.model_type == "gpt2" else config.model_type,
        "bos_token_id": ids.get("bos_token_id") if ids.get("bos_token_id") is not None else first_end or 0,
        "eos_token_id": end if end is not None else config.vocab_size,
        "pad_token_id": pad if pad is not None else first_end or 0,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "early_stopping": True,
        "max_length": config.max_position_embeddings,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}
