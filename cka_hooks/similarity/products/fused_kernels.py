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
from triton import OutOfResources as OutOfResources

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
def centre_grams(GRAMS, SHIFTS, PARTS, NUMBERS, n, N: tl.constexpr, BLOCK: tl.constexpr):
    """Make from linear GRAMS (rows, n, n) what `Minibatches.of` makes, unbiased, one row per program.

    PARTS (rows, n) and NUMBERS (rows, 6) are float64. A vector of n (n - 1) / 2 numbers overwrites the start of its
    Gram matrix.
    """
    row = tl.program_id(0).to(tl.int64)
    # Until the end, PARTS holds what is to be subtracted.
    grams, parts, numbers = GRAMS + row * n * n, PARTS + row * n, NUMBERS + row * 6
    i = tl.arange(0, N)
    there = i < n
    sums = tl.zeros((N,), tl.float64)
    for low in range(0, N, BLOCK):
        j = low + tl.arange(0, BLOCK)
        sums += tl.sum(
            tl.load(grams + j[:, None] * n + i[None, :], mask=(j < n)[:, None] & there[None, :], other=0.0), 0
        )
    own = tl.load(grams + i * (n + 1), mask=there, other=0.0)
    total, trace, shift = tl.sum(sums, 0), tl.sum(own, 0), tl.load(SHIFTS + row)
    size = trace + n * shift * shift
    finite = (total + size) - (total + size) == 0.0
    tl.store(parts + i, (sums - own) / (n - 2) - (total - trace) / (2.0 * (n - 1) * (n - 2)), mask=there)
    # This program wrote these itself, from any of its threads.
    tl.debug_barrier()
    squares = tl.zeros((N,), tl.float64)
    for low in range(0, N, BLOCK):
        centred = _centred(grams, parts, low + tl.arange(0, BLOCK), i, n)
        squares += tl.sum(centred * centred, 0)
    norm = tl.sqrt(tl.sum(squares, 0))
    inverse = 1.0 / tl.where(norm > 0.0, norm, 1.0)
    triangles = 0.0
    triples = 0.0
    for low in range(0, N, BLOCK):
        j = low + tl.arange(0, BLOCK)
        unit = (_centred(grams, parts, i, j, n) * inverse).to(tl.float32)
        squared = tl.zeros((N, BLOCK), tl.float32)
        for first in range(0, N, BLOCK):
            k = first + tl.arange(0, BLOCK)
            left = (_centred(grams, parts, i, k, n) * inverse).to(tl.float32)
            right = (_centred(grams, parts, k, j, n) * inverse).to(tl.float32)
            squared += tl.dot(left, right, input_precision="ieee")
        triangles += tl.sum(tl.sum(squared * unit, 1), 0)
        triples += tl.sum(tl.sum(unit * unit * unit, 1), 0)
    cube = norm * norm * norm
    tl.store(numbers, tl.where(finite, trace - total / n, 0.0))
    tl.store(numbers + 1, tl.where(finite, size, 0.0))
    tl.store(numbers + 2, tl.where(finite, 1.0, 0.0))
    tl.store(numbers + 3, 0.0)
    tl.store(numbers + 4, tl.where(finite, triangles.to(tl.float64) * cube, 0.0))
    tl.store(numbers + 5, tl.where(finite, triples.to(tl.float64) * cube, 0.0))
    weight = tl.sqrt(2.0 / n.to(tl.float64))
    for low in range(0, N, BLOCK):
        j = low + tl.arange(0, BLOCK)
        centred = _centred(grams, parts, j, i, n)
        # Row j goes to j (j - 1) / 2, where only rows up to j were. All threads must have read these before.
        tl.debug_barrier()
        tl.store(
            grams + (j * (j - 1) // 2)[:, None] + i[None, :],
            tl.where(finite, centred * weight, 0.0),
            mask=(i[None, :] < j[:, None]) & (j < n)[:, None],
        )
    tl.debug_barrier()
    tl.store(parts + i, tl.where(finite, 2.0 * squares / n, 0.0), mask=there)


@triton.jit
def _add(total, value, needed):
    tl.store(total, tl.load(total, mask=needed, other=0.0) + value, mask=needed)


@triton.jit
def _add_twice(total, at, value, needed, also_at, other_value, also_needed):
    _add(total + at, value, needed)
    _add(total + also_at, other_value, also_needed)


@triton.jit(do_not_specialize=["minibatches", "positions", "layers", "m", "n", "variance", "of_t", "of_both", "of_s"])
def add_hsic(
    HSIC, NUMBERS, PARTS, MOMENTS, NULL, SPREAD, SIZE, DIFFER, SEEN, BAD, PEAK,
    minibatches: tl.int64, positions: tl.int64, layers, m, n,
    variance: tl.float64, of_t: tl.float64, of_both: tl.float64, of_s: tl.float64,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add m minibatches of n samples to the sums of `State`, as `State.add` does, N x N pairs of layers per program.

    The lower triangles of HSIC (m, layers, layers) are read, and copied to the upper ones. NUMBERS (layers, m, 6) and
    PARTS (layers, m, n) are those of `Minibatches`. MOMENTS (4, layers, layers) to PEAK (2, layers) are in `State`.
    `minibatches` and `positions` came before, and `variance` to `of_s` are `null_weights`. All tensors are float64.
    """
    i = tl.program_id(0) * N + tl.arange(0, N)
    j = tl.program_id(1) * N + tl.arange(0, N)
    is_i, is_j = i < layers, j < layers
    pairs = layers.to(tl.int64) * layers
    if tl.program_id(1) <= tl.program_id(0):
        below = is_i[:, None] & (j[None, :] <= i[:, None])
        above = is_i[:, None] & (j[None, :] < i[:, None])
        at = i[:, None].to(tl.int64) * layers + j[None, :]
        across = j[None, :].to(tl.int64) * layers + i[:, None]
        sums = tl.zeros((N, N), tl.float64)
        squares = tl.zeros((N, N), tl.float64)
        with_i = tl.zeros((N, N), tl.float64)
        with_j = tl.zeros((N, N), tl.float64)
        both = tl.zeros((N, N), tl.float64)
        third = tl.zeros((N, N), tl.float64)
        for b in range(m):
            hsic = HSIC + b * pairs
            h = tl.load(hsic + at, mask=below, other=0.0)
            tl.store(hsic + across, h, mask=above)
            own_i = tl.load(hsic + i.to(tl.int64) * (layers + 1), mask=is_i, other=0.0)[:, None]
            own_j = tl.load(hsic + j.to(tl.int64) * (layers + 1), mask=is_j, other=0.0)[None, :]
            sums += h
            squares += h * h
            with_i += h * own_i
            with_j += h * own_j
            both += own_i * own_j
            of_i, of_j = NUMBERS + (i.to(tl.int64) * m + b) * 6, NUMBERS + (j.to(tl.int64) * m + b) * 6
            t = tl.load(of_i + 4, mask=is_i, other=0.0)
            s = tl.load(of_i + 5, mask=is_i, other=0.0)
            third += (of_t * t + of_both * s)[:, None] * tl.load(of_j + 4, mask=is_j, other=0.0)[None, :]
            third += (of_both * t + of_s * s)[:, None] * tl.load(of_j + 5, mask=is_j, other=0.0)[None, :]
        _add_twice(MOMENTS, at, sums, below, across, sums, above)
        _add_twice(MOMENTS + pairs, at, squares, below, across, squares, above)
        _add_twice(MOMENTS + 2 * pairs, at, with_i, below, across, with_j, above)
        _add_twice(MOMENTS + 3 * pairs, at, both, below, across, both, above)
        _add_twice(NULL, at, variance * both, below, across, variance * both, above)
        _add_twice(NULL + pairs, at, third, below, across, third, above)
    if tl.program_id(1) == tl.program_id(0):
        spread = tl.zeros((N,), tl.float64)
        size = tl.zeros((N,), tl.float64)
        differ = tl.zeros((N,), tl.float64)
        bad = tl.load(BAD + i, mask=is_i, other=0.0)
        for b in range(m):
            numbers = NUMBERS + (i.to(tl.int64) * m + b) * 6
            spread += tl.load(numbers, mask=is_i, other=0.0)
            size += tl.load(numbers + 1, mask=is_i, other=0.0)
            differ += tl.load(numbers + 3, mask=is_i, other=0.0)
            finite = tl.load(numbers + 2, mask=is_i, other=1.0)
            bad = tl.where(finite == 0.0, tl.minimum(bad, (minibatches + b).to(tl.float64)), bad)
        _add(SPREAD + i, spread, is_i)
        _add(SIZE + i, size, is_i)
        _add(DIFFER + i, differ, is_i)
        _add(SEEN + i, m, is_i)
        tl.store(BAD + i, bad, mask=is_i)
        peak = tl.load(PEAK + i, mask=is_i, other=0.0)
        place = tl.load(PEAK + layers + i, mask=is_i, other=0.0)
        samples = m * n
        for low in range(0, samples, BLOCK):
            sample = low + tl.arange(0, BLOCK)
            of_samples = PARTS + i[:, None].to(tl.int64) * samples + sample[None, :]
            part = tl.load(of_samples, mask=is_i[:, None] & (sample < samples)[None, :], other=-1.0)
            largest = tl.max(part, 1)
            first = tl.min(tl.where(part == largest[:, None], sample[None, :], samples), 1)
            place = tl.where(largest > peak, (positions + first).to(tl.float64), place)
            peak = tl.maximum(peak, largest)
        tl.store(PEAK + i, peak, mask=is_i)
        tl.store(PEAK + layers + i, place, mask=is_i)
