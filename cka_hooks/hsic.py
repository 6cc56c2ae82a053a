"""Pure functions from stacks of Gram matrices to HSIC, for all pairs of layers at once.

Sources: Székely & Rizzo 2014 (U-centring); Song et al. 2012, JMLR 13, eq. 5 (the unbiased estimate, which
is the inner product of U-centred matrices / (n (n - 3))); Gretton et al. 2005 (the biased one);
Nguyen, Raghu & Kornblith 2021 (sums over minibatches).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["unbiased", "biased"]
# Below four samples the unbiased estimate divides by zero.
MIN_SAMPLES = 4
# Share of a sum of all K_ij^2 that centring in float64 may leave over if the true result is 0.
CENTRING_NOISE = (16 * torch.finfo(torch.float64).eps) ** 2


# How many samples to look at feature by feature, and how many features at a time.
_LOOKED_AT, _AT_ONCE = 32, 1 << 17


def resolution(dtype: torch.dtype) -> float:
    """Share of tr(X X'): if the centred trace is not above it, rounding may explain the difference between samples.

    Layers compute in floats of two or more bytes, whose last bits are uncertain. One-byte floats are made in one step
    from wider ones.
    """
    eps = torch.finfo(dtype).eps
    return (eps if dtype.itemsize == 1 else 8 * eps) ** 2


def features_differ(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether some feature differs between samples by more than rounding can explain: () bool.

    A sum over all features, as for :func:`resolution`, is dominated by a few that are a thousand times larger than
    the others, such as the massive activations of language models (Sun et al. 2024). Here every feature is compared
    with its own size, or with that of half of the features if this is larger, because numbers that cancelled keep the
    rounding of larger ones.

    Args:
        rows: (n, P, C) features. Only the first samples are looked at.
        dtype: dtype of the activation.
    """
    # If this does not wait for a device, ask some features of two samples first, which nearly always differ.
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel():
        _, positions, channels = rows.shape
        some = rows.detach()[:2, :: positions // 64 + 1, :: channels // 64 + 1]
        wide = some.float() if some.dtype.itemsize < 4 else some
        apart, largest = float(torch.dist(wide[0], wide[-1], torch.inf)), float(wide.abs().max())
        # Far more than rounding of the largest one, and no square leaves the range of float32.
        if 1e-15 < 32 * torch.finfo(dtype).eps * largest < apart < 1e12 or _differ(some, dtype):
            return torch.ones((), dtype=torch.bool, device="cpu")
    return _differ(rows[:_LOOKED_AT], dtype)


def _differ(rows: Tensor, dtype: torch.dtype) -> Tensor:
    some = rows.detach().flatten(1)
    if not some.numel():
        return some.new_zeros((), dtype=torch.bool)
    mean, variance = map(torch.cat, zip(*map(_moments, some.split(_AT_ONCE, 1)), strict=True))
    size = variance + mean.square()
    usual = _median_above_0(size) if size.device.type != "cpu" else torch.where(size > 0, size, torch.nan).nanmedian()
    return (variance > resolution(dtype) * torch.maximum(size, usual)).any()


def _moments(some: Tensor) -> tuple[Tensor, Tensor]:
    some = some if some.dtype is torch.float64 else some.float()
    mean = some.mean(0)
    # Ten times as fast as torch.var over the first dimension.
    return mean, (some - mean).square_().mean(0)


def _median_above_0(sizes: Tensor) -> Tensor:
    """The lower median of (k,) numbers above 0, as (1,). On a GPU, `nanmedian` would wait for it."""
    zeros, others = (sizes == 0).sum(), (sizes > 0).sum()
    # NaN comes last.
    return sizes.sort().values.gather(0, (zeros + (others - 1) // 2).clamp_min(0).view(1))


def centre(grams: Tensor, estimator: Estimator = "unbiased") -> Tensor:
    """Centred Gram matrices (..., n, n): U-centred with a zero diagonal (unbiased), or H K H (biased)."""
    n = grams.shape[-1]
    if estimator == "biased":
        means = grams.mean(-1)
        offset = means - means.mean(-1, keepdim=True) / 2
        centred = grams - offset.unsqueeze(-1)
        return centred.sub_(offset.unsqueeze(-2))
    sums = grams.sum(-1) - grams.diagonal(dim1=-2, dim2=-1)
    offset = sums / (n - 2) - sums.sum(-1, keepdim=True) / (2 * (n - 1) * (n - 2))
    centred = (grams - offset.unsqueeze(-1)).sub_(offset.unsqueeze(-2))
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    return centred


def pack(centred: Tensor, estimator: Estimator = "unbiased") -> Tensor:
    """Centred matrices (..., n, n) as vectors (..., p) whose inner products are weighted HSIC estimates.

    The matrices are symmetric, so only the lower triangle is kept, entries off the diagonal times sqrt(2):
    p = n (n - 1) / 2 for the unbiased estimator, whose diagonal is 0, else n (n + 1) / 2. The inner product of
    two such vectors is w_n * HSIC(K, L), with HSIC = <K, L> / (n (n - 3)) and w_n = n - 3 (unbiased), or
    <K, L> / (n - 1)^2 and w_n = n - 1 (biased), where w_n is the weight for adding minibatches of unequal size.
    """
    n = centred.shape[-1]
    unbiased = estimator == "unbiased"
    rows, columns = torch.tril_indices(n, n, -1 if unbiased else 0, device=centred.device)
    # Five times as fast as indexing.
    packed = centred.flatten(-2).gather(-1, (rows * n + columns).expand(*centred.shape[:-2], -1))
    if unbiased:
        return packed.mul_((2 / n) ** 0.5)
    # Use the dtype of the vectors from the start: `where` of two Python numbers is float32.
    weights = torch.full_like(rows, 2, dtype=packed.dtype).sub_((rows == columns).to(packed.dtype)).div_(n - 1)
    return packed.mul_(weights.sqrt_())


def sample_parts(centred: Tensor, estimator: Estimator = "unbiased") -> Tensor:
    """The part of each layer's own w_n * HSIC(K, K) from pairs with each sample: (..., n, n) -> (..., n).

    A pair counts for both of its samples, so a sample on which everything depends has all of it.
    """
    n = centred.shape[-1]
    # For each row in one pass, without a matrix of squares.
    squares = torch.linalg.vector_norm(centred, dim=-1).square()
    parts: Tensor = 2 * squares - centred.diagonal(dim1=-2, dim2=-1).square()
    return parts / (n if estimator == "unbiased" else n - 1)


def all_pairs(packed: Tensor) -> Tensor:
    """Inner products of every pair of layers: centred vectors (L, m, p) -> (m, L, L), symmetric to the bit.

    This is one matrix product of which only the lower bands are computed, because the result is symmetric.
    """
    vectors = packed.transpose(0, 1)
    m, layers, _ = vectors.shape
    out = packed.new_empty(m, layers, layers)
    _lower_product(vectors, out)
    return out.tril().add_(out.tril(-1).mT)


def _lower_product(vectors: Tensor, out: Tensor) -> None:
    layers = vectors.shape[1]
    # Small bands cost more in launches than they save in arithmetic.
    if layers <= 256:
        torch.bmm(vectors, vectors.mT, out=out) if out.is_contiguous() else out.copy_(vectors @ vectors.mT)
        return
    half = layers // 2
    out[:, half:, :half] = vectors[:, half:] @ vectors[:, :half].mT
    _lower_product(vectors[:, :half], out[:, :half, :half])
    _lower_product(vectors[:, half:], out[:, half:, half:])
