"""`result.pvalue()`, and what summary, picture, page and tables say of entries that may be unrelated.

How good the p-values of a run are is tested where the moments are made; here they are given.
"""

import dataclasses
import math
import warnings

import numpy as np
import pandas
import pytest
import torch
from made_up import resnet_labels, result_of
from scipy import stats

from cka_hooks import CKAAccumulator, CKAResult, CKAWarning, OptionError
from cka_hooks.views.page import page_data


def with_null(result, variance=0.01, skewness=0.5):
    """The result with these moments of the null in every entry; undefined where it is."""
    variances = torch.full_like(result.matrix, variance).masked_fill(result.matrix.isnan(), math.nan)
    return dataclasses.replace(result, null_variance=variances, null_skewness=torch.full_like(variances, skewness))


KNOWN = with_null(result_of({"a": list("wxyz"), "b": list("xyz")}, degenerate=("a/y",), seed=3))


@pytest.mark.parametrize("skewness", [-3.0, -0.5, 0.0, 0.02, 0.7, 2.0])
def test_the_tail_is_that_of_scipy(skewness):
    result = with_null(CKAResult.example(), variance=0.09, skewness=skewness)
    expected = stats.pearson3.sf(result.matrix.numpy() / 0.3, skewness)
    assert result.pvalue().numpy() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_pvalues_and_their_cuts():
    p = KNOWN.pvalue()
    assert p.shape == KNOWN.matrix.shape
    assert p.dtype == torch.float64
    assert torch.equal(p.isnan(), KNOWN.matrix.isnan())
    assert torch.equal(p, p.T) or torch.allclose(p, p.T, equal_nan=True)
    assert torch.allclose(KNOWN.between("a", "b").pvalue(), p[:4, 4:], equal_nan=True)
    assert torch.allclose(KNOWN.null_stderr, torch.full_like(p, 0.1).masked_fill(p.isnan(), math.nan), equal_nan=True)
    assert KNOWN.null_unknown is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": {"estimator": "biased"}}, 'estimator="unbiased"'),
        ({"settings": {"per": "position"}}, 'per="sample"'),
        ({"passes": 3}, "epochs=1"),
        ({}, "run the comparison again"),
    ],
)
def test_where_the_null_is_not_known_it_is_nan_and_says_why(changes, reason):
    result = dataclasses.replace(CKAResult.example(), **changes)
    with pytest.warns(CKAWarning, match=f"no p-values: .*{reason}"):
        assert result.pvalue().isnan().all()
    assert reason in result.null_unknown
    assert result.null_stderr.isnan().all()
    assert page_data(result)["pvalue"] is None
    assert "unrelated" not in result.summary()


def test_a_variance_of_zero_has_no_pvalue():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_null(CKAResult.example(), variance=0.0).pvalue().isnan().all()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"null_variance": torch.zeros(3, 3, dtype=torch.float64)}, "belong together"),
        ({"null_skewness": torch.zeros(3, 3, dtype=torch.float64)}, "belong together"),
        (
            {"null_variance": torch.zeros(2, 3, dtype=torch.float64), "null_skewness": torch.zeros(3, 3)},
            "labels need",
        ),
        (
            {"null_variance": -torch.ones(3, 3, dtype=torch.float64), "null_skewness": torch.zeros(3, 3).double()},
            "0 or",
        ),
    ],
)
def test_moments_that_do_not_fit_are_refused(fields, found):
    with pytest.raises(OptionError, match=found):
        dataclasses.replace(CKAResult.example(), **fields)


def test_a_file_keeps_them(tmp_path):
    KNOWN.save(tmp_path / "cka.json")
    loaded = CKAResult.load(tmp_path / "cka.json")
    assert loaded == KNOWN
    assert torch.allclose(loaded.pvalue(), KNOWN.pvalue(), equal_nan=True)
    assert loaded != with_null(KNOWN, variance=0.02)


def test_the_summary_names_only_what_cannot_be_told_from_unrelated():
    result = with_null(CKAResult.example(), variance=0.1, skewness=0.0)
    assert "Indistinguishable from unrelated (p > 0.05): 1 pair, such as conv1 and fc, CKA 0.500" in result.summary()
    assert "p = 0.057." in result.summary()
    assert "unrelated" not in with_null(CKAResult.example(), variance=0.001).summary()


def test_the_picture_hatches_only_those(tmp_path):
    result = with_null(CKAResult.example(), variance=0.1, skewness=0.0)
    _, axes = result.plot(tmp_path / "cka.png")
    (marks,) = [it for it in axes.collections if it.get_hatch()]
    assert len(marks.get_paths()) == 2  # one pair, on both sides of the diagonal
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "indistinguishable from unrelated (p > 0.05)"
    ]
    _, axes = with_null(result_of(resnet_labels()), variance=1e-6).select("layer1.**").plot(tmp_path / "cka.png")
    assert not [it for it in axes.collections if it.get_hatch()]
    _, axes = result.plot(tmp_path / "cka.png", stderr=True)
    assert not [it for it in axes.collections if it.get_hatch()]


