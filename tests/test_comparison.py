"""`Comparison` in a loop of one's own, and what `compare` refuses, keeps or says of a run."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import cka_hooks
from cka_hooks import CheckpointError, CKAWarning, Comparison, OptionError
from cka_hooks.run import checkpoint
from cka_hooks.run.checkpoint import locked, released
from cka_hooks.run.identity import of_model, of_option

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def batches(count: int = 6, samples: int = 12) -> list[Tensor]:
    return list(torch.randn(count, samples, 10, generator=torch.Generator().manual_seed(3)))


def same(one: cka_hooks.CKAResult, other: cka_hooks.CKAResult) -> None:
    assert one.rows == other.rows
    assert torch.equal(one.matrix, other.matrix)
    assert torch.equal(one.stderr, other.stderr)
    assert (one.samples, one.minibatches, one.skipped, one.models) == (
        other.samples,
        other.minibatches,
        other.skipped,
        other.models,
    )


def test_a_loop_of_ones_own_gives_what_compare_gives() -> None:
    models = {"a": net(0), "b": net(1)}
    whole = cka_hooks.compare(models, batches(), layers=["0", "2", "3"], progress=False)
    before = copy.deepcopy(models["a"].state_dict())
    state = torch.get_rng_state()
    with Comparison(models, layers=["0", "2", "3"]) as comparison:
        counts = [comparison.update(batch) for batch in batches()]
        partial = comparison.compute()
    assert counts == [12] * 6
    result = comparison.compute()
    same(result, whole)
    same(partial, whole)
    for name in ("models", "layers", "features", "minibatch", "shapes", "torch"):
        assert result.settings[name] == whole.settings[name]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in models["a"].state_dict().items())
    assert models["a"].training


def test_a_loop_with_recorder_and_accumulator_says_what_was_skipped() -> None:
    model = nn.ModuleDict({"used": net().eval(), "unused": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign, assignment]
    cka = cka_hooks.CKAAccumulator()
    with torch.no_grad(), cka_hooks.LayerRecorder(model, consumer=cka.observe, batch_dim=0):
        for batch in batches():
            model(batch)
            cka.step()
    result = cka.compute()
    assert result.skipped == {"unused": "did not run in the forward pass"}
    assert "unused" not in result.layers


def test_it_can_be_saved_restored_and_reset() -> None:
    whole = cka_hooks.compare(net(), batches(), progress=False)
    with Comparison(net()) as first:
        for batch in batches()[:2]:
            first.update(batch)
    second = Comparison(net())
    second.load_state_dict(first.state_dict())
    with second:
        for batch in batches()[2:]:
            second.update(batch)
    same(second.compute(), whole)
    second.reset()
    with second:
        for batch in batches():
            second.update(batch)
    same(second.compute(), whole)
    with pytest.raises(OptionError, match="estimator is 'biased' here and 'unbiased' there"):
        Comparison(net(), estimator="biased").load_state_dict(first.state_dict())


def test_it_is_used_in_its_block() -> None:
    with pytest.raises(OptionError, match="with Comparison"):
        Comparison(net()).update(batches()[0])


def test_a_batch_that_breaks_off_leaves_nothing_behind() -> None:
    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch)
        if len(batch) == 7:
            raise RuntimeError("out of luck")
        return out

    with Comparison(net(), forward=failing) as comparison:
        for batch in batches()[:3]:
            comparison.update(batch)
        with pytest.raises(RuntimeError, match="out of luck"):
            comparison.update(torch.randn(7, 10))
        for batch in batches()[3:]:
            comparison.update(batch)
    same(comparison.compute(), cka_hooks.compare(net(), batches(), forward=failing, progress=False))


@pytest.mark.parametrize("name", [0, "", None, ("a", 1)])
def test_names_of_models_are_text(name: Any) -> None:
    calls: list[int] = []
    with pytest.raises(OptionError, match="the name of a model is"):
        cka_hooks.compare({name: net(), "b": net()}, (calls.append(1) for _ in range(3)), progress=False)
    assert not calls


@pytest.mark.parametrize(
    "options",
    [
        {"minibatch": 3},
        {"minibatch": "32"},
        {"minibatch": 8.0},
        {"max_samples": float("inf")},
        {"epochs": True},
        {"tolerance": float("inf")},
        {"tolerance": float("nan")},
        {"tolerance": "0.01"},
        {"tolerance": torch.ones(2)},
        {"seed": -1},
        {"seed": 0.5},
        {"estimator": "unbaised"},
    ],
    ids=str,
)
def test_options_are_refused_before_the_first_batch(options: dict[str, Any]) -> None:
    def loader() -> Any:
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(OptionError, match=next(iter(options))):
        cka_hooks.compare(net(), loader(), progress=False, **options)


def test_numbers_of_any_kind_are_converted() -> None:
    numpy = pytest.importorskip("numpy")
    options: dict[str, Any] = {"minibatch": numpy.int64(6), "max_samples": torch.tensor(48)}
    options |= {"tolerance": numpy.float32(1e-9), "seed": numpy.int8(2)}
    result = cka_hooks.compare(net(), batches(), progress=False, **options)
    assert result.settings["minibatch"] == 6
    assert result.settings["max_samples"] == 48
    assert type(result.settings["tolerance"]) is float
    assert result.settings["tolerance_reached"] is False


def test_large_batches_are_split_evenly_where_that_changes_nothing_but_the_spread() -> None:
    wide = list(torch.randn(3, 300, 10, generator=torch.Generator().manual_seed(0)))
    result = cka_hooks.compare(net(), wide, progress=False)
    assert result.minibatches == 9
    assert result.samples == 900
    assert result.settings["minibatch"] == "at most 128"
    parts = [part for batch in wide for part in batch.split(100)]
    by_hand = cka_hooks.compare(net(), parts, progress=False)
    torch.testing.assert_close(result.matrix, by_hand.matrix, rtol=0, atol=1e-6)
    for options in ({"estimator": "biased"}, {"kernel": "rbf"}, {"kernel": lambda x: x @ x.mT}):
        assert cka_hooks.compare(net(), wide, progress=False, **options).minibatches == 3
    assert cka_hooks.compare(net(), wide, kernel="rbf", sigma=3.0, progress=False).minibatches == 9
    assert cka_hooks.compare(net(), wide, minibatch=300, progress=False).minibatches == 3


class All(IterableDataset[Tensor]):
    """Each worker yields everything."""

    def __iter__(self) -> Any:
        return iter(torch.randn(48, 10, generator=torch.Generator().manual_seed(0)))


def test_a_batch_that_comes_twice_is_a_warning() -> None:
    loader = DataLoader(All(), batch_size=12, num_workers=2)
    with pytest.warns(CKAWarning, match=r"a batch came twice .*get_worker_info"):
        cka_hooks.compare(net(), loader, progress=False)
    cka_hooks.compare(net(), batches(), epochs=2, progress=False)


def test_images_with_equal_borders_are_no_batch_that_comes_twice(recwarn: pytest.WarningsRecorder) -> None:
    images = torch.rand(2, 8, 3, 64, 64)
    images[..., 0] = 0
    cka_hooks.compare(nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU()), list(images), progress=False)
    assert not [it for it in recwarn if "came twice" in str(it.message)]


# What may go on from a checkpoint


def test_a_model_is_known_by_the_kinds_of_its_modules() -> None:
    relu, tanh = net(), net()
    tanh[2] = nn.Tanh()
    assert of_model(relu) == of_model(net())
    assert of_model(relu) != of_model(tanh)
    slope = net()
    slope[2] = nn.LeakyReLU(0.3)
    other = net()
    other[2] = nn.LeakyReLU(0.1)
    assert of_model(slope) != of_model(other)


def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


def test_a_function_is_known_by_what_it_does() -> None:
    def by(factor: float) -> Any:
        return lambda x: x * factor

    assert of_option(by(2.0)) == of_option(by(2.0))
    assert of_option(by(2.0)) != of_option(by(3.0))
    assert of_option(lambda x: x + 1) != of_option(lambda x: x + 2)
    assert of_option(lambda x: x.sin()) != of_option(lambda x: x.cos())
    assert of_option(functools.partial(scaled, by=2)) != of_option(functools.partial(scaled, by=3))
    assert of_option({"a": ["conv1", nn.Linear]}) == {"a": ["conv1", "torch.nn.modules.linear.Linear"]}


@pytest.mark.parametrize("option", ["forward", "features", "kernel"])
def test_another_function_is_not_resumed(tmp_path: Path, option: str) -> None:
    first = {"forward": lambda m, x: m(x), "features": lambda x: x * 1, "kernel": lambda x: x @ x.mT}[option]
    second = {"forward": lambda m, x: m(-x), "features": lambda x: x * x, "kernel": lambda x: (x @ x.mT) ** 2}[option]
    path = tmp_path / "run.ckpt"
    cka_hooks.compare(net(), batches(), checkpoint=path, progress=False, **{option: first})
    cka_hooks.compare(net(), batches(), checkpoint=path, progress=False, **{option: first})
    with pytest.raises(CheckpointError, match=f"another run: {option} is"):
        cka_hooks.compare(net(), batches(), checkpoint=path, progress=False, **{option: second})


def test_two_runs_on_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    lock = locked(path)
    with pytest.raises(CheckpointError, match=r"in use by process \d+ on .*: wait for that run"):
        cka_hooks.compare(net(), batches(), checkpoint=path, progress=False)
    released(lock)
    cka_hooks.compare(net(), batches(), checkpoint=path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def test_classes_of_any_kind_of_integer_can_be_kept(tmp_path: Path) -> None:
    targets = [torch.arange(12) % 2 == 0 for _ in range(6)]
    loader = list(zip(batches(), targets, strict=True))
    path = tmp_path / "run.ckpt"
    first = cka_hooks.compare(net(), loader, checkpoint=path, progress=False)
    same(cka_hooks.compare(net(), loader, checkpoint=path, progress=False), first)


def test_identifiers_as_targets_do_not_grow_without_bound() -> None:
    x, identifiers = torch.randn(24_000, 10), torch.arange(24_000)
    loader = DataLoader(TensorDataset(x, identifiers), batch_size=6000)
    with Comparison(net()) as comparison:
        for batch in loader:
            comparison.update(batch)
    assert len(comparison.state.classes) < 17_000
    comparison.compute()


def test_a_random_state_that_would_read_beyond_its_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        failing.calls += 1  # type: ignore[attr-defined]
        if failing.calls == 4:  # type: ignore[attr-defined]
            raise RuntimeError("stop")
        return model(batch)

    failing.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="stop"):
        cka_hooks.compare(net(), batches(), forward=failing, checkpoint=path, progress=False)
    content = checkpoint.read(path)
    content["place"]["start"]["numpy"][2] = 2**30
    checkpoint.write(path, content)
    with pytest.raises(CheckpointError, match="other random generators"):
        cka_hooks.compare(net(), batches(), forward=failing, checkpoint=path, progress=False)


# P-values


def test_pvalues_tell_related_layers_from_unrelated_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    cka = cka_hooks.CKAAccumulator()
    for _ in range(20):
        x = torch.randn(16, 6, generator=generator)
        noise = torch.randn(16, 6, generator=generator)
        cka.update({"x": x, "like x": x + noise, "other": torch.randn(16, 6, generator=generator)})
    result = cka.compute()
    p = result.pvalue()
    assert p[0, 1] < 1e-10
    assert p[0, 2] > 0.01
    torch.testing.assert_close(p, p.T)
    assert 0.5 < float(result.null_stderr[0, 2] / result.stderr[0, 2]) < 2


def test_there_are_no_pvalues_of_biased_estimates_and_of_several_passes() -> None:
    for options in ({"estimator": "biased"}, {"epochs": 2}):
        result = cka_hooks.compare(net(), batches(), progress=False, **options)
        assert result.null_unknown is not None
        assert bool(result.null_stderr.isnan().all())


def test_pvalues_against_permuted_samples() -> None:
    """The share of permuted runs with a larger value, for a pair that is weakly related."""
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)) for _ in range(6)]
    pairs = [(x, y + 0.5 * x) for x, y in pairs]

    def value(permuted: bool) -> cka_hooks.CKAResult:
        cka = cka_hooks.CKAAccumulator()
        for x, y in pairs:
            order = torch.randperm(12, generator=generator) if permuted else torch.arange(12)
            cka.update({"x": x, "y": y[order]})
        return cka.compute()

    result = value(permuted=False)
    rounds = 150
    above = sum(value(permuted=True)["x", "y"] >= result["x", "y"] for _ in range(rounds)) / rounds
    p = float(result.pvalue()[0, 1])
    assert 0.02 < p < 0.6
    assert above == pytest.approx(p, abs=4 * (p * (1 - p) / rounds) ** 0.5 + 2 / rounds)
