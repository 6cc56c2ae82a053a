"""Gram matrices of awkward features: CKA that they give stays within 1e-6 of the float64 oracle."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import cka_hooks
from cka_hooks import CKAAccumulator
from cka_hooks.features import memory_order
from cka_hooks.hsic import centre
from cka_hooks.similarity.products import choose, native
from cka_hooks.similarity.products.choose import linear_grams

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")


def features(n: int, d: int, seed: int = 0) -> Tensor:
    """Three directions carry what the samples share with `reference`, the rest is noise."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mix = torch.randn(3, d, generator=generator, dtype=torch.float64)
    return signal @ mix + torch.randn(n, d, generator=generator, dtype=torch.float64)


def reference(n: int) -> Tensor:
    return features(n, 16, seed=7)


def error(x: Tensor, minibatches: int = 1, estimator: str = "unbiased") -> float:
    """Largest error in CKA of `x` and another layer, and of `x` and its own half, against the oracle."""
    n = len(x) // minibatches
    layers = [x, reference(len(x)).to(x.dtype), x.flatten(1)[:, ::2].clone()]
    cka = CKAAccumulator(estimator=estimator, minibatch=n)
    cka.update({str(i): layer for i, layer in enumerate(layers)})
    grams = [[oracle.linear_gram(oracle.flatten(layer[b : b + n])) for layer in layers] for b in range(0, len(x), n)]
    expected = oracle.cka_minibatch(grams, estimator)
    found = cka.compute().matrix.numpy()
    assert np.isfinite(expected).all()
    return float(np.abs(np.nan_to_num(found, nan=9.0) - expected).max())


