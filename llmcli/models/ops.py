"""Operators of the models: linear maps and norms in the activations' precision, and attention.

Invariant: weights may be stored wider than the activations (float32 masters, bfloat16 activations); every operator
casts its weight as it is used, so one set of parameters serves training and inference.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to this many positions compiled training on the CPU keeps the probabilities of a layer for the backward pass: the
# fused kernel's backward runs at 100 GFLOP/s, plain products at 400. Uncompiled, the passes between those products cost
# more than that wins (docs/log.md, "Pretraining speed" and "Fine-tuning speed").
EXPLICIT_POSITIONS = 1024
# The same for attention both ways: 64 texts of 32 tokens forward and backward in 6.5 ms, with the fused kernel 23.
_EXPLICIT_BOTH = 128


@functools.cache
def cuda_kernels() -> ModuleType | None:
    """Our own kernels, where triton loads and compiles; tried once, with a run of one of them."""
    try:
        from llmcli.models import kernels

        kernels.gated(torch.zeros(1, 16, device="cuda"))
    except Exception:  # no triton, no compiler for its launcher, a device that it does not know: each its own kind
        return None
    return kernels


class Linear(nn.Linear):
    """A linear map whose weight is cast to its input's precision."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.adapter: Any = None  # a low-rank part, see models/lora.py
        self.fused: Tensor | None = None  # of the first of several maps of one input: the memory of all their weights

    def reset_parameters(self) -> None:
        """Draws values where there is memory for them: on the meta device that would import the compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is not None:
            return adapted(x, self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """An embedding; as `Linear` it draws nothing on the meta device."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv1D(nn.Module):
    """GPT-2's linear map, whose weight is stored (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.adapter: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is not None:
            return adapted(x, self)
        return F.linear(x, self.weight.to(x.dtype).t(), self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467), reduced in float32 whatever the input is."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        if torch.is_grad_enabled():
            return RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        if x.is_cuda:  # one kernel instead of six
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)


class RMSNormFunction(torch.autograd.Function):
    """The norm with its gradient written out: a third of the passes that autograd would make over the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(length.square() / x.size(-1) + eps).to(x.dtype)  # (..., 1)
        scaled = x * inverse
        ctx.save_for_backward(scaled, inverse, weight)
        return scaled * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        scaled, inverse, weight = ctx.saved_tensors
        (gradient,) = gradients
        narrow = weight.to(gradient.dtype)
        product = gradient * scaled
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = product.sum(tuple(range(product.ndim - 1)), dtype=torch.float32).to(weight.dtype)
        along = (product @ narrow).unsqueeze(-1) / -scaled.size(-1)  # what the norm takes back along its input
        return torch.addcmul(gradient * narrow, scaled, along) * inverse, of_weight, None


class LayerNorm(nn.LayerNorm):
    """Layer norm (arXiv:1607.06450) whose weights are cast to its input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the halves of each head by its position's angle. x (..., D); cos, sin broadcast to it.

    `cos` holds each angle twice, `sin` too, the first time negated: x * cos + swapped(x) * sin.
    """
    if torch.is_grad_enabled():
        return RopeFunction.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return torch.addcmul(x * cos, _swapped(x), sin)


def _swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second, first), -1)


class RopeFunction(torch.autograd.Function):
    """The rotation, whose gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, _swapped(x), sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        (gradient,) = gradients
        return torch.addcmul(gradient * cos, _swapped(gradient), sin, value=-1), None, None


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves (arXiv:2002.05202): (..., 2 I) -> (..., I)."""
    result: Tensor = SwiGLUFunction.apply(gate_and_up)  # type: ignore[no-untyped-call]
    return result


class SwiGLUFunction(torch.autograd.Function):
    """SwiGLU that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gate_and_up,) = ctx.saved_tensors
        (gradient,) = gradients
        gate, up = gate_and_up.chunk(2, -1)
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return torch.cat((of_gate, gradient * F.silu(gate)), -1)


def gated(gate_and_up: Tensor) -> Tensor:
    """`swiglu` without gradients, as one kernel where there are kernels."""
    if gate_and_up.is_cuda:
        kernels = cuda_kernels()
        if kernels is not None:
            return cast(Tensor, kernels.gated(gate_and_up))
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


def joined(x: Tensor, *maps: Linear) -> Tensor:
    """The outputs of several linear maps of one input, side by side: one product, and one for each gradient."""
    if any(each.adapter is not None for each in maps):
        return adapted(x, *maps)
    weights: list[Tensor] = [each.weight for each in maps]
    biases: list[Tensor] = [each.bias for each in maps if each.bias is not None]
    weight = torch.cat(weights).to(x.dtype)
    return F.linear(x, weight, torch.cat(biases).to(x.dtype) if biases else None)


class PackedLinear:
    """Linear maps of one input as one product in bfloat16 on the CPU, the weights laid out for its kernel once.

    The layout would else be made anew for each product. Bias and activation are part of the product.
    """

    _FUSED: ClassVar = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}

    def __init__(self, *maps: Linear) -> None:
        self._maps = maps
        self._packed_from = [(each.weight, each.weight._version) for each in maps]
        weight = torch.cat([each.weight.detach() for each in maps])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = torch.cat([each.bias.detach() for each in maps])

    @staticmethod
    def works() -> bool:
        """Whether this machine's CPU multiplies bfloat16 itself, and torch has the kernels."""
        return bool(torch._C._has_mkldnn) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def fits(self, x: Tensor) -> bool:
        """Whether the input is one to multiply, and the maps still are what they were when they were packed."""
        return (
            x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and all(
                each.adapter is None and each.weight is weight and weight._version == version
                for each, (weight, version) in zip(self._maps, self._packed_from, strict=True)
            )
        )

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        """The product, and of it the activation; which must be one of those that `fuses` names."""
        name, algorithm = self._FUSED[activation] if activation else ("none", "")
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, name, [], algorithm)
        return made

    @classmethod
    def fuses(cls, activation: str) -> bool:
        """Whether an activation can be part of the product."""
        return activation in cls._FUSED


