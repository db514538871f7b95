"""Low-rank adapters: a frozen matrix W and a trained part of low rank, W x + alpha / r B A x; DoRA beside it.

Invariant: names, shapes and scale are PEFT's, and a model with its adapters gives what the merged model gives, but for
rounding. The frozen weights get no gradient and are held once, in the activations' precision.

Sources: LoRA (arXiv:2106.09685), rank-stabilised scale (arXiv:2312.03732), DoRA (arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmcli.errors import ConfigError
from llmcli.models.decoder import Attention, Decoder, GatedMLP
from llmcli.models.ops import Conv1D, Linear

Map = Linear | Conv1D


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """What adapters are like."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # last parts of the matrices' names; none: all of the blocks
    dora: bool = False

    @property
    def scale(self) -> float:
        """Of the low-rank part."""
        return self.alpha / self.rank


class Dropout:
    """Leaves a share of the inputs out. What is left out depends on `seed` alone, which each batch sets."""

    def __init__(self, share: float, device: torch.device) -> None:
        self.share = share
        self.generator = torch.Generator(device)

    def __call__(self, x: Tensor) -> Tensor | None:
        """The input with holes; None where there are none."""
        if not self.share:
            return None
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.share
        return x * (kept.to(x.dtype) / (1 - self.share))


class Adapter(nn.Module):
    """The low-rank part of one matrix: A (r, inputs) drawn, B (outputs, r) zero; DoRA's magnitude (outputs,)."""

    def __init__(self, owner: Map, shape: AdapterShape, dropout: Dropout, generator: torch.Generator | None) -> None:
        super().__init__()
        weight = _weight(owner)
        rows, columns = weight.shape
        bound = columns**-0.5  # kaiming_uniform_(a=sqrt(5)), as PEFT draws it
        drawn = torch.empty(shape.rank, columns).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, shape.rank, device=weight.device))
        self.lora_magnitude_vector = nn.Parameter(weight.detach().float().norm(dim=1)) if shape.dora else None
        self.scale, self.dropout = shape.scale, dropout

    def delta(self) -> Tensor:
        """What is added to the weight, (outputs, inputs), DoRA's length aside."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def merged(self, weight: Tensor) -> Tensor:
        """The weight (outputs, inputs) that does the work of both, in float32."""
        found = weight.float() + self.delta()
        if self.lora_magnitude_vector is not None:
            found = found * (self.lora_magnitude_vector.float() / found.norm(dim=1))[:, None]
        return found


def _weight(owner: Map) -> Tensor:
    """The weight as (outputs, inputs)."""
    return owner.weight.t() if isinstance(owner, Conv1D) else owner.weight


def adapted_product(x: Tensor, maps: Sequence[Map]) -> Tensor:
    """The outputs of maps of one input side by side: (..., inputs) -> (..., sum of outputs)."""
    adapters: list[Adapter | None] = [each.adapter for each in maps]
    present = [each for each in adapters if each is not None]
    first = maps[0]
    fused = first.fused if isinstance(first, Linear) and len(maps) > 1 else None
    weight = fused if fused is not None else torch.cat([_weight(each) for each in maps]) if maps[1:] else _weight(first)
    down = torch.cat([each.lora_A for each in present]) if present[1:] else present[0].lora_A
    blocks = [
        x.new_zeros(_weight(owner).size(0), 0, dtype=torch.float32) if each is None else each.lora_B * each.scale
        for owner, each in zip(maps, adapters, strict=True)
    ]
    up = torch.block_diag(*blocks) if blocks[1:] else blocks[0]  # type: ignore[no-untyped-call]
    dropped = present[0].dropout(x) if present[0].training else None
    output: Tensor = LowRankFunction.apply(x, dropped, weight, down, up)  # type: ignore[no-untyped-call]
    if any(each.lora_magnitude_vector is not None for each in present):
        output = output * torch.cat([_lengths(owner, x) for owner in maps])
    if all(each.bias is None for each in maps):
        return output
    none = [x.new_zeros(_weight(each).size(0)) if each.bias is None else each.bias.to(x.dtype) for each in maps]
    return output + (torch.cat(none) if none[1:] else none[0])


def _lengths(owner: Map, x: Tensor) -> Tensor:
    """What DoRA multiplies each output by; the norm counts as a constant, as in the paper's section 4.3."""
    adapter: Adapter | None = owner.adapter
    if adapter is None or adapter.lora_magnitude_vector is None:
        return x.new_ones(_weight(owner).size(0))
    with torch.no_grad():
        norm = (_weight(owner).float() + adapter.delta()).norm(dim=1)
    return (adapter.lora_magnitude_vector / norm).to(x.dtype)


