"""Losses of texts as vectors: scores of pairs (CoSENT), and one right text among those of the batch (ranking).

Invariant: on the same vectors they are sentence-transformers' CoSENTLoss and MultipleNegativesRankingLoss at their
default scale of 20; but a text of the batch that says the same as the right one is never counted as a wrong one.

Sources: CoSENT (Su 2022, https://kexue.fm/archives/8847); ranking (arXiv:1705.00652, section 4.4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 20.0  # of cosines: one over the temperature


def cosent_loss(first: Tensor, second: Tensor, scores: Tensor, scale: float = SCALE) -> Tensor:
    """log(1 + sum of exp(scale (cos_i - cos_j)) over all pairs i with a lower score than j). (R, C) twice, (R,)."""
    cosines = F.cosine_similarity(first, second) * scale  # (R,)
    apart = cosines[:, None] - cosines[None, :]
    wrong = scores[:, None] < scores[None, :]
    return torch.logsumexp(torch.cat([cosines.new_zeros(1), apart[wrong]]), 0)


def ranking_losses(anchors: Tensor, candidates: Tensor, ours: Tensor, scale: float = SCALE) -> Tensor:
    """Cross-entropy of each anchor's own candidate, the one of its number. (R, C), (M, C) -> (R,).

    `ours` (R, M): what must not count against an anchor, since it says the same as its own candidate.
    """
    similarity = similarities(anchors, candidates) * scale
    return F.cross_entropy(
        similarity.masked_fill(ours, -torch.inf), torch.arange(len(anchors), device=anchors.device), reduction="none"
    )


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of all with all: (R, C), (M, C) -> (R, M)."""
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).t()


def same_text(anchors: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Which candidates are no wrong answers to an anchor. Numbers that tell texts apart: (R,), (R,), (M,) -> (R, M).

    They are the anchor's own text, the same text as its positive, and what is a positive of the same anchor elsewhere;
    the anchor's own candidate, the one of its number, is not among them.
    """
    count = len(anchors)
    ours = (candidates[None] == positives[:, None]) | (candidates[None] == anchors[:, None])
    ours[:, :count] |= anchors[None] == anchors[:, None]
    ours[torch.arange(count), torch.arange(count)] = False
    return ours