def adapted(x: Tensor, *maps: Linear | Conv1D) -> Tensor:
    """The outputs of maps of one input, some with a low-rank part, side by side."""
    from llmcli.models.lora import adapted_product

    return adapted_product(x, maps)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(QK^T / sqrt(D)) V. query (B, H, T, D); key, value (B, K, S, D); mask (B, 1, T, S) or None for causal."""
    whole = mask is None and query.size(2) == key.size(2) <= EXPLICIT_POSITIONS
    if whole and torch.is_grad_enabled() and query.device.type == "cpu" and torch.compiler.is_compiling():
        return _explicit(query, key, value)
    grouped = query.size(1) != key.size(1)
    causal = mask is None and query.size(2) > 1
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def attend_both(parts: Tensor, heads: int, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention to every token. parts (B, T, 3 C): query, key and value side by side -> (B, T, C).

    `mask` (B, 1, 1 or T, T): True where a token attends to another. `dropout`: the share of probabilities dropped.
    """
    query, key, value = split_heads(parts, heads)
    if query.size(2) <= EXPLICIT_POSITIONS and torch.is_grad_enabled() and query.device.type == "cpu":
        found: Tensor = BothAttention.apply(query, key, value, mask, dropout)  # type: ignore[no-untyped-call]
    else:
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return found.transpose(1, 2).flatten(2)


def split_heads(parts: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, H, T, D) of what lies side by side, (B, T, 3 C)."""
    rows, count, width = parts.shape
    query, key, value = parts.view(rows, count, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return query, key, value


class BothAttention(torch.autograd.Function):
    """Attention both ways that keeps the probabilities. query, key, value (B, H, T, D).

    `seen` (B, 1, 1 or T, T): True where a token attends to another; None: everywhere.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
        query = query * query.size(-1) ** -0.5
        scores = query @ key.transpose(-1, -2)
        if seen is not None:
            scores = scores.masked_fill_(~seen, float("-inf"))
        probabilities = torch.softmax(scores, -1)
        kept = None
        if dropout:
            kept = torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout)
        ctx.save_for_backward(query, key, value, probabilities, kept)
        return (probabilities if kept is None else probabilities * kept) @ value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, probabilities, kept = ctx.saved_tensors
        (gradient,) = gradients
        of_used = gradient @ value.transpose(-1, -2)
        used = probabilities
        if kept is not None:
            of_used, used = of_used * kept, probabilities * kept
        of_scores = torch.ops.aten._softmax_backward_data(of_used, probabilities, -1, probabilities.dtype)
        of_query = (of_scores @ key) * query.size(-1) ** -0.5
        return of_query, of_scores.transpose(-1, -2) @ query, used.transpose(-1, -2) @ gradient, None, None


def _explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as plain products; grouped heads are joined along the queries: (B, K, G x T, D)."""
    rows, heads, count, size = query.shape
    groups = heads // key.size(1)
    joined = query.reshape(rows, key.size(1), groups * count, size)
    result: Tensor = CausalAttention.apply(joined, key, value, groups)  # type: ignore[no-untyped-call]
    return result.view(rows, heads, count, size)


class CausalAttention(torch.autograd.Function):
    """Causal attention that keeps the probabilities. query (B, K, G x T, D); key, value (B, K, T, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
        scale, count = query.size(-1) ** -0.5, key.size(2)
        future = torch.full((count, count), float("-inf"), device=query.device).triu(1).repeat(groups, 1)
        scores = (query @ key.transpose(-1, -2)).float() * scale + future
        probabilities = torch.softmax(scores, -1).to(query.dtype)
        output = probabilities @ value
        ctx.save_for_backward(query, key, value, probabilities, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, probabilities, output = ctx.saved_tensors
        (gradient,) = gradients
        scale = query.size(-1) ** -0.5
        shared = (gradient.float() * output.float()).sum(-1, keepdim=True)  # the softmax's own correction
        of_probabilities = gradient @ value.transpose(-1, -2)
        of_scores = (probabilities.float() * (of_probabilities.float() - shared) * scale).to(query.dtype)
        return (
            of_scores @ key,
            of_scores.transpose(-1, -2) @ query,
            probabilities.transpose(-1, -2) @ gradient,
            None,
        )
