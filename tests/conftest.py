"""What the tests of the core share: batches, small models, and the comparison with the oracle."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

import cka_hooks

# The same examples in every run: a landing does not hang on chance. Others with `--hypothesis-profile explore`.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("same")

# The limit of a test that is marked as slow; that of the others is in pyproject.toml.
SLOW_SECONDS = 1200


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


def against_oracle(
    model: nn.Module | Any, batches: Sequence[Any], atol: float = 1e-6, **options: Any
) -> cka_hooks.CKAResult:
    """The result of `compare`, after its labels, order, values and NaN were found to be the oracle's."""
    result = cka_hooks.compare(model, batches, progress=False, **options)
    labels, matrix, stderr = oracle.cka_of_model(model, batches, **options)
    assert list(result.layers) == labels
    np.testing.assert_allclose(result.matrix.numpy(), matrix, rtol=0, atol=atol)
    np.testing.assert_allclose(result.stderr.numpy(), stderr, rtol=1e-3, atol=atol)
    undefined = {label for label, value in zip(labels, np.diagonal(matrix), strict=True) if np.isnan(value)}
    assert set(result.degenerate) == undefined
    assert all("CKA is undefined" in reason for reason in result.degenerate.values())
    return result


@pytest.fixture
def check() -> Callable[..., cka_hooks.CKAResult]:
    """See :func:`against_oracle`."""
    return against_oracle


class SmallNet(nn.Module):
    """Convolution, norm, in-place ReLU that runs twice, dropout, and a head that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)
        self.unused = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.fc(self.drop(self.relu(y)).mean((2, 3)))


SMALL_LAYERS = ("conv1", "bn1", "relu", "conv2", "bn2", "relu#2", "drop", "fc")


def image_batches(count: int = 3, samples: int = 16, size: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 3, size, size, generator=generator) for _ in range(count)]


@pytest.fixture
def net() -> SmallNet:
    """A :class:`SmallNet` in train mode with one module in eval mode: no uniform mode to restore."""
    model = SmallNet().train()
    model.bn2.eval()
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    """Three minibatches of 16 images."""
    return image_batches()


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each of several workers, and their children: with more, they wait for one another."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C counts, here and in processes started from here: a shell's job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage, of which some tests make many, need not go over it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(autouse=True)
def _leaves_gradients_on() -> Iterator[None]:
    """A test that leaves torch's grad mode off would fail others, far from the cause."""
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on, "gradients are off after this test"
