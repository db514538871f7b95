"""What one model can take over from another of another kind: the parts that mean the same and have the same shape.

Invariant: a part is copied whole or not at all; the embedding goes row by row, to the token of the same text.

Of a decoder and an encoder these parts mean the same: token and learned position embeddings, the maps to queries, keys
and values (key/value heads that queries share are repeated), the map out of attention, the maps up and down of the
feed-forward part. Norms do not: one kind stands before its block, the other behind. Nor do rotary positions, the gate
of SwiGLU and the heads. Two models of one kind share everything that has one name and shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from llmcli.data.tokenizer import TextTokenizer
from llmcli.models.decoder import Decoder, GPT2Model
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_heads import MaskedLM

_ROWS = ("embedding", "head.bias")  # a row for each token


@dataclasses.dataclass(frozen=True)
class Taken:
    """How much was taken over."""

    rows: int  # of the embedding
    vocabulary: int
    parts: tuple[str, ...]  # beside the embedding
    left: tuple[str, ...]  # that the model has and that stay fresh

    def __str__(self) -> str:
        matrices = [name for name in self.parts if name.startswith("layers.")]
        others = [name for name in self.parts if not name.startswith("layers.")]
        told = [f"{self.rows:,} of {self.vocabulary:,} rows of the embedding"]
        if matrices:
            layers = len({name.split(".")[1] for name in matrices})
            kinds = dict.fromkeys(name.split(".")[2] for name in matrices)
            told.append(f"{', '.join(kinds)} of {layers} {'layer' if layers == 1 else 'layers'}")
        told += others
        fresh = dict.fromkeys(name.split(".")[2] if name.startswith("layers.") else name for name in self.left)
        return "; ".join(told) + (f"; fresh: {', '.join(fresh)}" if fresh else "")


@torch.no_grad()
def taken_over(model: Decoder | Encoder, other: Decoder | Encoder, own: TextTokenizer, its: TextTokenizer) -> Taken:
    """Copies into a fresh model what it can take over from another one, whose tokenizer is `its`."""
    wanted, known = dict(_parts(model)), dict(_parts(other))
    places = _same_tokens(own, its, wanted["embedding"].size(0), known["embedding"].size(0))
    rows, parts, left = 0, [], []
    for name, tensor in wanted.items():
        source = known.get(name)
        if source is None:
            left.append(name)
        elif name in _ROWS or name == "head":
            if source.shape[1:] == tensor.shape[1:] and len(places[0]):
                tensor[places[0]] = source[places[1]]
                rows = len(places[0]) if name == "embedding" else rows
                if name != "embedding":
                    parts.append(name)
            else:
                left.append(name)
        elif name == "positions" and source.shape[1] == tensor.shape[1]:
            count = min(len(source), len(tensor))
            tensor[:count] = source[:count]
            parts.append(name)
        else:
            source = _shared_heads(name, source, tensor, other)
            if source.shape == tensor.shape:
                tensor.copy_(source)
                parts.append(name)
            else:
                left.append(name)
    return Taken(rows, wanted["embedding"].size(0), tuple(parts), tuple(left))


def _same_tokens(own: TextTokenizer, its: TextTokenizer, most: int, known: int) -> tuple[Tensor, Tensor]:
    """The ids of the tokens that both have, in the one and in the other."""
    pairs = [(index, its.id_of(own.token(index))) for index in range(min(own.vocab_size, most))]
    found = [(index, other) for index, other in pairs if other is not None and other < known]
    table = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _shared_heads(name: str, source: Tensor, tensor: Tensor, other: Decoder | Encoder) -> Tensor:
    """Key/value heads that queries share, once for each of them."""
    if isinstance(other, Encoder) or name.split(".")[-2:-1] not in (["key"], ["value"]):
        return source
    config = other.config
    groups = config.num_attention_heads // config.num_key_value_heads
    if groups == 1 or source.shape[0] * groups != tensor.shape[0]:
        return source
    heads = source.view(config.num_key_value_heads, config.head_dim, *source.shape[1:])
    return heads.repeat_interleave(groups, 0).reshape(tensor.shape)


# ----------------------------------------------------------------------------------------------------------------
# The parts of a model by names that all families share, as views into its weights


def _parts(model: Decoder | Encoder) -> Iterator[tuple[str, Tensor]]:
    yield "embedding", model.embedding.data
    yield from _encoder_parts(model) if isinstance(model, Encoder) else _decoder_parts(model)


def _encoder_parts(model: Encoder) -> Iterator[tuple[str, Tensor]]:
    embeddings = model.body.embeddings
    yield "positions", embeddings.position_embeddings.weight.data[model.config.first_position :]
    if model.config.type_vocab_size:
        yield "types", embeddings.token_type_embeddings.weight.data
    yield from _both("embedding norm", embeddings.LayerNorm)
    for index, layer in enumerate(cast(list[Any], model.layers)):
        parts = layer.parts
        named = {"query": parts.query, "key": parts.key, "value": parts.value, "out": parts.out}
        named |= {"up": parts.up, "down": parts.down, "norms after": parts.norm, "last norms after": parts.last_norm}
        for name, module in named.items():
            yield from _both(f"layers.{index}.{name}", module)
    if isinstance(model, MaskedLM):
        for name, module in zip(("head.map", "head.norm"), model._head, strict=True):
            yield from _both(name, module)
        yield "head.bias", model.bias.data


def _both(name: str, module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        tensor = getattr(module, kind, None)
        if tensor is not None:
            yield f"{name}.{kind}", tensor.data


def _decoder_parts(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    body, size = model.body, model.config.hidden_size
    if isinstance(body, GPT2Model):
        yield "positions", body.wpe.weight.data
        yield from _both("last norm", body.ln_f)
        for index, layer in enumerate(cast(list[Any], body.h)):
            at = f"layers.{index}"
            for place, name in enumerate(("query", "key", "value")):
                columns = slice(place * size, (place + 1) * size)
                yield f"{at}.{name}.weight", layer.attn.c_attn.weight.data[:, columns].t()
                yield f"{at}.{name}.bias", layer.attn.c_attn.bias.data[columns]
            for name, module in (("out", layer.attn.c_proj), ("up", layer.mlp.c_fc), ("down", layer.mlp.c_proj)):
                yield f"{at}.{name}.weight", module.weight.data.t()
                yield f"{at}.{name}.bias", module.bias.data
            yield from _both(f"{at}.norms before", layer.ln_1)
            yield from _both(f"{at}.last norms before", layer.ln_2)
    else:
        yield from _both("last norm", body.norm)
        for index, layer in enumerate(cast(list[Any], body.layers)):
            attention, mlp = layer.self_attn, layer.mlp
            named = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
            named |= {"out": attention.o_proj, "up": mlp.up_proj, "down": mlp.down_proj, "gate": mlp.gate_proj}
            named |= {"norms before": layer.input_layernorm, "last norms before": layer.post_attention_layernorm}
            if attention.qk_norm:
                named |= {"query norms": attention.q_norm, "key norms": attention.k_norm}
            for name, module in named.items():
                yield from _both(f"layers.{index}.{name}", module)
    if not model.config.tie_word_embeddings:
        yield "head", model.lm_head.weight.data
