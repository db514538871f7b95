"""Losses: cross-entropy straight from hidden states, without ever holding all logits.

Invariant: the sum over targets times `scale` is returned, so the loss is normalised once, by the number of target
tokens of the whole accumulated step (not by micro-batch, transformers #24725).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcli.training.packing import filled_up

IGNORED = -100  # a target that does not count
_CHUNK_BYTES = 64 << 20  # logits of one piece, in float32: of fewer rows the products are slower (docs/log.md)


def piece_loss(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one piece. logits (N, V); targets (N,); scale (). Returns (), (N, V) in logits' dtype."""
    wide = logits.float()
    counted = targets != IGNORED
    total = wide.logsumexp(-1)  # (N,)
    chosen = wide.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    loss = ((total - chosen) * counted).sum() * scale
    weight = (counted * scale)[:, None]
    hot = torch.arange(wide.size(1), device=logits.device) == targets[:, None]
    gradient = ((wide - total[:, None]).exp() - hot.float()) * weight
    return loss, gradient.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of `hidden @ head^T + bias`, piece by piece; gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: Tensor,
        piece: Callable[..., Any],
    ) -> Tensor:
        weight = head.to(hidden.dtype)
        added_bias = None if bias is None else bias.to(hidden.dtype)
        step = max(16, min(hidden.size(0), _CHUNK_BYTES // (4 * head.size(0))))
        of_hidden = torch.empty_like(hidden)
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None  # a frozen head needs none
        of_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.size(0), step):
            part = hidden[start : start + step]
            added, gradient = piece(F.linear(part, weight, added_bias), targets[start : start + step], scale)
            loss += added
            of_hidden[start : start + step] = gradient @ weight
            if of_head is not None:
                of_head += gradient.t() @ part
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=of_bias.dtype)
        ctx.save_for_backward(of_hidden, of_head, of_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        of_hidden, of_head, of_bias = ctx.saved_tensors
        (gradient,) = gradients
        of_head = None if of_head is None else of_head * gradient.to(of_head.dtype)
        of_bias = None if of_bias is None else of_bias * gradient.to(of_bias.dtype)
        return of_hidden * gradient.to(of_hidden.dtype), of_head, of_bias, None, None, None


def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: Tensor,
    piece: Callable[..., Any] = piece_loss,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum of -log p(target) times `scale`. hidden (B, T, C); head (V, C); targets (B, T), IGNORED where not counted.

    `piece` may be a compiled `piece_loss`; `bias` (V,) is added to the logits. The result carries gradients for
    `hidden`, `head` and `bias`.
    """
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    if added := filled_up(len(wanted)) - len(wanted):
        flat, wanted = F.pad(flat, (0, 0, 0, added)), F.pad(wanted, (0, added), value=IGNORED)
    loss: Tensor = _HeadLoss.apply(flat, head, bias, wanted, scale, piece)  # type: ignore[no-untyped-call]
    return loss


class _LogProbabilities(torch.autograd.Function):
    """log p(target) of `hidden @ head^T`; what each counts for is known on the way back, when logits are made again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        weight = head.to(hidden.dtype)
        found = torch.empty(hidden.size(0), device=hidden.device)
        totals = torch.empty_like(found)
        for rows in _pieces(hidden, head):
            wide = (hidden[rows] @ weight.t()).float()
            totals[rows] = wide.logsumexp(-1)
            found[rows] = wide.gather(1, targets[rows, None]).squeeze(1) - totals[rows]
        ctx.save_for_backward(hidden, head, targets, totals)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, head, targets, totals = ctx.saved_tensors
        weight = head.to(hidden.dtype)
        of_hidden = torch.empty_like(hidden)
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for rows in _pieces(hidden, head):
            part, counts = hidden[rows], gradients[0][rows, None]
            shares = ((part @ weight.t()).float() - totals[rows, None]).exp() * -counts
            of_logits = shares.scatter_add_(1, targets[rows, None], counts.float()).to(hidden.dtype)
            of_hidden[rows] = of_logits @ weight
            if of_head is not None:
                of_head += of_logits.t() @ part
        return of_hidden, of_head, None


def _pieces(hidden: Tensor, head: Tensor) -> Iterator[slice]:
    step = max(16, _CHUNK_BYTES // (4 * head.size(0)))
    return (slice(start, start + step) for start in range(0, hidden.size(0), step))


def log_probabilities(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log p(target) in nats, float32. hidden (N, C); head (V, C); targets (N,). Returns (N,), with gradients."""
    found: Tensor = _LogProbabilities.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def summed_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> float:
    """Sum of -log p(target) in nats, in float32, piece by piece. hidden (B, T, C); head (V, C); targets (B, T)."""
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    weight = head.to(flat.dtype)
    step = max(16, _CHUNK_BYTES // (4 * head.size(0)))
    total = 0.0
    for start in range(0, flat.size(0), step):
        logits = (flat[start : start + step] @ weight.t()).float()
        total += float(F.cross_entropy(logits, wanted[start : start + step], ignore_index=IGNORED, reduction="sum"))
    return total


@torch.no_grad()
def found_tokens(states: Tensor, head: Tensor, bias: Tensor, targets: Tensor) -> tuple[float, int]:
    """Sum of -log p(target) in nats, and how often the target is the likeliest. states (N, C); targets (N,)."""
    weight, added = head.to(states.dtype), bias.to(states.dtype)
    nats, hits = 0.0, 0
    for rows in _pieces(states, head):
        logits, wanted = F.linear(states[rows], weight, added).float(), targets[rows]
        nats += float(F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
        hits += int((logits.argmax(-1) == wanted).sum())
    return nats, hits
