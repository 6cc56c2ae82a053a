"""The most similar layer of another network is the corresponding one: a small version of the benchmark."""

from types import ModuleType

import pytest
import torch
from benchmark_file import load
from torch import Tensor, nn

NETWORKS, WIDTH, STEPS = 2, 16, 250


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load("layer_identification")


@pytest.fixture(scope="module")
def batches(benchmark: ModuleType) -> tuple[Tensor, ...]:
    return benchmark.Digits(1).draw(512, held_out=True)[0].split(256)


@pytest.fixture(scope="module")
def networks(benchmark: ModuleType) -> list[nn.Module]:
    return [benchmark.trained(seed, STEPS, WIDTH) for seed in range(NETWORKS)]


def test_trained_networks_correspond_and_untrained_ones_do_not(
    benchmark: ModuleType, batches: tuple[Tensor, ...], networks: list[nn.Module]
) -> None:
    untrained = [benchmark.network(seed, WIDTH).eval() for seed in range(NETWORKS)]
    shares = {
        name: float(benchmark.identified(benchmark.cka(models, batches, kernel=kernel), NETWORKS).mean())
        for name, models, kernel in (
            ("linear", networks, "linear"),
            ("rbf", networks, "rbf"),
            ("untrained", untrained, "linear"),
        )
    }
    # One in ten by chance.
    assert shares["linear"] >= 0.4, shares
    assert shares["rbf"] >= 0.4, shares
    assert shares["untrained"] < shares["linear"] - 0.1, shares


def test_the_overwritten_numbers_are_those_of_the_next_layer(
    benchmark: ModuleType, batches: tuple[Tensor, ...], networks: list[nn.Module]
) -> None:
    """What an in-place ReLU leaves of a stored activation is the ReLU's own output."""
    import cka_hooks

    wrong = benchmark.cka_of_overwritten(networks, batches)
    relus = [str(int(layer) + 1) for layer in benchmark.LAYERS]
    named = {str(i): model for i, model in enumerate(networks)}
    of_relus = cka_hooks.compare(named, batches, layers=relus, progress=False).matrix
    torch.testing.assert_close(wrong, of_relus, rtol=0, atol=1e-5)
    assert (wrong - benchmark.cka(networks, batches)).abs().max() > 0.05


def test_identified_counts_what_it_says(benchmark: ModuleType) -> None:
    depth = len(benchmark.LAYERS)
    right = torch.eye(depth, dtype=torch.float64)
    assert benchmark.identified(right.repeat(2, 2), 2).tolist() == [1.0] * depth
    shifted = right.repeat(2, 2)
    shifted[:depth, depth:] = right.roll(1, 0)
    assert benchmark.identified(shifted, 2).tolist() == [0.5] * depth
