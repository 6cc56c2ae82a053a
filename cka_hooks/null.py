"""The null distribution: what CKA would be for two unrelated layers, over permutations of the samples.

Let A and B be the U-centred Gram matrices of a minibatch of n samples, zero on the diagonal and in every row sum, and
P a permutation drawn at random. Then <A, P B P'> = sum_{i != j} A_ij B_{p(i)p(j)} has mean 0, and its q-th moment is
the sum over q pairs (i, j) of products of q entries of A times the mean product of the entries of B where P takes
them. That mean depends only on which indices coincide, that is on a graph G of q edges without loops. With T_G(A) the
sum of the products over all ways to give the v vertices of G different samples, and c_G the number of ways in which
2 q indices can coincide to make G,

    E <A, P B P'>^q = sum_G c_G T_G(A) T_G(B) / (n (n - 1) ... (n - v + 1)).

A vertex at the end of a single edge can be summed out, because rows sum to 0: it takes minus the values of the
vertices that are already in use. So every T_G with two edges is a multiple of |A|^2, which gives the variance 2 |A|^2
|B|^2 / (n (n - 3)) (double edge: c = 2, T = |A|^2; two edges at a vertex: 4, -|A|^2; two apart: 1, 2 |A|^2). Every
T_G with three edges is a combination of the triangle, t = tr A^3, and the triple edge, s = sum_ij A_ij^3: see
`_GRAPHS`. Both results are exact for every n >= 4. If n < v there is no such G, and T_G = 0 (so t = 2 s for n of 4
and 5). Permutations of different minibatches are independent, so their variances and third central moments add up.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from cka_hooks.errors import OptionError
from cka_hooks.precision import exactly

# Three edges without loops: c_G, v, and T_G as a multiple of t plus one of s.
_GRAPHS = (
    (4, 2, 0, 1),  # a triple edge
    (24, 3, 0, -1),  # a double edge and one more at one of its vertices
    (8, 3, 1, 0),  # a triangle
    (6, 4, 0, 2),  # a double edge and one apart
    (8, 4, 0, 2),  # three at one vertex
    (24, 4, -1, 1),  # a path
    (12, 5, 2, -4),  # two at a vertex and one apart
    (1, 6, -8, 16),  # three apart
)
# If the skewness is below this, the tail is a correction to that of the normal distribution.
_NEARLY_NORMAL = 0.02
# Numbers of permutations that are kept: 256 MB, and what a result file can have.
_MOST_PERMUTED = 1 << 25


def null_numbers(centred: Tensor) -> Tensor:
    """The numbers of U-centred matrices for the third moment, (..., n, n) -> (..., 2): tr A^3 and the sum of A_ij^3.

    The product is made in float32 from matrices of norm 1: right to about 1e-8 |A|^3, three times as fast.
    """
    size = torch.linalg.vector_norm(centred, dim=(-2, -1), keepdim=True)
    unit = (centred / torch.where(size > 0, size, 1)).float()
    scale: Tensor = size.squeeze(-1) ** 3
    return exactly(unit.device, _cubes, unit).to(size) * scale


def _cubes(unit: Tensor) -> Tensor:
    flat = unit.flatten(-2)
    both = (unit @ unit).flatten(-2), flat.square()
    # `vecdot` is a product, too, and rounds as products do.
    return torch.stack([torch.linalg.vecdot(other, flat) for other in both], -1)


def null_cumulants(own: Tensor, numbers: Tensor, n: int) -> Tensor:
    """Variance and third central moment of the weighted HSIC summed over m minibatches of n samples.

    Args:
        own: (L, m) w_n HSIC(K, K) of L layers, |A|^2 / n, see :func:`cka_hooks.hsic.pack`.
        numbers: (L, m, 2), see `null_numbers`.
        n: number of samples in each of the m minibatches.

    Returns:
        (2, L, L), of sum_b w_n HSIC(K_b, P L_b P') over random permutations P of each minibatch, for every pair of
        layers. Add those of other minibatches. Divide the first by S_ii S_jj and the second by its power of 3/2 to
        get those of CKA_ij, since S_ii and S_jj do not depend on P.

    Example:
        >>> import torch
        >>> from cka_hooks.hsic import centre
        >>> x = torch.randn(2, 1, 8, 3, dtype=torch.float64)
        >>> centred = centre(x @ x.mT)
        >>> null_cumulants(centred.square().sum((-2, -1)) / 8, null_numbers(centred), 8).shape
        torch.Size([2, 2, 2])
    """
    variance, of_t, of_both, of_s = null_weights(n)
    # Python numbers rather than tensors, which would have to be moved to the device.
    t, s = numbers.unbind(-1)
    third = (of_t * t + of_both * s) @ t.mT + (of_both * t + of_s * s) @ s.mT
    return torch.stack([variance * own @ own.mT, third])


@lru_cache(maxsize=256)
def null_weights(n: int) -> tuple[float, float, float, float]:
    """The weights in `null_cumulants` of |A|^2 of both layers, t of both, t of one with s of the other, s of both."""
    here = [(ways / math.perm(n, vertices) / n**3, t, s) for ways, vertices, t, s in _GRAPHS if vertices <= n]
    of_t = sum(share * t**2 for share, t, _ in here)
    of_both = sum(share * t * s for share, t, s in here)
    of_s = sum(share * s**2 for share, _, s in here)
    return 2 / (n * (n - 3)), of_t, of_both, of_s


def check_permutations(count: int, layers: int) -> None:
    """Check that the values of all pairs of layers in so many permutations can be kept.

    Raises:
        OptionError: they take more than 256 MB.
    """
    if count * layers**2 > _MOST_PERMUTED:
        raise OptionError(
            f"permutations={count} of {layers} layers would take {8e-9 * count * layers**2:,.1f} GB: at most "
            f"{_MOST_PERMUTED // layers**2:,} of so many layers are kept; take fewer, or choose layers by layers="
        )


def permuted_orders(hsic: Tensor, n: int, count: int, seed: int) -> Tensor:
    """Orders of the n samples of a minibatch, drawn at random: (L, L) HSICs of its layers -> (count, n).

    They depend on the seed and on these, and so neither on when nor on which rank it was added. This waits for the
    device.
    """
    # Nine digits, which rounding does not change. Layers with NaN are left out: each NaN has another hash.
    total = float(hsic.nan_to_num(0, 0, 0).sum())
    generator = torch.Generator().manual_seed(hash((seed, float(f"{total:.9g}"))))
    return torch.rand(count, n, generator=generator, device="cpu").argsort(-1).to(hsic.device)


def permuted_pairs(vectors: Tensor, hsic: Tensor, n: int, count: int, seed: int) -> Tensor:
    """The sums over m minibatches of h_ij, i < j, with the samples of j in another order, the same one for every j.

    Args:
        vectors: (L, m, p) centred Gram matrices, unbiased, see :func:`cka_hooks.hsic.pack`.
        hsic: (m, L, L) their inner products.
        n: samples in each minibatch.
        count: how often they are permuted.
        seed: of the orders, see `permuted_orders`.

    Returns:
        (count, L, L), symmetric, 0 on the diagonal.

    Raises:
        OptionError: that would take more than 256 MB.
    """
    rows, columns = torch.tril_indices(n, n, -1, device=vectors.device)
    layers, m, _ = vectors.shape
    check_permutations(count, layers)
    found = vectors.new_zeros(count, layers, layers)
    for b in range(m):
        mine, theirs = vectors[:, b], vectors[:, b].mT.contiguous()
        for total, order in zip(found, permuted_orders(hsic[b], n, count, seed), strict=True):
            one, other = order[rows], order[columns]
            larger = torch.maximum(one, other)
            total += mine @ theirs[larger * (larger - 1) // 2 + torch.minimum(one, other)]
    upper = found.triu_(1)
    return upper + upper.mT


def null_tail(values: Tensor, variance: Tensor, skewness: Tensor) -> Tensor:
    """P-values of CKA values, given variance and skewness of their null distribution; NaN where the variance is 0."""
    return pearson3_tail(values / torch.where(variance > 0, variance, torch.nan).sqrt(), skewness)


def pearson3_tail(z: Tensor, skewness: Tensor) -> Tensor:
    """P(Z > z) for Z with mean 0, variance 1 and a given skewness, of Pearson's type III: a shifted gamma.

    Args:
        z: (...) values in standard deviations.
        skewness: (...) of either sign; 0 is the normal distribution.

    Returns:
        (...) float64, NaN if either is NaN.

    Example:
        >>> pearson3_tail(torch.tensor([1.6448536, 3.0]), torch.tensor([0.0, 2.0])).tolist()  # normal, exponential
        [0.0500..., 0.0183...]
    """
    z, skewness = z.double(), skewness.double()
    shape = 4 / skewness.abs().clamp_min(_NEARLY_NORMAL) ** 2
    above = torch.special.gammaincc(shape, (shape + z * shape.sqrt()).clamp_min(0))
    below = torch.special.gammainc(shape, (shape - z * shape.sqrt()).clamp_min(0))
    nearly = _nearly_normal_tail(z.clamp(-100, 100), skewness.clamp(-_NEARLY_NORMAL, _NEARLY_NORMAL))
    return torch.where(skewness.abs() < _NEARLY_NORMAL, nearly, torch.where(skewness < 0, below, above))


def _nearly_normal_tail(z: Tensor, skewness: Tensor) -> Tensor:
    """A tail that is right to 1e-8 of itself where incomplete gamma functions lose digits (Lugannani & Rice 1980).

    With u = z skewness / 2 and w = z r, r^2 = 2 (u - log(1 + u)) / u^2, it is 1 - Phi(w) + phi(w) (1 / z - 1 / w).
    """
    u = z * skewness / 2
    small = u.abs() < 1e-2
    some = torch.where(small, 1, u)
    series = -2 / 3 + u / 2 - 2 / 5 * u**2 + u**3 / 3 - 2 / 7 * u**4
    # (r^2 - 1) / u.
    slope = torch.where(small, series, (2 * (some - some.log1p()) / some**2 - 1) / some)
    r = (1 + slope * u).sqrt()
    w = z * r
    density = torch.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)
    normal: Tensor = torch.special.erfc(w / math.sqrt(2)) / 2
    return normal + density * skewness / 2 * slope / (r * (r + 1))
