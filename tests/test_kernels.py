"""Every kernel against the oracle: on a real network, over minibatches, and where samples do not differ."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cka_hooks import CKAAccumulator, OptionError, cka, compare
from cka_hooks.options import Options
from cka_hooks.similarity import kernels
from cka_hooks.similarity.kernels import as_kernel

LAYERS = ["conv1", "bn1", "relu", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.conv1", "layer3.1.bn2", "avgpool", "fc"]


def laplacian(x: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, x) / x.shape[1] ** 0.5)


def laplacian_of_oracle(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.sqrt(oracle.squared_distances(x)) / math.sqrt(x.shape[1]))


OPTIONS: dict[str, tuple[dict[str, object], Callable[[np.ndarray], np.ndarray]]] = {
    "linear": ({}, oracle.linear_gram),
    "rbf": ({"kernel": "rbf"}, oracle.rbf_gram),
    "rbf, bandwidth": ({"kernel": "rbf", "bandwidth": 0.4}, partial(oracle.rbf_gram, bandwidth=0.4)),
    "rbf, sigma": ({"kernel": "rbf", "sigma": 20.0}, partial(oracle.rbf_gram, sigma=20.0)),
    "distance": ({"kernel": "distance"}, oracle.distance_gram),
    "cosine": ({"kernel": "cosine"}, oracle.cosine_gram),
    "polynomial": ({"kernel": "polynomial"}, oracle.polynomial_gram),
    "callable": ({"kernel": laplacian}, laplacian_of_oracle),
}


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return list(torch.randn(3, 12, 3, 40, 40, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_untrained_resnet_equals_the_oracle(
    name: str, estimator: str, resnet: nn.Module, images: list[Tensor]
) -> None:
    options, gram = OPTIONS[name]
    result = compare(resnet, images, layers=LAYERS, estimator=estimator, progress=False, **options)
    labels, matrix, stderr = oracle.cka_of_model(resnet, images, estimator, gram, layers=LAYERS)
    at = [labels.index(layer) for layer in result.rows]
    np.testing.assert_allclose(result.matrix, matrix[np.ix_(at, at)], atol=1e-6)
    np.testing.assert_allclose(result.stderr, stderr[np.ix_(at, at)], atol=1e-6)
    assert not result.degenerate


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(4, 13),
    name=st.sampled_from([name for name in OPTIONS if name != "linear"]),
    shift=st.sampled_from([0.0, 10.0, 1e3]),
    equal=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_gram_matrices_equal_the_oracle(n: int, name: str, shift: float, equal: int, seed: int) -> None:
    """Odd and even numbers of distances, equal samples among them, minibatches that each have their own median."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(2, n, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 30.0])[:, None, None]
        + shift
    )
    x[:, :equal] = x[:, :1]
    options, gram = OPTIONS[name]
    kernel = as_kernel(Options(**options))  # type: ignore[arg-type]
    found = kernel(x.flatten(0, 1).unsqueeze(1), 2).values
    wanted = np.stack([gram(group.numpy()) for group in x])
    # Where the median is 0, K tells equal samples from different ones, and rounding must not.
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-6)


@pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")
def test_the_median_is_each_minibatchs_own_and_sigma_is_the_runs() -> None:
    x = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + x
    scales = (1.0, 7.0, 0.1)

    def value(factors: tuple[float, ...], **options: float) -> float:
        accumulator = CKAAccumulator(kernel="rbf", **options)  # type: ignore[arg-type]
        for minibatch, factor in enumerate(factors):
            accumulator.update({"x": factor * x[minibatch], "y": y[minibatch]})
        return accumulator.compute()["x", "y"]

    assert value(scales) == pytest.approx(value((1, 1, 1)), abs=1e-12)
    assert abs(value(scales, sigma=2.0) - value((1, 1, 1), sigma=2.0)) > 0.01


