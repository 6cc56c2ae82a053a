"""The permutation distribution: moments against all permutations, tails against scipy and real permutations."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from cka_hooks.hsic import all_pairs, centre, pack
from cka_hooks.null import null_cumulants, null_numbers, pearson3_tail


def centred(layers: int, n: int, seed: int, heavy: bool = False) -> Tensor:
    """(layers, n, n) U-centred Gram matrices of random features, with outlying samples where `heavy`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, n, 3, generator=generator, dtype=torch.float64)
    return centre((x.exp() if heavy else x.relu()) @ (x.exp() if heavy else x.relu()).mT)


def numbers_of_float64(matrices: Tensor) -> Tensor:
    cubes = [
        np.einsum("...ij,...jk,...ki->...", matrices, matrices, matrices),
        np.sum(matrices.numpy() ** 3, (-2, -1)),
    ]
    return torch.from_numpy(np.stack(cubes, -1))


def sums_over_permutations(a: Tensor, b: Tensor) -> Tensor:
    """<A, P B P'> / n for every permutation P."""
    n = len(a)
    orders = torch.tensor(list(itertools.permutations(range(n))))
    return (a * b[orders.unsqueeze(2), orders.unsqueeze(1)]).sum((1, 2)) / n


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_moments_are_those_of_all_permutations(n: int, heavy: bool) -> None:
    matrices = centred(3, n, seed=n, heavy=heavy)
    own = matrices.square().sum((1, 2)) / n
    exact = null_cumulants(own[:, None], numbers_of_float64(matrices)[:, None], n)
    fast = null_cumulants(own[:, None], null_numbers(matrices)[:, None], n)
    torch.testing.assert_close(exact, exact.mT)
    for i, j in itertools.product(range(3), repeat=2):
        values = sums_over_permutations(matrices[i], matrices[j])
        assert abs(float(values.mean())) < 1e-12 * float(values.abs().max())
        for found, limit in ((exact, 1e-10), (fast, 1e-6)):
            variance, third = found[:, i, j]
            assert float(variance / values.square().mean()) == pytest.approx(1, abs=1e-10)
            # The third moment may be near 0 by chance: in units of the standard deviation.
            assert float((third - values.pow(3).mean()) / variance**1.5) == pytest.approx(0, abs=limit)


def test_autocast_changes_nothing() -> None:
    matrices = centred(3, 12, seed=0)
    expected = null_numbers(matrices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(null_numbers(matrices), expected)


def test_minibatches_of_several_sizes_add_up() -> None:
    total, wanted = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for n in (4, 5):
        layers = centred(6, n, seed=n).unflatten(0, (2, 3))
        own = all_pairs(pack(layers)).diagonal(dim1=1, dim2=2).mT
        total += null_cumulants(own, null_numbers(layers), n)[:, 0, 1]
        for b in range(3):
            values = sums_over_permutations(layers[0, b], layers[1, b])
            wanted += torch.stack([values.square().mean(), values.pow(3).mean()])
    torch.testing.assert_close(total, wanted, rtol=1e-7, atol=0)


def test_matrices_that_are_zero_or_large() -> None:
    matrices = centred(2, 12, seed=0)
    matrices[0] = 0
    for scale in (1e-60, 1.0, 1e60):
        found = null_numbers(scale * matrices)
        assert found[0].tolist() == [0, 0]
        torch.testing.assert_close(found[1] / scale**3, numbers_of_float64(matrices)[1], rtol=1e-6, atol=0)
    assert null_numbers(matrices * torch.nan).isnan().all()


def exact_tail(z: float, skewness: float) -> mpmath.mpf:
    """The integral over the density of a gamma variable less its mean, over its standard deviation."""
    with mpmath.workdps(60):
        root = 2 / mpmath.mpf(abs(skewness))
        shape, side = root**2, -1 if skewness < 0 else 1
        norm = mpmath.exp((shape - 0.5) * mpmath.log(shape) - shape - mpmath.loggamma(shape))

        def density(t: mpmath.mpf) -> mpmath.mpf:
            return mpmath.exp((shape - 1) * mpmath.log1p(t / root) - root * t) if t > -root else mpmath.mpf(0)

        steps = [0, 0.5, 1, 2, 3, 5, 8, 12, 20, 40]
        points = sorted({max(side * (mpmath.mpf(z) + step), -root) for step in steps})
        return norm * mpmath.quad(density, points) if len(points) > 1 else mpmath.mpf(0)


@pytest.mark.parametrize("skewness", [3.5, 0.3, 0.0201, 0.0199, 1e-4, 1e-12])
def test_the_tail_is_the_integral_over_the_density(skewness: float) -> None:
    z = [-1.5, 0.0, 0.3, 2.0, 4.6, 8.0]
    for signed in (skewness, -skewness):
        found = pearson3_tail(torch.tensor(z, dtype=torch.float64), torch.tensor(signed, dtype=torch.float64))
        wanted = [float(exact_tail(value, signed)) for value in z]
        np.testing.assert_allclose(found, wanted, rtol=5e-8, atol=1e-300)


@pytest.mark.parametrize("skewness", [-2.0, -0.3, -0.05, -1e-3, 0.0, 1e-3, 0.05, 0.3, 1.0, 2.0, 3.5])
def test_the_tail_is_scipys(skewness: float) -> None:
    z = np.linspace(-4.4, 4.4, 37)
    found = pearson3_tail(torch.from_numpy(z), torch.tensor(skewness, dtype=torch.float64))
    np.testing.assert_allclose(found, scipy.stats.pearson3.sf(z, skewness), rtol=1e-8, atol=1e-300)


def test_tails_that_are_not_there() -> None:
    z = torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf, 1e10, -1e10, 5.0])
    skewness = torch.tensor([0.5, torch.nan, 0.5, 0.5, 0.5, 0.5, -1.0])
    found = pearson3_tail(z, skewness)
    assert found.isnan().tolist() == [True, True, *[False] * 5]
    assert found[2:].tolist() == [0, 1, 0, 1, 0]
    assert found.dtype is torch.float64


