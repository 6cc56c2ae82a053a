"""What CKA promises for any features: hypothesis looks for those that break it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cka_hooks import CKAAccumulator, cka, cka_matrix

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**31)
estimators = st.sampled_from(["unbiased", "biased"])
kernels = st.sampled_from(["linear", "rbf", "distance"])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Features of the same samples: any number of them, alike to any degree."""
    n = draw(st.integers(6, 40))
    width, other = draw(st.integers(2, 60)), draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(draw(seeds))
    signal = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    noise = draw(st.floats(0.1, 3))
    return tuple(
        signal @ torch.randn(4, d, generator=generator, dtype=torch.float64)
        + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
        for d in (width, other)
    )


def close(a: float, b: float, limit: float = 1e-8) -> bool:
    return abs(a - b) <= limit


@few
@given(pairs(), estimators, kernels, seeds)
def test_permuted_samples(xy: tuple[Tensor, Tensor], estimator: str, kernel: str, seed: int) -> None:
    x, y = xy
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    options = {"estimator": estimator, "kernel": kernel}
    assert close(cka(x[order], y[order], **options), cka(x, y, **options))


@few
@given(pairs(), estimators, kernels, seeds)
def test_orthogonal_maps(xy: tuple[Tensor, Tensor], estimator: str, kernel: str, seed: int) -> None:
    x, y = xy
    square = torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotated = x @ torch.linalg.qr(square).Q
    options = {"estimator": estimator, "kernel": kernel}
    assert close(cka(rotated, y, **options), cka(x, y, **options))
    assert close(cka(rotated, x, **options), 1)


@few
@given(pairs(), estimators, kernels, st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_scale_and_shift(xy: tuple[Tensor, Tensor], estimator: str, kernel: str, scale: float, shift: float) -> None:
    x, y = xy
    options = {"estimator": estimator, "kernel": kernel}
    # In units of the features, so that the shift leaves digits of them.
    assert close(cka((x + shift) * -scale, y, **options), cka(x, y, **options), 1e-7)


@few
@given(pairs(), estimators, kernels)
def test_symmetry_self_and_range(xy: tuple[Tensor, Tensor], estimator: str, kernel: str) -> None:
    x, y = xy
    options = {"estimator": estimator, "kernel": kernel}
    value = cka(x, y, **options)
    assert close(value, cka(y, x, **options), 1e-12)
    assert close(cka(x, x.clone(), **options), 1, 1e-10)
    matrix = cka_matrix([x, y], **options)
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [1.0, 1.0]
    # Both estimators are inner products divided by norms.
    assert -1 - 1e-12 <= value <= 1 + 1e-12
    if estimator == "biased":
        assert value >= 0


@few
@given(pairs(), estimators, kernels)
def test_other_linear_maps_do_change_it(xy: tuple[Tensor, Tensor], estimator: str, kernel: str) -> None:
    x, _ = xy
    stretched = x.clone()
    stretched[:, 0] *= 100
    assert cka(stretched, x, estimator=estimator, kernel=kernel) < 1 - 1e-6


@st.composite
def runs(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    """Minibatches of different sizes of three layers in float32."""
    sizes = draw(st.lists(st.integers(5, 12), min_size=3, max_size=7))
    shared = draw(st.sampled_from([0.0, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(draw(seeds))
    widths = {"a": 3, "b": 17, "c": 5}
    return [
        {layer: torch.randn(n, width, generator=generator) + shared for layer, width in widths.items()} for n in sizes
    ]


def added(run: list[dict[str, Tensor]], **options: object) -> CKAAccumulator:
    accumulator = CKAAccumulator(**options)
    for minibatch in run:
        accumulator.update(minibatch)
    return accumulator


def same_sums(one: CKAAccumulator, other: CKAAccumulator) -> bool:
    assert one.layers == other.layers
    assert (one.samples, one.minibatches) == (other.samples, other.minibatches)
    root = one.state.moments[0].diagonal().sqrt()
    difference = (one.state.moments[0] - other.state.moments[0]).abs() / (root[:, None] * root)
    return bool((difference <= 1e-12).all())


@few
@given(runs(), st.randoms(use_true_random=False), estimators, kernels)
def test_any_order_of_minibatches(run: list[dict[str, Tensor]], random: object, estimator: str, kernel: str) -> None:
    options = {"estimator": estimator, "kernel": kernel}
    assert same_sums(added(run, **options), added(random.sample(run, len(run)), **options))


@few
@given(runs(), st.data(), estimators)
def test_merging_is_associative(run: list[dict[str, Tensor]], data: st.DataObject, estimator: str) -> None:
    first = data.draw(st.integers(0, len(run)))
    second = data.draw(st.integers(first, len(run)))
    parts = [run[:first], run[first:second], run[second:]]
    left, middle, right = (added(part, estimator=estimator) for part in parts)
    left.merge_state(middle)
    left.merge_state(right)
    other, middle, right = (added(part, estimator=estimator) for part in parts)
    middle.merge_state(right)
    other.merge_state(middle)
    whole = added(run, estimator=estimator)
    assert same_sums(whole, left)
    assert same_sums(whole, other)


@few
@given(runs(), seeds)
def test_samples_may_change_places_within_a_minibatch(run: list[dict[str, Tensor]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for minibatch in run:
        order = torch.randperm(len(minibatch["a"]), generator=generator)
        moved.append({layer: x[order] for layer, x in minibatch.items()})
    matrix, other = (added(it).compute().matrix for it in (run, moved))
    torch.testing.assert_close(matrix, other, rtol=0, atol=2e-5)
