"""Codes that leave the least error in a product's outputs, given the second moments of its inputs.

The error of an output is d^T M d, with d the error of its row of weights and M = E[x x^T]. Three steps: scales are
searched (`scale_search`); columns are rounded one after the other, the inputs of most energy first, each one's error
made up for by those that are still free (GPTQ, arXiv:2210.17323; scales are fixed, so any order will do); then every
code in turn takes its best value with all others fixed (coordinate descent, as in QuantEase, arXiv:2309.01885), and
scales are refitted in closed form between the passes.

Invariant: no step after the second raises the error that is minimised.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from llmcli.errors import CheckError
from llmcli.onnx.quantize import BlockQuantized, Scheme, blocked
from llmcli.onnx.scale_search import Rounding, searched
from llmcli.onnx.weights import Array

_CHUNK = 64  # columns between products with the whole matrix
_TINY = np.float32(1e-30)


def damped(moment: Array, share: float) -> npt.NDArray[np.float64]:
    """The moments with `share` of their mean diagonal added to it: few tokens say little of rare directions."""
    found = moment.astype(np.float64)
    mean = float(np.trace(found)) / len(found)
    found[np.diag_indices_from(found)] += share * mean if mean > 0 else 1.0
    return found


def output_error(weight: Array, rounded: Array, moment: Array) -> float:
    """The mean squared error of the outputs, summed over them: trace(d M d^T)."""
    difference = weight - rounded
    return float(np.vdot(difference @ moment, difference))


class LeastError:
    """Scale search, error feedback and coordinate descent against the moments of the inputs. Rows are independent.

    `damping`: share of the moments' mean diagonal added to it. `passes`: of the descent. `zero_points`: a code for
    zero in each block, 4 bits more for it.
    """

    needs_moments = True

    def __init__(self, *, damping: float = 0.02, passes: int = 2, zero_points: bool = False) -> None:
        self.damping, self.passes, self.zero_points = damping, passes, zero_points

    def blocks(self, name: str, weight: Array, scheme: Scheme, moment: Array | None = None) -> BlockQuantized:
        """Quantizes (outputs, inputs) in blocks. Without moments the error of the weights themselves is minimised.

        Raises CheckError for moments that are not finite: the model has a weight that is not, or overflows.
        """
        if moment is not None and not np.isfinite(moment).all():
            raise CheckError(f"what the model makes of text before {name} is not finite (NaN or infinite)")
        found = self.rounded(weight, scheme, moment)
        return found.packed(scheme, weight.shape[1], zero_points=self.zero_points)

    def rounded(self, weight: Array, scheme: Scheme, moment: Array | None) -> Rounding:
        """The codes, not packed yet."""
        if moment is None:
            return searched(weight, scheme, zero_points=self.zero_points)
        inputs = weight.shape[1]
        metric = np.eye(-(-inputs // scheme.block_size) * scheme.block_size)  # of filling: any will do
        metric[:inputs, :inputs] = damped(moment, self.damping)
        start = searched(weight, scheme, np.diag(metric)[:inputs].astype(np.float32), zero_points=self.zero_points)
        weight = blocked(weight, scheme.block_size).reshape(len(weight), -1)
        found = with_feedback(weight, metric, start, scheme.bits)
        for _ in range(self.passes):
            found = descended(weight, metric.astype(np.float32), refitted(weight, metric, found), scheme.bits)
        return refitted(weight, metric, found)


def with_feedback(weight: Array, metric: npt.NDArray[np.float64], start: Rounding, bits: int) -> Rounding:
    """GPTQ at the scales of `start`. weight: (outputs, inputs); metric: (inputs, inputs), positive definite."""
    highest, size = (1 << bits) - 1, weight.shape[1] // start.scales.shape[1]
    order = np.argsort(-np.diag(metric), kind="stable")
    # Row j of the factor tells how the error of column j is shared out over the columns after it.
    factor = np.linalg.cholesky(np.linalg.inv(metric[np.ix_(order, order)])).T.astype(np.float32)
    scales, zeros = np.ascontiguousarray(start.scales.T), np.ascontiguousarray(start.zeros.T)  # (blocks, outputs)
    left = np.ascontiguousarray(weight.T[order])  # (inputs, outputs), what each column shall still stand for
    codes = np.empty(left.shape, np.uint8)
    for first in range(0, len(left), _CHUNK):
        last = min(first + _CHUNK, len(left))
        errors = np.empty((last - first, left.shape[1]), np.float32)
        for column in range(first, last):
            scale, zero = scales[order[column] // size], zeros[order[column] // size]
            code = np.clip(np.rint(left[column] / scale) + zero, 0, highest)
            codes[order[column]] = code
            error = (left[column] - (code - zero) * scale) / factor[column, column]
            left[column + 1 : last] -= factor[column, column + 1 : last, None] * error
            errors[column - first] = error
        left[last:] -= factor[first:last, last:].T @ errors
    return dataclasses.replace(start, codes=np.ascontiguousarray(codes.T))


def refitted(weight: Array, metric: npt.NDArray[np.float64], found: Rounding, passes: int = 2) -> Rounding:
    """The same codes at scales that leave less error: each block's in turn is set to its best."""
    wide = metric.astype(np.float32)
    size = weight.shape[1] // found.scales.shape[1]
    scales = found.scales.copy()
    offsets = found.codes.astype(np.float32) - np.repeat(found.zeros, size, 1)
    gradient = (weight - found.weights()) @ wide  # (outputs, inputs)
    for _ in range(passes):
        for block in range(scales.shape[1]):
            here = slice(block * size, (block + 1) * size)
            reach = offsets[:, here] @ wide[here]  # (outputs, inputs)
            length = np.einsum("nk,nk->n", reach[:, here], offsets[:, here])
            along = np.einsum("nk,nk->n", gradient[:, here], offsets[:, here])
            step = np.where(length > _TINY, along / np.maximum(length, _TINY), 0).astype(np.float32)
            step[scales[:, block] + step == 0] = 0  # a scale of zero would be the end of its block
            scales[:, block] += step
            gradient -= step[:, None] * reach
    return dataclasses.replace(found, scales=scales)


def descended(weight: Array, metric: Array, found: Rounding, bits: int) -> Rounding:
    """One pass of coordinate descent over the codes, the inputs of most energy first."""
    highest, size = (1 << bits) - 1, weight.shape[1] // found.scales.shape[1]
    scales = np.ascontiguousarray(found.scales.T)  # (blocks, outputs)
    codes = np.ascontiguousarray(found.codes.T).astype(np.float32)  # (inputs, outputs)
    gradient = metric @ (weight - found.weights()).T  # (inputs, outputs)
    energy = np.diag(metric)
    order = np.argsort(-energy, kind="stable")
    for first in range(0, len(order), _CHUNK):
        chosen = order[first : first + _CHUNK]
        near, slope = metric[np.ix_(chosen, chosen)], gradient[chosen]
        moves = np.empty_like(slope)
        for place, column in enumerate(chosen):
            scale = scales[column // size]
            code = np.clip(np.rint(codes[column] + slope[place] / (energy[column] * scale)), 0, highest)
            moves[place] = (code - codes[column]) * scale
            codes[column] = code
            slope -= near[:, place, None] * moves[place]
        gradient -= metric[:, chosen] @ moves
    return dataclasses.replace(found, codes=np.ascontiguousarray(codes.T).astype(np.uint8))
