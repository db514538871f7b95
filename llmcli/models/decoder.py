"""Decoders: one pre-norm transformer for the Llama family, and GPT-2 with the same attention and cache.

Invariant: parameter names are the family's own in Hugging Face transformers, so a checkpoint needs no map, and
logits agree with transformers' within 1e-4 in float32, prefill and cached.
Letters: B rows, T new tokens, S cached tokens, H heads, K key/value heads, D head size, C hidden size, V vocabulary.

Sources: Llama (arXiv:2302.13971), GPT-2 (Radford et al. 2019), RoPE (arXiv:2104.09864), GQA (arXiv:2305.13245),
QK-norm (arXiv:2302.05442, as in Qwen3, arXiv:2505.09388), the llama3 rope rule (arXiv:2407.21783), the sliding
window (Mistral, arXiv:2310.06825).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcli.models.cache import KeyValueCache, Step, causal_window
from llmcli.models.config import DecoderConfig
from llmcli.models.ops import (
    Conv1D,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    apply_rope,
    attend,
    cuda_kernels,
    gated,
    joined,
    swiglu,
)
from llmcli.models.segments import Segments, attend_apart

Cache = KeyValueCache | Step
Mask = Tensor | Segments | None  # None: causal


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:  # (B, H, T, D) -> (B, T, H D)
    apart = isinstance(mask, Segments)
    found = attend_apart(query, key, value, mask) if apart else attend(query, key, value, mask)  # type: ignore[arg-type]
    return found.transpose(1, 2).flatten(2)


def rope_frequencies(config: DecoderConfig) -> Tensor:
    """Angles a position turns each pair of a head by: (D / 2,), float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    rule = config.rope_scaling
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    turns = rule["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - smooth) / rule["factor"] + smooth)


def _placed(ids: Tensor, cache: Cache | None, segments: Segments | None) -> tuple[Tensor, Mask]:
    """Positions (B or 1, T) of the new tokens and what they attend to."""
    if segments is not None:
        return segments.positions, segments
    if cache is not None:
        return cache.begin(ids.size(1))
    return torch.arange(ids.size(1), device=ids.device)[None], None


class Attention(nn.Module):
    """Self-attention of the Llama family: grouped key/value heads, rotary positions, optional QK-norm."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.sliding_window
        wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = Linear(wide, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.qk_norm = config.qk_norm
        self.sizes = [wide, narrow, narrow]
        self.qkv_proj: nn.Module | None = None  # in place of the three, once they are fused (models/quantized.py)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Mask) -> Tensor:
        if isinstance(cache, Step) and cache.kernels is not None and self.qkv_proj is not None:
            return self.o_proj(self._stepped(self.qkv_proj(x), cos, sin, cache))
        query, key, value = self.heads(x, cos, sin)
        if cache is not None:
            key, value = cache.put(self.layer, key, value)
        return self.o_proj(_attended(query, key, value, mask))

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, T, D), key and value (B, K, T, D), turned by their positions."""
        shape = (*x.shape[:2], -1, self.head_dim)  # (B, T, H, D)
        parts = self._projected(x)
        query, key, value = parts[0].reshape(shape), parts[1].reshape(shape), parts[2].reshape(shape)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return apply_rope(query, cos, sin), apply_rope(key, cos, sin), value

    def _stepped(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """Norm, rotation, writing to the cache and attention of a token a row, as one kernel: -> (B, 1, H D)."""
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.qk_norm else None
        keys, values = step.keys[self.layer], step.values[self.layer]
        assert step.kernels is not None
        return step.kernels.attended(qkv, cos, sin, norms, keys, values, step.positions, self.window)

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        if self.qkv_proj is not None:
            return torch.split(self.qkv_proj(x), self.sizes, -1)
        if torch.is_grad_enabled():  # one product; to join the weights for a single token would cost more than it saves
            return torch.split(joined(x, self.q_proj, self.k_proj, self.v_proj), self.sizes, -1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gate_up_proj: nn.Module | None = None  # in place of the two, once they are fused

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is not None:
            return self.down_proj(gated(self.gate_up_proj(x)))
        if torch.is_grad_enabled():
            return self.down_proj(swiglu(joined(x, self.gate_proj, self.up_proj)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm block of the Llama family."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Mask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, blocks and the last norm of the Llama family."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.frequencies: Tensor
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.sliding_window = config.sliding_window

    def forward(
        self, ids: Tensor, cache: Cache | None, dtype: torch.dtype, segments: Segments | None = None
    ) -> Tensor:  # (B, T) -> (B, T, C)
        x = self.embed_tokens(ids).to(dtype)
        positions, mask = _placed(ids, cache, segments)
        if isinstance(mask, Segments):
            mask = dataclasses.replace(mask, window=self.sliding_window)
        elif mask is None and self.sliding_window is not None and ids.size(1) > self.sliding_window:
            mask = causal_window(positions, positions[0], self.sliding_window)
        angles = positions[:, None, :, None].float() * self.frequencies  # (B or 1, 1, T, D / 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, mask)
        return self.norm(x)


class GPT2Attention(nn.Module):
    """GPT-2's self-attention: one matrix for query, key and value."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.c_attn = Conv1D(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cache: Cache | None, mask: Mask) -> Tensor:
        query, key, value = self.heads(x)
        if cache is not None:
            key, value = cache.put(self.layer, key, value)
        return self.c_proj(_attended(query, key, value, mask))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value: (B, H, T, D)."""
        parts = self.c_attn(x).view(*x.shape[:2], 3, -1, self.head_dim)  # (B, T, 3, H, D)
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        return query, key, value


class GPT2MLP(nn.Module):
    """GPT-2's feed-forward part, with the tanh form of GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.hidden_size, config.intermediate_size)
        self.c_proj = Conv1D(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Layer(nn.Module):
    """One pre-norm block of GPT-2."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, cache: Cache | None, mask: Mask) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """Embeddings of tokens and positions, blocks and the last norm of GPT-2."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(GPT2Layer(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self, ids: Tensor, cache: Cache | None, dtype: torch.dtype, segments: Segments | None = None
    ) -> Tensor:  # (B, T) -> (B, T, C)
        positions, mask = _placed(ids, cache, segments)
        x = (self.wte(ids) + self.wpe(positions)).to(dtype)
        for layer in self.h:
            x = layer(x, cache, mask)
        return self.ln_f(x)


class Decoder(nn.Module):
    """A causal language model: hidden states and logits of any supported family."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # of the activations; None: the weights' own
        self.head_product: nn.Module | None = None  # in place of the head's matrix, where it is quantized
        if config.model_type == "gpt2":
            self.transformer = GPT2Model(config)
        else:
            self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def body(self) -> LlamaModel | GPT2Model:
        """Everything below the head."""
        return self.transformer if self.config.model_type == "gpt2" else self.model

    @property
    def embedding(self) -> Tensor:
        """The token embedding: (V, C)."""
        body = self.body
        return body.wte.weight if isinstance(body, GPT2Model) else body.embed_tokens.weight

    @property
    def head(self) -> Tensor:
        """The matrix that gives logits from hidden states: (V, C); the embedding itself where they are tied."""
        return self.embedding if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, ids: Tensor, cache: KeyValueCache | None = None, segments: Segments | None = None) -> Tensor:
        """Last hidden states, after the last norm: (B, T) -> (B, T, C). `segments`: one row, (1, N), of many texts."""
        states: Tensor = self.body(ids, cache, self.compute_dtype or self.embedding.dtype, segments)
        if cache is not None:
            cache.commit(ids.size(1))
        return states

    def states(self, ids: Tensor, segments: Segments | None = None) -> list[Tensor]:
        """The embedding's output and each block's, the last one's after the last norm, as transformers gives them.

        (B, T) -> one more than there are blocks, each (B, T, C).
        """
        found: list[Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for layer in self.layers]
        try:
            last = self.hidden(ids, segments=segments)
        finally:
            for hook in hooks:
                hook.remove()
        return [*found, last]

    def forward(self, ids: Tensor, cache: KeyValueCache | None = None, keep: int | None = None) -> Tensor:
        """Logits of the last `keep` positions, all when None: (B, T) -> (B, keep, V)."""
        states = self.hidden(ids, cache)
        return self.logits(states if keep is None else states[:, -keep:])

    def logits(self, states: Tensor) -> Tensor:
        """Logits of hidden states: (..., C) -> (..., V)."""
        if self.head_product is not None:
            return self.head_product(states)
        return F.linear(states, self.head.to(states.dtype))

    def step(self, ids: Tensor, step: Step) -> Tensor:
        """Logits after one more token a row, float32: (B, 1) -> (B, V). Nothing in here waits for the device.

        The shapes depend on rows and capacity alone, so it can be captured once and replayed.
        """
        states: Tensor = self.body(ids, step, self.compute_dtype or self.embedding.dtype)
        return self.logits(states[:, 0]).float()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        body = self.body
        return body.h if isinstance(body, GPT2Model) else body.layers

    def cache(self, rows: int = 1, capacity: int = 64) -> KeyValueCache:
        """An empty key/value cache for `rows` sequences, which grows up to the context."""
        weight = self.embedding
        dtype = self.compute_dtype or weight.dtype
        return KeyValueCache(self.config, rows, capacity, device=weight.device, dtype=dtype)

    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: all but an embedding of which it looks single rows up."""
        looked_up = self.head_product is not None or not self.config.tie_word_embeddings
        return sum(each.nbytes for each in self.parameters()) - (self.embedding.nbytes if looked_up else 0)

    def new_step(self, cache: KeyValueCache) -> Step:
        """A step over a cache; with our kernels where they serve: on CUDA, for a model that was fused."""
        layer = self.layers[0]
        fused = isinstance(layer, Layer) and layer.self_attn.qkv_proj is not None
        return Step(cache, cuda_kernels() if fused and cache.keys[0].is_cuda else None)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> Decoder:
        """Draws fresh weights.

        | part                                 | values                                   |
        | embedding                            | normal, std 0.02 tied, 0.5 untied        |
        | matrices that read the hidden state  | uniform, +-sqrt(3 / inputs): std 1/sqrt(inputs) |
        | o_proj, down_proj, c_proj            | zero: each block begins as the identity  |
        | norms 1, biases 0, untied head       | zero                                     |
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif parameter is self.embedding or name.endswith("wpe.weight"):
                wide = parameter is self.embedding and not self.config.tie_word_embeddings
                parameter.normal_(0.0, 0.5 if wide else 0.02, generator=generator)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight", "lm_head.weight")):
                parameter.zero_()
            else:
                inputs = parameter.size(0) if self.config.model_type == "gpt2" else parameter.size(1)
                bound = math.sqrt(3.0 / inputs)
                parameter.uniform_(-bound, bound, generator=generator)
        return self


def without_head(base: Decoder) -> Decoder:
    """The same weights, but for a head of its own: only hidden states are asked of it."""
    if base.config.tie_word_embeddings:
        return base
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(base.config, tie_word_embeddings=True))
    kept = {name: value for name, value in base.state_dict().items() if name != "lm_head.weight"}
    model.load_state_dict(kept, assign=True)
    for name, buffer in base.body.named_buffers():
        setattr(model.body, name, buffer)
    return model