@pytest.fixture(params=["cpu", "cpu, nothing compiled", "accelerator"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On an accelerator no value may be looked at: the one path that it takes, taken here."""
    if request.param == "accelerator":
        monkeypatch.setattr(choose, "_can_branch", lambda tensor: False)
    elif request.param != "cpu":
        monkeypatch.setattr(native, "VARIANTS", {})
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths of a CPU."""
    if not request.param:
        monkeypatch.setattr(native, "VARIANTS", {})


@pytest.mark.parametrize("shared", [0, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("n", [4, 5, 129, 600])
def test_a_large_common_component(n: int, shared: float, path: str) -> None:
    assert error((features(n, 600) + shared).float()) < 1e-6


@pytest.mark.parametrize("shared", [0, 1, 3, 10])
@pytest.mark.parametrize("n", [4, 8, 32])
@pytest.mark.parametrize("width", [1024, 4096, 16384])
def test_features_that_repeat(width: int, n: int, shared: float, path: str) -> None:
    """Equal addends round alike: a sum of them is further off than its number of addends tells."""
    for seed in range(5):
        x = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed)) + shared
        assert error(x.repeat(1, width)) < 1e-6


@pytest.mark.parametrize("path", ["cpu, nothing compiled", "accelerator"], indirect=True)
@pytest.mark.parametrize("n", [4, 5, 8, 32, 64])
def test_features_that_repeat_where_products_are_summed_one_by_one(
    n: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far a product is off is up to BLAS. The worst adds each feature to one sum, and rounds it."""
    multiply = torch.bmm

    def one_by_one(a: Tensor, b: Tensor, **out: Tensor) -> Tensor:
        if a.dtype is torch.float64:
            return multiply(a, b, **out)
        a, b, total = a.double(), b.double(), torch.zeros(a.shape[0], a.shape[1], b.shape[2])
        for k in range(a.shape[2]):
            total = (total.double() + a[:, :, k, None] * b[:, k, None]).float()
        return total

    monkeypatch.setattr(torch, "bmm", one_by_one)
    for seed in range(3):
        for shared in (0, 1, 3, 6):
            x = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed)) + shared
            assert error(x.repeat(1, 1024)) < 1e-6


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize(("tokens", "width"), [(7, 2500), (2, 2500), (5, 700), (3, 256)])
def test_tokens_in_front_of_samples(tokens: int, width: int, n: int, path: str) -> None:
    """No run of features is longer than a token: neither tokens nor pieces of them are left out or counted twice."""
    x = features(n, tokens * width).view(n, tokens, width) + 3
    assert error(x.transpose(0, 1).float().contiguous().transpose(0, 1)) < 1e-6


@pytest.mark.parametrize("factor", [100, 1000])
@pytest.mark.parametrize("at", [0, 16, 31, 5])
@pytest.mark.parametrize("shared", [0, 1e3])
def test_an_outlying_sample(at: int, factor: float, shared: float, compiled: None) -> None:
    x = features(32, 2000) + shared
    x[at] = shared + (x[at] - shared) * factor
    assert error(x.float()) < 1e-6


@pytest.mark.parametrize("at", [0, 16, 31])
def test_an_outlying_sample_on_an_accelerator(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_can_branch", lambda tensor: False)
    x = features(32, 2000)
    x[at] *= 100
    assert error(x.float()) < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shared", [0, 1000])
def test_magnitude(scale: float, dtype: torch.dtype, shared: float, path: str) -> None:
    for width in (3, 300, 2000):
        assert error(((features(32, width) + shared * (dtype.itemsize > 2)) * scale).to(dtype)) < 1e-6


def test_magnitudes_that_differ_from_feature_to_feature(path: str) -> None:
    """Also where what all samples share is far larger than what they do not."""
    x = features(32, 2000) * 1e-20
    for at, scale, shared in ((0, 1e-10, 0), (0, 1e50, 0), (1999, 1e-10, 0), (1000, 0, 1e30)):
        y = x.clone()
        y[:, at] = y[:, at] * scale + shared
        found = centre(linear_grams(memory_order(y.float())).values[0])
        wide = y.float().double()
        expected = centre((wide - wide[0]) @ (wide - wide[0]).mT)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("shared", [0, 50])
def test_dtype(dtype: torch.dtype, limit: float, shared: float, path: str) -> None:
    assert error((features(32, 5000) * 4 + shared).to(dtype)) < limit


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_one_byte(dtype: torch.dtype, path: str) -> None:
    x = (features(16, 500) * 4 + 20).to(dtype)
    found, exact = linear_grams(memory_order(x)).values, linear_grams(memory_order(x.double())).values
    torch.testing.assert_close(centre(found), centre(exact), rtol=0, atol=1e-6 * float(centre(exact).abs().max()))


def test_float16_whose_squares_overflow() -> None:
    x = (features(32, 5000) * 1000).half()
    assert x.isfinite().all()
    assert x.float().square().max() > torch.finfo(torch.float16).max
    assert error(x) < 1e-6


@pytest.mark.parametrize("width", [1, 4095, 4096, 4097, 8192, 8193, 3 * 4096 + 1])
@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("shared", [0, 1e3])
def test_chunk_boundaries(width: int, minibatches: int, shared: float, path: str) -> None:
    """No feature is left out or counted twice where chunks end."""
    x = (features(12, width) + shared).float()
    grams = linear_grams(memory_order(x), minibatches)
    wide = x.double().unflatten(0, (minibatches, -1))
    centred = wide - wide.mean(1, keepdim=True)
    expected = centred @ centred.mT
    torch.testing.assert_close(
        centre(grams.values, "biased"), expected, rtol=0, atol=2e-6 * float(expected.abs().max())
    )
    spread, size = grams.traces()
    torch.testing.assert_close(spread, centred.square().sum((1, 2)), rtol=2e-6, atol=0)
    # `size` only tells whether samples differ at all: where a vector was taken off it is not exact.
    assert torch.all((size / wide.square().sum((1, 2))).log2().abs() < 2)


def view(name: str, x: Tensor) -> Tensor:
    """The numbers of x (n, 24, 6, 6) as a view with other strides."""
    n = len(x)
    return {
        "contiguous": lambda: x,
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "batch second": lambda: x.flatten(2).permute(1, 0, 2).contiguous().transpose(0, 1),
        "batch last": lambda: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "transposed": lambda: x.flatten(2).mT,
        "every second": lambda: x[:, ::2, ::2, 1::2],
        "cut out of a padded one": lambda: torch.nn.functional.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
        "every second sample": lambda: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
        "expanded": lambda: x[:, :, :1, :1].expand(n, 24, 6, 6),
        "flipped": lambda: x.flip(1)[:, :, :, 3:],
        "one number": lambda: x[:, 0, 0, 0],
        "overlapping": lambda: x.flatten(1).unfold(1, 5, 2),
    }[name]()


VIEWS = [
    "contiguous",
    "channels last",
    "batch second",
    "batch last",
    "transposed",
    "every second",
    "cut out of a padded one",
    "every second sample",
    "expanded",
    "flipped",
    "one number",
    "overlapping",
]


@pytest.mark.parametrize("shared", [0, 1e3])
@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str, minibatches: int, shared: float, path: str) -> None:
    x = view(name, (features(20, 864) + shared).float().unflatten(1, (24, 6, 6)))
    grams = linear_grams(memory_order(x), minibatches)
    exact = linear_grams(memory_order(x.double().reshape(20, -1)), minibatches)
    found, expected = centre(grams.values, "biased"), centre(exact.values, "biased")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["contiguous", "channels last", "batch second", "transposed"])
def test_views_are_not_copied(name: str) -> None:
    x = view(name, torch.randn(20, 24, 6, 6))
    rows = memory_order(x)
    assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert rows.shape[1] * rows.shape[2] == 864


@pytest.mark.parametrize("minibatches", [2, 5])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_several_minibatches_in_one_batch(minibatches: int, estimator: str, path: str) -> None:
    assert error((features(8 * minibatches, 900) + 1e3).float(), minibatches, estimator) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1000.3])
def test_equal_samples_are_degenerate_and_rounding_is_no_difference(
    dtype: torch.dtype, value: float, path: str
) -> None:
    x = torch.full((16, 500), value, dtype=dtype)
    x[3] = torch.nextafter(x[3], x[3] + 1) if dtype.itemsize > 2 else x[3] * (1 + torch.finfo(dtype).eps)
    cka = CKAAccumulator()
    cka.update({"x": x, "equal": torch.ones(16, 3), "live": reference(16).float()})
    result = cka.compute()
    expected = {"equal"} if value == 0.0 and dtype.itemsize > 2 else {"x", "equal"}
    assert set(result.degenerate) - {"x"} == {"equal"}
    if value:
        assert set(result.degenerate) == expected
        assert result["x", "live"] != result["x", "live"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("massive", [[7], [7, 300]])
def test_a_few_massive_features_hide_no_others(dtype: torch.dtype, massive: list[int], path: str) -> None:
    """As in language models: float64 of the same numbers says what CKA is."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 64, 4096, generator=generator)
    size = 2000 if dtype.itemsize == 2 else 3e8
    x[:, massive] = size
    noise[:, massive] = 0
    one, two = x.to(dtype), (x + noise).to(dtype)
    expected = oracle.cka_minibatch([[oracle.linear_gram(it.double().numpy()) for it in (one, two)]])[0, 1]
    assert 0.4 < expected < 0.6
    assert cka_hooks.cka(one, two) == pytest.approx(expected, abs=1e-5)
    assert 1 - float(cka_hooks.cka_loss(one, two)) == pytest.approx(expected, abs=1e-5)
    cka = CKAAccumulator(minibatch=32)
    for _ in range(2):
        cka.update({"one": one, "two": two})
    result = cka.compute()
    assert not result.degenerate
    grams = [
        [oracle.linear_gram(it[part].double().numpy()) for it in (one, two)] for part in (slice(32), slice(32, 64))
    ]
    assert result["one", "two"] == pytest.approx(oracle.cka_minibatch(grams)[0, 1], abs=1e-5)
    # Nothing else differs: what rounding made of the massive ones is no difference.
    same = torch.ones(64, 100, dtype=dtype)
    same[:, 3] = 2000
    same[::2, 3] *= 1 + torch.finfo(dtype).eps
    cka.reset()
    cka.update({"same": same, "one": one})
    assert list(cka.compute().degenerate) == ["same"]
    assert math.isnan(cka_hooks.cka(same, one))


def test_no_features_is_degenerate() -> None:
    cka = CKAAccumulator()
    cka.update({"none": torch.zeros(16, 0), "live": reference(16)})
    assert list(cka.compute().degenerate) == ["none"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 4096, 9999])
@pytest.mark.parametrize("sample", [0, 3, 4, 7])
def test_a_number_that_is_not_finite_shows(bad: float, sample: int, at: int, path: str) -> None:
    """Also in one of the samples 0, 4 and 7, of which the common vector is made."""
    x = features(8, 10_000).float()
    x[sample, at] = bad
    assert not torch.isfinite(linear_grams(memory_order(x)).values.sum())


def test_reduced_precision_products_are_not_used_and_the_setting_stays() -> None:
    x = (features(32, 3000) + 3).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert error(x) < 1e-6
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
