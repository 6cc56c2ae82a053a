"""The random sign sketch: unbiased, reproducible, exact where features are few, its spread in the standard errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cka_hooks
from cka_hooks import hsic
from cka_hooks.similarity import sketch
from cka_hooks.similarity.products import reference as gram

WIDTH = 3000


def activations(minibatches: int = 40, samples: int = 16) -> list[dict[str, torch.Tensor]]:
    """Three layers with 6 shared directions in 3000 features, in which CKA is far from 0 and from 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    maps = [normal(6, WIDTH) * scale for scale in (1.0, 0.5, 2.0)]
    found = []
    for _ in range(minibatches):
        shared = normal(samples, 6)
        layers = [(shared + 0.7 * normal(samples, 6)) @ directions + 3 for directions in maps]
        found.append({f"layer{i}": x for i, x in enumerate(layers)} | {"narrow": shared})
    return found


def result_of(data: list[dict[str, torch.Tensor]], **options: object) -> cka_hooks.CKAResult:
    accumulator = cka_hooks.CKAAccumulator(**options)  # type: ignore[arg-type]
    for layers in data:
        accumulator.update(layers)
    return accumulator.compute()


@pytest.mark.parametrize("shape", [(8, 1, 9000), (8, 7, 3000), (8, 100, 150), (8, 3, 2049), (8, 5000, 3)])
def test_every_feature_is_added_once(shape: tuple[int, ...]) -> None:
    # With one feature of size 1 and all others 0, a sketch that takes each once has Gram matrices of ones.
    features = torch.zeros(shape)
    total = features.flatten(1).shape[1]
    for feature in (0, total // 2, total - 1):
        features.zero_().flatten(1)[:, feature] = torch.arange(8.0)
        one = sketch.sketched_grams(features, 2, 512, [1, 2])
        exact = gram.linear_grams(features, 2)
        assert one.deviation is not None
        torch.testing.assert_close(hsic.centre(one.values), hsic.centre(exact.values), rtol=1e-6, atol=1e-9)
        assert one.deviation.abs().max() < 1e-5


def test_signs_are_balanced_and_independent_between_keys() -> None:
    def signs(key: int) -> torch.Tensor:
        return sketch.random_signs(1 << 18, key, torch.device("cpu"), torch.float64)

    first, second = signs(sketch.sketch_key(0, "a", 0, 1)), signs(sketch.sketch_key(0, "a", 0, 2))
    assert set(first.tolist()) == {-1.0, 1.0}
    for product in (first, first * second, first[1:] * first[:-1], first[64:] * first[:-64]):
        # Five standard deviations of a mean of 2^18 signs.
        assert abs(product.mean()) < 5 / 512


def test_estimates_are_unbiased_over_seeds() -> None:
    data = activations(minibatches=20)
    exact = result_of(data)
    sketched = torch.stack([result_of(data, sketch=128, seed=seed).matrix for seed in range(30)])
    bias = sketched.mean(0) - exact.matrix
    standard_error = sketched.std(0) / 30**0.5
    off = ~torch.eye(4, dtype=torch.bool)
    assert (bias[off].abs() < 4 * standard_error[off] + 1e-12).all()
    # A sketch so narrow moves single entries by much more than this bound on the bias.
    assert standard_error[:3, :3].max() < 0.004
    assert sketched.std(0)[0, 1] > 0.002


def test_its_spread_is_in_the_standard_errors() -> None:
    data = activations(minibatches=40)
    exact = result_of(data)
    runs = [result_of(data, sketch=16, seed=seed) for seed in range(20)]
    spread = torch.stack([run.matrix for run in runs]).std(0)[0, 1]
    reported = torch.stack([run.stderr for run in runs]).square().mean(0).sqrt()[0, 1]
    expected = (spread**2 + exact.stderr[0, 1] ** 2).sqrt()
    assert expected > 1.2 * exact.stderr[0, 1]
    assert 0.75 * expected < reported < 1.3 * expected


def test_the_same_seed_gives_the_same_matrix_and_another_one_does_not() -> None:
    data = activations(minibatches=4)
    assert torch.equal(result_of(data, sketch=64, seed=1).matrix, result_of(data, sketch=64, seed=1).matrix)
    assert not torch.equal(result_of(data, sketch=64, seed=1).matrix, result_of(data, sketch=64, seed=2).matrix)


def test_narrow_layers_stay_exact() -> None:
    data = activations(minibatches=4)
    assert torch.equal(result_of(data, sketch=WIDTH).matrix, result_of(data).matrix)


def test_minibatches_of_one_batch_have_signs_of_their_own() -> None:
    data = activations(minibatches=4, samples=32)
    halves = [{k: x[part] for k, x in layers.items()} for layers in data for part in (slice(16), slice(16, 32))]
    whole = result_of(data, sketch=64, minibatch=16, keep_minibatches=True)
    apart = result_of(halves, sketch=64, keep_minibatches=True)
    torch.testing.assert_close(whole.minibatch_hsic, apart.minibatch_hsic, rtol=1e-5, atol=0)


def test_samples_that_do_not_differ_are_degenerate_in_a_sketch_too() -> None:
    data = [{**layers, "same": torch.full((16, 5000), 0.37)} for layers in activations(minibatches=8)]
    result = result_of(data, sketch=64)
    assert list(result.degenerate) == ["same"]


def test_compare_passes_it_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
    loader = [torch.randn(16, 3, 16, 16) for _ in range(6)]
    exact = cka_hooks.compare(model, loader, progress=False)
    result = cka_hooks.compare(model, loader, sketch=256, seed=3, progress=False)
    assert result.settings["sketch"] == 256
    assert result.settings["seed"] == 3
    assert 0 < abs(result["0", "1"] - exact["0", "1"]) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sketch": 1}, "number of columns"),
        ({"sketch": 0.5}, "number of columns"),
        ({"sketch": 64, "kernel": "rbf"}, "linear"),
    ],
)
def test_a_sketch_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(cka_hooks.OptionError, match=message):
        cka_hooks.CKAAccumulator(**options)  # type: ignore[arg-type]
