"""The reference backend: Gram matrices by PyTorch's products, on any device and in any dtype, as `Grams`.

One block of features at a time goes into a scratch buffer, minus a common vector. Blocks are added in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cka_hooks import memory
from cka_hooks.precision import accumulation_device

# Features in one float32 product before partial sums go on in float64; fewer if rounding has few pairs of samples to
# average out over. A BLAS that adds them to one number, one by one, is right to 1e-6 up to these.
CHUNK, CHUNK_OF_FEW, FEW_SAMPLES = 512, 128, 32


class Grams(NamedTuple):
    """Gram matrices of m minibatches of n samples, and numbers that show whether the samples differ.

    Attributes:
        values: (m, n, n) kernel values, float64. Linear ones are up to a shift of all samples by one vector.
        shift: (m,) norm of the vector that was subtracted from all samples if `values` are linear, else None.
        spread: (m,) for other kernels, the trace of the centred linear Gram matrix, see `traces`.
        size: (m,) for other kernels, the trace of the linear Gram matrix.
    """

    values: Tensor
    shift: Tensor | None = None
    spread: Tensor | None = None
    size: Tensor | None = None

    def of_layers(self, which: int | slice) -> Grams:
        """The matrices of one layer or of several, if those of more are stacked in a leading dimension."""
        return Grams(*(None if stacked is None else stacked[which] for stacked in self))  # type: ignore[arg-type]

    def traces(self) -> tuple[Tensor, Tensor]:
        """(m,) traces of the centred linear Gram matrix and of the linear Gram matrix.

        The first is the sum of squared distances from the mean sample, the second the sum of squared norms of the
        samples. If a common vector was subtracted, the second is that of the shifted samples plus that of the vector,
        which shows just as well whether samples differ at all. With another leading dimension, this covers many
        layers at once, which saves a handful of launches per layer on an accelerator.
        """
        if self.shift is None:
            return self.spread, self.size  # type: ignore[return-value]
        n = self.values.shape[-1]
        trace = self.values.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace - self.values.sum((-2, -1)) / n, trace + n * self.shift.square()


def chunk_of(n: int) -> int:
    """Features in one float32 product of n samples."""
    return CHUNK if n >= FEW_SAMPLES else CHUNK_OF_FEW


def _feature_blocks(features: Tensor, size: int) -> Iterator[Tensor]:
    """Cut (m, n, P, C) into views (m, n, T, c) of at most `size` features, c at most a chunk."""
    _, n, positions, channels = features.shape
    chunk = chunk_of(n)
    if channels > chunk and positions > channels // chunk:
        for c in range(0, channels, chunk):
            yield from _feature_blocks(features[..., c : c + chunk], size)
    elif channels > chunk:
        whole = channels - channels % chunk
        for p in range(positions):
            yield from _feature_blocks(features[:, :, p, :whole].unflatten(-1, (-1, chunk)), size)
            if whole < channels:
                yield features[:, :, p : p + 1, whole:]
    else:
        step = max(1, size // max(1, channels))
        for p in range(0, positions, step):
            yield features[:, :, p : p + step]


def shifted(grouped: Tensor, dtype: torch.dtype | None = None, *, scaled: bool = False) -> Grams:
    """K = (X - 1v') (X - 1v')' with v close to the samples' mean, widened to at least float32.

    `scaled` divides each block by a power of two near its largest difference, so that squares stay in range. Use it
    where nobody can check whether they did.
    """
    m, n, _, _ = grouped.shape
    dtype = dtype or (torch.float64 if grouped.dtype is torch.float64 else torch.float32)
    # Scratch that fits into a CPU's cache, or is large enough to keep a GPU busy.
    size = max(chunk_of(n), memory.scratch(1 << 20 if grouped.device.type == "cpu" else 1 << 24) // (m * n))
    scratch: Tensor | None = None
    values: Tensor | None = None
    norms: list[Tensor] = []
    for block in _feature_blocks(grouped, size):
        widened = block.transpose(1, 2)
        if scratch is None or scratch.shape != widened.shape:
            scratch = torch.empty(widened.shape, dtype=dtype, device=block.device)
        common = _common(block).to(dtype)
        if block.dtype == dtype or block.device.type != "cpu":
            # Widens and subtracts in one launch.
            torch.sub(widened, common, out=scratch)
        else:
            # A CPU would make a widened copy first.
            scratch.copy_(widened).sub_(common)
        power = _power(scratch) if scaled and dtype is torch.float32 else None
        values = _add_products(values, scratch if power is None else scratch.div_(power), power)
        norms.append(_norm(common.flatten(1)))
    if values is None:
        values = _zeros(grouped, m, n)
    shift = norms[0] if len(norms) == 1 else _norm(torch.stack(norms, 1)) if norms else values.new_zeros(m)
    # Only the lower bands were computed.
    for low, high in _bands(n, grouped.device)[1:]:
        values[:, :low, low:high] = values[:, low:high, :low].mT
    return Grams(values, shift)


def differentiable(grouped: Tensor) -> Grams:
    """K = (X - 1v') (X - 1v')' with the samples' mean v, in float64, with gradients.

    No gradient goes through v: nothing that ignores a shift of all samples depends on it.
    """
    rows = grouped.flatten(2).to(accumulation_device(grouped.device), torch.float64)
    common = rows.detach().mean(1, keepdim=True)
    centred = rows - common
    return Grams(centred @ centred.mT, _norm(common.flatten(1)))


def _power(differences: Tensor) -> Tensor:
    """(m, 1, 1, 1) powers of two, at most a factor of 8 from the largest of (m, T, n, c) float32 differences.

    This takes all bits of the exponent but the two lowest, and sets the lowest bit, so that the power and its inverse
    are numbers of full precision. NaN and infinity make it large and stay what they are.
    """
    top: Tensor = torch.linalg.vector_norm(differences, math.inf, dim=(1, 2, 3), keepdim=True)
    return top.view(torch.int32).bitwise_and_(0x7E000000).bitwise_or_(0x00800000).view(torch.float32)


def _add_products(values: Tensor | None, chunks: Tensor, power: Tensor | None = None) -> Tensor:
    """Add the products of (m, T, n, c) chunks with their transposes to (m, n, n) `values`, lower bands only.

    If there are no values yet, the first products become the values. `power` is what the chunks were divided by.
    """
    m, count, n, _ = chunks.shape
    batch = chunks.flatten(0, 1)
    bands = _bands(n, batch.device)
    if values is None and len(bands) > 1:
        values = _zeros(chunks, m, n)
    for low, high in bands:
        products = torch.bmm(batch[:, low:high], batch[:, :high].mT)
        products = _summed(products.view(m, count, high - low, high))
        if power is not None:
            # Once for each factor, because the square is beyond float32.
            factor = power.view(m, 1, 1).to(products.device)
            products.mul_(factor).mul_(factor)
        if values is None:
            values = products
        else:
            values[:, low:high, :high] += products
    assert values is not None
    return values


def _bands(n: int, device: torch.device) -> list[tuple[int, int]]:
    """Bands of a symmetric matrix: compute rows low to high in columns 0 to high.

    Narrow bands save arithmetic and cost efficiency, and on an accelerator also launches.
    """
    count = 1 if n < 64 or device.type != "cpu" else 2 if n < 256 else 4
    return [(n * band // count, n * (band + 1) // count) for band in range(count)]


def _common(block: Tensor) -> Tensor:
    """A vector close to the mean of the samples of (m, n, T, C), as (m, T, 1, C).

    It is the elementwise median of three samples, which costs three rows instead of a pass over the block, and which
    one outlying sample does not move.
    """
    n = block.shape[1]
    a, b, c = (block.select(1, i) for i in (0, n // 2, n - 1))
    return torch.clamp(c, torch.minimum(a, b), torch.maximum(a, b)).unsqueeze(2)


def _summed(products: Tensor) -> Tensor:
    """(m, T, n, n) summed over T in float64, on another device if this one has no float64."""
    device = accumulation_device(products.device)
    if device != products.device:
        return products.sum(1).to(device, torch.float64)
    return products.sum(1, dtype=torch.float64)


def _norm(vectors: Tensor) -> Tensor:
    """(m,) norms of (m, k) vectors, float64."""
    device = accumulation_device(vectors.device)
    if device != vectors.device:
        vectors = vectors.to(device)
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)  # type: ignore[no-any-return]


def _zeros(grouped: Tensor, m: int, n: int) -> Tensor:
    return torch.zeros(m, n, n, dtype=torch.float64, device=accumulation_device(grouped.device))
