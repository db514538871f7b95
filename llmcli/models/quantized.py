"""Weight-only quantization for torch: matrices in 8 or 4 bits, activations as they are.

int8 has a scale an output, int4 one a group of 64 inputs. Of up to 16 rows the product is a kernel of ours on CUDA,
which reads the codes alone; else the weights are dequantized for it and multiplied as usual.

Invariant: what a product computes with is `dequantized()`, on every device and for every number of rows.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcli.models.decoder import Attention, Decoder, GatedMLP
from llmcli.models.ops import Conv1D, Linear, cuda_kernels

BITS = {"int8": 8, "int4": 4}
GROUP = 64  # inputs that share a scale in int4
ROWS = 16  # up to which a product is bound by reading the weights
_HEAD_BITS = 8  # a head's errors reach the logits unsoftened
# Scales tried for a group, beyond or within the one that gives its extreme weight the outermost code.
_TRIES = (-0.06, 0.0, 0.06, 0.12, 0.18, 0.24, 0.3)
_PIECE = 1 << 26  # weights that are rounded at once


class QuantizedLinear(nn.Module):
    """A linear map of few bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, device: str | torch.device) -> None:
        """Rounds a weight (outputs, inputs); codes and scales lie on `device`, the scales in the weight's precision."""
        super().__init__()
        self.bits, (self.out_features, self.in_features) = bits, weight.shape
        rounded = _rounded_channels if bits == 8 else _rounded_groups
        step = max(1, _PIECE // self.in_features)
        found = [rounded(weight[first : first + step].to(device)) for first in range(0, len(weight), step)]
        codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.codes = nn.Parameter(codes, requires_grad=False)  # int8: (outputs, inputs); int4: see `packed`
        self.scales = nn.Parameter(scales, requires_grad=False)  # (outputs, groups); int8: one group
        self.bias = None if bias is None else nn.Parameter(bias.to(device), requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights that the product computes with: (outputs, inputs)."""
        if self.bits == 8:
            return self.codes.to(dtype) * self.scales.to(dtype)
        groups = unpacked(self.codes).view(self.out_features, -1, GROUP).to(dtype)
        return (groups * self.scales.to(dtype)[..., None]).flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:  # (..., inputs) -> (..., outputs)
        if x.is_cuda and x.numel() <= ROWS * self.in_features:
            kernels = cuda_kernels()
            if kernels is not None:
                return cast(Tensor, kernels.product(x, self.codes, self.scales, self.bias, self.bits, GROUP))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)


def packed(codes: Tensor) -> Tensor:
    """Codes (outputs, n GROUP) of -8 to 7, two a byte: of each group the first half low, the second high, plus 8.

    So both halves of a byte share a scale, and are multiplied with inputs that lie side by side.
    """
    low, high = (codes + 8).to(torch.uint8).view(len(codes), -1, GROUP).chunk(2, -1)
    return (low | (high << 4)).flatten(1)


def unpacked(data: Tensor) -> Tensor:
    """What `packed` was given, as int8: (outputs, n GROUP / 2) -> (outputs, n GROUP)."""
    halves = data.view(len(data), -1, GROUP // 2)
    return torch.cat((halves & 15, halves >> 4), -1).flatten(1).to(torch.int8) - 8


def _rounded_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale for each output; the codes are those of the scale as it is stored."""
    wide = weight.float()
    scales = (wide.abs().amax(1, keepdim=True) / 127).clamp(min=1e-20).to(weight.dtype)
    return (wide / scales.float()).round().clamp(-127, 127).to(torch.int8), scales


def _rounded_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and the scales of the groups, chosen among some by the error that they leave."""
    groups = F.pad(weight.float(), (0, -weight.size(1) % GROUP)).reshape(len(weight), -1, GROUP)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # whose sign decides the scale's
    best = torch.full_like(extreme, torch.inf)
    scales, codes = torch.ones_like(extreme), torch.zeros_like(groups, dtype=torch.int8)
    for step in _TRIES:
        tried = (extreme * -(1 + step) / 8).to(weight.dtype).float()
        tried = torch.where(tried == 0, 1.0, tried)
        found = (groups / tried).round().clamp(-8, 7)
        error = (found * tried - groups).square().sum(-1, keepdim=True)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
        codes = torch.where(better, found.to(torch.int8), codes)
    return packed(codes.flatten(1)), scales[..., 0].to(weight.dtype)


# ----------------------------------------------------------------------------------------------------------------
# Whole models


@torch.no_grad()
def fuse(model: Decoder) -> Decoder:
    """Joins the products that read the same states: query, key and value; gate and up. Changes the model, for good."""
    for module in model.modules():
        if isinstance(module, Attention) and module.qkv_proj is None:
            module.qkv_proj = _joined(module.q_proj, module.k_proj, module.v_proj)
            del module.q_proj, module.k_proj, module.v_proj
        elif isinstance(module, GatedMLP) and module.gate_up_proj is None:
            module.gate_up_proj = _joined(module.gate_proj, module.up_proj)
            del module.gate_proj, module.up_proj
    return model


def _joined(*maps: Linear) -> Linear:
    """One map whose outputs are those of several, side by side."""
    with torch.device("meta"):
        made = Linear(maps[0].in_features, sum(each.out_features for each in maps), bias=False)
    made.weight = nn.Parameter(torch.cat([each.weight for each in maps]), requires_grad=False)
    if maps[0].bias is not None:
        made.bias = nn.Parameter(torch.cat([each.bias for each in maps]), requires_grad=False)
    return made


@torch.no_grad()
def quantize(model: Decoder, bits: int, device: str | torch.device | None = None) -> Decoder:
    """Rounds the matrices of a model, one by one, on the device where it shall run. Changes the model, for good.

    The embedding, which is only looked up in, and the norms keep their precision; the head gets 8 bits at least.
    """
    place = device or model.embedding.device
    for block in model.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear | Conv1D):
                    weight = child.weight.t() if isinstance(child, Conv1D) else child.weight
                    setattr(parent, name, QuantizedLinear(weight.detach(), child.bias, bits, place))
    model.head_product = QuantizedLinear(model.head.detach(), None, max(bits, _HEAD_BITS), place)
    if not model.config.tie_word_embeddings:
        del model.lm_head
    return model.to(place).requires_grad_(False)
