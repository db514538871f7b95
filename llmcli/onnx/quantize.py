"""Quantization: which product a matrix gets, and how its numbers become few bits.

`Plan.scheme` is the one place that decides the kind of matrix product; a `Quantizer` decides the codes and scales.
Formats: MatMulNBits and MatMulIntegerToFloat of onnxruntime (docs/ContribOperators.md there).

Invariant: what a product computes with is `dequantized()`, whatever method chose the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmcli.errors import ConfigError
from llmcli.onnx.weights import Array

Codes = npt.NDArray[np.uint8]
FLOAT, BLOCKS, CHANNELS = "float", "blocks", "channels"
BLOCK_SIZES = (128, 64, 32)
_FILLED = 1 / 8  # more inputs than there are, which the last block of 128 may be filled up with


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is held: FLOAT; BLOCKS of `block_size` inputs with a scale each; CHANNELS: a scale an output."""

    kind: str = FLOAT
    bits: int = 32
    block_size: int = 0

    def __str__(self) -> str:
        blocks = f", blocks of {self.block_size}" if self.kind == BLOCKS else ""
        return f"{'float' if self.kind == FLOAT else 'int'}{self.bits}{blocks}"


@dataclasses.dataclass(frozen=True, slots=True)
class BlockQuantized:
    """A matrix in blocks along its inputs: weight = (code - zero point) * scale."""

    scheme: Scheme
    inputs: int
    data: Codes  # (outputs, blocks, block_size * bits / 8), the first code in the low bits
    scales: Array  # (outputs, blocks)
    zero_points: Codes | None = None  # (outputs, ceil(blocks * bits / 8)), packed as data; None: the middle code

    def codes(self) -> Codes:
        """One code a byte: (outputs, inputs)."""
        return unpacked(self.data, self.scheme.bits).reshape(len(self.data), -1)[:, : self.inputs]

    def middles(self) -> Codes:
        """The codes that mean zero, one a byte: (outputs, blocks)."""
        if self.zero_points is None:
            return np.full(self.scales.shape, 1 << (self.scheme.bits - 1), np.uint8)
        return unpacked(self.zero_points, self.scheme.bits)[:, : self.scales.shape[1]]

    def dequantized(self) -> Array:
        """The weights that the product computes with: (outputs, inputs), float32."""
        codes = blocked(self.codes().astype(np.float32), self.scheme.block_size)
        weight = (codes - self.middles()[..., None]) * self.scales[..., None]
        return np.ascontiguousarray(weight.reshape(len(codes), -1)[:, : self.inputs])


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelQuantized:
    """A matrix of int8 with a scale an output, laid out as MatMulIntegerToFloat takes it."""

    data: npt.NDArray[np.int8]  # (inputs, outputs)
    scales: Array  # (outputs,)

    def dequantized(self) -> Array:
        """The weights that the product computes with: (outputs, inputs), float32."""
        return np.ascontiguousarray((self.data.astype(np.float32) * self.scales).T)


def packed(codes: Codes, bits: int) -> Codes:
    """Codes (..., n) of 8 bits into bytes of the last dimension; 4 bits: two a byte, n filled up with zeros."""
    if bits == 8:
        return np.ascontiguousarray(codes, np.uint8)
    if codes.shape[-1] % 2:
        codes = np.concatenate((codes, np.zeros((*codes.shape[:-1], 1), np.uint8)), -1)
    return np.ascontiguousarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


def unpacked(data: Codes, bits: int) -> Codes:
    """The codes of packed bytes: (..., n) -> (..., n * 8 / bits)."""
    if bits == 8:
        return data
    return np.stack((data & 15, data >> 4), -1).reshape(*data.shape[:-1], -1)


def blocked(weight: Array, block_size: int) -> Array:
    """(outputs, inputs) -> (outputs, blocks, block_size), filled up with zeros."""
    outputs, inputs = weight.shape
    missing = -inputs % block_size
    if missing:
        weight = np.concatenate((weight, np.zeros((outputs, missing), np.float32)), 1)
    return weight.reshape(outputs, -1, block_size)


def storable(scales: Array, bits: int) -> Array:
    """The scales of 4-bit codes as float16 holds them, where it does to a part in a thousand: half the bytes."""
    if bits > 4:
        return scales  # their error would be near the codes' own
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16).astype(np.float32)
    return half if bool((np.abs(half - scales) <= 1e-3 * np.abs(scales)).all()) else scales


class Quantizer(Protocol):
    """A method that chooses codes and scales. Rows are independent: it may be given some of a matrix's rows."""

    needs_moments: bool  # whether it wants the second moments of each product's inputs, from a calibration text

    def blocks(self, name: str, weight: Array, scheme: Scheme, moment: Array | None = None) -> BlockQuantized:
        """Quantizes (outputs, inputs) in blocks. `moment`: (inputs, inputs), the mean of x x^T over the text."""
        ...


class RoundToNearest:
    """Each block's extreme value gets the outermost code, the rest the nearest (llama.cpp's Q4_0 and Q8_0)."""

    needs_moments = False

    def blocks(self, name: str, weight: Array, scheme: Scheme, moment: Array | None = None) -> BlockQuantized:
        """Rounds; without zero points, as the extreme decides the sign of the scale."""
        found = [_rounded(piece, scheme) for piece in _in_pieces(weight)]
        data = np.concatenate([each[0] for each in found])
        return BlockQuantized(
            scheme, weight.shape[1], data, storable(np.concatenate([each[1] for each in found]), scheme.bits)
        )


