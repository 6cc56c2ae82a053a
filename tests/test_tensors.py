"""`cka` and `cka_matrix` against the oracle, and feature space against Gram matrices."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import cka_hooks
from cka_hooks import cka, cka_matrix

KERNELS: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({}, oracle.linear_gram),
    "rbf": ({"kernel": "rbf"}, oracle.rbf_gram),
    "rbf bandwidth": ({"kernel": "rbf", "bandwidth": 0.5}, lambda x: oracle.rbf_gram(x, 0.5)),
    "rbf sigma": ({"kernel": "rbf", "sigma": 3.0}, lambda x: oracle.rbf_gram(x, sigma=3.0)),
    "distance": ({"kernel": "distance"}, oracle.distance_gram),
    "cosine": ({"kernel": "cosine"}, oracle.cosine_gram),
    "polynomial": ({"kernel": "polynomial"}, oracle.polynomial_gram),
    "callable": (
        {"kernel": lambda x: (x @ x.mT).abs().sqrt()},
        lambda x: np.sqrt(np.abs(x @ x.T)),
    ),
}


def features(n: int, *shape: int, seed: int = 0, shared: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    flat = signal @ torch.randn(3, math.prod(shape), generator=generator, dtype=torch.float64)
    flat = flat + torch.randn(flat.shape, generator=generator, dtype=torch.float64) + shared
    return flat.unflatten(1, shape)


def expected(xs: list[Tensor], ys: list[Tensor] | None, gram: Any, estimator: str) -> np.ndarray:
    tensors = [*xs, *(ys or [])]
    matrix = oracle.cka_minibatch([[gram(oracle.flatten(t)) for t in tensors]], estimator)
    return matrix if ys is None else matrix[: len(xs), len(xs) :]


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shared", [0.0, 100.0])
def test_against_the_oracle(kernel: str, estimator: Any, shared: float) -> None:
    options, gram = KERNELS[kernel]
    # Narrower than the samples, as wide, wider; two and more dimensions.
    xs = [features(20, *shape, seed=i, shared=shared) for i, shape in enumerate([(1,), (7,), (20,), (3, 4, 5)])]
    ys = [features(20, 19, seed=8), features(20, 40, seed=9, shared=shared)]
    for columns in (None, ys):
        found = cka_matrix(xs, columns, estimator=estimator, **options)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected(xs, columns, gram, estimator), rtol=0, atol=1e-9)
    assert cka(xs[1], ys[1], estimator=estimator, **options) == float(
        cka_matrix([xs[1]], [ys[1]], estimator=estimator, **options)
    )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-5), (torch.float64, 1e-10)]
)
@pytest.mark.parametrize("shared", [0.0, 10.0])
def test_dtypes(dtype: torch.dtype, limit: float, shared: float) -> None:
    xs = [features(30, d, seed=d, shared=shared).to(dtype) for d in (5, 500)]
    np.testing.assert_allclose(
        cka_matrix(xs).numpy(), expected(xs, None, oracle.linear_gram, "unbiased"), rtol=0, atol=limit
    )


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("n", [4, 5, 12, 200])
@pytest.mark.parametrize("shared", [0.0, 1e4])
def test_feature_space_is_the_gram_path(n: int, estimator: Any, shared: float) -> None:
    xs = [features(n, d, seed=d, shared=shared) for d in (1, 2, 3)]
    # Features that are 0 change nothing but the path that is taken.
    wide = [torch.nn.functional.pad(x, (0, n)) for x in xs]
    narrow = cka_matrix(xs, estimator=estimator)
    torch.testing.assert_close(narrow, cka_matrix(wide, estimator=estimator), rtol=0, atol=1e-10)
    torch.testing.assert_close(narrow, cka_matrix(xs, wide, estimator=estimator), rtol=0, atol=1e-10)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("factor", [1e3, 1e5, 1e7])
def test_an_outlying_sample_of_few_features(factor: float, estimator: Any) -> None:
    xs = [features(50, 3, seed=seed) for seed in (1, 2)]
    xs[0][5] *= factor
    np.testing.assert_allclose(
        cka_matrix(xs, estimator=estimator), expected(xs, None, oracle.linear_gram, estimator), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_many_samples_of_few_features_are_a_matter_of_a_moment(estimator: Any) -> None:
    # 200,000 x 200,000 would be 320 GB.
    x = torch.randn(200_000, 3)
    started = time.perf_counter()
    value = cka(x, x + torch.randn(200_000, 3), estimator=estimator)
    assert value == pytest.approx(0.5, abs=0.01)
    assert time.perf_counter() - started < 5


def test_a_subset_is_reproducible_and_the_same_of_every_tensor() -> None:
    xs = [features(100, 4), features(100, 300, seed=1)]

    def drawn(seed: int) -> Tensor:
        return cka_matrix(xs, subset=40, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(5), drawn(5))
    assert not torch.equal(drawn(5), drawn(6))
    chosen = torch.randperm(100, generator=torch.Generator().manual_seed(5))[:40]
    torch.testing.assert_close(drawn(5), cka_matrix([x[chosen] for x in xs]), rtol=0, atol=1e-12)
    assert cka(xs[0], xs[0] * 2, subset=40) == pytest.approx(1)
    torch.testing.assert_close(cka_matrix(xs, subset=100), cka_matrix(xs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [1, 5, 30])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_samples_that_do_not_differ_give_nan(d: int, estimator: Any) -> None:
    equal, live = torch.full((20, d), 0.1), features(20, 6).float()
    found = cka_matrix([equal, live], estimator=estimator)
    assert found.isnan().tolist() == [[True, True], [True, False]]
    assert math.isnan(cka(equal, live, estimator=estimator))


@pytest.mark.parametrize("d", [1, 3, 30])
@pytest.mark.parametrize("kernel", ["linear", "rbf", "distance"])
@pytest.mark.parametrize("value", [1.0, 0.3, 1e-3, 1e3])
def test_one_sample_that_differs_has_no_unbiased_cka(d: int, kernel: str, value: float) -> None:
    """Its U-centred Gram matrix is 0: a quotient of two roundings is no number to report."""
    x = torch.zeros(10, d, dtype=torch.float64)
    x[7] = value
    for shared in (0.0, 0.1, 7.7):
        assert math.isnan(cka(x + shared, features(10, 5), kernel=kernel))
        assert not math.isnan(cka(x + shared, features(10, 5), kernel=kernel, estimator="biased"))


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "n": ([torch.ones(5, 2), torch.ones(6, 2)], {}, cka_hooks.SampleCountError, r"\[5, 6\] samples in dimension 0"),
    "few": ([torch.ones(3, 2)], {}, cka_hooks.TooFewSamplesError, "at least 4 samples.*found 3"),
    "none": ([], {}, cka_hooks.TooFewSamplesError, "no tensor"),
    "integers": ([torch.ones(5, 2).long()], {}, cka_hooks.OptionError, r"int64.*\.float\(\)"),
    "complex": ([torch.ones(5, 2) * 1j], {}, cka_hooks.OptionError, "complex64"),
    "list": ([[1.0, 2.0, 3.0, 4.0]], {}, cka_hooks.OptionError, "tensor 0 is list"),
    "scalar": ([torch.tensor(1.0)], {}, cka_hooks.OptionError, "expected a floating-point tensor"),
    "nan": ([torch.ones(5), torch.full((5,), math.nan)], {}, cka_hooks.NonFiniteError, "tensor 1 has NaN"),
    "inf": ([torch.full((5,), math.inf)], {}, cka_hooks.NonFiniteError, "tensor 0"),
    "kernel": ([torch.ones(5)], {"kernel": "rfb"}, cka_hooks.OptionError, "'rfb' is not known.*'rbf'"),
    "estimator": ([torch.ones(5)], {"estimator": "x"}, cka_hooks.OptionError, "'unbiased' or 'biased'"),
    "bandwidth": ([torch.ones(5)], {"bandwidth": 1.0}, cka_hooks.OptionError, "belongs to kernel='rbf'"),
    "negative": ([torch.ones(5)], {"kernel": "rbf", "bandwidth": -1.0}, cka_hooks.OptionError, "above 0"),
    "both": ([torch.ones(5)], {"kernel": "rbf", "bandwidth": 1.0, "sigma": 1.0}, cka_hooks.OptionError, "exclude"),
    "large subset": ([torch.ones(5)], {"subset": 6}, cka_hooks.OptionError, "from 4 to the 5"),
    "small subset": ([torch.ones(5)], {"subset": 3}, cka_hooks.OptionError, "from 4 to the 5"),
    "shape": ([torch.ones(5)], {"kernel": lambda x: x[:, 0]}, cka_hooks.OptionError, r"shape \(5, 5\)"),
    "not a tensor": ([torch.ones(5)], {"kernel": lambda x: 1.0}, cka_hooks.OptionError, "float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    xs, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        cka_matrix(xs, **options)


def test_tensors_that_need_gradients() -> None:
    x = features(20, 4).requires_grad_()
    assert not cka_matrix([x]).requires_grad
    with torch.inference_mode():
        assert cka(x, x * 2) == pytest.approx(1)
