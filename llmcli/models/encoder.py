"""Encoders: one post-norm transformer that looks both ways, for BERT, RoBERTa and DistilBERT.

Invariant: parameter names are the family's own in Hugging Face transformers, below the family's prefix, so a checkpoint
needs no map; hidden states and logits agree with transformers' within 1e-4 in float32, however the texts are laid out.
Letters: B rows, T tokens, N tokens of all texts side by side, C hidden size, V vocabulary, R texts.

Sources: BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692), DistilBERT (arXiv:1910.01108), GELU (arXiv:1606.08415).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcli.errors import DataError
from llmcli.models.encoder_config import EncoderConfig
from llmcli.models.ops import Embedding, LayerNorm, Linear, PackedLinear, attend_both, joined
from llmcli.models.segments import Segments, attend_both_apart

Attend = Callable[[Tensor], Tensor]  # query, key and value of every token, side by side (B, T, 3 C) -> (B, T, C)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Parts(NamedTuple):
    """The maps and norms of a block, whatever the family calls them."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    norm: LayerNorm
    up: Linear
    down: Linear
    last_norm: LayerNorm


class Layer(nn.Module):
    """One post-norm block. Its parts hang below it by the family's names, and are used by their own."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        # A tuple, so that torch does not count these as children of their own.
        self.parts = Parts(
            query=Linear(size, size),
            key=Linear(size, size),
            value=Linear(size, size),
            out=Linear(size, size),
            norm=LayerNorm(size, eps=config.norm_eps),
            up=Linear(size, inner),
            down=Linear(inner, size),
            last_norm=LayerNorm(size, eps=config.norm_eps),
        )
        for name, child in (_distil_names if config.model_type == "distilbert" else _bert_names)(self.parts):
            self.add_module(name, child)
        self.activation_name, self.activation = config.activation, ACTIVATIONS[config.activation]
        self.dropout = config.hidden_dropout
        self.packed: tuple[PackedLinear, ...] | None = None

    def pack(self) -> None:
        """Lays the weights out for inference in bfloat16 on the CPU."""
        parts = self.parts
        qkv = PackedLinear(parts.query, parts.key, parts.value)
        self.packed = (qkv, *(PackedLinear(each) for each in (parts.out, parts.up, parts.down)))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:  # (B, T, C) -> (B, T, C)
        parts = self.parts
        if self.packed and not (self.training or torch.is_grad_enabled()) and all(e.fits(x) for e in self.packed):
            qkv, out, up, down = self.packed
            x = parts.norm(out(attend(qkv(x))).add_(x))
            fused = PackedLinear.fuses(self.activation_name)
            inner = up(x, self.activation_name) if fused else self.activation(up(x))
            return parts.last_norm(down(inner).add_(x))
        attended = parts.out(attend(joined(x, parts.query, parts.key, parts.value)))
        x = parts.norm(x + F.dropout(attended, self.dropout, self.training))
        changed = parts.down(self.activation(parts.up(x)))
        return parts.last_norm(x + F.dropout(changed, self.dropout, self.training))


def _bert_names(parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    looking = nn.ModuleDict({"query": parts.query, "key": parts.key, "value": parts.value})
    given = nn.ModuleDict({"dense": parts.out, "LayerNorm": parts.norm})
    yield "attention", nn.ModuleDict({"self": looking, "output": given})
    yield "intermediate", nn.ModuleDict({"dense": parts.up})
    yield "output", nn.ModuleDict({"dense": parts.down, "LayerNorm": parts.last_norm})


def _distil_names(parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    maps = {"q_lin": parts.query, "k_lin": parts.key, "v_lin": parts.value, "out_lin": parts.out}
    yield "attention", nn.ModuleDict(maps)
    yield "sa_layer_norm", parts.norm
    yield "ffn", nn.ModuleDict({"lin1": parts.up, "lin2": parts.down})
    yield "output_layer_norm", parts.last_norm


class Embeddings(nn.Module):
    """The sum of a token's, its position's and its text's embedding, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, size)
        self.position_embeddings = Embedding(config.max_position_embeddings, size)
        if config.type_vocab_size:
            self.token_type_embeddings = Embedding(config.type_vocab_size, size)
        self.LayerNorm = LayerNorm(size, eps=config.norm_eps)
        self.types, self.dropout = config.type_vocab_size, config.hidden_dropout

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None, dtype: torch.dtype) -> Tensor:
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        if self.types > 1 and types is not None:
            x = x + self.token_type_embeddings(types)
        elif self.types:
            x = x + self.token_type_embeddings.weight[0]
        return F.dropout(self.LayerNorm(x.to(dtype)), self.dropout, self.training)


class EncoderBody(nn.Module):
    """Embeddings, blocks and, where there is one, the pooler."""

    def __init__(self, config: EncoderConfig, pooler: bool) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.add_module("transformer" if config.model_type == "distilbert" else "encoder", under("layer", layers))
        self._layers = (layers,)  # in a tuple: it is a child already
        self.pooler: nn.ModuleDict | None = under("dense", square(config)) if pooler else None

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        return self._layers[0]


