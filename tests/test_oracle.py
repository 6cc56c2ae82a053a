"""The oracle against known values and against other routes to the same numbers."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_grams(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=(n, 3))
    y = x @ rng.normal(size=(3, 4)) + rng.normal(size=(n, 4)) + 2.0
    return x @ x.T, y @ y.T


def simulate(rng: np.random.Generator, sizes: list[int], layers: int = 3) -> list[list[np.ndarray]]:
    mixes = [rng.normal(size=(5, 6)) for _ in range(layers)]
    minibatches = []
    for n in sizes:
        x = rng.normal(size=(n, 5)) * [3, 2, 1, 1, 1]
        minibatches.append([oracle.linear_gram(x @ mix + 2 * rng.normal(size=(n, 6))) for mix in mixes])
    return minibatches


# Features and kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flatten_widens_and_keeps_rows(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    features = oracle.flatten(x)
    assert features.dtype == np.float64
    np.testing.assert_array_equal(features, np.arange(24.0).reshape(2, 12))
    assert oracle.flatten(torch.ones(5)).shape == (5, 1)


def test_linear_gram_is_the_centred_product(rng):
    x = rng.normal(size=(5, 7)) + 3
    h = np.eye(5) - 1 / 5
    np.testing.assert_allclose(oracle.linear_gram(x), h @ x @ x.T @ h, atol=1e-12)


def test_linear_gram_survives_a_large_common_component(rng):
    # Multiples of 2^-10 stay exact after the shift, so the centred products must agree to rounding.
    x = np.round(rng.normal(size=(6, 9)) * 1024) / 1024
    np.testing.assert_allclose(oracle.linear_gram(x + 2.0**30), oracle.linear_gram(x), atol=1e-12)


def test_chunks_of_features_add_up(rng, monkeypatch):
    x = rng.normal(size=(4, 10))
    whole = oracle.linear_gram(x), oracle.squared_distances(x)
    monkeypatch.setattr(oracle, "_feature_chunks", lambda x: [x[:, :3], x[:, 3:9], x[:, 9:]])
    np.testing.assert_allclose(oracle.linear_gram(x), whole[0], atol=1e-13)
    np.testing.assert_allclose(oracle.squared_distances(x), whole[1], atol=1e-13)


def test_rbf_of_an_odd_count_by_hand():
    # Samples 0, 1, 3: D has three 0, two 1, two 4, two 9; the fifth of the nine in order is 1.
    gram = oracle.rbf_gram(np.array([[0.0], [1.0], [3.0]]))
    d = np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]])
    np.testing.assert_allclose(gram, np.exp(-d / 2), rtol=1e-15)


def test_rbf_of_an_even_count_by_hand():
    # Samples 0, 1, 3, 7: four 0, then pairs of 1, 4, 9, 16, 36, 49; the eighth is 4 and the ninth is 9.
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    gram = oracle.rbf_gram(x, bandwidth=0.5)
    np.testing.assert_allclose(gram[0], np.exp(-np.array([0, 1, 9, 49]) / (2 * 0.25 * 6.5)), rtol=1e-15)
    np.testing.assert_allclose(oracle.rbf_gram(x, sigma=3.0)[1, 3], np.exp(-36 / 18), rtol=1e-15)


def test_rbf_where_most_samples_are_equal():
    x = np.array([[1.0], [1.0], [1.0], [1.0], [2.0]])
    np.testing.assert_array_equal(oracle.rbf_gram(x), (x == x.T).astype(float))


def test_cosine_and_polynomial_by_hand():
    x = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(oracle.cosine_gram(x), [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 0]], atol=1e-15)
    np.testing.assert_allclose(oracle.polynomial_gram(x)[:2, :2], [[13.5**3, 2.5**3], [2.5**3, 1.5**3]])
    np.testing.assert_allclose(oracle.polynomial_gram(x, degree=2, gamma=2.0, coef0=0.0)[0, 1], 36.0)


# HSIC


@pytest.mark.parametrize("n", [4, 5, 6])
def test_unbiased_is_the_average_over_4_tuples(rng, n):
    k, el = random_grams(rng, n)
    terms = [
        k[i, j] * (el[i, j] + el[q, r] - 2 * el[i, q]) for i, j, q, r in permutations(range(n), oracle.MIN_SAMPLES)
    ]
    assert oracle.hsic_unbiased(k, el) == pytest.approx(np.mean(terms), rel=1e-10)


def u_centred(gram: np.ndarray) -> np.ndarray:
    n = len(gram)
    gram = gram - np.diag(np.diag(gram))
    rows = gram.sum(axis=1)
    centred = gram - (rows[:, None] + rows[None, :]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred - np.diag(np.diag(centred))


@pytest.mark.parametrize("n", [4, 7, 20])
def test_unbiased_is_the_inner_product_of_u_centred_grams(rng, n):
    k, el = random_grams(rng, n)
    expected = np.sum(u_centred(k) * u_centred(el)) / (n * (n - 3))
    assert oracle.hsic_unbiased(k, el) == pytest.approx(expected, rel=1e-10)


def test_unbiased_ignores_the_diagonal_and_additive_terms(rng):
    k, el = random_grams(rng, 8)
    a = rng.normal(size=8)
    changed = k + a[:, None] + a[None, :] + np.diag(rng.normal(size=8))
    assert oracle.hsic_unbiased(changed, el) == pytest.approx(oracle.hsic_unbiased(k, el), rel=1e-10)


def test_unbiased_averages_to_0_for_independent_features(rng):
    values = [
        oracle.hsic_unbiased(*(x @ x.T for x in (rng.normal(size=(6, 2)), rng.normal(size=(6, 2)))))
        for _ in range(4000)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_biased_is_the_cross_covariance_norm(rng):
    x, y = rng.normal(size=(9, 3)) + 1, rng.normal(size=(9, 5)) - 2
    cross = (x - x.mean(0)).T @ (y - y.mean(0))
    expected = np.linalg.norm(cross) ** 2 / 8**2
    assert oracle.hsic_biased(x @ x.T, y @ y.T) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_pairs_are_the_single_formula(rng, estimator):
    grams = [*random_grams(rng, 7), *random_grams(rng, 7)]
    single = {"unbiased": oracle.hsic_unbiased, "biased": oracle.hsic_biased}[estimator]
    expected = [[single(k, el) for el in grams] for k in grams]
    np.testing.assert_allclose(oracle.hsic_pairs(grams, estimator), expected, rtol=1e-10)


def test_unknown_estimator_is_refused(rng):
    with pytest.raises(ValueError, match="estimator"):
        oracle.hsic_pairs(random_grams(rng, 5), "debiased")


# CKA


def test_biased_linear_cka_is_kornblith_in_feature_space(rng):
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 6))
    y[:, :4] += x
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    cka = oracle.cka_minibatch([[oracle.linear_gram(x), oracle.linear_gram(y)]], "biased")
    assert cka[0, 1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_linear_cka_invariances(rng, estimator):
    x = rng.normal(size=(12, 5)) * [4, 2, 1, 1, 1]
    y = x[:, :3] + rng.normal(size=(12, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    layers = [y, x, x @ rotation * 7 + 5, x * [1, 1, 1, 1, 9]]
    cka = oracle.cka_minibatch([[oracle.linear_gram(layer) for layer in layers]], estimator)
    np.testing.assert_allclose(np.diagonal(cka), 1, rtol=1e-12)
    np.testing.assert_allclose(cka, cka.T, atol=1e-14)
    assert cka[1, 2] == pytest.approx(1, rel=1e-12)
    assert cka[0, 1] == pytest.approx(cka[0, 2], rel=1e-12)
    assert abs(cka[0, 3] - cka[0, 1]) > 0.1


@pytest.mark.parametrize(("estimator", "offset"), [("unbiased", 3), ("biased", 1)])
def test_minibatches_are_weighted_sums(rng, estimator, offset):
    grams = simulate(rng, [8, 8, 5], layers=2)
    single = {"unbiased": oracle.hsic_unbiased, "biased": oracle.hsic_biased}[estimator]
    sums = {
        (i, j): sum((len(layers[0]) - offset) * single(layers[i], layers[j]) for layers in grams)
        for i, j in [(0, 1), (0, 0), (1, 1)]
    }
    expected = sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1])
    assert oracle.cka_minibatch(grams, estimator)[0, 1] == pytest.approx(expected, rel=1e-10)
    equal = oracle.cka_minibatch(grams, estimator, weight=lambda n: 1.0)
    assert equal[0, 1] != pytest.approx(expected, rel=1e-6)


def test_stderr_agrees_with_the_jackknife(rng):
    values = oracle.hsic_minibatches(simulate(rng, [16] * 150 + [24] * 50))
    count = len(values)
    left_out = np.stack([oracle.cka_of_values(np.delete(values, b, axis=0)) for b in range(count)])
    jackknife = np.sqrt((count - 1) / count * ((left_out - left_out.mean(0)) ** 2).sum(0))
    stderr = oracle.stderr_minibatch(values)
    upper = np.triu_indices(3, 1)
    np.testing.assert_allclose(stderr[upper], jackknife[upper], rtol=0.03)
    np.testing.assert_array_equal(np.diagonal(stderr), 0)


def test_stderr_covers_the_spread_of_repeated_runs(rng):
    mixes = [rng.normal(size=(5, 6)) for _ in range(2)]
    ckas, errors = [], []
    for _ in range(200):
        grams = []
        for _ in range(20):
            x = rng.normal(size=(10, 5))
            grams.append([oracle.linear_gram(x @ mix) for mix in mixes])
        values = oracle.hsic_minibatches(grams)
        ckas.append(oracle.cka_of_values(values)[0, 1])
        errors.append(oracle.stderr_minibatch(values)[0, 1])
    assert np.mean(errors) == pytest.approx(np.std(ckas), rel=0.2)


def test_stderr_needs_three_minibatches(rng):
    values = oracle.hsic_minibatches(simulate(rng, [8, 8]))
    assert np.isnan(oracle.stderr_minibatch(values)).all()
    values = oracle.hsic_minibatches(simulate(rng, [8, 8, 8]))
    assert np.isfinite(oracle.stderr_minibatch(values)).all()


# Degenerate layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_is_relative_to_size_and_dtype(dtype):
    eps = torch.finfo(dtype).eps
    ones = torch.ones(128, 3, dtype=dtype)
    rounding = ones.clone()
    rounding[::2] += eps
    signal = ones.clone()
    signal[::2] += 64 * eps
    assert oracle.degenerate([ones * 0.1])
    assert oracle.degenerate([torch.zeros(8, 3, dtype=dtype)])
    assert oracle.degenerate([rounding])
    assert not oracle.degenerate([signal])
    assert not oracle.degenerate([ones, signal])


def test_tiny_features_are_not_degenerate():
    assert not oracle.degenerate([torch.randn(8, 3) * 1e-15])


# Recording


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y = self.relu(y.mean((2, 3)) - 0.5 * y.mean())
        return self.fc(y)


LABELS = ["conv", "bn", "relu", "relu#2", "fc"]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randn(4, 12, 3, 6, 6, generator=torch.Generator().manual_seed(1)))


def test_in_place_relu_does_not_change_what_was_recorded(net, batches):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    labels, recorded = oracle.record(net, batches)
    assert labels == LABELS
    for batch, seen in zip(batches, recorded, strict=True):
        assert list(seen) == LABELS
        assert (seen["bn"] < 0).any()
        torch.testing.assert_close(seen["relu"], seen["bn"].relu(), rtol=0, atol=0)
        assert seen["fc"].dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(seen["conv"], net.conv(batch))
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_chosen_layers_and_batches_of_pairs(net, batches):
    labels, recorded = oracle.record(net, [(batch, torch.zeros(12)) for batch in batches], layers=["fc", "bn"])
    assert labels == ["bn", "fc"]
    assert recorded[0]["bn"].shape == (12, 4, 6, 6)


def test_own_call(net, batches):
    labels, recorded = oracle.record(net, [{"image": b} for b in batches], call=lambda m, b: m(b["image"] * 0))
    assert labels == LABELS
    assert oracle.degenerate([seen["fc"] for seen in recorded])


@pytest.mark.parametrize("kernel", ["linear", "rbf", "cosine", "polynomial", oracle.linear_gram])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_cka_of_model_is_cka_of_what_was_recorded(net, batches, kernel, estimator):
    labels, recorded = oracle.record(net, batches)
    gram = oracle.KERNELS.get(kernel, oracle.linear_gram)
    grams = [
        [gram(oracle.flatten(seen[label][part])) for label in labels]
        for seen in recorded
        for part in (slice(0, 8), slice(8, 12))
    ]
    names, cka, stderr = oracle.cka_of_model(net, batches, estimator, kernel, minibatch=8)
    assert names == labels
    np.testing.assert_allclose(cka, oracle.cka_minibatch(grams, estimator), rtol=1e-12, atol=1e-14)
    values = oracle.hsic_minibatches(grams, estimator)
    np.testing.assert_allclose(stderr, oracle.stderr_minibatch(values), rtol=1e-10, atol=1e-12)


def test_degenerate_layers_are_nan(net, batches):
    with torch.no_grad():
        net.bn.weight.zero_()
        net.bn.bias.fill_(0.3)
    labels, cka, stderr = oracle.cka_of_model(net, batches, forward=lambda m, b: m(b))
    dead = np.array([label != "conv" for label in labels])
    assert np.isnan(cka[dead]).all()
    assert np.isnan(stderr[:, dead]).all()
    assert cka[0, 0] == pytest.approx(1)
    assert stderr[0, 0] == 0


@pytest.mark.parametrize(
    ("samples", "minibatch", "sizes"),
    [
        (12, None, [12]),
        (3, None, []),
        (12, 4, [4, 4, 4]),
        (12, 8, [8, 4]),
        (11, 8, [8]),
        (5, 8, [5]),
        (0, None, []),
    ],
)
def test_minibatch_slices(samples, minibatch, sizes):
    slices = oracle.minibatch_slices(samples, minibatch)
    assert [len(range(samples)[part]) for part in slices] == sizes
    assert [part.start for part in slices] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_minibatch_of_three_is_refused():
    with pytest.raises(ValueError, match="at least 4"):
        oracle.minibatch_slices(12, 3)


@dataclasses.dataclass
class Output:
    count: int
    index: torch.Tensor
    inner: dict


class Wrap(nn.Module):
    def forward(self, x):
        return Output(1, torch.arange(len(x)), {"weights": None, "hidden": [x.clone()]})


class Nothing(nn.Module):
    def forward(self, x):
        return x.mean(0), torch.arange(len(x)), None, "text"


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.wrap = Wrap()
        self.nothing = Nothing()

    def forward(self, x):
        x, _ = self.attention(x, x, x)
        x = self.wrap(self.normed(x)).inner["hidden"][0]
        self.nothing(x)
        return x


def test_attention_parametrizations_and_nested_outputs():
    model = Odd()
    labels, recorded = oracle.record(model, [torch.randn(6, 3, 4)])
    assert labels == ["attention", "normed", "wrap"]
    assert all(value.shape == (6, 3, 4) for value in recorded[0].values())
    torch.testing.assert_close(recorded[0]["normed"], recorded[0]["wrap"], rtol=0, atol=0)
