"""Standard errors of CKA against the oracle, and what carries them: merging, passes, differences."""

import math
from collections.abc import Sequence

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cka_hooks import CKAAccumulator, OptionError
from cka_hooks.results.result import CKAResult
from cka_hooks.similarity import estimate
from cka_hooks.similarity.state import moments_of

# In minibatches this few and small, one sample may well decide much.
pytestmark = pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")


def related_layers(sizes: Sequence[int], noises: Sequence[float], seed: int = 0) -> list[dict[str, Tensor]]:
    """Minibatches of layers that are one random layer plus more and more noise, at different scales."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = [normal(6, 5) for _ in noises]
    minibatches = []
    for n in sizes:
        x = normal(n, 6) * (0.3 * normal(n, 1)).exp()
        minibatches.append({f"l{i}": 10.0**i * (x @ maps[0] + noise * x @ maps[i]) for i, noise in enumerate(noises)})
    return minibatches


def run(minibatches: Sequence[dict[str, Tensor]], **options: object) -> CKAResult:
    cka = CKAAccumulator(**options)  # type: ignore[arg-type]
    for minibatch in minibatches:
        cka.update(minibatch)
    return cka.compute()


def expected(minibatches: Sequence[dict[str, Tensor]], estimator: str = "unbiased") -> tuple[np.ndarray, np.ndarray]:
    grams = [[oracle.linear_gram(oracle.flatten(x)) for x in layers.values()] for layers in minibatches]
    values = oracle.hsic_minibatches(grams, estimator)
    return oracle.cka_of_values(values), oracle.stderr_minibatch(values)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("sizes", [[16] * 12, [16] * 3, [32, 16, 5, 4, 24, 9], [4, 4, 4]])
def test_stderr_equals_the_oracle(estimator: str, sizes: list[int]) -> None:
    minibatches = related_layers(sizes, (0, 0.1, 0.5, 2))
    result = run(minibatches, estimator=estimator)
    matrix, stderr = expected(minibatches, estimator)
    np.testing.assert_allclose(result.matrix, matrix, atol=1e-9)
    np.testing.assert_allclose(result.stderr, stderr, atol=1e-7)
    assert result.stderr[0, 3] > 1e-3


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(3, 40),
    noise=st.sampled_from([0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2]),
    scale=st.sampled_from([1e-18, 1e-3, 1.0, 3.7, 1e9]),
    uneven=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_stderr_is_right_to_1e_7_where_its_moments_cancel(
    count: int, noise: float, scale: float, uneven: float, seed: int
) -> None:
    """CKA within `noise` of 1, minibatches whose weights differ by orders, layers whose scales do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weights = normal(count, 30), (uneven * normal(count, 1)).exp()
    vectors = torch.stack([x * weights, scale * (x + noise * normal(count, 30)) * weights], 1)
    hsic = vectors @ vectors.mT
    moments = sum(map(moments_of, hsic.split(7)))
    np.testing.assert_allclose(
        estimate.stderr(moments, count, count), oracle.stderr_minibatch(hsic.numpy()), atol=1e-7
    )


def test_layers_that_are_equal_up_to_scale_have_no_error() -> None:
    minibatches = [{"x": m["l0"], "3x": 3 * m["l0"], "y": m["l1"]} for m in related_layers([16] * 9, (0, 1))]
    result = run(minibatches)
    assert result["x", "3x"] == pytest.approx(1, abs=1e-12)
    assert 0 <= result.stderr[0, 1] < 1e-7
    assert result.stderr[0, 2] > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(4, 12), min_size=3, max_size=8),
    estimator=st.sampled_from(["unbiased", "biased"]),
    seed=st.integers(0, 1000),
)
def test_the_diagonal_is_exact_and_the_rest_is_symmetric(sizes: list[int], estimator: str, seed: int) -> None:
    result = run(related_layers(sizes, (0, 0.3, 1), seed), estimator=estimator)
    assert torch.equal(result.matrix.diagonal(), torch.ones(3, dtype=torch.float64))
    assert torch.equal(result.stderr.diagonal(), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(result.stderr, result.stderr.mT)
    assert bool((result.stderr >= 0).all())


@pytest.mark.parametrize("count", [1, 2])
def test_below_three_minibatches_the_error_is_unknown_and_not_zero(count: int) -> None:
    result = run(related_layers([16] * count, (0, 1)))
    assert result.stderr.isnan()[0, 1]
    assert all(bound.isnan()[0, 1] for bound in result.interval())


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(4, 12), min_size=3, max_size=9), cut=st.data(), seed=st.integers(0, 1000))
def test_merging_carries_the_standard_errors(sizes: list[int], cut: st.DataObject, seed: int) -> None:
    minibatches = related_layers(sizes, (0, 0.3, 1), seed)
    at = cut.draw(st.integers(0, len(sizes)))
    first, second = CKAAccumulator(), CKAAccumulator()
    for accumulator, part in ((first, minibatches[:at]), (second, minibatches[at:])):
        for minibatch in part:
            accumulator.update(minibatch)
    first.merge_state(second)
    whole, merged = run(minibatches), first.compute()
    torch.testing.assert_close(merged.stderr, whole.stderr, rtol=1e-9, atol=1e-9)
    assert merged.degrees_of_freedom == whole.degrees_of_freedom == len(sizes) - 1


def test_the_order_of_minibatches_does_not_matter() -> None:
    minibatches = related_layers([16, 8, 24, 5, 16], (0, 0.3, 1))
    torch.testing.assert_close(run(minibatches).stderr, run(minibatches[::-1]).stderr, rtol=1e-9, atol=1e-9)


