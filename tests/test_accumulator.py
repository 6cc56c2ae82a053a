"""`CKAAccumulator`: order, merging, unequal minibatches, layers that come and go."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import cka_hooks
from cka_hooks import CKAAccumulator

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
Minibatch = dict[str, Tensor]


def minibatches(count: int = 6, n: int | Sequence[int] = 12) -> list[Minibatch]:
    generator = torch.Generator().manual_seed(0)
    mixes = {"a": 9, "b": 4, "c": 30}
    mix = {layer: torch.randn(5, width, generator=generator) for layer, width in mixes.items()}
    out = []
    for b in range(count):
        samples = n if isinstance(n, int) else n[b]
        signal = torch.randn(samples, 5, generator=generator)
        out.append(
            {
                layer: signal @ mix[layer] + torch.randn(samples, width, generator=generator)
                for layer, width in mixes.items()
            }
        )
    return out


def accumulated(batches: Sequence[Minibatch], **options: Any) -> CKAAccumulator:
    cka = CKAAccumulator(**options)
    for batch in batches:
        cka.update(batch)
    return cka


def assert_same_sums(one: CKAAccumulator, other: CKAAccumulator) -> None:
    """1e-12 relative to the root of the product of the two layers' own sums."""
    position = [other.layers.index(layer) for layer in one.layers]
    first, second = one.state.moments[0], other.state.moments[0][position][:, position]
    root = first.diagonal().sqrt()
    assert float(((first - second) / (root[:, None] * root)).abs().max()) < 1e-12
    a, b = one.compute(), other.compute()
    assert (a.samples, a.minibatches) == (b.samples, b.minibatches)
    torch.testing.assert_close(a.stderr, b.stderr[position][:, position], rtol=1e-6, atol=1e-10)