@pytest.mark.filterwarnings("ignore:The 'float_precision'")  # which old versions of pandas need
def test_tables_have_them_where_they_are_known(tmp_path):
    frame = KNOWN.to_dataframe(tidy=True)
    assert list(frame.columns) == ["row", "column", "cka", "stderr", "pvalue"]
    assert np.array_equal(frame.pvalue.to_numpy().reshape(7, 7), KNOWN.pvalue().numpy(), equal_nan=True)
    KNOWN.to_csv(tmp_path / "cka.csv", tidy=True)
    read = pandas.read_csv(tmp_path / "cka.csv", float_precision="round_trip")
    assert np.array_equal(read.pvalue.to_numpy(), frame.pvalue.to_numpy(), equal_nan=True)


# Family-wise


def test_family_wise_values_are_holms_over_pairs_of_different_layers():
    generator = torch.Generator().manual_seed(0)
    for result in (KNOWN, KNOWN.between("a", "b"), KNOWN.select(rows="a/*", columns=["a/w", "b/x"])):
        variance = 0.02 + torch.rand(result.matrix.shape, generator=generator, dtype=torch.float64)
        if result.square:
            variance = (variance + variance.T) / 2
        result = dataclasses.replace(
            result, null_variance=variance.masked_fill(result.matrix.isnan(), math.nan), null_skewness=variance
        )
        alone, found = result.pvalue(), result.pvalue(family_wise=True)
        pairs = {
            tuple(sorted((row, column))): float(alone[i, j])
            for i, row in enumerate(result.rows)
            for j, column in enumerate(result.columns)
            if row != column and not math.isnan(alone[i, j])
        }
        ordered = sorted(pairs, key=pairs.get)
        steps = [min(1, (len(ordered) - k) * pairs[pair]) for k, pair in enumerate(ordered)]
        expected = dict(zip(ordered, np.maximum.accumulate(steps), strict=True))
        for i, row in enumerate(result.rows):
            for j, column in enumerate(result.columns):
                pair = tuple(sorted((row, column)))
                wanted = expected.get(pair, float(alone[i, j]))
                assert float(found[i, j]) == pytest.approx(wanted, rel=1e-9, nan_ok=True), pair
        assert (found >= alone)[~alone.isnan()].all()


def permuted_maxima(layers, draws, generator):
    """The largest of all pairs' values, in standard deviations of the permutations, when every layer is permuted."""
    n = layers.shape[2]
    grams = []
    for minibatch in layers.transpose(0, 1):
        for x in minibatch.double().numpy():
            gram = x @ x.T
            np.fill_diagonal(gram, 0)
            rows = gram.sum(0) / (n - 2)
            gram += -rows[:, None] - rows[None] + gram.sum() / ((n - 1) * (n - 2))
            np.fill_diagonal(gram, 0)
            grams.append(gram)
    grams = np.stack(grams).reshape(layers.shape[1], len(layers), n, n)
    pairs = np.triu_indices(len(layers), 1)
    sums = np.zeros((draws + 1, len(pairs[0])))
    for draw in range(draws + 1):
        for minibatch in grams:
            orders = [generator.permutation(n) if draw else np.arange(n) for _ in minibatch]
            flat = np.stack([gram[order][:, order].ravel() for gram, order in zip(minibatch, orders, strict=True)])
            sums[draw] += (flat @ flat.T)[pairs]
    z = sums / sums[1:].std(0)
    return z[0], z[1:].max(1)


def test_family_wise_values_against_the_largest_of_real_permutations():
    """Five layers, two of them related: no value is below that of the largest statistic, nor far above it."""
    generator = torch.Generator().manual_seed(3)
    layers = torch.randn(5, 6, 16, 8, generator=generator)
    layers[1] = layers[0] + 2.2 * layers[1]
    accumulator = CKAAccumulator(minibatch=16)
    accumulator.update({str(i): layer.flatten(0, 1) for i, layer in enumerate(layers)})
    found = accumulator.compute().pvalue(family_wise=True)[np.triu_indices(5, 1)].numpy()
    observed, maxima = permuted_maxima(layers, 1000, np.random.default_rng(0))
    expected = np.array([(maxima >= value).mean() for value in observed])
    assert found[0] < 0.05
    assert expected[0] < 0.05
    assert ((found < 0.05) == (expected < 0.05)).all()
    assert (found >= expected - 0.03).all()
    assert np.abs(found - expected)[expected < 0.2].max() < 0.05


def test_unrelated_layers_are_told_apart_as_seldom_as_the_level_says():
    """400 runs of five unrelated layers: 5 % give a simulation error of 1.1 points."""
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(400):
        accumulator = CKAAccumulator(minibatch=8)
        accumulator.update({str(i): torch.randn(80, 16, generator=generator) for i in range(5)})
        p = accumulator.compute().pvalue(family_wise=True)
        alarms += bool((p[np.triu_indices(5, 1)] < 0.05).any())
    assert 0.02 * 400 < alarms < 0.08 * 400