def test_state_does_not_grow_with_the_number_of_minibatches() -> None:
    def numbers(accumulator: CKAAccumulator) -> int:
        return sum(tensor.numel() for tensor in vars(accumulator.state).values() if isinstance(tensor, Tensor))

    cka = CKAAccumulator()
    sizes = []
    for minibatch in related_layers([8] * 30, (0, 1, 2)):
        cka.update(minibatch)
        sizes.append(numbers(cka))
    assert set(sizes) == {6 * 3 * 3 + 7 * 3}


def passes(minibatches: Sequence[dict[str, Tensor]], count: int, **options: object) -> CKAAccumulator:
    cka = CKAAccumulator(**options)  # type: ignore[arg-type]
    for number in range(count):
        if number:
            cka.start_pass()
        for minibatch in minibatches:
            cka.update(minibatch)
    return cka


def test_more_passes_over_the_same_minibatches_change_nothing() -> None:
    minibatches = related_layers([16] * 8, (0, 0.3, 1))
    once, often = passes(minibatches, 1).compute(), passes(minibatches, 20).compute()
    torch.testing.assert_close(often.stderr, once.stderr, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(often.interval()[0], once.interval()[0], rtol=1e-9, atol=1e-9)
    assert (often.samples, often.minibatches, often.passes, often.degrees_of_freedom) == (128, 160, 20, 7)


def test_merging_runs_of_several_passes_counts_one_pass_of_each() -> None:
    minibatches = related_layers([16] * 8, (0, 0.3, 1))
    first, second = passes(minibatches[:3], 4), passes(minibatches[3:], 4)
    first.merge_state(second)
    merged, whole = first.compute(), passes(minibatches, 4).compute()
    torch.testing.assert_close(merged.stderr, whole.stderr, rtol=1e-9, atol=1e-9)
    assert (merged.samples, merged.passes, merged.degrees_of_freedom) == (128, 4, 7)


def test_interval_is_students_t() -> None:
    result = run(related_layers([16] * 5, (0, 1)))
    low, high = result.interval(0.95)
    # The 97.5 % quantile for 4 degrees of freedom, from a table.
    assert float(high[0, 1] - result.matrix[0, 1]) == pytest.approx(2.776445 * float(result.stderr[0, 1]), rel=1e-6)
    assert float(low[0, 0]) == float(high[0, 0]) == 1


def test_difference_equals_a_direct_computation() -> None:
    """Leave out one minibatch at a time and look at how the difference moves: to first order the same."""
    minibatches = related_layers([16] * 200, (0, 0.4, 0.8, 1.5))
    result = run(minibatches, keep_minibatches=True)
    found = result.difference(("l0", "l1"), ("l0", "l2"))
    grams = [[oracle.linear_gram(x.numpy()) for x in layers.values()] for layers in minibatches]
    values = oracle.hsic_minibatches(grams)

    def difference(kept: np.ndarray) -> float:
        cka = oracle.cka_of_values(kept)
        return float(cka[0, 1] - cka[0, 2])

    left_out = np.array([difference(np.delete(values, b, axis=0)) for b in range(len(values))])
    jackknife = math.sqrt((len(values) - 1) * left_out.var())
    assert found.value == pytest.approx(difference(values), abs=1e-12)
    assert found.stderr == pytest.approx(jackknife, rel=0.02)
    apart = math.hypot(float(result.stderr[0, 1]), float(result.stderr[0, 2]))
    assert abs(found.stderr / apart - 1) > 0.05


def test_difference_of_a_pair_and_the_diagonal_has_the_pairs_error() -> None:
    result = run(related_layers([16, 8, 24, 12, 5], (0, 0.4, 0.8)), keep_minibatches=True)
    for first, second in (("l0", "l1"), ("l1", "l2")):
        found = result.difference((first, second), ("l0", "l0"))
        at = result.rows.index(first), result.columns.index(second)
        assert found.value == pytest.approx(result[first, second] - 1, abs=1e-12)
        assert found.stderr == pytest.approx(float(result.stderr[at]), abs=1e-9)
    same = result.difference(("l0", "l1"), ("l1", "l0"))
    assert (same.value, same.stderr) == pytest.approx((0, 0), abs=1e-15)


def test_difference_over_passes_and_merges() -> None:
    minibatches = related_layers([16] * 6, (0, 0.4, 0.8))
    pairs = ("l0", "l1"), ("l0", "l2")
    once = run(minibatches, keep_minibatches=True).difference(*pairs)
    often = passes(minibatches, 5, keep_minibatches=True).compute().difference(*pairs)
    first, second = (
        passes(minibatches[:2], 1, keep_minibatches=True),
        passes(minibatches[2:], 1, keep_minibatches=True),
    )
    first.merge_state(second)
    merged = first.compute().difference(*pairs)
    for other in (often, merged):
        assert other.value == pytest.approx(once.value, abs=1e-12)
        assert other.stderr == pytest.approx(once.stderr, rel=1e-9)
        assert other.degrees_of_freedom == 5


def test_difference_without_kept_minibatches_says_what_to_do() -> None:
    with pytest.raises(OptionError, match="keep_minibatches=True"):
        run(related_layers([16] * 4, (0, 1))).difference(("l0", "l1"), ("l0", "l0"))
    few = run(related_layers([32] * 2, (0, 1)), keep_minibatches=True).difference(("l0", "l1"), ("l0", "l0"))
    assert math.isnan(few.stderr)
