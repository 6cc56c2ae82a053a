"""Half precision, huge common components, and settings that make products less exact than they look."""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from itertools import product
from threading import Event, Thread, main_thread

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import cka_hooks
from cka_hooks.hsic import centre
from cka_hooks.precision import exactly
from cka_hooks.similarity.products import native
from cka_hooks.similarity.products.choose import linear_grams

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
TOLERANCE = 1e-6


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
    assert np.abs(accumulator.compute().matrix.numpy() - expected).max() < TOLERANCE


MATMUL = {"mkldnn": getattr(torch.backends.mkldnn, "matmul", None), "cuda": torch.backends.cuda.matmul}
HAS_BACKEND_SWITCHES = hasattr(torch.backends, "fp32_precision")
# The older function, the flag for TF32, then the switches of all backends and of two: every combination.
COMBINATIONS = list(
    product(
        (None, "highest", "high", "medium"),
        (None, True, False),
        *[(None, "ieee", "tf32"), (None, "ieee", "bf16"), (None, "ieee", "tf32")] * HAS_BACKEND_SWITCHES,
    )
)


def reset_switches() -> None:
    """As they are when PyTorch is imported."""
    torch.set_float32_matmul_precision("highest")
    if HAS_BACKEND_SWITCHES:
        for switch in (torch.backends, torch.backends.mkldnn, torch.backends.cudnn, *MATMUL.values()):
            switch.fp32_precision = "none"


def switch_to(older: str | None, tf32: bool | None, every: str | None = None, *single: str | None) -> None:
    if older is not None:
        torch.set_float32_matmul_precision(older)
    if tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    if every is not None:
        torch.backends.fp32_precision = every
    for backend, value in zip(MATMUL.values(), single, strict=False):
        if value is not None:
            backend.fp32_precision = value


def switches() -> list[str]:
    """All that a user can ask for; asking the older functions raises once the newer ones were used."""
    found = []
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(str(ask()))
        except RuntimeError:
            found.append("raises")
    if HAS_BACKEND_SWITCHES:
        every = (torch.backends, torch.backends.mkldnn, torch.backends.cudnn, *MATMUL.values())
        found += [switch.fp32_precision for switch in every]
    return found


def is_exact(kind: str) -> bool:
    if HAS_BACKEND_SWITCHES:
        return MATMUL[kind].fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def fresh_switches() -> Iterator[None]:
    reset_switches()
    yield
    reset_switches()


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
def test_every_combination_of_switches_is_exact_inside_and_as_it_was_outside(
    device: str, fresh_switches: None
) -> None:
    kind = "cuda" if device == "cuda" else "mkldnn"
    for combination in COMBINATIONS:
        seen = []
        for use in (False, True):
            reset_switches()
            switch_to(*combination)
            if use:
                assert exactly(torch.device(device), is_exact, kind), combination
                with pytest.raises(ZeroDivisionError):
                    exactly(torch.device(device), lambda: 1 / 0)
            seen.append([switches()])
            # What inherited still does: a later choice for all backends is one for the same ones as before.
            if HAS_BACKEND_SWITCHES:
                for later in ("ieee", "tf32"):
                    torch.backends.fp32_precision = later
                    seen[-1].append(switches())
        assert seen[0] == seen[1], combination


@pytest.mark.skipif(not HAS_BACKEND_SWITCHES, reason="PyTorch 2.9 has brought them")
@pytest.mark.parametrize("value", ["tf32", "none"])
def test_switches_between_all_and_one_backend(value: str, fresh_switches: None) -> None:
    for every in ("tf32", "none"):
        for backend, one in (("mkldnn", torch.backends.mkldnn), ("cuda", torch.backends.cudnn)):
            reset_switches()
            torch.backends.fp32_precision, one.fp32_precision = every, value
            before = switches()
            exactly(torch.device("cuda" if backend == "cuda" else "cpu"), lambda: None)
            assert switches() == before
            one.fp32_precision = "ieee"
            assert MATMUL[backend].fp32_precision == "ieee"


def test_products_are_exact_under_every_combination(fresh_switches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VARIANTS", {})
    x = torch.randn(16, 1, 300) + 3
    expected = centre(linear_grams(x.double()).values)
    for combination in COMBINATIONS:
        reset_switches()
        switch_to(*combination)
        before = switches()
        found = centre(linear_grams(x).values)
        assert switches() == before, combination
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_float32_matmul_precision(precision: str, fresh_switches: None) -> None:
    model = network().eval()
    model(inputs()[0])
    torch.set_float32_matmul_precision(precision)
    assert error(model, inputs()) < 1e-6
    assert torch.get_float32_matmul_precision() == precision


class Interrupted(BaseException):
    """Ctrl-C, but for the debugger."""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a signal that is free")
def test_switches_are_as_they_were_after_an_interruption_anywhere(fresh_switches: None) -> None:
    """Signals that come while nothing but switching goes on."""
    torch.set_float32_matmul_precision("medium")
    before, armed, ready, done, hits = switches(), [False], Event(), Event(), 0

    def interrupt(*_: object) -> None:
        if armed[0]:
            armed[0] = False
            raise Interrupted

    def send() -> None:
        while ready.wait() and not done.is_set():
            ready.clear()
            time.sleep(random.uniform(0, 2e-5))
            signal.pthread_kill(main_thread().ident, signal.SIGUSR1)

    handler, interval = signal.signal(signal.SIGUSR1, interrupt), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    sender = Thread(target=send)
    sender.start()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(1000):
                ready.set()
                try:
                    armed[0] = True
                    for _ in range(20):
                        exactly(torch.device("cpu"), torch.is_grad_enabled)
                    armed[0] = False
                except Interrupted:
                    hits += 1
                assert switches() == before
                assert torch.is_autocast_enabled("cpu")
    finally:
        armed[0] = False
        done.set()
        ready.set()
        sender.join()
        sys.setswitchinterval(interval)
        signal.signal(signal.SIGUSR1, handler)
    assert hits > 100


def test_threads_do_not_take_one_anothers_switch_for_the_users(fresh_switches: None) -> None:
    torch.set_float32_matmul_precision("medium")
    exact = []

    def product() -> None:
        for _ in range(3):
            exact.append(is_exact("cuda"))
            time.sleep(1e-5)

    def work() -> None:
        for _ in range(30):
            exactly(torch.device("cuda"), product)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(exact)
    assert torch.get_float32_matmul_precision() == "medium"
    assert not is_exact("cuda")


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
