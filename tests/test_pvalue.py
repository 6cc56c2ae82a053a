"""`result.pvalue()`, and what summary, picture, page and tables say of entries that may be unrelated.

How good the p-values of a run are is tested where the moments are made; here they are given.
"""

import dataclasses
import math
import warnings

import numpy as np
import oracle
import pandas
import pytest
import torch
from made_up import resnet_labels, result_of
from scipy import stats

from cka_hooks import CKAAccumulator, CKAResult, CKAWarning, OptionError, compare, null
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


@pytest.mark.parametrize("name", ["null_variance", "null_skewness"])
def test_one_moment_alone_is_refused(name):
    with pytest.raises(OptionError, match="only one of null_variance and null_skewness: expected both, or neither"):
        dataclasses.replace(CKAResult.example(), **{name: torch.ones(3, 3, dtype=torch.float64)})


def test_a_variance_of_zero_has_no_pvalue():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_null(CKAResult.example(), variance=0.0).pvalue().isnan().all()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
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
    """200 runs of five unrelated layers: 5 % give a simulation error of 1.5 points."""
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(200):
        accumulator = CKAAccumulator(minibatch=8)
        accumulator.update({str(i): torch.randn(80, 16, generator=generator) for i in range(5)})
        p = accumulator.compute().pvalue(family_wise=True)
        alarms += bool((p[np.triu_indices(5, 1)] < 0.05).any())
    assert 0.02 * 200 < alarms < 0.08 * 200


# Real permutations


def run_of(layers, **options):
    """A comparison of (L, m, n, d) features."""
    accumulator = CKAAccumulator(minibatch=layers.shape[2], **options)
    accumulator.update({str(i): layer.flatten(0, 1) for i, layer in enumerate(layers)})
    return accumulator


def related(layers, minibatches, n, seed, width=8):
    """(L, m, n, d) features: the first half of the layers are related to one another, and so is the second."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(2, minibatches, n, width, generator=generator).repeat_interleave(layers // 2, 0)
    return common + 0.5 * torch.randn(layers, minibatches, n, width, generator=generator)


def test_permuted_values_are_those_of_the_oracle_for_the_orders_that_were_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        null, "permuted_orders", lambda *args, real=null.permuted_orders: drawn.append(real(*args)) or drawn[-1]
    )
    layers = related(4, 3, 7, seed=0)
    result = run_of(layers, permutations=20).compute()
    orders = torch.stack(drawn, 1)
    assert orders.shape == (20, 3, 7)
    assert (orders.sort(-1).values == torch.arange(7)).all()
    grams = [[oracle.linear_gram(x.double().numpy()) for x in layer] for layer in layers]
    own = [sum(oracle.hsic_unbiased(gram, gram) for gram in layer) for layer in grams]
    for draw, of_minibatches in enumerate(orders.numpy()):
        for i in range(4):
            for j in range(i + 1, 4):
                pairs = zip(grams[i], grams[j], of_minibatches, strict=True)
                total = sum(oracle.hsic_unbiased(one, other[order][:, order]) for one, other, order in pairs)
                expected = total / math.sqrt(own[i] * own[j])
                assert float(result.permuted[draw, i, j]) == pytest.approx(expected, abs=1e-6)
                assert result.permuted[draw, j, i] == result.permuted[draw, i, j]
    assert not result.permuted.diagonal(dim1=1, dim2=2).any()


def test_permuted_values_have_the_moments_that_are_known_exactly():
    result = run_of(related(4, 2, 9, seed=1), permutations=20_000).compute()
    i, j = torch.triu_indices(4, 4, 1)
    z = (result.permuted / result.null_stderr)[:, i, j]
    assert z.mean(0).abs().max() < 4 / math.sqrt(20_000)
    assert (z.square().mean(0) - 1).abs().max() < 0.06
    assert (z.pow(3).mean(0) - result.null_skewness[i, j]).abs().max() < 0.2


def stepped_down(result):
    """Westfall & Young's p-values, written out: each pair against the smallest of itself and of those after it."""
    pairs = [(i, j) for i, row in enumerate(result.rows) for j, column in enumerate(result.columns) if row != column]
    pairs = list({frozenset((result.rows[i], result.columns[j])): (i, j) for i, j in reversed(pairs)}.values())
    alone = result.pvalue()
    pairs.sort(key=lambda pair: float(alone[pair]))
    found, before = {}, 0.0
    for k, pair in enumerate(pairs):
        least = [
            min(
                stats.pearson3.sf(
                    float(draw[it]) / math.sqrt(float(result.null_variance[it])), float(result.null_skewness[it])
                )
                for it in pairs[k:]
            )
            for draw in result.permuted
        ]
        before = max(before, (1 + sum(p <= float(alone[pair]) for p in least)) / (1 + len(least)))
        found[pair] = before
    return found


def test_family_wise_values_of_permutations_written_out_and_of_cuts():
    result = run_of(related(6, 4, 6, seed=2), permutations=99).compute()
    for one in (result, result.select(rows=["0", "1", "2"], columns=["3", "4"]), result.select(["5", "1"])):
        found = one.pvalue(family_wise=True)
        expected = stepped_down(one)
        for pair, value in expected.items():
            assert float(found[pair]) == pytest.approx(value), pair
        assert (found >= one.pvalue() - 0.1).all()
    assert torch.equal(result.pvalue(family_wise=True), result.pvalue(family_wise=True).T)


