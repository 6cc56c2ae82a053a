"""Intervals hold the truth as often as they say: a small version of benchmarks/intervals.py.

200 runs and 15 pairs: the simulation error of a mean share is about 1 point. The bounds are the promised ones,
and intervals that are too short, or that count passes as samples, miss them by far.
"""

from types import ModuleType

import pytest
import torch
from benchmark_file import load
from torch import Tensor

RUNS = 200


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    torch.manual_seed(0)
    return load("intervals")


@pytest.fixture(scope="module")
def truth(benchmark: ModuleType) -> Tensor:
    return benchmark.true_cka(benchmark.Population(), 5000)


@pytest.fixture(scope="module")
def runs(benchmark: ModuleType) -> Tensor:
    """(runs, 30, L, L): independent minibatches."""
    population = benchmark.Population()
    population.draw(12345)  # other samples than those of the truth
    return benchmark.simulate(population, RUNS, 30)


def test_1_96_standard_errors(benchmark: ModuleType, truth: Tensor, runs: Tensor) -> None:
    for minibatches, low, high in ((10, 0.85, 0.98), (30, 0.90, 0.98)):
        results = [benchmark.result_of(hsic[:minibatches], minibatches) for hsic in runs]
        found = benchmark.coverage(results, truth)
        assert low <= found.mean <= high
        assert found.lowest >= low - 0.08


def test_student_intervals_with_five_minibatches(benchmark: ModuleType, truth: Tensor, runs: Tensor) -> None:
    results = [benchmark.result_of(hsic[:5], 5) for hsic in runs]
    assert 0.90 <= benchmark.coverage(results, truth, benchmark.student).mean <= 0.98
    # What this test would say of an interval that is too short:
    assert benchmark.coverage(results, truth).mean < 0.88


def test_a_difference_of_two_entries(benchmark: ModuleType, truth: Tensor, runs: Tensor) -> None:
    results = [benchmark.result_of(hsic, 30) for hsic in runs[:150]]
    assert 0.90 <= benchmark.difference_coverage(results, truth).mean <= 0.98


def test_stopping_does_not_favour_lucky_runs(benchmark: ModuleType, truth: Tensor, runs: Tensor) -> None:
    """Runs that may end from the 30th minibatch on, at a tolerance that some of them have reached there."""
    long = runs[:198].reshape(66, 90, *runs.shape[2:])
    tolerance = float(torch.stack([benchmark.result_of(hsic[:30], 30).stderr.max() for hsic in long]).median())
    results = [benchmark.stopped(hsic, tolerance) for hsic in long]
    assert len({result.minibatches for result in results}) > 2
    assert 0.89 <= benchmark.coverage(results, truth).mean <= 0.99


def test_more_passes_are_not_more_samples(benchmark: ModuleType, truth: Tensor) -> None:
    population = benchmark.Population()
    population.draw(54321)
    many = benchmark.simulate_passes(population, 80, 15, 4)
    found = benchmark.coverage([benchmark.result_of(hsic, 15) for hsic in many], truth)
    assert 0.89 <= found.mean <= 0.99
    naive = benchmark.coverage([benchmark.result_of(hsic, 60) for hsic in many], truth)
    assert naive.mean < 0.8