@pytest.mark.parametrize("options", [{"bandwidth": 0.5}, {"sigma": 3.0}], ids=str)
def test_rbf_does_not_depend_on_order_or_merging(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    minibatches = []
    for scale in (1, 5, 0.2, 2):
        x = scale * torch.randn(16, 6, generator=generator)
        minibatches.append({"x": x, "y": x.relu() + 0.3})

    def run(some: list[dict[str, Tensor]]) -> CKAAccumulator:
        accumulator = CKAAccumulator(kernel="rbf", **options)  # type: ignore[arg-type]
        for minibatch in some:
            accumulator.update(minibatch)
        return accumulator

    whole = run(minibatches).compute()
    merged = run(minibatches[:1])
    merged.merge_state(run(minibatches[1:]))
    for other in (run(minibatches[::-1]).compute(), merged.compute()):
        torch.testing.assert_close(other.matrix, whole.matrix, rtol=0, atol=1e-12)
        torch.testing.assert_close(other.stderr, whole.stderr, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_whose_samples_do_not_differ_is_degenerate(name: str) -> None:
    options, _ = OPTIONS[name]
    generator = torch.Generator().manual_seed(0)
    accumulator = CKAAccumulator(**options)  # type: ignore[arg-type]
    for _ in range(3):
        x = torch.randn(16, 6, generator=generator)
        noise = 1 + 1e-7 * torch.randint(2, (16, 6), generator=generator)
        accumulator.update({"x": x, "constant": torch.full((16, 4), 3.0), "rounding": noise, "zero": 0 * x})
    result = accumulator.compute()
    assert set(result.degenerate) == {"constant", "rounding", "zero"}
    assert result["x", "x"] == 1
    assert math.isnan(result["x", "constant"])


@pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_where_pytorch_has_to_be_deterministic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(9, 5), torch.randn(9, 4)
    expected = cka(x, y, **OPTIONS[name][0])  # type: ignore[arg-type]

    def refused(*_: object, **__: object) -> None:
        # As a GPU does.
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")

    monkeypatch.setattr(Tensor, "kthvalue", refused)
    torch.use_deterministic_algorithms(True)
    try:
        assert cka(x, y, **OPTIONS[name][0]) == expected  # type: ignore[arg-type]
    finally:
        torch.use_deterministic_algorithms(False)


def test_samples_that_are_equal_but_for_a_few() -> None:
    """Their median distance is 0; K is then its limit for a small bandwidth."""
    x = torch.zeros(12, 3)
    x[:2] = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    grams = [[oracle.rbf_gram(z.double().numpy()) for z in (x, y)]]
    assert cka(x, y, kernel="rbf") == pytest.approx(oracle.cka_minibatch(grams)[0, 1], abs=1e-6)


def test_distance_is_the_distance_correlation_of_dcor() -> None:
    """One test, so that one worker imports dcor: numba, its compiler, has crashed where two ran it at a time."""
    import dcor

    estimators = (("unbiased", dcor.u_distance_correlation_sqr), ("biased", dcor.distance_correlation_sqr))
    for n, shared, (estimator, of_dcor) in itertools.product((4, 7, 50), (0.0, 1e4), estimators):
        x = torch.randn(n, 5, dtype=torch.float64)
        y = x[:, :1] * torch.randn(n, 3, dtype=torch.float64) + shared
        wanted = float(of_dcor(x.numpy(), y.numpy()))
        assert cka(x, y, kernel="distance", estimator=estimator) == pytest.approx(wanted, abs=1e-10), (n, shared)


@pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("width", [3, 50, 3000])
def test_distances_of_samples_that_are_nearly_the_same(width: int, apart: float, dtype: torch.dtype) -> None:
    """What cancels in |x|^2 + |y|^2 - 2 <x, y> would be all of it in float32, and the root doubles its digits."""
    signal = torch.randn(12, 3)
    x = (signal @ torch.randn(3, width) + torch.randn(12, width)).repeat_interleave(2, 0)
    x[1::2] += apart * torch.randn(12, width)
    for shared in (0.0, 3.0):
        layers = {"x": (x + shared).to(dtype), "y": x.relu().to(dtype), "z": signal.repeat(2, 1).to(dtype)}
        accumulator = CKAAccumulator(kernel="distance")
        accumulator.update(layers)
        grams = [[oracle.distance_gram(oracle.flatten(layer)) for layer in layers.values()]]
        np.testing.assert_allclose(accumulator.compute().matrix, oracle.cka_minibatch(grams), rtol=0, atol=1e-6)


def test_callables_get_raw_wide_features() -> None:
    seen: list[Tensor] = []

    def kernel(x: Tensor) -> Tensor:
        seen.append(x)
        return x @ x.mT

    accumulator = CKAAccumulator(kernel=kernel)
    x = (torch.randn(8, 2, 3) + 100).half()
    accumulator.observe("x", x)
    assert seen[0].dtype is torch.float64
    assert torch.equal(seen[0], x.double().flatten(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": "gauss"}, "'gauss' is unknown: use one of 'linear', 'rbf', 'distance'"),
        ({"kernel": ["rbf"]}, "is unknown"),
        ({"kernel": None}, "is unknown"),
        ({"kernel": "distance", "bandwidth": 1.0}, "bandwidth=1.0 belongs to kernel='rbf', and kernel is 'distance'"),
        ({"kernel": laplacian, "sigma": 1.0}, "sigma=1.0 belongs to kernel='rbf'"),
        ({"kernel": "linear", "bandwidth": 1.0}, "bandwidth"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "bandwidth"),
        ({"kernel": "rbf", "sigma": -1.0}, "sigma"),
        ({"kernel": "rbf", "sigma": math.nan}, "sigma"),
        ({"kernel": "rbf", "bandwidth": 1.0, "sigma": 1.0}, "exclude"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        CKAAccumulator(**options)  # type: ignore[arg-type]


def test_a_new_kernel_is_an_entry_of_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cka_hooks.command.cli import main

    def new(sigma: float) -> kernels.Kernel:
        return kernels.on_raw_features(lambda x: torch.exp(-torch.cdist(x, x) / sigma))

    monkeypatch.setitem(kernels.KERNELS, "new", new)
    x, y = torch.randn(2, 12, 3)
    assert cka(x, y, kernel="new", sigma=2.0) == cka(x, y, kernel=lambda x: torch.exp(-torch.cdist(x, x) / 2))
    with pytest.raises(OptionError, match="'polynomial', 'new', or a callable"):
        cka(x, y, kernel="old")
    with pytest.raises(
        OptionError, match=r"sigma=1\.0 belongs to kernel='rbf' and kernel='new', and kernel is 'linear'"
    ):
        cka(x, y, sigma=1)
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "polynomial,new" in capsys.readouterr().out.replace(" ", "")


def test_a_kernel_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(OptionError, match=r"\(8, 8\)"):
        CKAAccumulator(kernel=lambda x: x).observe("x", torch.randn(8, 3))
