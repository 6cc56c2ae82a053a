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

from cka_hooks import CKAResult, CKAWarning, OptionError
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
