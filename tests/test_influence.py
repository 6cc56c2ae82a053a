"""`result.influence`: the one sample on which a layer's HSIC hangs, wherever in the run it is."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cka_hooks import CKAAccumulator, CKAWarning
from cka_hooks.results.result import CKAResult

SAMPLES, MINIBATCH = 96, 16


def layers(outlier: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Two layers of SAMPLES; in "scaled" one sample is 30 times as large."""
    generator = torch.Generator().manual_seed(seed)
    even, scaled = torch.randn(2, SAMPLES, 20, generator=generator, dtype=torch.float64)
    if outlier is not None:
        scaled[outlier] *= 30
    return {"even": even, "scaled": scaled}


def accumulated(samples: dict[str, Tensor], **options: object) -> CKAAccumulator:
    cka = CKAAccumulator(**options)  # type: ignore[arg-type]
    for low in range(0, len(next(iter(samples.values()))), MINIBATCH):
        cka.update({layer: x[low : low + MINIBATCH] for layer, x in samples.items()})
    return cka


def result_of(cka: CKAAccumulator) -> tuple[CKAResult, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = cka.compute()
    return result, [str(warning.message) for warning in caught if issubclass(warning.category, CKAWarning)]


@settings(max_examples=15, deadline=None)
@given(
    outlier=st.integers(0, SAMPLES - 1),
    estimator=st.sampled_from(["unbiased", "biased"]),
    minibatch=st.sampled_from([None, 8]),
    seed=st.integers(0, 100),
)
def test_the_outlier_is_found_and_named(outlier: int, estimator: str, minibatch: int | None, seed: int) -> None:
    result, messages = result_of(accumulated(layers(outlier, seed), estimator=estimator, minibatch=minibatch))
    assert result.influence["even"].share < 0.25
    assert result.influence["scaled"].sample == outlier
    assert 0.35 < result.influence["scaled"].share <= 1
    assert any(f"sample {outlier} of the run" in message and "'scaled'" in message for message in messages)


def test_minibatches_of_four_tell_the_minibatch_only() -> None:
    """A U-centred 4 x 4 matrix has equal values at (1, 2) and (3, 4), so that its samples have equal parts."""
    result, messages = result_of(accumulated(layers(50), minibatch=4))
    assert result.influence["scaled"].sample // 4 == 50 // 4
    assert messages


def test_a_run_without_an_outlier_does_not_warn() -> None:
    result, messages = result_of(accumulated(layers(None)))
    assert not messages
    # Each pair counts for both of its samples, so that alike samples have 2 / SAMPLES each.
    for found in result.influence.values():
        assert 2 / SAMPLES < found.share < 0.1


@pytest.mark.parametrize(("factor", "warned"), [(2.0, False), (8.0, True)])
def test_the_documented_level_is_a_quarter(factor: float, warned: bool) -> None:
    samples = layers(None)
    samples["scaled"][40] *= factor
    result, messages = result_of(accumulated(samples))
    assert (result.influence["scaled"].share > 0.25) is warned
    assert bool(messages) is warned


def test_the_share_equals_what_leaving_the_samples_pairs_out_leaves() -> None:
    """Of the U-centred matrix, straight from its definition."""
    import oracle

    x = layers(50)["scaled"][: MINIBATCH * 4]
    n, share, own = MINIBATCH, 0.0, 0.0
    for group in x.split(n):
        gram = oracle.linear_gram(group.numpy())
        gram -= gram * torch.eye(n).numpy()
        rows = gram.sum(0)
        centred = gram - rows[:, None] / (n - 2) - rows / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        squares = centred**2 * (1 - torch.eye(n).numpy())
        own += squares.sum()
        share = max(share, float((2 * squares.sum(0)).max()))
    result, _ = result_of(accumulated({"scaled": x}))
    assert result.influence["scaled"].share == pytest.approx(share / own, rel=1e-9)


@pytest.mark.parametrize("outlier", [3, 40, 95])
def test_merging_counts_positions_on(outlier: int) -> None:
    samples = layers(outlier)
    first = accumulated({layer: x[:32] for layer, x in samples.items()})
    first.merge_state(accumulated({layer: x[32:] for layer, x in samples.items()}))
    merged, _ = result_of(first)
    whole, _ = result_of(accumulated(samples))
    assert merged.influence["scaled"].sample == outlier
    assert merged.influence["scaled"].share == pytest.approx(whole.influence["scaled"].share, rel=1e-12)


def test_the_order_of_samples_moves_the_position_and_not_the_finding() -> None:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    result, _ = result_of(accumulated({layer: x[order] for layer, x in layers(17).items()}))
    assert order[result.influence["scaled"].sample] == 17
    assert result.influence["scaled"].share > 0.75


def test_passes_do_not_hide_it() -> None:
    cka = CKAAccumulator()
    for number in range(10):
        if number:
            cka.start_pass()
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(number))
        for part in order.split(MINIBATCH):
            cka.update({layer: x[part] for layer, x in layers(17).items()})
    result, messages = result_of(cka)
    assert result.influence["scaled"].share > 0.75
    assert messages
    number, position = divmod(result.influence["scaled"].sample, SAMPLES)
    assert torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(number))[position] == 17
