"""Features to Gram matrices: the only code whose cost grows with the number of features.

HSIC does not change when every sample is shifted by the same vector, and the Gram matrix of samples that
share a large common component is, in float32, that component plus rounding. So a common vector is taken off
before the product wherever it matters, one block of features at a time into a scratch buffer, and blocks
are added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cka_hooks import memory
from cka_hooks.precision import accumulation_device, exact_products
from cka_hooks.similarity.products import native

# A more careful product is made where rounding may be more than this much per sample of the U-centred norm
# (see `_is_precise`). Measured: errors in CKA of untrained torchvision models stay below this.
NOISE_TOLERANCE = 2e-6
# A plain product is not taken where it is more than this many times the U-centred norm, times the root of n(n-3):
# sums of features that repeat round alike, which averages out over pairs of samples only. How far off they are
# depends on BLAS, up to 4e-6 in those measured.
PLAIN_SHARED = 0.75
# Where the samples' spread is at least this share of their size in a few probed runs of features, the
# plain product is tried first: it needs no subtraction and no scratch buffer.
PLAIN_SPREAD = 0.05
PROBED_RUNS, PROBED_RUN = 16, 64
# Products of up to this many multiplications cost less than the look.
CHEAP = 1 << 22
# Features in one float32 product before the partial sums go on in float64: fewer where rounding has few pairs of
# samples to average out over.
CHUNK, CHUNK_OF_FEW, FEW_SAMPLES = 1024, 256, 32
# Mean squared norms below this came near the end of float32's range, where squares lose their digits.
TINY = 1e-30


class Grams(NamedTuple):
    """Gram matrices of m minibatches of n samples, and what tells whether their samples differ.

    Attributes:
        values: (m, n, n) kernel values, float64; linear ones up to a shift of all samples by one vector.
        shift: (m,) norm of the vector that was taken off all samples, if `values` are linear, else None.
        spread: (m,) of other kernels: trace of the centred linear Gram matrix, see `traces`.
        size: (m,) of other kernels: trace of the linear Gram matrix.
        deviation: (m, n, n) of sketched features: half the difference of the two sketches that `values` is the
            mean of; None where `values` are exact.
    """

    values: Tensor
    shift: Tensor | None = None
    spread: Tensor | None = None
    size: Tensor | None = None
    deviation: Tensor | None = None

    def traces(self) -> tuple[Tensor, Tensor]:
        """(m,) traces of the centred linear Gram matrix and of the linear Gram matrix.

        The first is the sum of squared distances from the mean sample, the second of squared norms of the samples.
        Where a common vector was taken off, it is of the samples shifted plus of the vector: as good to tell whether
        samples differ at all. With another dimension in front, of so many layers at once: on an accelerator that
        saves a handful of launches a layer.
        """
        if self.shift is None:
            assert self.spread is not None
            assert self.size is not None
            return self.spread, self.size
        n = self.values.shape[-1]
        trace = self.values.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace - self.values.sum((-2, -1)) / n, trace + n * self.shift.square()


def linear_grams(features: Tensor, minibatches: int = 1) -> Grams:
    """Linear Gram matrices of `minibatches` equal groups of consecutive samples, right to 1e-5 in CKA.

    Args:
        features: (m * n, P, C) floating point, of any strides: the P * C features of each sample. A view of
            an activation is as good as a copy, since only the sum over all features counts.
        minibatches: m, the number of groups.
    """
    if features.dtype.itemsize == 1:
        # PyTorch computes nothing in floats of one byte, all of which float16 holds.
        features = features.half()
    rows, positions, channels = features.shape
    grouped = features.view(minibatches, rows // minibatches, positions, channels)
    with exact_products(features.device):
        if not _can_branch(features):
            return _shifted(grouped)
        return _on_cpu(grouped)


def _on_cpu(grouped: Tensor) -> Grams:
    """The cheapest product first, a more careful one where the Gram matrix shows that rounding may matter."""
    dtype, n, width = grouped.dtype, grouped.shape[1], grouped.shape[2:].numel()
    if native.takes(grouped) and n <= native.MAX_SAMPLES:
        grams, measured = _compiled(grouped)
        chunk = native.BLOCK
    else:
        chunk = _chunk(n)
        cheap = grouped.numel() * n <= CHEAP
        if dtype in (torch.float32, torch.float64) and (cheap or _looks_spread(grouped)):
            grams = _plain(grouped)
            if all(_is_precise(of_one, n, width, chunk, PLAIN_SHARED) for of_one in _measured(grams)):
                return grams
        grams = _shifted(grouped)
        if dtype is torch.float64:
            return grams
        measured = _measured(grams)
    # Samples that are equal to within rounding have no signal that a better product could save.
    level = (4 * torch.finfo(dtype).eps) ** 2
    if all(
        _is_precise(of_one, n, width, chunk)
        or (of_one.spread <= level * of_one.size < math.inf and of_one.trace >= n * TINY)
        for of_one in measured
    ):
        return grams
    return _shifted(grouped, torch.float64)


def _can_branch(tensor: Tensor) -> bool:
    """Whether looking at a value is free. On an accelerator it would wait for the device."""
    return tensor.device.type == "cpu"


def _looks_spread(grouped: Tensor) -> bool:
    """A look at evenly spaced positions and channels: does the samples' spread dominate what they share?"""
    _, _, positions, channels = grouped.shape
    some = grouped[:, :, :: max(1, positions // 8)]
    runs = PROBED_RUNS // min(some.shape[2], 8)
    if channels > runs * PROBED_RUN:
        # Runs and not single features: a look at one number costs a whole line of the cache.
        apart = channels // runs
        some = some[..., : runs * apart].unflatten(-1, (runs, apart))[..., :PROBED_RUN]
    probe = some.flatten(2)
    shared = probe.mean(1).square().sum(-1)
    size = probe.square().sum((1, 2)) / probe.shape[1]
    return bool((size - shared >= PLAIN_SPREAD * size).all())


class Measured(NamedTuple):
    """Numbers that tell how precise an (n, n) Gram matrix K is.

    Attributes:
        spread: the first of `Grams.traces`.
        size: the second one.
        whole: sum of all K_ij^2.
        own: sum of the K_ii^2.
        rows: sum over i of (sum over j other than i of K_ij)^2.
        total: sum of all K_ij.
        trace: sum of the K_ii.
    """

    spread: float
    size: float
    whole: float
    own: float
    rows: float
    total: float
    trace: float


def _measured(grams: Grams) -> list[Measured]:
    """Of each of m Gram matrices."""
    values = grams.values
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    sums = values.sum(-1)
    whole, own, rows = (
        torch.linalg.vector_norm(part, dim=-1).square() for part in (values.flatten(1), diagonal, sums - diagonal)
    )
    found = [*grams.traces(), whole, own, rows, sums.sum(-1), diagonal.sum(-1)]
    return [Measured(*numbers) for numbers in torch.stack(found, -1).tolist()]


def _is_precise(measured: Measured, n: int, width: int, chunk: int, shared: float = math.inf) -> bool:
    """Whether float32 rounding in a Gram matrix of `width` features is below what 1e-5 in CKA allows.

    `chunk` features were added up in float32 at a time. Rounding while a sum grows is relative to what it has grown
    to: to K_ij where products have one sign, and to a part of |x_i| |x_j| that falls with the number of chunks where
    they do not. What counts is this against the norm of the U-centred matrix: a shared component, an outlying sample
    and overflow all show there. What it may be at most is `shared` times that norm and the root of its n(n-3).
    """
    _, _, whole, own, rows, total, trace = measured
    # |U-centred|^2 = |K|^2 - 2/(n-2) |K1|^2 + (1'K1)^2 / ((n-1)(n-2)), zero diagonal (Székely & Rizzo 2014).
    off_diagonal, off_total = whole - own, total - trace
    centred = off_diagonal - 2 / (n - 2) * rows + off_total * off_total / ((n - 1) * (n - 2))
    growth = math.sqrt(max(off_diagonal, 0.0)) + trace * min(1.0, chunk / max(width, 1)) ** 0.5
    eps = torch.finfo(torch.float32).eps
    is_small = (eps * growth) ** 2 <= (NOISE_TOLERANCE * n) ** 2 * centred
    is_bounded = shared == math.inf or off_diagonal <= shared**2 * n * (n - 3) * centred
    return is_small and is_bounded and trace >= n * TINY


def _chunk(n: int) -> int:
    return CHUNK if n >= FEW_SAMPLES else CHUNK_OF_FEW


def _blocks(features: Tensor, size: int) -> Iterator[Tensor]:
    """Cut (m, n, P, C) into views (m, n, T, c) of at most `size` features, c at most a chunk."""
    _, n, positions, channels = features.shape
    chunk = _chunk(n)
    if channels > chunk and positions > channels // chunk:
        for c in range(0, channels, chunk):
            yield from _blocks(features[..., c : c + chunk], size)
        return
    if channels > chunk:
        whole = channels - channels % chunk
        for p in range(positions):
            if whole:
                yield from _blocks(features[:, :, p, :whole].unflatten(-1, (-1, chunk)), size)
            if whole < channels:
                yield features[:, :, p : p + 1, whole:]
        return
    step = max(1, size // max(1, channels))
    for p in range(0, positions, step):
        yield features[:, :, p : p + step]


def _compiled(grouped: Tensor) -> tuple[Grams, list[Measured]]:
    """As `_shifted`, in one pass over the features."""
    values, measures = native.grams(grouped.flatten(0, 1), grouped.shape[0])
    return Grams(values, measures[:, -1]), [Measured(*numbers[:-1]) for numbers in measures.tolist()]


def _plain(grouped: Tensor) -> Grams:
    """K = X X', straight from views of the activation."""
    m, n, _, _ = grouped.shape
    values = _zeros(grouped, m, n)
    # Products of T chunks are T matrices before they are added: bounded to 8 MB.
    for block in _blocks(grouped, _chunk(n) * max(1, (1 << 21) // (n * n))):
        chunks = block.transpose(1, 2)
        count = chunks.shape[1]
        # One batched product takes either all minibatches or all chunks: no stride leads through both.
        if m == 1 or count == 1:
            _add_products(values, chunks)
        elif m < count:
            for g in range(m):
                _add_products(values[g : g + 1], chunks[g : g + 1])
        else:
            for t in range(count):
                _add_products(values, chunks[:, t : t + 1])
    return Grams(_mirrored(values, grouped.device), values.new_zeros(m))


def _shifted(grouped: Tensor, dtype: torch.dtype | None = None) -> Grams:
    """K = (X - 1v') (X - 1v')' with v close to the samples' mean, widened to at least float32."""
    m, n, _, _ = grouped.shape
    dtype = dtype or (torch.float64 if grouped.dtype is torch.float64 else torch.float32)
    # Scratch that stays in the cache of a CPU, or is large enough to keep a GPU busy.
    size = max(_chunk(n), memory.scratch(1 << 20 if grouped.device.type == "cpu" else 1 << 24) // (m * n))
    scratch: Tensor | None = None
    values: Tensor | None = None
    norms: list[Tensor] = []
    for block in _blocks(grouped, size):
        widened = block.transpose(1, 2)
        if scratch is None or scratch.shape != widened.shape:
            scratch = torch.empty(widened.shape, dtype=dtype, device=block.device)
        common = _common(block).to(dtype)
        if block.dtype == dtype or block.device.type != "cpu":
            # Widens and subtracts in one launch.
            torch.sub(widened, common, out=scratch)
        else:
            # A CPU would widen a copy first.
            scratch.copy_(widened).sub_(common)
        values = _add_products(values, scratch)
        norms.append(_norm(common.flatten(1)))
    if values is None:
        values = _zeros(grouped, m, n)
    shift = norms[0] if len(norms) == 1 else _norm(torch.stack(norms, 1)) if norms else values.new_zeros(m)
    return Grams(_mirrored(values, grouped.device), shift)


def _add_products(values: Tensor | None, chunks: Tensor) -> Tensor:
    """Add the products of (m, T, n, c) chunks with their transposes to (m, n, n) `values`, lower bands only.

    The first products, where there are no values yet, are the values.
    """
    m, count, n, _ = chunks.shape
    batch = chunks.flatten(0, 1)
    bands = _bands(n, batch.device)
    if values is None and len(bands) > 1:
        values = _zeros(chunks, m, n)
    for low, high in bands:
        products = torch.bmm(batch[:, low:high], batch[:, :high].mT)
        products = _summed(products.view(m, count, high - low, high))
        if values is None:
            values = products
        else:
            values[:, low:high, :high] += products
    assert values is not None
    return values


def _bands(n: int, device: torch.device) -> list[tuple[int, int]]:
    """Rows low to high of a symmetric matrix, to be made in columns 0 to high.

    Narrow bands save arithmetic and cost efficiency; on an accelerator they cost launches too.
    """
    count = 1 if n < 64 or device.type != "cpu" else 2 if n < 256 else 4
    return [(n * band // count, n * (band + 1) // count) for band in range(count)]


def _mirrored(values: Tensor, device: torch.device) -> Tensor:
    """Lower bands of (m, n, n) made on a device to whole matrices."""
    for low, high in _bands(values.shape[-1], device)[1:]:
        values[:, :low, low:high] = values[:, low:high, :low].mT
    return values


def _common(block: Tensor) -> Tensor:
    """A vector close to the mean of the samples of (m, n, T, C), as (m, T, 1, C).

    The elementwise median of three samples: it costs three rows instead of a pass over the block, and one
    outlying sample among them does not move it.
    """
    n = block.shape[1]
    a, b, c = (block.select(1, i) for i in (0, n // 2, n - 1))
    return torch.clamp(c, torch.minimum(a, b), torch.maximum(a, b)).unsqueeze(2)


def _summed(products: Tensor) -> Tensor:
    """(m, T, n, n) summed over T in float64, which may lie on another device (float64 is missing on some)."""
    device = accumulation_device(products.device)
    if device != products.device:
        return products.sum(1).to(device, torch.float64)
    return products.sum(1, dtype=torch.float64)


def _norm(vectors: Tensor) -> Tensor:
    """(m,) norms of (m, k) vectors, float64."""
    device = accumulation_device(vectors.device)
    if device != vectors.device:
        return torch.linalg.vector_norm(vectors, dim=1).to(device, torch.float64)  # type: ignore[no-any-return]
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)  # type: ignore[no-any-return]


def _zeros(grouped: Tensor, m: int, n: int) -> Tensor:
    return torch.zeros(m, n, n, dtype=torch.float64, device=accumulation_device(grouped.device))
