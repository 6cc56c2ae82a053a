"""Half precision, huge common components, and settings that make products less exact than they look."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import cka_hooks

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    torch.manual_seed(0)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.LazyLinear(10)
    )


def inputs() -> list[Tensor]:
    return [torch.randn(16, 3, 12, 12) for _ in range(3)]


def error(model: nn.Module, batches: list[Tensor], **options: object) -> float:
    """Largest difference from float64 arithmetic on the very same activations."""
    result = cka_hooks.compare(model, batches, progress=False, **options)  # type: ignore[arg-type]
    labels, matrix, _ = oracle.cka_of_model(model, batches, kernel=str(options.get("kernel", "linear")))
    assert list(result.layers) == labels
    assert not result.degenerate
    return float(np.abs(result.matrix.numpy() - matrix).max())


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, kernel: str) -> None:
    model = network().eval()
    model(inputs()[0])
    assert error(model.to(dtype), [x.to(dtype) for x in inputs()], kernel=kernel) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    model = network().eval()
    model(inputs()[0])
    dtypes = set()
    model[0].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert error(model, inputs()) < TOLERANCE
    assert dtypes == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_overflow(dtype: torch.dtype) -> None:
    """Squares of numbers near the end of float16's range, and of float32's."""
    largest = 6e4 if dtype is torch.float16 else 1e18
    x, y = (torch.randn(24, 300).clamp(-3, 3) / 3 * largest for _ in range(2))
    x, y = x.to(dtype), (x + 0.5 * y).mul(0.5).to(dtype)
    accumulator = cka_hooks.CKAAccumulator()
    accumulator.update({"x": x, "y": y})
    expected, _ = oracle.cka_of_grams(
        [[oracle.linear_gram(oracle.flatten(t)) for t in (x, y)]], np.array([False] * 2)
    )
    assert abs(accumulator.compute()["x", "y"] - expected[0, 1]) < TOLERANCE


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("minibatch", [None, 8])
def test_a_residual_stream_with_a_thousandfold_mean(kernel: str, minibatch: int | None) -> None:
    stream = torch.randn(20, 256) * 1000

    def layer(seed: int, n: int = 32) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return stream + torch.randn(n, 20, 256, generator=generator)

    layers = {"a": layer(0), "b": layer(0) + 0.3 * layer(1), "c": layer(2)}
    accumulator = cka_hooks.CKAAccumulator(kernel=kernel, minibatch=minibatch)
    accumulator.update(layers)
    parts = oracle.minibatch_slices(32, minibatch)
    grams = [[oracle.KERNELS[kernel](oracle.flatten(x[part])) for x in layers.values()] for part in parts]
    expected, _ = oracle.cka_of_grams(grams, np.array([False] * 3))
    assert np.abs(accumulator.compute().matrix.numpy() - expected).max() < TOLERANCE


@pytest.mark.parametrize("position", [0, 1, 15, 31])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_an_outlying_sample(position: int, size: float) -> None:
    """Wherever it stands, as the first one too, whose features might be taken off all others."""
    x = torch.randn(32, 2000) + 3
    x[position] *= size
    y = (x @ torch.randn(2000, 500)) / 40
    accumulator = cka_hooks.CKAAccumulator()
    accumulator.update({"x": x, "y": y})
    grams = [[oracle.linear_gram(oracle.flatten(t)) for t in (x, y)]]
    expected, _ = oracle.cka_of_grams(grams, np.array([False] * 2))
    assert np.abs(accumulator.compute().matrix.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_float32_matmul_precision(precision: str) -> None:
    model = network().eval()
    model(inputs()[0])
    torch.set_float32_matmul_precision(precision)
    assert error(model, inputs()) < 1e-5
    assert torch.get_float32_matmul_precision() == precision


def test_inference_mode() -> None:
    model = network().eval()
    model(inputs()[0])
    batches = inputs()
    expected = cka_hooks.compare(model, batches, progress=False)
    with torch.inference_mode():
        result = cka_hooks.compare(model, batches, progress=False)
        accumulator = cka_hooks.CKAAccumulator()
        with cka_hooks.LayerRecorder(model, consumer=accumulator.observe):
            for x in batches:
                model(x)
                accumulator.step()
        streamed = next(iter(cka_hooks.LayerRecorder(model).stream(batches)))
    assert torch.equal(result.matrix, expected.matrix)
    assert torch.equal(accumulator.compute().matrix, expected.matrix)
    assert not any(activation.is_inference() for activation in streamed.values())
    # What was begun inside the mode goes on outside of it.
    accumulator.update({layer: torch.randn(16, 5) for layer in accumulator.layers})
    model(batches[0]).sum().backward()


def test_float64_by_default() -> None:
    torch.set_default_dtype(torch.float64)
    model = network().eval()
    model(inputs()[0])
    assert error(model, inputs()) < 1e-12


def test_a_float32_model_under_a_float64_default() -> None:
    model = network().eval()
    model(inputs()[0])
    batches = inputs()
    expected = cka_hooks.compare(model, batches, progress=False)
    torch.set_default_dtype(torch.float64)
    result = cka_hooks.compare(model, batches, features="flatten", progress=False)
    assert torch.equal(result.matrix, expected.matrix)


def test_tiny_activations() -> None:
    x = torch.randn(16, 50) * 1e-22
    accumulator = cka_hooks.CKAAccumulator()
    accumulator.update({"x": x, "y": x * 1e-8, "z": torch.randn(16, 50)})
    assert accumulator.compute()["x", "y"] == pytest.approx(1, abs=1e-4)
    assert math.isfinite(accumulator.compute()["x", "z"])
