"""stories260K, a real trained model (TinyStories; llama2.c's format), as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(os.environ.get("LLMCLI_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STORIES = DATA / "models" / "stories260K"


def reference() -> dict[str, Any]:
    """What the model gives, computed elsewhere."""
    if not STORIES.is_dir():
        pytest.skip("needs the data of shared/data")
    content: dict[str, Any] = json.loads((STORIES / "reference.json").read_text())
    return content


def make_stories(folder: Path) -> Path:
    """Converts it. Llama2.c turns neighbouring pairs of a head, Hugging Face its halves: rows change places."""
    from safetensors.numpy import save_file

    raw = (STORIES / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", raw[:28])
    numbers, place = np.frombuffer(raw, "<f4", offset=28), 0

    def take(*shape: int) -> np.ndarray[Any, Any]:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return numbers[place - size : place].reshape(shape)

    def halves(weight: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
        return weight.reshape(count, -1, 2, dim).swapaxes(1, 2).reshape(-1, dim)

    narrow = dim // heads * kv_heads
    tensors = {"model.embed_tokens.weight": take(vocabulary, dim)}
    shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (narrow, dim),
        "self_attn.v_proj": (narrow, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for name, shape in shapes.items():
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = halves(weight, heads if "q_proj" in name else kv_heads)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    tensors["model.norm.weight"] = take(dim)
    folder.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(weight) for name, weight in tensors.items()}, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Its pieces, merged by score, as sentencepiece's BPE with bytes to fall back on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    raw, place = (STORIES / "tok512.bin").read_bytes(), 4
    pieces: list[tuple[str, float]] = []
    while place < len(raw):
        score, size = struct.unpack_from("<fi", raw, place)
        text = raw[place + 8 : place + 8 + size].decode()
        pieces.append((text.replace(" ", "▁") if len(pieces) >= 259 else text.strip(), score))
        place += 8 + size
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(text for text, _ in pieces[259:])]
    vocabulary = {text: index for index, text in enumerate(names)}
    merges = []
    for text, score in pieces[259:]:
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [(score, left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    ordered = [(left, right) for _, left, right in sorted(merges, key=lambda merge: -merge[0])]
    tokenizer = Tokenizer(models.BPE(vocabulary, ordered, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
