"""Names and shapes of the weights of BERT, RoBERTa and DistilBERT, as Hugging Face's checkpoints have them.

Invariant: every weight that an encoder's graph asks for is named here and nowhere else in `llmcli/onnx`.
"""

from __future__ import annotations

import dataclasses

from llmcli.models.encoder_config import EncoderConfig
from llmcli.onnx.families import Norm
from llmcli.onnx.weights import Array, Matrix, Tensor, Weights

# The parts of a block: BERT's and RoBERTa's names, DistilBERT's.
_PARTS = {
    "query": ("attention.self.query", "attention.q_lin"),
    "key": ("attention.self.key", "attention.k_lin"),
    "value": ("attention.self.value", "attention.v_lin"),
    "output": ("attention.output.dense", "attention.out_lin"),
    "norm": ("attention.output.LayerNorm", "sa_layer_norm"),
    "up": ("intermediate.dense", "ffn.lin1"),
    "down": ("output.dense", "ffn.lin2"),
    "last_norm": ("output.LayerNorm", "output_layer_norm"),
}
_OLD = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in checkpoints that came from TensorFlow
_BODY = ("embeddings.", "encoder.", "transformer.", "pooler.")  # what a base's own checkpoint has without a prefix
# The masked-language-model head: its matrix, its norm, the bias of the logits.
_MASKED = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
}
_BIASES = ("cls.predictions", "lm_head")  # some checkpoints keep the logits' bias with the tied matrix


@dataclasses.dataclass(frozen=True)
class Affine:
    """A matrix (outputs, inputs) and its bias."""

    matrix: Matrix
    bias: Array


@dataclasses.dataclass(frozen=True)
class EncoderLayer:
    """The weights of a block."""

    name: str
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    norm: Norm
    up: Affine
    down: Affine
    last_norm: Norm


class EncoderWeights:
    """The weights of an encoder, part by part."""

    def __init__(self, config: EncoderConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self._stored: dict[str, str] = {}
        for stored in weights.names():
            name = stored
            for old, new in _OLD.items():
                if name.endswith(old):
                    name = name.removesuffix(old) + new
            self._stored[f"{config.model_type}.{name}" if name.startswith(_BODY) else name] = stored
        for head in _BIASES:
            if f"{head}.decoder.bias" in self._stored:
                self._stored.setdefault(f"{head}.bias", self._stored[f"{head}.decoder.bias"])
        self._body = f"{config.model_type}."
        self._distil = config.model_type == "distilbert"

    def _tensor(self, name: str, *shape: int) -> Tensor:
        return self.weights.tensor(self._stored.get(name, name), shape)

    def _matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        return Matrix(name, (self._tensor(f"{name}.weight", outputs, inputs),))

    def _affine(self, name: str, outputs: int, inputs: int) -> Affine:
        return Affine(self._matrix(name, outputs, inputs), self._tensor(f"{name}.bias", outputs).rows())

    def _norm(self, name: str) -> Norm:
        size = self.config.hidden_size
        return Norm(name, self._tensor(f"{name}.weight", size), self._tensor(f"{name}.bias", size))

    def _embeddings(self, name: str, count: int) -> Matrix:
        return self._matrix(f"{self._body}embeddings.{name}_embeddings", count, self.config.hidden_size)

    @property
    def embedding(self) -> Matrix:
        """Of the tokens: (V, C)."""
        return self._embeddings("word", self.config.vocab_size)

    @property
    def positions(self) -> Array:
        """Of a text's tokens from its first on: (longest, C)."""
        table = self._embeddings("position", self.config.max_position_embeddings)
        return table.rows(self.config.first_position, self.config.max_position_embeddings)

    @property
    def types(self) -> Array:
        """Of first and second texts: (types, C)."""
        return self._embeddings("token_type", self.config.type_vocab_size).rows(0, self.config.type_vocab_size)

    @property
    def embedding_norm(self) -> Norm:
        """The norm of the embeddings' sum."""
        return self._norm(f"{self._body}embeddings.LayerNorm")

    def layer(self, index: int) -> EncoderLayer:
        """A block, from 0."""
        name = f"{self._body}{'transformer' if self._distil else 'encoder'}.layer.{index}"
        size, inner = self.config.hidden_size, self.config.intermediate_size
        names = {part: f"{name}.{pair[self._distil]}" for part, pair in _PARTS.items()}
        return EncoderLayer(
            name,
            self._affine(names["query"], size, size),
            self._affine(names["key"], size, size),
            self._affine(names["value"], size, size),
            self._affine(names["output"], size, size),
            self._norm(names["norm"]),
            self._affine(names["up"], inner, size),
            self._affine(names["down"], size, inner),
            self._norm(names["last_norm"]),
        )

    # ------------------------------------------------------------------------------------------------------------
    # Heads

    @property
    def masked(self) -> tuple[Affine, Norm, Array]:
        """Of the masked-language-model head: what comes before the tied matrix, and the logits' bias (V,)."""
        dense, norm, bias = _MASKED[self.config.model_type]
        size = self.config.hidden_size
        return self._affine(dense, size, size), self._norm(norm), self._tensor(bias, self.config.vocab_size).rows()

    @property
    def before_labels(self) -> Affine:
        """What a first token's state goes through before the labels' matrix; BERT's is its pooler."""
        names = {"bert": "bert.pooler.dense", "roberta": "classifier.dense", "distilbert": "pre_classifier"}
        return self._affine(names[self.config.model_type], self.config.hidden_size, self.config.hidden_size)

    @property
    def labels(self) -> Affine:
        """The labels' matrix, as many as the checkpoint has."""
        name = "classifier.out_proj" if self.config.model_type == "roberta" else "classifier"
        stored = self._stored.get(f"{name}.weight", "")
        count = self.weights.shape(stored)[0] if stored else 1
        return self._affine(name, count, self.config.hidden_size)

    @property
    def span(self) -> Affine:
        """Scores of an answer's first and last token."""
        return self._affine("qa_outputs", 2, self.config.hidden_size)