OPTIONS: list[dict[str, Any]] = [{}, {"estimator": "biased"}, {"kernel": "rbf"}, {"minibatch": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_minibatches(options: dict[str, Any], seed: int) -> None:
    batches = minibatches(n=[12, 4, 20, 12, 8, 12])
    shuffled = random.Random(seed).sample(batches, len(batches))
    # Layers in another order too.
    turned = [dict(reversed(batch.items())) for batch in shuffled]
    assert_same_sums(accumulated(batches, **options), accumulated(turned, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_two_accumulators_merged(options: dict[str, Any], cut: int) -> None:
    batches = minibatches()
    one, other = accumulated(batches[:cut], **options), accumulated(batches[cut:], **options)
    untouched = None if not other.state.layers else other.state.moments.clone()
    one.merge_state(other)
    assert_same_sums(accumulated(batches, **options), one)
    if untouched is not None:
        assert torch.equal(other.state.moments, untouched)
        one.update(batches[0])
        assert torch.equal(other.state.moments, untouched)


def test_merging_refuses_other_options() -> None:
    with pytest.raises(cka_hooks.OptionError, match="estimator is 'unbiased' here and 'biased' there"):
        accumulated(minibatches()).merge_state(accumulated(minibatches(), estimator="biased"))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("minibatch", [None, 4, 5, 8])
def test_against_the_oracle(estimator: str, minibatch: int | None) -> None:
    batches = minibatches(n=[12, 13, 20, 16, 12, 24])
    result = accumulated(batches, estimator=estimator, minibatch=minibatch)
    slices = [oracle.minibatch_slices(len(batch["a"]), minibatch) for batch in batches]
    grams = [
        [oracle.linear_gram(oracle.flatten(x[part])) for x in batch.values()]
        for batch, parts in zip(batches, slices, strict=True)
        for part in parts
    ]
    left_out = sum(len(batch["a"]) for batch in batches) - sum(len(minibatch[0]) for minibatch in grams)
    assert result.left_out == left_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        found = result.compute()
    expected, stderr = oracle.cka_of_grams(grams, np.zeros(3, bool), estimator)
    np.testing.assert_allclose(found.matrix.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.stderr.numpy(), stderr, rtol=0, atol=1e-6)


def test_observe_and_step_is_update() -> None:
    batches = minibatches()
    cka = CKAAccumulator()
    for batch in batches:
        for layer, activation in batch.items():
            cka.observe(layer, activation)
            # What happens to it later does not matter any more.
            activation_before = activation.clone()
            activation.zero_()
            batch[layer] = activation_before
        cka.step()
    assert torch.equal(cka.compute().matrix, accumulated(batches).compute().matrix)


def test_compute_changes_nothing_and_reset_forgets() -> None:
    batches = minibatches()
    cka = accumulated(batches[:3])
    assert torch.equal(cka.compute().matrix, cka.compute().matrix)
    for batch in batches[3:]:
        cka.update(batch)
    assert torch.equal(cka.compute().matrix, accumulated(batches).compute().matrix)
    cka.reset()
    with pytest.raises(cka_hooks.TooFewSamplesError, match="nothing was observed"):
        cka.compute()
    cka.update(batches[0])
    assert cka.compute().samples == 12


def test_a_layer_that_was_not_always_there_is_skipped() -> None:
    batches = minibatches()
    del batches[2]["b"]
    result = accumulated(batches).compute()
    assert result.layers == ("a", "c")
    assert result.skipped == {"b": "ran in 5 of 6 minibatches"}
    expected = accumulated([{k: v for k, v in batch.items() if k != "b"} for batch in batches]).compute()
    torch.testing.assert_close(result.matrix, expected.matrix, rtol=0, atol=1e-12)


def test_a_layer_that_came_late_is_not_lost() -> None:
    batches = minibatches()
    late = batches[0].pop("c")
    assert late is not None
    result = accumulated(batches).compute()
    assert result.layers == ("a", "b")
    assert "ran in 5 of 6" in result.skipped["c"]


def test_misuse_says_what_to_do() -> None:
    cka = CKAAccumulator()
    with pytest.raises(cka_hooks.LayerError, match="no layer was observed"):
        cka.step()
    cka.observe("a", torch.randn(8, 3))
    with pytest.raises(cka_hooks.LayerError, match=r"'a' was observed twice.*step\(\)"):
        cka.observe("a", torch.randn(8, 3))
    with pytest.raises(cka_hooks.SampleCountError, match="'b' has 7 samples and 'a' has 8"):
        cka.observe("b", torch.randn(7, 3))
    cka.discard()
    with pytest.raises(cka_hooks.SampleCountError):
        cka.update({"a": torch.randn(8, 3), "b": torch.randn(9, 3)})
    cka.update({"a": torch.randn(8, 3), "b": torch.randn(8, 3)})
    assert cka.samples == 8


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("value", [1.0, 0.3, 1e3])
@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize("shared", [0.0, 0.1, 7.7])
def test_a_layer_in_which_one_sample_differs(kernel: str, value: float, at: int, shared: float) -> None:
    """Its U-centred Gram matrix is 0: what rounding leaves of it is not reported."""
    x = torch.zeros(10, 3)
    x[at] = value
    cka = CKAAccumulator(kernel=kernel)
    for batch in minibatches(3, 10):
        cka.update({"one": x + shared, "a": batch["a"]})
    result = cka.compute()
    assert "CKA is undefined" in result.degenerate["one"]
    assert math.isnan(result["one", "a"])
    assert math.isnan(result["one", "one"])


def test_keep_minibatches() -> None:
    batches = minibatches()
    result = accumulated(batches, keep_minibatches=True).compute()
    assert result.minibatch_hsic.shape == (6, 3, 3)
    total = result.minibatch_hsic.sum(0)
    root = total.diagonal().sqrt()
    torch.testing.assert_close(result.matrix, total / (root[:, None] * root), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out_of_the_sums(bad: float) -> None:
    batches = minibatches(3)
    batches[1]["b"][2, 0] = bad
    cka = accumulated(batches)
    assert bool(cka.state.moments.isfinite().all())
    without = accumulated([batches[0], batches[2]])
    torch.testing.assert_close(cka.state.moments[0, 1, 1], without.state.moments[0, 1, 1], rtol=1e-12, atol=0)


def test_a_label_that_is_no_text_is_refused_before_the_first_batch() -> None:
    """At the end of a run it would be too late: a result has text as labels."""
    cka = CKAAccumulator()
    with pytest.raises(cka_hooks.OptionError, match=r"label of a layer is 0: .*'layer 0'"):
        cka.update({0: torch.randn(8, 3), 1: torch.randn(8, 3)})
    assert not cka.observing
    cka.update({"a": torch.randn(8, 3), np.str_("b"): torch.randn(8, 3)})
    assert cka.compute().layers == ("a", "b")