def _in_pieces(weight: Array, elements: int = 1 << 20) -> list[Array]:
    """Rows that fit the cores' caches: intermediate arrays stay small."""
    step = max(1, elements // weight.shape[1])
    return [weight[first : first + step] for first in range(0, len(weight), step)]


def _rounded(weight: Array, scheme: Scheme) -> tuple[Codes, Array]:
    blocks = blocked(weight, scheme.block_size)
    middle = 1 << (scheme.bits - 1)
    low, high = blocks.min(-1), blocks.max(-1)
    extreme = np.where(-low >= high, low, high)
    scales = (extreme / -middle).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, 0, 1 / scales).astype(np.float32)
    codes = np.rint(blocks * inverse[..., None])
    codes += middle
    return packed(np.clip(codes, 0, 2 * middle - 1).astype(np.uint8), scheme.bits), scales


def round_channels(weight: Array) -> ChannelQuantized:
    """int8 with a scale an output."""
    scales = (np.abs(weight).max(1) / 127).astype(np.float32)
    scales[scales == 0] = 1
    codes = np.rint(weight / scales[:, None]).astype(np.int8)
    return ChannelQuantized(np.ascontiguousarray(codes.T), scales)


class Moments(Protocol):
    """Second moments by the name of a matrix, asked for in the order of the blocks (see `calibrate`)."""

    def get(self, name: str) -> Array | None:
        """(inputs, inputs), the mean of x x^T of what the matrix is multiplied with; None where it is not known."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each matrix becomes. `moments`: for a quantizer that needs them; `schemes`: exceptions by name."""

    precision: str = "fp32"  # fp32, fp16, int8, int4
    block_size: int | None = None  # None: chosen for each matrix
    largest: int = 64  # block that int4 chooses: 64, or 128 (docs/log.md)
    weight_only: bool = False  # int8: activations stay float, rows stay independent
    quantizer: Quantizer = dataclasses.field(default_factory=RoundToNearest)
    moments: Moments | Mapping[str, Array] = dataclasses.field(default_factory=dict)
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    in_blocks: tuple[str, ...] = ()  # ends of names: matrices whose activations int8 quantizes block by block too
    portable: bool = False  # standard operators alone, among which nothing quantizes activations for the product
    activations: str = "row"  # of int8 with a scale an output: one scale for each "row", or one for the whole "tensor"
    few: int = 1 << 15  # weights; below, the nodes around a product by channels take longer than it saves (docs/log.md)
    float_prompts: bool = False  # products in blocks leave activations as they are, which pays for many rows at once
    common: float = 0.0  # share of the ids, the lowest, whose rows of embedding and head int4 keeps in int8

    def parts(self, name: str, shape: tuple[int, int], role: str = "") -> tuple[tuple[int, Scheme], ...]:
        """The kinds of product of a matrix's rows: (how many, which), one after the other; mostly one for all."""
        scheme = self.scheme(name, shape, role)
        count = int(self.common * shape[0]) if role and not self.portable else 0
        if not count or (scheme.kind, scheme.bits) != (BLOCKS, 4):
            return ((shape[0], scheme),)
        return (count, Scheme(BLOCKS, 8, scheme.block_size)), (shape[0] - count, scheme)

    def scheme(self, name: str, shape: tuple[int, int], role: str = "") -> Scheme:
        """The kind of product of a matrix (outputs, inputs). `role`: "embedding" (tied to a head or not), "head" or "".

        One row is bound by memory, whatever the operator; from four rows up products of int8 by channels are the
        fastest by far (docs/log.md). An embedding is held in blocks, which gather too; a head's errors reach the logits
        unsoftened, and it seldom sees more than one row.
        """
        if self.precision in ("fp32", "fp16"):
            return Scheme(FLOAT, 32 if self.precision == "fp32" else 16)
        if name in self.schemes:
            return self.schemes[name]
        bits = 4 if self.precision == "int4" else 8
        block = self._block(name, shape[1], small=bits == 8 or role != "")
        if role == "embedding":
            # GatherBlockQuantized knows no block that is not full.
            return Scheme(FLOAT) if shape[1] % block else Scheme(BLOCKS, bits, block)
        by_channel = bits == 8 and not self.weight_only and not self.portable and role != "head"
        by_channel = by_channel and shape[0] * shape[1] >= self.few
        if by_channel and not (self.in_blocks and name.endswith(self.in_blocks)):
            return Scheme(CHANNELS, 8)
        return Scheme(BLOCKS, bits, block)

    def _block(self, name: str, inputs: int, *, small: bool) -> int:
        # An embedding's blocks must be full and a head's errors reach the logits; in int8, rows side by side in blocks
        # of 128 are no longer exactly what they are alone.
        if self.block_size is None:
            if self.largest == 128 and not small and -inputs % 128 <= _FILLED * inputs:
                return 128
            return next((size for size in BLOCK_SIZES[1:] if inputs % size == 0), BLOCK_SIZES[-1])
        if inputs % self.block_size:
            fitting = ", ".join(str(size) for size in BLOCK_SIZES if inputs % size == 0)
            raise ConfigError(
                f"blocks of {self.block_size} do not divide the {inputs} inputs of {name}; "
                f"take auto{f' or {fitting}' if fitting else ''}",
                where="block_size",
            )
        return self.block_size

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row of a run gives what it gives alone (but for rounding)."""
        return self.activations == "row" or self.precision != "int8" or self.weight_only or self.portable