class LowRankFunction(torch.autograd.Function):
    """W x + up (down x), W frozen. x (..., C); weight (O, C); down (R, C); up (O, R)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        weight, narrow_down, narrow_up = weight.to(x.dtype), down.to(x.dtype), up.to(x.dtype)
        source = flat if dropped is None else dropped.reshape(-1, x.size(-1))
        inner = source @ narrow_down.t()  # (N, R)
        output = (flat @ weight.t()).addmm_(inner, narrow_up.t())
        ctx.save_for_backward(source, inner, weight, narrow_down, narrow_up)
        ctx.apart, ctx.shape = dropped is not None, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        source, inner, weight, down, up = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].size(-1))
        of_inner = gradient @ up
        of_down, of_up = (of_inner.t() @ source).float(), (gradient.t() @ inner).float()
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight
            if not ctx.apart:
                of_x.addmm_(of_inner, down)
            of_x = of_x.view(ctx.shape)
        if ctx.apart and ctx.needs_input_grad[1]:
            of_dropped = (of_inner @ down).view(ctx.shape)
        return of_x, of_dropped, None, of_down, of_up


# ----------------------------------------------------------------------------------------------------------------
# Putting them on


def maps_of(model: Decoder) -> Iterator[tuple[str, Map]]:
    """Name and module of every matrix of the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, Linear | Conv1D) and (".layers." in name or ".h." in name):
            yield name, module


def attach(model: Decoder, shape: AdapterShape, *, seed: int, kept: Sequence[nn.Module] = ()) -> Dropout:
    """Freezes a model and gives its matrices adapters; `kept`: modules that go on being trained whole.

    The model is then trained in `compute_dtype`, in which what is frozen is held. Raises ConfigError for a target that
    the model has not.
    """
    chosen = chosen_maps(model, shape.targets)
    model.requires_grad_(False)
    free = {id(parameter) for module in kept for parameter in module.requires_grad_(True).parameters()}
    generator = torch.Generator().manual_seed(seed)
    dropout = Dropout(shape.dropout, model.embedding.device)
    for _, module in chosen:
        module.adapter = Adapter(module, shape, dropout, generator)
        free |= {id(parameter) for parameter in module.adapter.parameters()}
    dtype = model.compute_dtype or model.embedding.dtype
    for parameter in model.parameters():
        if id(parameter) not in free:
            parameter.data = parameter.data.to(dtype)
    for part in model.modules():
        if isinstance(part, Attention):
            _fuse(part.q_proj, part.k_proj, part.v_proj)
        elif isinstance(part, GatedMLP):
            _fuse(part.gate_proj, part.up_proj)
    return dropout


def chosen_maps(model: Decoder, targets: Sequence[str]) -> list[tuple[str, Map]]:
    """The matrices that targets name. Raises ConfigError for a name that none has."""
    every = list(maps_of(model))
    names = sorted({name.rpartition(".")[2] for name, _ in every})
    for target in targets:
        if target not in names:
            raise ConfigError(f"no matrix is called {target!r}; there are {', '.join(names)}", where="lora_targets")
    return [(name, module) for name, module in every if not targets or name.rpartition(".")[2] in targets]


@torch.no_grad()
def _fuse(*maps: Linear) -> None:
    """Lays the weights side by side in memory, each a view, so that one product needs no copy of them."""
    whole = torch.cat([each.weight for each in maps])
    begin = 0
    for each in maps:
        each.weight.data = whole[begin : begin + each.weight.size(0)]
        begin += each.weight.size(0)
    maps[0].fused = whole


def merge(model: Decoder) -> Decoder:
    """Puts every adapter into its matrix, in place, and takes it off. The model then has plain weights."""
    with torch.no_grad():
        for _, module in maps_of(model):
            adapter: Adapter | None = module.adapter
            if adapter is None:
                continue
            found = adapter.merged(_weight(module)).to(module.weight.dtype)
            module.weight.copy_(found.t() if isinstance(module, Conv1D) else found)
            module.adapter = None
    return model
