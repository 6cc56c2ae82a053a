"""The kernels of the fused backend, in Triton. See fused.py for how and when they are called.

A program of `partial_grams` reads a range of features of one minibatch once, by their strides. It subtracts a common
vector (the elementwise median of three samples), cuts the float32 difference into bfloat16 pieces whose sum has 16
(PIECES = 2) or 24 bits (PIECES = 3), multiplies the pieces on tensor cores with float32 accumulators, and writes one
partial matrix. `add_partials` adds those of many layers in float64, and `centre_grams` goes on from there.

With h + m + s the pieces of X, X X' = h h' + (h m' + m h') + m m' + (h s' + s h') + ... The second and the fourth
term are each a matrix plus its transpose, so `mixed` keeps only h m' + h s', and `even` keeps what is symmetric by
itself.

Range: squares of numbers below 2^-30 or above 2^50 come near the ends of float32's range. A program sees this in the
    sum of the squares it has made, and then goes over its range once more with a power of two as a factor, which
    `add_partials` takes out again. Nothing has to be known in advance, and numbers within range are read once.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Whether a compiled kernel also gets its constants when it is launched.
TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
# The interpreter, in which tests run without a GPU, has no bfloat16 products. Pieces are exact in float32, too.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Sums of squares between these are right as they are. Outside, factors bring them into this range.
SMALL, LARGE = tl.constexpr(2.0**-60), tl.constexpr(2.0**100)
UP, DOWN = tl.constexpr(2.0**80), tl.constexpr(2.0**-80)


@triton.jit
def _product(a, b, total):
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee")
    return tl.dot(a.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16)), total)


@triton.jit
def _high(x):
    # The upper 16 bits of a float32: a bfloat16, rounded towards zero. What is left is exact in float32.
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    # As `_high`, to the nearest one: what is left has either sign, and averages out. A NaN may become 0.
    return ((x.to(tl.int32, bitcast=True) + 32768) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _first_feature(program, per_program, LONG: tl.constexpr):
    """The index of a program's first feature."""
    return (program.to(tl.int64) if LONG else program) * per_program


@triton.jit
def _place(feature, channels, sp, sc, UNIT: tl.constexpr, FLAT: tl.constexpr):
    """The distance of a feature from the first one of its sample, in numbers."""
    inner = feature if FLAT else feature % channels
    at = inner if UNIT else inner.to(tl.int64) * sc
    return at if FLAT else at + feature // channels * sp