def under(name: str, module: nn.Module) -> nn.ModuleDict:
    """The module below a name."""
    return nn.ModuleDict({name: module})


def square(config: EncoderConfig) -> Linear:
    """A map of hidden states to as many."""
    return Linear(config.hidden_size, config.hidden_size)


class Encoder(nn.Module):
    """Hidden states of any supported family. `pooler`: whether there is BERT's map of the first token's state."""

    kind = "base"

    def __init__(self, config: EncoderConfig, *, pooler: bool = False) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # of the activations; None: the weights' own
        body = EncoderBody(config, pooler)
        self.add_module(config.model_type, body)
        self._body = (body,)

    @property
    def body(self) -> EncoderBody:
        """Everything below the head."""
        return self._body[0]

    @property
    def embedding(self) -> Tensor:
        """The token embedding: (V, C)."""
        return self.body.embeddings.word_embeddings.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        return self.body.layers

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Segments | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states: (B, T) -> (B, T, C).

        `mask` (B, T): True where there is a token; rows are filled up on the right, and what is given there means
        nothing. `segments`: one row (1, N) of many texts, each of which attends to itself alone. `types` (B, T): 0
        in a first text, 1 in a second; families with one type or none take no notice. Raises DataError for a text that
        is longer than the model has positions.
        """
        steps = self.steps(ids, self._attention(mask, segments), segments=segments, types=types)
        return deque(steps, maxlen=1).pop()

    def states(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Segments | None = None,
        types: Tensor | None = None,
    ) -> list[Tensor]:
        """The embeddings and what each block makes of them, last hidden states last: L + 1 of (B, T, C)."""
        return list(self.steps(ids, self._attention(mask, segments), segments=segments, types=types))

    def steps(
        self, ids: Tensor, attend: Attend, *, segments: Segments | None = None, types: Tensor | None = None
    ) -> Iterator[Tensor]:
        """What `states` lists, one after the other, with attention as `attend` computes it."""
        x = self._embedded(ids, segments, types)
        yield x
        for layer in self.layers:
            x = layer(x, attend)
            yield x

    def _embedded(self, ids: Tensor, segments: Segments | None, types: Tensor | None) -> Tensor:
        length = ids.size(1) if segments is None else segments.longest
        if length > self.config.longest:
            raise DataError(f"a text has {length} tokens, the model has positions for {self.config.longest}")
        first = self.config.first_position
        if segments is None:
            positions = torch.arange(first, first + length, device=ids.device)[None]
        else:
            positions = segments.positions + first if first else segments.positions
        embedded: Tensor = self.body.embeddings(ids, positions, types, self.compute_dtype or self.embedding.dtype)
        return embedded

    def _attention(self, mask: Tensor | None, segments: Segments | None) -> Attend:
        heads = self.config.num_attention_heads
        dropout = self.config.attention_dropout if self.training else 0.0
        if segments is not None:
            return partial(attend_both_apart, heads=heads, segments=segments, masks=segments.masks(), dropout=dropout)
        seen = None if mask is None else mask[:, None, None, :]
        return partial(attend_both, heads=heads, mask=seen, dropout=dropout)

    def pooled(self, first: Tensor) -> Tensor:
        """BERT's pooled output of texts, from the last hidden states of their first tokens: (R, C) -> (R, C)."""
        if self.body.pooler is None:
            raise DataError("the model has no pooler")
        return torch.tanh(self.body.pooler["dense"](first))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> Self:
        """Draws fresh weights.

        | part                                | values                                                   |
        | token and text embeddings           | normal, std 0.02                                         |
        | position embeddings                 | sines and cosines (arXiv:1706.03762) of amplitude 0.2    |
        | matrices that read the hidden state | uniform, +-sqrt(3 / inputs): std 1/sqrt(inputs)          |
        | each block's `out` and `down`       | zero: what is added to the residual begins as nothing    |
        | norms 1, biases 0                   |                                                          |

        Drawn at 0.02 as well, positions stay so far below the tokens' embeddings, which grow with the head that they
        are tied to, that attention does not find a token's neighbours for thousands of steps (docs/log.md).
        """
        blocks = [each.parts for each in self.layers if isinstance(each, Layer)]
        written = {id(weight) for parts in blocks for weight in (parts.out.weight, parts.down.weight)}
        embeddings = self.body.embeddings
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or id(parameter) in written:
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif parameter is embeddings.position_embeddings.weight:
                parameter.copy_(_waves(*parameter.shape))
            elif ".embeddings." in name:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                bound = math.sqrt(3.0 / parameter.size(1))
                parameter.uniform_(-bound, bound, generator=generator)
        return self


def _waves(positions: int, size: int) -> Tensor:
    """Sines and cosines of wavelengths from 2 pi to 20,000 pi, side by side: (positions, size)."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, size, 2) / size)
    angles = torch.arange(positions)[:, None] * frequencies
    return 0.2 * torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :size]
