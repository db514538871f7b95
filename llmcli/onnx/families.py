"""Names and shapes of each family's weights, as Hugging Face's checkpoints have them.

Heads whose size GroupQueryAttention does not take are filled up with zeros, which changes no result.

Invariant: every weight that a graph asks for is named here and nowhere else in `llmcli/onnx`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llmcli.models.config import DecoderConfig
from llmcli.onnx.weights import Array, Held, Matrix, Tensor, Weights


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """The weights of a block; of GPT-2, `gate_up` is c_fc alone."""

    name: str
    qkv: Matrix
    qkv_bias: Array | None
    output: Matrix
    output_bias: Array | None
    gate_up: Matrix
    gate_up_bias: Array | None
    down: Matrix
    down_bias: Array | None
    norms: tuple[Norm, Norm]  # before attention, before the feed-forward part
    head_norms: tuple[Array, Array] | None = None  # of queries and keys


@dataclasses.dataclass(frozen=True)
class Norm:
    """The weights of a norm; `bias` for LayerNorm alone."""

    name: str
    weight: Tensor
    bias: Tensor | None = None


class Heads:
    """Heads as the graph has them: of `size` entries, the model's own at `places`, zeros elsewhere."""

    def __init__(self, config: DecoderConfig) -> None:
        rotary = config.model_type != "gpt2"
        step = 16 if rotary else 8  # what GroupQueryAttention takes
        self.own, self.size = config.head_dim, -(-config.head_dim // step) * step
        self.places = np.arange(self.own)
        if rotary:  # which turns entry i with entry i + size / 2
            self.places[self.own // 2 :] += (self.size - self.own) // 2

    def rows(self, matrix: Matrix) -> Matrix:
        """A matrix whose outputs are heads."""
        if self.size == self.own:
            return matrix
        outputs, inputs = matrix.shape
        return self._held(matrix, self._filled(matrix.rows(0, outputs).reshape(-1, self.own, inputs), (inputs,)))

    def columns(self, matrix: Matrix) -> Matrix:
        """A matrix whose inputs are heads."""
        if self.size == self.own:
            return matrix
        outputs = matrix.shape[0]
        found = np.zeros((outputs, matrix.shape[1] // self.own, self.size), np.float32)
        found[:, :, self.places] = matrix.rows(0, outputs).reshape(outputs, -1, self.own)
        return self._held(matrix, found.reshape(outputs, -1))

    def vector(self, values: Array | None) -> Array | None:
        """A vector over heads: a bias."""
        return None if values is None else self._filled(values.reshape(-1, self.own), ())

    def norm(self, values: Array) -> Array:
        """A norm's weight over a head. The mean is taken over more entries, which it makes up for."""
        found = np.zeros(self.size, np.float32)
        found[self.places] = values * np.float32(np.sqrt(self.own / self.size))
        return found

    def _filled(self, values: Array, rest: tuple[int, ...]) -> Array:
        found = np.zeros((len(values), self.size, *rest), np.float32)
        found[:, self.places] = values
        return found.reshape(-1, *rest)

    @staticmethod
    def _held(matrix: Matrix, values: Array) -> Matrix:
        return Matrix(matrix.name, (Held(values),))


class ModelWeights:
    """The weights of a decoder, part by part."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        self.config, self.weights, self.heads = config, weights, Heads(config)
        self.gpt2 = config.model_type == "gpt2"
        # GPT-2's own checkpoint has no `transformer.` prefix.
        bare = self.gpt2 and "wte.weight" in weights
        self._prefix = ("" if bare else "transformer.") if self.gpt2 else "model."

    def _matrix(self, name: str, outputs: int, inputs: int, *stored: tuple[str, int]) -> Matrix:
        """A matrix under a name of ours, of stored ones below each other (name, outputs), or of one."""
        if self.gpt2:
            return Matrix(name, (self.weights.tensor(f"{self._stored(name)}.weight", (inputs, outputs)),), True)
        pairs = stored or ((name, outputs),)
        return Matrix(name, tuple(self.weights.tensor(f"{part}.weight", (size, inputs)) for part, size in pairs))

    def _stored(self, name: str) -> str:
        return name if self._prefix else name.removeprefix("transformer.")

    def _vector(self, name: str, size: int) -> Tensor:
        return self.weights.tensor(self._stored(name), (size,))

    def _bias(self, wanted: bool, *stored: tuple[str, int]) -> Array | None:
        if not wanted:
            return None
        return np.concatenate([self._vector(f"{name}.bias", size).rows() for name, size in stored])

    def _norm(self, name: str, size: int) -> Norm:
        bias = self._vector(f"{name}.bias", size) if self.gpt2 else None
        return Norm(name, self._vector(f"{name}.weight", size), bias)

    @property
    def embedding(self) -> Matrix:
        """Of the tokens: (V, C)."""
        name = "transformer.wte" if self.gpt2 else "model.embed_tokens"
        shape = (self.config.vocab_size, self.config.hidden_size)
        return Matrix(name, (self.weights.tensor(f"{self._stored(name)}.weight", shape),))

    @property
    def positions(self) -> Tensor:
        """Of the positions, GPT-2's: (context, C)."""
        shape = (self.config.max_position_embeddings, self.config.hidden_size)
        return self.weights.tensor(f"{self._prefix}wpe.weight", shape)

    @property
    def head(self) -> Matrix:
        """The matrix that gives logits: (V, C)."""
        if self.config.tie_word_embeddings:
            return self.embedding
        shape = (self.config.vocab_size, self.config.hidden_size)
        return Matrix("lm_head", (self.weights.tensor("lm_head.weight", shape),))

    def score(self, labels: int) -> Matrix:
        """The matrix that gives a classifier's scores: (labels, C)."""
        return Matrix("score", (self.weights.tensor("score.weight", (labels, self.config.hidden_size)),))

    @property
    def last_norm(self) -> Norm:
        """The norm before the head."""
        return self._norm("transformer.ln_f" if self.gpt2 else "model.norm", self.config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        """A block, from 0."""
        return self._gpt2_layer(index) if self.gpt2 else self._llama_layer(index)

    def _llama_layer(self, index: int) -> LayerWeights:
        config, name = self.config, f"model.layers.{index}"
        size, middle, head = config.hidden_size, config.intermediate_size, config.head_dim
        wide, narrow = config.num_attention_heads * head, config.num_key_value_heads * head
        qkv = tuple((f"{name}.self_attn.{part}_proj", wide if part == "q" else narrow) for part in "qkv")
        gate_up = tuple((f"{name}.mlp.{part}_proj", middle) for part in ("gate", "up"))
        output, down = (f"{name}.self_attn.o_proj", size), (f"{name}.mlp.down_proj", size)
        norms = (self._norm(f"{name}.input_layernorm", size), self._norm(f"{name}.post_attention_layernorm", size))
        heads = None
        if config.qk_norm:
            query, key = (self._vector(f"{name}.self_attn.{part}_norm.weight", head).rows() for part in "qk")
            heads = (self.heads.norm(query), self.heads.norm(key))
        return LayerWeights(
            name,
            self.heads.rows(self._matrix(f"{name}.self_attn.qkv_proj", wide + 2 * narrow, size, *qkv)),
            self.heads.vector(self._bias(config.attention_bias, *qkv)),
            self.heads.columns(self._matrix(output[0], size, wide)),
            self._bias(config.output_bias, output),
            self._matrix(f"{name}.mlp.gate_up_proj", 2 * middle, size, *gate_up),
            self._bias(config.mlp_bias, *gate_up),
            self._matrix(down[0], size, middle),
            self._bias(config.mlp_bias, down),
            norms,
            heads,
        )

    def _gpt2_layer(self, index: int) -> LayerWeights:
        config, name = self.config, f"transformer.h.{index}"
        size, middle = config.hidden_size, config.intermediate_size
        parts: dict[str, Any] = {}
        for field, part, outputs, inputs in (
            ("qkv", "attn.c_attn", 3 * size, size),
            ("output", "attn.c_proj", size, size),
            ("gate_up", "mlp.c_fc", middle, size),
            ("down", "mlp.c_proj", size, middle),
        ):
            parts[field] = self._matrix(f"{name}.{part}", outputs, inputs)
            parts[f"{field}_bias"] = self._bias(True, (f"{name}.{part}", outputs))
        parts["qkv"], parts["output"] = self.heads.rows(parts["qkv"]), self.heads.columns(parts["output"])
        parts["qkv_bias"] = self.heads.vector(parts["qkv_bias"])
        norms = (self._norm(f"{name}.ln_1", size), self._norm(f"{name}.ln_2", size))
        return LayerWeights(name=name, norms=norms, **parts)