@triton.jit(do_not_specialize=["slot", "n", "features", "channels", "blocks", "sm", "sn", "sp", "sc"])
def partial_grams(
    X, PARTIAL, NORMS, SCALES, slot, n, features, channels, blocks, sm, sn, sp, sc,
    N: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr, PIECES: tl.constexpr, STEP: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Write a partial matrix of each range of features to PARTIAL (slots, N, N) float32.

    X is (m * n, P, C) with strides sn, sp and sc; minibatches are sm apart. A program takes `blocks` of BLOCK
    features, with up to SUM features in one float32 sum. It also leaves in its slot the squared norm of the vector
    that it subtracted (NORMS, float64) and a factor by which to multiply each number twice (SCALES, float32).

    STEP: numbers of features and all strides but sc come divided by it, so that the compiler knows which addresses
        are multiples of 16 bytes. UNIT: sc is 1. FLAT: sc leads through all features of a sample. EVEN: n is N. LONG:
        there are more than 2^30 features.
    """
    program, minibatch = tl.program_id(0), tl.program_id(1)
    if LONG:
        features, channels = features.to(tl.int64), channels.to(tl.int64)
    features, channels = features * STEP, channels * STEP
    sm, sn, sp = sm.to(tl.int64) * STEP, sn.to(tl.int64) * STEP, sp.to(tl.int64) * STEP
    samples = tl.arange(0, N)
    base = X + minibatch * sm
    rows = base + samples[:, None] * sn
    second_row, third_row = base + (n // 2) * sn, base + (n - 1) * sn
    is_sample = (samples < n)[:, None]
    start = _first_feature(program, blocks * BLOCK, LONG)
    end = tl.minimum(start + blocks * BLOCK, features)
    where = (slot + minibatch * tl.num_programs(0) + program).to(tl.int64)
    out = PARTIAL + where * N * N + samples[:, None] * N + samples[None, :]
    scale = 1.0
    tries = 0
    while tries < 2:
        size = 0.0
        norm = tl.zeros((BLOCK,), tl.float64)
        # At least once: a program without features leaves zeros.
        for first_of_sum in range(start, tl.maximum(end, start + 1), SUM):
            even = tl.zeros((N, N), tl.float32)
            mixed = tl.zeros((N, N), tl.float32)
            for low in range(first_of_sum, tl.minimum(first_of_sum + SUM, end), BLOCK):
                feature = low + tl.arange(0, BLOCK)
                there = feature < features
                at = _place(feature, channels, sp, sc, UNIT, FLAT)
                first = tl.load(base + at, mask=there, other=0.0).to(tl.float32)
                second = tl.load(second_row + at, mask=there, other=0.0).to(tl.float32)
                third = tl.load(third_row + at, mask=there, other=0.0).to(tl.float32)
                common = tl.maximum(tl.minimum(first, second), tl.minimum(tl.maximum(first, second), third))
                norm += common.to(tl.float64) * common.to(tl.float64)
                if EVEN:
                    x = tl.load(rows + at[None, :], mask=there[None, :], other=0.0).to(tl.float32)
                    x = (x - common[None, :]) * scale
                else:
                    x = tl.load(rows + at[None, :], mask=there[None, :] & is_sample, other=0.0).to(tl.float32)
                    x = tl.where(is_sample, (x - common[None, :]) * scale, 0.0)
                h = _high(x)
                m = _rounded(x - h)
                even = _product(h, h, even)
                mixed = _product(h, m, mixed)
                even = _product(m, m, even)
                if PIECES == 3:
                    mixed = _product(h, _high(x - h - m), mixed)
            total = even + mixed + tl.trans(mixed)
            size += tl.sum(tl.sum(tl.where(samples[:, None] == samples[None, :], total, 0.0), 1), 0)
            if first_of_sum > start:
                # This program wrote these itself, from any of its threads.
                tl.debug_barrier()
                total += tl.load(out)
            tl.store(out, total)
        tl.store(NORMS + where, tl.sum(norm, 0))
        tl.store(SCALES + where, 1.0 / scale)
        factor = tl.where(size < SMALL, UP, tl.where(size <= LARGE, 1.0, DOWN))
        tries = tl.where((tries == 0) & (factor != 1.0), 1, 2)
        scale = factor


@triton.jit(do_not_specialize=["n"])
def add_partials(
    PARTIAL, NORMS, SCALES, TABLE, GRAMS, SHIFTS, n, N: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Add partial matrices to GRAMS (rows, n, n), and norms of subtracted vectors to SHIFTS (rows,), float64.

    TABLE has (first slot, slots, row) for each Gram matrix, int64. Both triangles are made from the lower one, so
    that the result is symmetric to the bit.
    """
    entry = TABLE + tl.program_id(0) * 3
    slot, slots, row = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = at // N, at % N
    needed = (i < n) & (j <= i)
    total = tl.zeros((BLOCK,), tl.float64)
    norm = tl.zeros((SLOTS,), tl.float64)
    for low in range(0, slots, SLOTS):
        some = low + tl.arange(0, SLOTS)
        there = some < slots
        some = slot + some
        scale = tl.load(SCALES + some, mask=there, other=0.0).to(tl.float64)
        partial = tl.load(
            PARTIAL + some[:, None] * N * N + at[None, :], mask=there[:, None] & needed[None, :], other=0.0
        )
        total += tl.sum(partial.to(tl.float64) * scale[:, None] * scale[:, None], 0)
        norm += tl.load(NORMS + some, mask=there, other=0.0)
    out = GRAMS + row * n * n
    tl.store(out + i * n + j, total, mask=needed)
    tl.store(out + j * n + i, total, mask=needed)
    if tl.program_id(1) == 0:
        tl.store(SHIFTS + row, tl.sqrt(tl.sum(norm, 0)))


@triton.jit
def _centred(grams, offsets, i, j, n):
    """Rows i and columns j of a U-centred Gram matrix, zero on the diagonal and beyond n."""
    needed = (i < n)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])
    values = tl.load(grams + i[:, None] * n + j[None, :], mask=needed, other=0.0)
    of_rows = tl.load(offsets + i, mask=i < n, other=0.0)
    of_columns = tl.load(offsets + j, mask=j < n, other=0.0)
    return tl.where(needed, values - of_rows[:, None] - of_columns[None, :], 0.0)


