"""Scales and zero points that leave the least squared error, block by block, found by trying some and refitting.

A block's extreme weight is one of 32 or more: to clip it a little, or to reach beyond it, often serves the others
better. For codes that are fixed the best scale has a closed form; so each try is judged by the error that its codes
leave at *their* best scale, as llama.cpp does (ggml-quants.c, make_qx_quants).

Invariant: the result of a block does not depend on its neighbours, and is never worse than what it began with.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from llmcli.onnx.quantize import BlockQuantized, Scheme, blocked, packed, storable
from llmcli.onnx.weights import Array

_PIECE = 1 << 18  # elements at once: intermediate arrays stay in the cores' caches
# Scales tried for 4 bits, above or below the one that gives the extreme weight the outermost code; with zero points,
# the one that covers the whole range. With more codes the best lies closer.
_CLIPPED = np.linspace(0.36, -0.06, 15)
_SHRUNK = np.linspace(-0.28, 0.04, 9)
_SMALLEST = np.float32(1e-30)


@dataclasses.dataclass(frozen=True, slots=True)
class Rounding:
    """Codes of a matrix, one a byte, not packed: weight = (code - zero point) * scale."""

    codes: npt.NDArray[np.uint8]  # (outputs, inputs), filled up to whole blocks
    scales: Array  # (outputs, blocks)
    zeros: Array  # (outputs, blocks), whole numbers

    def weights(self) -> Array:
        """What a product computes with: (outputs, inputs), float32, filled up to whole blocks."""
        outputs, blocks = self.scales.shape
        codes = self.codes.reshape(outputs, blocks, -1).astype(np.float32)
        codes -= self.zeros[..., None]
        codes *= self.scales[..., None]
        return codes.reshape(outputs, -1)

    def packed(self, scheme: Scheme, inputs: int, *, zero_points: bool) -> BlockQuantized:
        """As MatMulNBits takes it."""
        outputs, blocks = self.scales.shape
        data = packed(self.codes.reshape(outputs, blocks, -1), scheme.bits)
        zeros = packed(self.zeros.astype(np.uint8), scheme.bits) if zero_points else None
        return BlockQuantized(scheme, inputs, data, storable(self.scales, scheme.bits), zeros)


def searched(weight: Array, scheme: Scheme, importance: Array | None = None, *, zero_points: bool = False) -> Rounding:
    """The rounding of (outputs, inputs) whose squared errors, weighted by `importance` (inputs,), are least."""
    outputs, inputs = weight.shape
    blocks = -(-inputs // scheme.block_size)
    given = np.ones(inputs, np.float32) if importance is None else importance.astype(np.float32)
    importance = blocked(given[None], scheme.block_size)[0]  # (blocks, block_size)
    codes = np.empty((outputs, blocks * scheme.block_size), np.uint8)
    scales, zeros = np.empty((outputs, blocks), np.float32), np.empty((outputs, blocks), np.float32)
    step = max(1, _PIECE // inputs)
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        tries = _Tries(blocked(weight[rows], scheme.block_size), importance, (1 << scheme.bits) - 1)
        if zero_points:
            tries.ranges()
        else:
            tries.extremes()
        tries.add(tries.scales.copy(), tries.zeros.copy())  # new codes for the scales that were fitted
        scales[rows], zeros[rows] = tries.scales, tries.zeros
        codes[rows] = tries.codes(tries.scales, tries.zeros).reshape(-1, codes.shape[1]).astype(np.uint8)
    return Rounding(codes, scales, zeros)


class _Tries:
    """The best of the scales and zero points that were tried for each of some blocks: (outputs, blocks)."""

    def __init__(self, blocks: Array, importance: Array, highest: int) -> None:
        self._blocks, self._importance, self._highest = blocks, importance, highest
        self._weighted = blocks * importance
        self._gain = np.full(blocks.shape[:2], -1, np.float32)
        self.scales = np.ones(blocks.shape[:2], np.float32)
        self.zeros = np.full(blocks.shape[:2], (highest + 1) // 2, np.float32)

    def codes(self, scales: Array, zeros: Array) -> Array:
        """The nearest codes, as float32."""
        found: Array = self._blocks * np.reciprocal(scales)[..., None]
        np.rint(found, out=found)
        found += zeros[..., None]
        return found.clip(0, self._highest, out=found)

    def add(self, scales: Array, zeros: Array) -> None:
        """Tries these. With the codes fixed, the best scale is sum w x q / sum w q^2 and removes its product's half."""
        scales = np.where(np.abs(scales) > _SMALLEST, scales, 1).astype(np.float32)
        offsets = self.codes(scales, zeros)
        offsets -= zeros[..., None]
        along = np.einsum("nbk,nbk->nb", offsets, self._weighted)
        offsets *= offsets
        length = np.maximum(np.einsum("nbk,bk->nb", offsets, self._importance), _SMALLEST)
        gain = along * (along / length)
        better = gain > self._gain
        self._gain[better] = gain[better]
        fitted = along / length
        self.scales[better] = np.where(np.abs(fitted) > _SMALLEST, fitted, 1)[better]
        self.zeros[better] = zeros[better]

    def extremes(self) -> None:
        """Scales that put the extreme weight at the lowest code, near it or beyond it; the zero point is the middle."""
        place = np.abs(self._blocks).argmax(-1, keepdims=True)
        extreme = np.take_along_axis(self._blocks, place, -1)[..., 0]
        middle = (self._highest + 1) // 2
        zeros = np.full(extreme.shape, middle, np.float32)
        for step in _CLIPPED * (16 / (self._highest + 1)):
            self.add(extreme * np.float32(-(1 + step) / middle), zeros)

    def ranges(self) -> None:
        """Scales for the whole range of a block, or most of it, with the zero points that centre it."""
        low, high = np.minimum(self._blocks.min(-1), 0), np.maximum(self._blocks.max(-1), 0)
        for step in _SHRUNK * (16 / (self._highest + 1)):
            scales = np.maximum(high - low, _SMALLEST) * np.float32((1 + step) / self._highest)
            centred = np.rint((self._highest - (low + high) / scales) / 2)
            for shift in (-1, 0, 1):
                self.add(scales, np.clip(centred + shift, 0, self._highest).astype(np.float32))


class ScaleSearch:
    """The scale of each block is searched; no text is needed. Rows are independent."""

    needs_moments = False

    def blocks(self, name: str, weight: Array, scheme: Scheme, moment: Array | None = None) -> BlockQuantized:
        """Quantizes (outputs, inputs) in blocks, without zero points."""
        return searched(weight, scheme).packed(scheme, weight.shape[1], zero_points=False)
