"""The stacked HSIC functions against the formulas they come from."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from cka_hooks.hsic import _median_above_0, all_pairs, centre, pack, sample_parts


def grams(layers: int, minibatches: int, n: int, shared: float = 0.0) -> Tensor:
    """(layers, minibatches, n, n) Gram matrices of random features."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(layers, minibatches, n, 6, generator=generator, dtype=torch.float64) + shared
    return x @ x.mT


@pytest.mark.parametrize("n", [4, 5, 17])
def test_biased_centring_is_hkh(n: int) -> None:
    k = grams(2, 3, n, shared=5)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    torch.testing.assert_close(centre(k, "biased"), h @ k @ h)


@pytest.mark.parametrize("n", [4, 5, 17])
def test_u_centred_rows_sum_to_nothing(n: int) -> None:
    k = grams(2, 3, n, shared=5)
    before = k.clone()
    centred = centre(k)
    assert torch.equal(k, before)
    assert torch.all(centred.diagonal(dim1=-2, dim2=-1) == 0)
    torch.testing.assert_close(centred.sum(-1), torch.zeros(2, 3, n, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("n", [4, 5, 17])
def test_inner_products_of_packed_vectors_are_weighted_hsic(n: int, estimator: str) -> None:
    k = grams(3, 2, n)
    pairs = all_pairs(pack(centre(k, estimator), estimator))
    hsic = oracle.hsic_unbiased if estimator == "unbiased" else oracle.hsic_biased
    weight = n - 3 if estimator == "unbiased" else n - 1
    for b in range(2):
        for i in range(3):
            for j in range(3):
                expected = weight * hsic(k[i, b].numpy(), k[j, b].numpy())
                assert float(pairs[b, i, j]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_packing_halves_the_matrix_and_loses_no_digit(estimator: str) -> None:
    packed = pack(centre(grams(1, 1, 9), estimator), estimator)
    assert packed.shape[-1] == (36 if estimator == "unbiased" else 45)
    other = centre(grams(1, 1, 9), estimator)
    scale = 9 if estimator == "unbiased" else 8
    assert float(packed.square().sum()) == pytest.approx(float(other.square().sum()) / scale, rel=1e-14)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_adding_the_same_to_a_row_and_its_column_changes_nothing(estimator: str) -> None:
    k = grams(1, 1, 8)
    a = torch.randn(8, dtype=torch.float64)
    shifted = k + a[:, None] + a
    torch.testing.assert_close(centre(shifted, estimator), centre(k, estimator), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_parts_of_samples(estimator: str) -> None:
    n = 7
    k = centre(grams(2, 2, n), estimator)
    parts = sample_parts(k, estimator)
    own = pack(k, estimator).square().sum(-1)
    for i in range(n):
        others = torch.arange(n) != i
        without = k[:, :, others][:, :, :, others].square().sum((-2, -1)) / (n if estimator == "unbiased" else n - 1)
        torch.testing.assert_close(parts[..., i], own - without)


@pytest.mark.parametrize("layers", [1, 3, 256, 257, 300])
def test_all_pairs_is_one_symmetric_product(layers: int) -> None:
    vectors = torch.randn(layers, 2, 10, dtype=torch.float64)
    pairs = all_pairs(vectors)
    assert torch.equal(pairs, pairs.mT)
    expected = np.einsum("imp,jmp->mij", vectors.numpy(), vectors.numpy())
    np.testing.assert_allclose(pairs.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("zeros", [0, 3, 8])
@pytest.mark.parametrize("nans", [0, 1, 4])
def test_the_median_on_a_gpu_is_that_on_a_cpu(zeros: int, nans: int) -> None:
    sizes = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1
    sizes[:zeros], sizes[12 - nans :] = 0, torch.nan
    expected = torch.where(sizes > 0, sizes, torch.nan).nanmedian()
    found = _median_above_0(sizes[torch.randperm(12, generator=torch.Generator().manual_seed(1))])
    assert float(found) == (0 if expected.isnan() else float(expected))