@triton.jit(do_not_specialize=["n"])
def centre_grams(
    GRAMS, SHIFTS, OFFSETS, VECTORS, SPREAD, SIZE, FINITE, PARTS, CUBES, n, N: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Make from linear GRAMS (rows, n, n) what `Minibatches.of` makes, unbiased, one row per program.

    VECTORS (rows, n (n - 1) / 2), SPREAD and SIZE (rows,), PARTS (rows, n) and CUBES (rows, 2) are float64, FINITE
    (rows,) bool; OFFSETS (rows, n) float64 is scratch.
    """
    row = tl.program_id(0).to(tl.int64)
    grams, offsets = GRAMS + row * n * n, OFFSETS + row * n
    i = tl.arange(0, N)
    there = i < n
    sums = tl.zeros((N,), tl.float64)
    for low in range(0, N, BLOCK):
        j = low + tl.arange(0, BLOCK)
        sums += tl.sum(
            tl.load(grams + i[:, None] * n + j[None, :], mask=there[:, None] & (j < n)[None, :], other=0.0), 1
        )
    own = tl.load(grams + i * (n + 1), mask=there, other=0.0)
    total, trace, shift = tl.sum(sums, 0), tl.sum(own, 0), tl.load(SHIFTS + row)
    size = trace + n * shift * shift
    finite = (total + size) - (total + size) == 0.0
    tl.store(SPREAD + row, trace - total / n)
    tl.store(SIZE + row, size)
    tl.store(FINITE + row, finite)
    tl.store(offsets + i, (sums - own) / (n - 2) - (total - trace) / (2.0 * (n - 1) * (n - 2)), mask=there)
    # This program wrote these itself, from any of its threads.
    tl.debug_barrier()
    squares = tl.zeros((N,), tl.float64)
    vectors = VECTORS + row * (n * (n - 1) // 2)
    weight = tl.sqrt(2.0 / n.to(tl.float64))
    for low in range(0, N, BLOCK):
        j = low + tl.arange(0, BLOCK)
        centred = _centred(grams, offsets, i, j, n)
        squares += tl.sum(centred * centred, 1)
        below = (j[None, :] < i[:, None]) & there[:, None]
        tl.store(
            vectors + i[:, None] * (i - 1)[:, None] // 2 + j[None, :],
            tl.where(finite, centred * weight, 0.0),
            mask=below,
        )
    tl.store(PARTS + row * n + i, tl.where(finite, 2.0 * squares / n, 0.0), mask=there)
    norm = tl.sqrt(tl.sum(squares, 0))
    inverse = 1.0 / tl.where(norm > 0.0, norm, 1.0)
    triangles = 0.0
    triples = 0.0
    for low in range(0, N, BLOCK):
        j = low + tl.arange(0, BLOCK)
        unit = (_centred(grams, offsets, i, j, n) * inverse).to(tl.float32)
        squared = tl.zeros((N, BLOCK), tl.float32)
        for first in range(0, N, BLOCK):
            k = first + tl.arange(0, BLOCK)
            left = (_centred(grams, offsets, i, k, n) * inverse).to(tl.float32)
            right = (_centred(grams, offsets, k, j, n) * inverse).to(tl.float32)
            squared += tl.dot(left, right, input_precision="ieee")
        triangles += tl.sum(tl.sum(squared * unit, 1), 0)
        triples += tl.sum(tl.sum(unit * unit * unit, 1), 0)
    cube = norm * norm * norm
    tl.store(CUBES + row * 2, tl.where(finite, triangles.to(tl.float64) * cube, 0.0))
    tl.store(CUBES + row * 2 + 1, tl.where(finite, triples.to(tl.float64) * cube, 0.0))
