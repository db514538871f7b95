"""CUDA kernels of ours, in Triton: products with quantized weights, one token's attention over a cache, SwiGLU.

Imported where there is a GPU and triton loads, see `ops.cuda_kernels`. Each has a reference in plain torch beside it in
the models, which tests hold it against (without a GPU in Triton's interpreter).

Sources: the online softmax (arXiv:1805.02867), the split over keys (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Outputs and bytes of a row's codes that a program takes at a time, its warps, and loads of them under way plus one.
# To keep an H200's memory busy takes about 29 KB under way on each of its 132 multiprocessors: 4.8 TB/s for 0.8 us.
# By the registers that the kernels are compiled to these have 80 and 40 KB; not measured: see docs/log.md, "GPU".
TILES = {8: (4, 1024, 4, 4), 4: (4, 512, 4, 4)}
_MANY = (32, 128, 4)  # the same for 2 rows and more, which tensor cores multiply; int4: a group at a time
_LEAST = 16  # rows and columns that a product of tensor cores has at least
_SPLIT = 256  # entries of the cache that a program attends to, at most
_KEYS = 64  # of them at a time


def product(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor:  # (..., inputs) -> (..., outputs)
    """x W^T + bias for codes as `quantized.QuantizedLinear` has them; up to 16 rows."""
    inputs, (outputs, width) = x.shape[-1], codes.shape
    flat = x.reshape(-1, inputs)
    rows = len(flat)
    made = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    details = {"HALF": group // 2, "HAS_BIAS": bias is not None}
    given = (flat, codes, scales, scales if bias is None else bias, made, outputs, inputs, width)
    if rows == 1:
        tile, at_once, warps, stages = TILES[bits]
        kernel = _one_row_int8 if bits == 8 else _one_row_int4
        at_once = min(at_once, triton.next_power_of_2(width))
        kernel[(triton.cdiv(outputs, tile),)](
            *given, **details, TILE=tile, AT_ONCE=at_once, STAGES=stages, num_warps=warps
        )
    else:
        tile, at_once, warps = _MANY
        kernel = _few_rows_int8 if bits == 8 else _few_rows_int4
        padded = max(_LEAST, triton.next_power_of_2(rows))
        kernel[(triton.cdiv(outputs, tile),)](
            *given, rows, **details, ROWS=padded, TILE=tile, AT_ONCE=at_once, num_warps=warps
        )
    return made.view(*x.shape[:-1], outputs)


@triton.jit
def _one_row_int8(
    x, codes, scales, bias, made, outputs, inputs, width,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    within = out < outputs
    begins = codes + out.to(tl.int64)[:, None] * width
    total = tl.zeros((TILE, AT_ONCE), tl.float32)
    for first in tl.range(0, width, AT_ONCE, num_stages=STAGES):
        place = first + tl.arange(0, AT_ONCE)
        given = tl.load(x + place, mask=place < inputs, other=0.0).to(tl.float32)
        weight = tl.load(begins + place[None, :], mask=within[:, None] & (place < width)[None, :], other=0)
        total += weight.to(tl.float32) * given[None, :]
    result = tl.sum(total, 1) * tl.load(scales + out, mask=within, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + out, mask=within, other=0.0).to(tl.float32)
    tl.store(made + out, result.to(made.dtype.element_ty), mask=within)


@triton.jit
def _one_row_int4(
    x, codes, scales, bias, made, outputs, inputs, width,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A tile is (outputs, groups, bytes of a group), so that a scale is read once for a thread's bytes of a group.
    GROUPS: tl.constexpr = AT_ONCE // HALF if AT_ONCE > HALF else 1
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    within = out < outputs
    groups = width // HALF
    inside = tl.arange(0, HALF)
    total = tl.zeros((TILE, GROUPS, HALF), tl.float32)
    begins = codes + out.to(tl.int64)[:, None, None] * width
    for first in tl.range(0, groups, GROUPS, num_stages=STAGES):
        group = first + tl.arange(0, GROUPS)
        known = within[:, None] & (group < groups)[None, :]
        place = group[:, None] * (2 * HALF) + inside[None, :]
        low = tl.load(x + place, mask=place < inputs, other=0.0).to(tl.float32)
        high = tl.load(x + place + HALF, mask=place + HALF < inputs, other=0.0).to(tl.float32)
        packed = tl.load(
            begins + (group[:, None] * HALF + inside[None, :])[None, :, :], mask=known[:, :, None], other=0
        )
        scale = tl.load(scales + out[:, None] * groups + group[None, :], mask=known, other=0.0).to(tl.float32)
        # Codes are stored plus 8, which is taken off their sum: -8 (low + high), the same for all outputs.
        part = (-8.0 * (low + high))[None, :, :] + (packed & 15).to(tl.float32) * low[None, :, :]
        part += (packed >> 4).to(tl.float32) * high[None, :, :]
        total += part * scale[:, :, None]
    result = tl.sum(tl.sum(total, 2), 1)
    if HAS_BIAS:
        result += tl.load(bias + out, mask=within, other=0.0).to(tl.float32)
    tl.store(made + out, result.to(made.dtype.element_ty), mask=within)


@triton.jit
def _few_rows_int8(
    x, codes, scales, bias, made, outputs, inputs, width, rows,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    within, real = out < outputs, row < rows
    begins = codes + out.to(tl.int64)[None, :] * width
    total = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(0, width, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        given = tl.load(
            x + row[:, None] * inputs + place[None, :], mask=real[:, None] & (place < inputs)[None, :], other=0.0
        )
        weight = tl.load(begins + place[:, None], mask=within[None, :] & (place < width)[:, None], other=0)
        total = tl.dot(given, weight.to(given.dtype), total, input_precision="ieee")
    result = total * tl.load(scales + out, mask=within, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + out, mask=within, other=0.0).to(tl.float32)[None, :]
    target = made + row[:, None] * outputs + out[None, :]
    tl.store(target, result.to(made.dtype.element_ty), mask=real[:, None] & within[None, :])


@triton.jit
def _few_rows_int4(
    x, codes, scales, bias, made, outputs, inputs, width, rows,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    within, real = out < outputs, row < rows
    groups = width // HALF
    inside = tl.arange(0, HALF)
    begins = codes + out.to(tl.int64)[None, :] * width
    total = tl.zeros((ROWS, TILE), tl.float32)
    for group in range(groups):
        place = group * (2 * HALF) + inside
        source = x + row[:, None] * inputs + place[None, :]
        low = tl.load(source, mask=real[:, None] & (place < inputs)[None, :], other=0.0)
        high = tl.load(source + HALF, mask=real[:, None] & (place + HALF < inputs)[None, :], other=0.0)
        packed = tl.load(begins + (group * HALF + inside)[:, None], mask=within[None, :], other=8 | 8 << 4)
        part = tl.dot(low, ((packed & 15).to(tl.float32) - 8.0).to(low.dtype), input_precision="ieee")
        part = tl.dot(high, ((packed >> 4).to(tl.float32) - 8.0).to(low.dtype), part, input_precision="ieee")
        total += part * tl.load(scales + out * groups + group, mask=within, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + out, mask=within, other=0.0).to(tl.float32)[None, :]
    target = made + row[:, None] * outputs + out[None, :]
    tl.store(target, total.to(made.dtype.element_ty), mask=real[:, None] & within[None, :])


# ----------------------------------------------------------------------------------------------------------------


def gated(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves: (..., 2 I) -> (..., I)."""
    source = gate_and_up.contiguous()
    size = source.shape[-1] // 2
    made = torch.empty(*source.shape[:-1], size, dtype=source.dtype, device=source.device)
    block = min(1024, triton.next_power_of_2(size))
    _gated[(source.numel() // (2 * size), triton.cdiv(size, block))](source, made, size, BLOCK=block)
    return made


@triton.jit
def _gated(source, made, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = place < size
    gate = tl.load(source + row * 2 * size + place, mask=within, other=0.0).to(tl.float32)
    up = tl.load(source + row * 2 * size + size + place, mask=within, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(made + row * size + place, result.to(made.dtype.element_ty), mask=within)


# ----------------------------------------------------------------------------------------------------------------


def attended(
    qkv: Tensor,  # (B, 1, (H + 2 K) D)
    cos: Tensor,  # (B or 1, 1, 1, D), each angle twice
    sin: Tensor,  # the same, the first half negated
    norms: tuple[Tensor, Tensor, float] | None,  # of queries and keys, head by head: weights (D,), epsilon
    keys: Tensor,  # (B, K, capacity, D)
    values: Tensor,
    positions: Tensor,  # (B, 1), of the new tokens, which attend to all before them, or to the window's
    window: int | None,
) -> Tensor:  # (B, 1, H D)
    """Turns query and key, writes key and value into the cache, and attends: all of attention between its products."""
    rows, narrow, capacity, size = keys.shape
    heads = qkv.shape[-1] // size - 2 * narrow
    groups, splits = heads // narrow, triton.cdiv(capacity, _SPLIT)
    made = torch.empty(rows, 1, heads * size, dtype=qkv.dtype, device=qkv.device)
    # Of each split: the weighted values, and the maximum and sum of the softmax. One split has them in registers.
    parts = torch.empty(rows, splits, heads, size + 2, dtype=torch.float32, device=qkv.device) if splits > 1 else made
    query_norm, key_norm, epsilon = norms or (cos, cos, 0.0)
    padded = triton.next_power_of_2(size)
    _attended[(rows, narrow, splits)](
        qkv, cos, sin, cos.stride(0) if len(cos) > 1 else 0, query_norm, key_norm, epsilon,
        keys, values, positions, made, parts, narrow, capacity, window or 0, size**-0.5,
        SIZE=size, PADDED=max(_LEAST, padded), GROUPS=groups, ROWS=max(_LEAST, triton.next_power_of_2(groups)),
        NORMED=norms is not None, SPLIT=_SPLIT, KEYS=_KEYS, WHOLE=splits == 1,
    )  # fmt: skip
    if splits > 1:
        _joined[(rows, heads)](
            parts, made, splits, heads, SIZE=size, PADDED=padded, SPLITS=triton.next_power_of_2(splits)
        )
    return made


@triton.jit
def _turned(source, row, place, cos, sin, norm, epsilon, mask, SIZE: tl.constexpr, NORMED: tl.constexpr):
    # Heads (row, place) at `source`, normed and turned by their position's angle, in float32.
    swapped = (place + SIZE // 2) % SIZE
    own = tl.load(source + row * SIZE + place, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + row * SIZE + swapped, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        inverse = tl.rsqrt(tl.sum(own * own, 1) / SIZE + epsilon)[:, None]
        own *= inverse * tl.load(norm + place, mask=place < SIZE, other=0.0).to(tl.float32)
        other *= inverse * tl.load(norm + swapped, mask=place < SIZE, other=0.0).to(tl.float32)
    known = place < SIZE
    return own * tl.load(cos + place, mask=known, other=0.0).to(tl.float32) + other * tl.load(
        sin + place, mask=known, other=0.0
    ).to(tl.float32)


@triton.jit
def _attended(
    qkv, cos, sin, turn, query_norm, key_norm, epsilon, keys, values, positions, made, parts, narrow, capacity, window,
    scale, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, NORMED: tl.constexpr,
    SPLIT: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    batch, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + batch)
    place, row = tl.arange(0, PADDED)[None, :], tl.arange(0, ROWS)[:, None]
    one = tl.zeros((1, 1), tl.int32)
    known = place < SIZE
    real = (row < GROUPS) & known
    source = qkv + batch * (GROUPS + 2) * narrow * SIZE
    cos += batch * turn
    sin += batch * turn
    query = _turned(
        source + head * GROUPS * SIZE, row, place, cos, sin, query_norm, epsilon, real, SIZE=SIZE, NORMED=NORMED
    )
    element: tl.constexpr = keys.dtype.element_ty
    query = (query * scale).to(element)
    begin = (batch * narrow + head) * capacity * SIZE
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    length = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), -1e30, tl.float32)
    if split == 0:  # the new token itself, which the cache need not have yet
        fresh = source + (GROUPS * narrow + head) * SIZE
        key = _turned(fresh, one, place, cos, sin, key_norm, epsilon, known, SIZE=SIZE, NORMED=NORMED).to(element)
        value = tl.load(fresh + narrow * SIZE + place, mask=known, other=0.0).to(element)
        tl.store(keys + begin + position * SIZE + place, key, mask=known)
        tl.store(values + begin + position * SIZE + place, value, mask=known)
        highest = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)
        length += 1.0
        total += value.to(tl.float32)
    end = tl.minimum((split + 1) * SPLIT, position)
    for entry in range(split * SPLIT, end, KEYS):
        index = entry + tl.arange(0, KEYS)
        held = (index >= first) & (index < position)
        at = begin + index[:, None].to(tl.int64) * SIZE + place
        key = tl.load(keys + at, mask=held[:, None] & known, other=0.0)
        value = tl.load(values + at, mask=held[:, None] & known, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(held[None, :], scores, -1e30)
        top = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.where(held[None, :], tl.exp(scores - top[:, None]), 0.0)
        fall = tl.exp(highest - top)
        length = length * fall + tl.sum(shares, 1)
        total = tl.dot(shares.to(element), value, total * fall[:, None], input_precision="ieee")
        highest = top
    where = head * GROUPS + row
    if WHOLE:
        target = made + batch * GROUPS * narrow * SIZE + where * SIZE + place
        tl.store(target, (total / length[:, None]).to(made.dtype.element_ty), mask=real)
    else:
        target = parts + ((batch * tl.num_programs(2) + split) * GROUPS * narrow + where) * (SIZE + 2)
        tl.store(target + place, total, mask=real)
        tl.store(target + SIZE, highest[:, None], mask=row < GROUPS)
        tl.store(target + SIZE + 1, length[:, None], mask=row < GROUPS)


@triton.jit
def _joined(parts, made, splits, heads, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, place = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    source = parts + ((batch * splits + split) * heads + head) * (SIZE + 2)
    real = split < splits
    highest = tl.load(source + SIZE, mask=real, other=-1e30)
    length = tl.load(source + SIZE + 1, mask=real, other=0.0)
    share = tl.exp(highest - tl.max(highest, 0))
    total = tl.load(source[:, None] + place[None, :], mask=real[:, None] & (place < SIZE)[None, :], other=0.0)
    result = tl.sum(total * share[:, None], 0) / tl.sum(length * share, 0)
    tl.store(made + (batch * heads + head) * SIZE + place, result.to(made.dtype.element_ty), mask=place < SIZE)
