"""`cka` and `cka_matrix` against the oracle, and feature space against Gram matrices."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pandas
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
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-6), (torch.float64, 1e-10)]
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
    "integer array": ([np.ones((5, 2), int)], {}, cka_hooks.OptionError, r"int64.*\.astype\("),
    "text": ([np.array(["a"] * 5)], {}, cka_hooks.OptionError, r"tensor 0, numpy.ndarray, cannot be taken"),
    "objects": ([np.array([None] * 5)], {}, cka_hooks.OptionError, r"tensor 0, numpy.ndarray, cannot be taken"),
    "masked": ([np.ma.masked_less(np.arange(5.0), 2)], {}, cka_hooks.OptionError, r"masked entries.*\.filled"),
    "sparse": ([torch.ones(5, 2).to_sparse()], {}, cka_hooks.OptionError, r"sparse_coo.*\.to_dense\(\)"),
    "complex": ([torch.ones(5, 2) * 1j], {}, cka_hooks.OptionError, "complex64"),
    "list": (
        [[1.0, 2.0, 3.0, 4.0]],
        {},
        cka_hooks.OptionError,
        "tensor 0, builtins.list, cannot be taken as a tensor",
    ),
    "class": ([np.ndarray], {}, cka_hooks.OptionError, "tensor 0, builtins.type, cannot be taken as a tensor"),
    "scalar": ([torch.tensor(1.0)], {}, cka_hooks.OptionError, "expected floating-point numbers"),
    "nan": ([torch.ones(5), torch.full((5,), math.nan)], {}, cka_hooks.NonFiniteError, "tensor 1 has NaN"),
    "inf": ([torch.full((5,), math.inf)], {}, cka_hooks.NonFiniteError, "tensor 0"),
    "one tensor": (torch.ones(5, 2), {}, cka_hooks.OptionError, r"one Tensor \(5, 2\).*cka_hooks.cka\(x, y\)"),
    "one array": (np.ones((5, 2)), {}, cka_hooks.OptionError, r"one ndarray \(5, 2\).*cka_matrix\(\[x\], \[y\]\)"),
    "two tensors": (
        [torch.ones(5, 2)],
        {"ys": torch.ones(5, 2)},
        cka_hooks.OptionError,
        r"ys is one Tensor \(5, 2\), and cka_matrix takes lists",
    ),
    "mapping": ({"a": torch.ones(5)}, {}, cka_hooks.OptionError, r"xs is a mapping.*list\(xs.values\(\)\)"),
    "word": ("abcde", {}, cka_hooks.OptionError, "xs is one str"),
    "nothing": (None, {}, cka_hooks.OptionError, "xs is one NoneType"),
    "kernel": ([torch.ones(5)], {"kernel": "rfb"}, cka_hooks.OptionError, "'rfb' is unknown.*'rbf'"),
    "estimator": ([torch.ones(5)], {"estimator": "x"}, cka_hooks.OptionError, "'unbiased' or 'biased'"),
    "estimators": ([torch.ones(5)], {"estimator": np.ones(2)}, cka_hooks.OptionError, "'unbiased' or 'biased'"),
    "bandwidth": ([torch.ones(5)], {"bandwidth": 1.0}, cka_hooks.OptionError, "belongs to kernel='rbf'"),
    "both": ([torch.ones(5)], {"kernel": "rbf", "bandwidth": 1.0, "sigma": 1.0}, cka_hooks.OptionError, "exclude"),
    "large subset": ([torch.ones(5)], {"subset": 6}, cka_hooks.OptionError, "subset=6: .*from 4 to 5"),
    "small subset": ([torch.ones(5)], {"subset": 3}, cka_hooks.OptionError, "from 4 to 5"),
    "shape": ([torch.ones(5)], {"kernel": lambda x: x[:, 0]}, cka_hooks.OptionError, r"shape \(5, 5\)"),
    "not a tensor": ([torch.ones(5)], {"kernel": lambda x: 1.0}, cka_hooks.OptionError, "float"),
}
for number in (0, -1.0, math.nan, math.inf, "2", True, torch.ones(2), torch.tensor(math.nan), np.inf, [1.0]):
    for option in ("bandwidth", "sigma"):
        options = {"kernel": "rbf", option: number}
        BAD[f"{option} {number!r}"] = ([torch.ones(5)], options, cka_hooks.OptionError, f"{option}=.*above 0")
for number in (4.0, math.nan, math.inf, "4", True, torch.ones(2), [4]):
    BAD[f"subset {number!r}"] = ([torch.ones(5)], {"subset": number}, cka_hooks.OptionError, "subset=.*from 4 to 5")


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    xs, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        cka_matrix(xs, **options)


def test_tensors_that_need_gradients() -> None:
    x = features(20, 4).requires_grad_()
    assert not cka_matrix([x]).requires_grad
    assert cka_matrix([x, x], []).shape == (2, 0)
    with torch.inference_mode():
        assert cka(x, x * 2) == pytest.approx(1)


class WithDLPack:
    """An array of another package, which NumPy knows nothing of."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def arrays(x: np.ndarray, folder: Path) -> dict[str, Any]:
    """The same numbers as people bring them."""
    np.save(folder / "x.npy", x)
    read_only = x.copy()
    read_only.flags.writeable = False
    packed = np.zeros((len(x), x[0].size), [("byte", "u1"), ("number", "f8")])
    packed["number"] = x
    return {
        "array": x,
        "read-only": read_only,
        "memory map": np.load(folder / "x.npy", mmap_mode="r"),
        "other order of bytes": x.astype(">f8"),
        "long": x.astype(np.longdouble),
        "Fortran": np.asfortranarray(x),
        "backwards": x[::-1].copy()[::-1],
        "not aligned": packed["number"],
        "data frame": pandas.DataFrame(x),
        "DLPack": WithDLPack(torch.from_numpy(x)),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arrays_are_what_tensors_of_their_numbers_are(device: str, tmp_path: Path) -> None:
    x, y = features(20, 6), features(20, 30, seed=1)
    wanted = cka(x, y)
    torch.set_default_device(device)
    try:
        for name, array in arrays(x.numpy(), tmp_path).items():
            if name == "DLPack" and device == "meta":
                continue  # torch.from_dlpack itself makes meta tensors there
            assert cka(array, y.numpy()) == pytest.approx(wanted, abs=1e-12), name
            assert float(cka_matrix([array], [y])) == pytest.approx(wanted, abs=1e-12), name
            accumulator = cka_hooks.CKAAccumulator()
            accumulator.update({"x": array, "y": y.numpy()})
            assert accumulator.compute()["x", "y"] == pytest.approx(wanted, abs=1e-12), name
    finally:
        torch.set_default_device(None)
    assert np.array_equal(x.numpy(), features(20, 6).numpy()), "arrays are not written to"


@pytest.mark.filterwarnings("ignore:one sample decides")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_any_default_device(kernel: str, estimator: Any) -> None:
    xs = [features(20, *shape, seed=i).float() for i, shape in enumerate([(7,), (30,), (3, 4, 5)])]
    options = {**KERNELS[kernel][0], "estimator": estimator}

    def found() -> list[Tensor]:
        accumulator = cka_hooks.CKAAccumulator(minibatch=5, keep_minibatches=True, **options)
        accumulator.update({str(i): x for i, x in enumerate(xs)})
        accumulator.update({str(i): x for i, x in enumerate(reversed(xs))})
        result = accumulator.compute()
        drawn = cka_matrix(xs, xs[:1], subset=10, generator=torch.Generator("cpu").manual_seed(0), **options)
        torch.manual_seed(0)
        return [cka_matrix(xs, **options), drawn, cka_matrix(xs, subset=9, **options), result.matrix, result.stderr]

    wanted = found()
    torch.set_default_device("meta")
    try:
        here = found()
    finally:
        torch.set_default_device(None)
    for mine, theirs in zip(here, wanted, strict=True):
        assert mine.device.type == "cpu"
        assert torch.equal(mine, theirs)


def test_numbers_of_other_types_are_options() -> None:
    xs = [features(20, 4), features(20, 30, seed=1)]
    for number in (np.float32(2), np.int64(2), torch.tensor(2.0), 2):
        assert torch.equal(cka_matrix(xs, kernel="rbf", sigma=number), cka_matrix(xs, kernel="rbf", sigma=2.0))
    for number in (np.int64(9), np.uint8(9), torch.tensor(9)):
        drawn = [cka_matrix(xs, subset=n, generator=torch.Generator().manual_seed(0)) for n in (number, 9)]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("kernel", ["linear", "rbf", "distance", "cosine"])
def test_floats_of_one_byte(dtype: torch.dtype, kernel: str) -> None:
    xs = [features(20, d, seed=d).relu().to(dtype) for d in (6, 40)]
    wanted = expected(xs, None, oracle.KERNELS[kernel], "unbiased")
    np.testing.assert_allclose(cka_matrix(xs, kernel=kernel), wanted, rtol=0, atol=1e-6)
    accumulator = cka_hooks.CKAAccumulator(kernel=kernel)
    accumulator.update({"6": xs[0], "40": xs[1]})
    np.testing.assert_allclose(accumulator.compute().matrix, wanted, rtol=0, atol=1e-6)
    constant = torch.full((20, 5), 3.0).to(dtype)
    constant[::2] = torch.tensor(3.5 if dtype is torch.float8_e5m2 else 3.25).to(dtype)
    assert math.isnan(cka(constant, xs[0])), "one step of rounding is no difference"


def test_an_update_that_is_no_mapping() -> None:
    accumulator = cka_hooks.CKAAccumulator()
    with pytest.raises(cka_hooks.OptionError, match=r'found Tensor: write update\(\{"layer"'):
        accumulator.update(torch.ones(5, 2))
    with pytest.raises(cka_hooks.OptionError, match=r"layer 'a' is \(5,\) of torch.int64"):
        accumulator.update({"b": torch.ones(5, 2), "a": np.arange(5)})
    assert not accumulator.observing