def five_layers(n: int, generator: torch.Generator) -> list[Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gauss, narrow = draw(n, 20), draw(n, 5)
    relu = (draw(n, 5) @ draw(5, 30)).relu()
    one_direction = draw(n, 20) * torch.tensor([3.0] + 19 * [0.3])
    classes = draw(n, 20) + 2 * draw(3, 20)[torch.arange(n) % 3]
    return [gauss, narrow, relu, one_direction, classes]


@pytest.mark.parametrize("n", [8, 32, 128])
def test_ten_pairs_against_ten_thousand_real_permutations(n: int) -> None:
    """Of one layer's samples within each of some minibatches."""
    generator = torch.Generator().manual_seed(n)
    draws, rows, columns = 10_000, *torch.tril_indices(n, n, -1)
    cumulants = torch.zeros(2, 5, 5, dtype=torch.float64)
    sums = torch.zeros(draws, 5, 5, dtype=torch.float64)
    for _ in range({8: 6, 32: 3, 128: 1}[n]):
        layers = torch.stack([centre(x @ x.mT) for x in five_layers(n, generator)])
        cumulants += null_cumulants(layers.square().sum((1, 2))[:, None] / n, null_numbers(layers)[:, None], n)
        lower = 2 / n * layers[:, rows, columns]
        for some in sums.split(1000):
            order = torch.rand(len(some), n, generator=generator).argsort(1)
            index = order[:, rows] * n + order[:, columns]
            some += torch.stack([layer.take(index) @ lower.mT for layer in layers], 1)
    deviation = cumulants[0].sqrt()
    shares = torch.tensor([0.5, 0.2, 0.05, 0.01, 0.002], dtype=torch.float64)
    # What 10,000 draws leave unsure (both are the same sums for i, j and j, i: each pair has two tries).
    unsure = 4 * (shares * (1 - shares) / draws).sqrt()
    for i, j in itertools.permutations(range(5), 2):
        assert float(sums[:, i, j].std() / deviation[i, j]) == pytest.approx(1, abs=0.04)
        at = sums[:, i, j].quantile(1 - shares)
        p = pearson3_tail(at / deviation[i, j], cumulants[1, i, j] / deviation[i, j] ** 3)
        # And what a curve of three moments leaves out.
        assert ((p - shares).abs() < unsure + 0.1 * shares).all(), (i, j, p)
