"""A model of llama2.c under Hugging Face's names: the config, and the weights as they are read.

llama2.c turns neighbouring numbers of a head (2i, 2i + 1) by the rotary angle i, Hugging Face the halves (i, i + D/2):
the rows of the query and key projections change places, and the products stay the same.

Invariant: no more than one piece of the file is in memory, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmcli.errors import DataError, from_os_error
from llmcli.files.llama2c import Llama2cModel
from llmcli.files.tensors import Float32Tensor
from llmcli.models.config import DecoderConfig

Numbers = npt.NDArray[np.float32]
_PIECE = 1 << 22  # numbers that are read at once
_NORM_EPS, _ROPE_THETA = 1e-5, 10_000.0  # of run.c: the file does not tell them

# llama2.c's name: (Hugging Face's, whether there is one in each layer)
_NAMES = {
    "tok_embeddings": ("model.embed_tokens", False),
    "attention_norm": ("input_layernorm", True),
    "wq": ("self_attn.q_proj", True),
    "wk": ("self_attn.k_proj", True),
    "wv": ("self_attn.v_proj", True),
    "wo": ("self_attn.o_proj", True),
    "ffn_norm": ("post_attention_layernorm", True),
    "w1": ("mlp.gate_proj", True),
    "w2": ("mlp.down_proj", True),
    "w3": ("mlp.up_proj", True),
    "norm": ("model.norm", False),
    "output": ("lm_head", False),
}


def decoder_config(model: Llama2cModel) -> DecoderConfig:
    """The shape as a Llama's."""
    return DecoderConfig(
        model_type="llama",
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        head_dim=model.dim // model.n_heads,
        intermediate_size=model.hidden_dim,
        max_position_embeddings=model.seq_len,
        norm_eps=_NORM_EPS,
        rope_theta=_ROPE_THETA,
        tie_word_embeddings=model.shared_classifier,
    )


def tensors_of(model: Llama2cModel) -> list[Float32Tensor]:
    """Every weight, layer by layer. Reading one raises DataError where a number is not finite, or the file is cut."""
    found = []
    for layer in (None, *range(model.n_layers)):
        for source, stored in model.tensors.items():
            name, layered = _NAMES[source]
            if layered != (layer is not None):
                continue
            shape = stored.shape[1:] if layered else stored.shape
            offset = stored.offset + 4 * int(np.prod(shape)) * (layer or 0)
            prefix = f"model.layers.{layer}." if layered else ""
            found.append(_tensor(model, f"{prefix}{name}.weight", shape, offset, turned=source in ("wq", "wk")))
    return found


def _tensor(model: Llama2cModel, name: str, shape: tuple[int, ...], offset: int, *, turned: bool) -> Float32Tensor:
    count = int(np.prod(shape))
    head = model.dim // model.n_heads * model.dim  # numbers of one head's rows

    def pieces() -> Iterator[Numbers]:
        for piece in _read(model.path, name, offset, count, head if turned else _PIECE):
            yield np.ascontiguousarray(piece.reshape(-1, 2, model.dim).swapaxes(0, 1)) if turned else piece

    return Float32Tensor(name, shape, pieces)


def _read(path: Path, name: str, offset: int, count: int, step: int) -> Iterator[Numbers]:
    """`count` numbers from a place of the file, `step` at a time."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            for begin in range(0, count, step):
                piece = np.fromfile(file, "<f4", min(step, count - begin))
                if len(piece) != min(step, count - begin):
                    raise DataError("was cut while it was read", where=str(path))
                if not np.isfinite(piece).all():
                    raise DataError(f"{name} holds a number that is not finite", where=str(path))
                yield piece
    except OSError as error:
        raise from_os_error(error, path) from error