def test_family_wise_values_against_permutations_of_another_program():
    """The largest of the pairs between two groups of layers, of which the samples of one group are permuted."""
    layers = related(6, 6, 12, seed=3)
    layers[3:] += 0.2 * layers[:3]
    result = run_of(layers, permutations=1000).compute().select(rows=["0", "1", "2"], columns=["3", "4", "5"])
    found = result.pvalue(family_wise=True)
    generator, permute = np.random.default_rng(0), lambda gram, order: gram[order][:, order]
    grams = [[oracle.linear_gram(x.double().numpy()) for x in layer] for layer in layers]
    draws = []
    for draw in range(1001):
        orders = [generator.permutation(12) if draw else np.arange(12) for _ in range(6)]
        values = [
            [sum(map(oracle.hsic_unbiased, one, map(permute, other, orders))) for other in grams[3:]]
            for one in grams[:3]
        ]
        draws.append(values)
    observed, permuted = np.array(draws[0]), np.array(draws[1:])
    largest = np.argmax(observed / permuted.std(0))
    z = permuted / permuted.std(0)
    expected = (z.max((1, 2)) >= (observed / permuted.std(0)).max()).mean()
    assert 0.02 < expected < 0.5
    assert float(found.flatten()[largest]) == pytest.approx(expected, abs=0.05)


def test_dependent_pairs_cost_less_than_by_holm():
    layers = related(10, 6, 12, seed=4)
    layers[5:] += 0.35 * layers[:5]
    result = run_of(layers, permutations=999).compute().select(rows=list("01234"), columns=list("56789"))
    by_holm = dataclasses.replace(result, permuted=None).pvalue(family_wise=True)
    found = result.pvalue(family_wise=True)
    assert (found < 0.6 * by_holm).any()
    assert found.min() >= 1 / 1000


def test_unrelated_groups_of_related_layers_are_told_apart_as_seldom_as_the_level_says():
    """400 runs of two networks that have nothing in common: 5 % give a simulation error of 1.1 points."""
    alarms = 0
    for seed in range(400):
        result = run_of(related(6, 5, 8, seed=seed), permutations=99).compute()
        p = result.pvalue(family_wise=True)
        assert p[0, 1] == pytest.approx(0.01)
        alarms += bool((p[:3, 3:] <= 0.05).any())
    assert 0.02 * 400 < alarms < 0.08 * 400


def test_permutations_do_not_depend_on_how_minibatches_are_added():
    layers = related(4, 4, 6, seed=5)
    whole = run_of(layers, permutations=9, seed=3)
    parts = [run_of(some, permutations=9, seed=3) for some in layers.split(2, dim=1)]
    parts[1].merge_state(parts[0])
    torch.testing.assert_close(parts[1].compute().permuted, whole.compute().permuted, rtol=0, atol=1e-12)
    other = run_of(layers, permutations=9, seed=4)
    assert not torch.allclose(other.compute().permuted, whole.compute().permuted)
    again = CKAAccumulator(minibatch=6, permutations=9, seed=3)
    again.load_state_dict(whole.state_dict())
    assert again.compute() == whole.compute()
    before = whole.compute().permuted
    parts[0].merge_state(whole)
    assert torch.equal(whole.compute().permuted, before)


def test_a_file_keeps_permutations_or_leaves_them_out(tmp_path):
    result = run_of(related(4, 2, 6, seed=6), permutations=5).compute()
    result.save(tmp_path / "cka.json")
    assert CKAResult.load(tmp_path / "cka.json") == result
    result.save(tmp_path / "cka.json", minibatches=False)
    assert CKAResult.load(tmp_path / "cka.json").permuted is None
    with pytest.raises(OptionError, match="permuted has shape"):
        dataclasses.replace(result, permuted=result.permuted[:, :2])


def test_further_passes_change_no_permutation():
    layers = related(4, 3, 6, seed=7)
    once = run_of(layers, permutations=5)
    first = once.state.permuted.clone()
    once.start_pass()
    once.update({str(i): layer.flatten(0, 1) for i, layer in enumerate(layers)})
    assert torch.equal(once.state.permuted, first)
    assert once.compute().permuted is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"estimator": "biased"}, "needs estimator='unbiased'"),
        ({"per": "position"}, "needs per='sample'"),
        ({"epochs": 2}, "needs epochs=1"),
        ({"permutations": 1.5}, "expected a whole number of at least 0"),
        ({"permutations": -1}, "expected a whole number of at least 0"),
    ],
)
def test_permutations_are_refused_where_they_say_nothing(options, reason):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    with pytest.raises(OptionError, match=reason):
        compare(model, [torch.randn(8, 3)], progress=False, **{"permutations": 9} | options)


def test_more_permutations_than_memory_is_for_are_refused():
    accumulator = CKAAccumulator(permutations=10_000_000)
    with pytest.raises(OptionError, match=r"10000000 of 2 layers would take 0.3 GB: at most 8,388,608 of so many"):
        accumulator.update({"a": torch.randn(8, 3), "b": torch.randn(8, 3)})


def test_too_many_permutations_are_refused_in_the_first_batch_of_a_model_built_in_turn():
    steps = []

    def build():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
        model.register_forward_hook(lambda *_: steps.append(len(built)))
        built.append(1)
        return model

    built = []
    loader = list(torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(OptionError, match="of 2 layers would take"):
        compare({"a": build, "b": build}, loader, layers="0", permutations=10_000_000, progress=False)
    assert steps.count(2) < steps.count(1)
