"""Optimizers: Muon for the hidden matrices, fused AdamW for the rest.

Invariant: the state is a flat mapping of names to tensors, so it is saved as safetensors and restored bit for bit.

Muon orthogonalises the momentum of each matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) by
Newton-Schulz iteration. torch.optim.Muon does the same one matrix at a time, in five iterations; here matrices of one
shape are taken together, and the first product, which the iteration needs anyway, gives a tighter bound of the
spectral norm than Frobenius' (||X||_2 <= ||XX^T||_F^(1/2)), which saves an iteration. docs/log.md has the figures.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmcli.errors import DataError

# Coefficients a, b, c of x <- a x + (b xx^T + c (xx^T)^2) x for each iteration: the last four of the five optimal
# quintics for singular values in [0.001, 1] (Polar Express, arXiv:2505.16932, algorithm 1). The first of the five only
# lifts small values, which the tighter bound has done already.
QUINTICS = (
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_MARGIN = 1.01  # keeps rounding in bfloat16 from pushing the greatest singular value past 1
MOMENTUM = 0.95
BETAS = (0.9, 0.95)
EPS = 1e-10


def orthogonalize(stack: Tensor) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices, whatever the scale. (N, rows, columns) -> the same.

    Singular values of at least a hundredth of the greatest come out in [0.7, 1.15], smaller ones between 0 and that.
    """
    tall = stack.size(1) > stack.size(2)
    x = stack.mT if tall else stack
    peak = torch.linalg.vector_norm(x, float("inf"), dim=(1, 2), keepdim=True).float().clamp(min=2.0**-126)
    x = x * torch.exp2(-peak.log2().floor()).to(x.dtype)  # exact; else the fourth powers below leave float32
    gram = x @ x.mT  # (N, r, r), r the smaller side
    bound = gram.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-30) * _MARGIN**2  # >= greatest value, squared
    x = x * bound.rsqrt().to(x.dtype)
    gram = (gram.float() / bound).to(x.dtype)
    for index, (a, b, c) in enumerate(QUINTICS):
        if index:
            gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: the matrices of the blocks; embeddings, head and vectors go to AdamW."""
    return parameter.ndim == 2 and any(blocks in name for blocks in (".layers.", ".h.", ".layer."))


class Muon:
    """Momentum, Nesterov's way, orthogonalised; the step's size is learning_rate * sqrt(max(1, rows / columns)).

    `names` and `parameters` are those of the matrices; the state is one momentum buffer a matrix, in float32.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, dtype: torch.dtype) -> None:
        self.parameters = dict(parameters)
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self.weight_decay, self.dtype = weight_decay, dtype
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self.parameters.items():
            shapes.setdefault(tuple(parameter.shape), []).append(name)
        self.groups = list(shapes.values())

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates every matrix from its gradient."""
        for names in self.groups:
            parameters: list[Tensor] = [self.parameters[name] for name in names]
            gradients = [parameter.grad for parameter in parameters]
            if any(gradient is None for gradient in gradients):
                raise RuntimeError("a matrix has no gradient")
            held = [self.momentum[name] for name in names]
            torch._foreach_lerp_(held, gradients, 1 - MOMENTUM)  # type: ignore[arg-type]
            ahead = torch._foreach_lerp(gradients, held, MOMENTUM)  # type: ignore[arg-type]
            rows, columns = parameters[0].shape
            size = learning_rate * max(1.0, rows / columns) ** 0.5
            updates = orthogonalize(torch.stack([update.to(self.dtype) for update in ahead])).to(parameters[0].dtype)
            if self.weight_decay:
                torch._foreach_mul_(parameters, 1 - learning_rate * self.weight_decay)
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=-size)


class Optimizer:
    """Both halves behind one step; learning rates are given at each step, so a schedule needs no hook."""

    def __init__(self, model: nn.Module, *, kind: str, weight_decay: float, dtype: torch.dtype) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {name: p for name, p in named.items() if kind == "muon" and is_matrix(name, p)}
        self.rest = {name: p for name, p in named.items() if name not in matrices}
        self.muon = Muon(matrices, weight_decay=weight_decay, dtype=dtype)
        decayed = [p for p in self.rest.values() if p.ndim >= 2 and kind == "adamw"]
        kept = [p for p in self.rest.values() if p.ndim < 2 or kind == "muon"]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=BETAS, eps=EPS, fused=True
        )
        self.parameters = list(named.values())

    def step(self, matrix_rate: float, rest_rate: float) -> None:
        """One update from the gradients that stand; then they are let go."""
        self.muon.step(matrix_rate)
        for group in self.adamw.param_groups:
            group["lr"] = rest_rate
        self.adamw.step()
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self, largest: float) -> Tensor:
        """The global norm of the gradients, which are scaled down to `largest` where it is greater (0: never)."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, largest or float("inf"))

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors: `momentum.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        found = {f"momentum.{name}": buffer for name, buffer in self.muon.momentum.items()}
        for name, parameter in self.rest.items():
            for key, value in self.adamw.state[parameter].items():
                found[f"{key}.{name}"] = value
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave. Raises DataError when a tensor is missing or of a wrong shape."""
        for name, buffer in self.muon.momentum.items():
            buffer.copy_(_taken(tensors, f"momentum.{name}", buffer))
        for name, parameter in self.rest.items():
            self.adamw.state[parameter] = {
                "step": _taken(tensors, f"step.{name}", torch.zeros(())).clone(),
                "exp_avg": _taken(tensors, f"exp_avg.{name}", parameter).to(parameter.device, copy=True),
                "exp_avg_sq": _taken(tensors, f"exp_avg_sq.{name}", parameter).to(parameter.device, copy=True),
            }


def _taken(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in tensors:
        raise DataError(f"the optimizer's state has no {name}")
    if tensors[name].shape != like.shape:
        raise DataError(f"the optimizer's {name} has shape {list(tensors[name].shape)}, not {list(like.shape)}")
    return tensors[name]
