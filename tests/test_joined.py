"""Small batches, joined to minibatches of the size that was asked for; refused early where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from broken_off import Forward, Stop
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks import Comparison, OptionError, TooFewSamplesError

pytestmark = pytest.mark.filterwarnings(
    "ignore:one sample decides", "ignore:.* left out", "ignore:a batch came twice"
)

LAYERS = ["0", "2"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()


def images(count: int = 50) -> list[Tensor]:
    """Of different sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(6, 12, (count, 2), generator=generator).tolist()
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def alone(count: int = 50) -> list[Tensor]:
    return [image[None] for image in images(count)]


def pooled(samples: list[Tensor], size: int) -> Tensor:
    """The matrix from minibatches of `size` samples, each image run alone, in float64."""
    model = net().double()
    with torch.no_grad():
        first = [model[0](image.double()[None]) for image in samples]
        layers = [torch.cat([x.mean((2, 3)) for x in each]) for each in (first, [model[2](x.relu()) for x in first])]
    grams = [
        [oracle.linear_gram(oracle.flatten(layer[low : low + size])) for layer in layers]
        for low in range(0, len(samples), size)
        if len(samples) - low >= 4
    ]
    return torch.from_numpy(oracle.cka_minibatch(grams))


def compare(batches: Any, **options: Any) -> cka_hooks.CKAResult:
    given = {"layers": LAYERS, "features": "mean", "join_batches": 16, "progress": False, **options}
    return cka_hooks.compare(net(), batches, **given)


@pytest.mark.parametrize(("count", "left_out"), [(48, 0), (50, 2), (53, 0)])
def test_images_of_different_sizes_one_at_a_time(count: int, left_out: int) -> None:
    result = compare(alone(count))
    torch.testing.assert_close(result.matrix, pooled(images(count), 16), rtol=0, atol=1e-6)
    assert result.samples == count - left_out
    assert result.minibatches == -(-result.samples // 16)
    assert (result.settings["join_batches"], result.settings["minibatch"]) == (16, 16)


@pytest.mark.parametrize("sizes", [[3] * 20, [1, 40, 2, 17], [60], [16, 16, 16, 12]])
def test_batches_of_any_size_are_cut_at_the_same_places(sizes: list[int]) -> None:
    x = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    result = compare(list(x.split(sizes)))
    torch.testing.assert_close(result.matrix, pooled(list(x), 16), rtol=0, atol=1e-6)


def test_joined_and_split_again() -> None:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    result = compare(list(x.split(3)), join_batches=32, minibatch=8)
    torch.testing.assert_close(result.matrix, pooled(list(x), 8), rtol=0, atol=1e-6)
    large = compare(list(x.repeat(4, 1, 1, 1).split(3)), join_batches=250)
    assert large.minibatches == 2


@pytest.mark.parametrize("epochs", [1, 2])
def test_passes_and_a_bound(epochs: int) -> None:
    result = compare(alone(), epochs=epochs, max_samples=40)
    torch.testing.assert_close(result.matrix, pooled(images()[:40], 16), rtol=0, atol=1e-6)
    assert (result.samples, result.passes, result.minibatches) == (40, epochs, 3 * epochs)


def test_together_with_precomputed_features_and_models_in_turn() -> None:
    array = torch.randn(50, 7, generator=torch.Generator().manual_seed(4)).numpy()
    whole = cka_hooks.compare(
        {"a": net(), "V4": array}, alone(), layers=LAYERS, features="mean", join_batches=16, progress=False
    )
    turn = cka_hooks.compare(
        {"a": net, "V4": array}, alone(), layers=LAYERS, features="mean", join_batches=16, epochs=2, progress=False
    )
    assert turn.layers == whole.layers == ("a/0", "a/2", "V4")
    torch.testing.assert_close(turn.matrix, whole.matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stops", [(3, 20), (17, 17, 17), (49,)])
def test_resumed_where_samples_wait(tmp_path: Path, stops: tuple[int, ...]) -> None:
    def run(path: Path | None, stop_at: int | None = None) -> cka_hooks.CKAResult:
        return compare(alone(), checkpoint=path, forward=Always(stop_at))

    for stop_at in stops:
        with pytest.raises(Stop):
            run(tmp_path / "run.ckpt", stop_at)
    ours, whole = run(tmp_path / "run.ckpt"), run(None)
    assert torch.equal(ours.matrix, whole.matrix)
    assert (ours.samples, ours.minibatches, ours.influence) == (whole.samples, whole.minibatches, whole.influence)


class Always(Forward):
    """Counts batches of one sample, too."""

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            raise self.error
        return module(batch)


def test_a_loop_of_ones_own() -> None:
    options: dict[str, Any] = {"layers": LAYERS, "features": "mean", "join_batches": 16}
    with Comparison(net(), **options) as comparison:
        counts = [comparison.update(batch) for batch in alone()[:30]]
        early = comparison.compute()
        assert torch.equal(comparison.compute().matrix, early.matrix)
        torch.testing.assert_close(early.matrix, pooled(images()[:30], 16), rtol=0, atol=1e-6)
    assert counts == [0] * 15 + [16] + [0] * 14
    other = Comparison(net(), **options)
    other.load_state_dict(comparison.state_dict())
    with other:
        for batch in alone()[30:]:
            other.update(batch)
    torch.testing.assert_close(other.compute().matrix, pooled(images(), 16), rtol=0, atol=1e-6)
    other.reset()
    with pytest.raises(TooFewSamplesError):
        other.compute()


@pytest.mark.parametrize(
    "forge",
    [
        lambda state: {**state, "counted": None},
        lambda state: {**state, "counted": [1]},
        lambda state: {**state, "counted": [None, 0]},
        lambda state: {**state, "counted": [0, -1]},
        lambda state: {**state, "waiting": 1},
        lambda state: {**state, "waiting": ["0"]},
        lambda state: {**state, "waiting": [{"0": None}]},
        lambda state: {**state, "waiting": [{0: torch.zeros(3, 6)}]},
        lambda state: {**state, "waiting": [{"0": torch.zeros(3, 6, dtype=torch.int)}]},
        lambda state: {**state, "waiting": [{"0": torch.zeros(3, 6), "2": torch.zeros(2, 5)}]},
        lambda state: {**state, "waiting": [{"0": torch.zeros(3, 6)}, {"0": torch.zeros(3, 7)}]},
        lambda state: {**state, "options": {**state["options"], "seed": torch.zeros(2)}},
        lambda state: {**state, "options": None},
        lambda state: {**state, "state": {**state["state"], "seen": {"0": "x"}}},
        lambda state: {**state, "state": {**state["state"], "sketch": 1}},
        lambda state: {key: item for key, item in state.items() if key != "state"},
        lambda state: [*state],
        lambda _: None,
    ],
)
def test_a_state_that_is_none_is_refused(forge: Any) -> None:
    options: dict[str, Any] = {"layers": LAYERS, "features": "mean", "join_batches": 16}
    with Comparison(net(), **options) as comparison:
        for batch in alone()[:20]:
            comparison.update(batch)
    with pytest.raises(OptionError):
        Comparison(net(), **options).load_state_dict(forge(comparison.state_dict()))


def test_a_batch_that_breaks_off_leaves_what_waits() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Any:
        out = model(batch)
        if len(batch) == 2:
            raise RuntimeError("out of luck")
        return out

    with Comparison(net(), layers=LAYERS, features="mean", join_batches=16, forward=forward) as comparison:
        for batch in alone(20):
            comparison.update(batch)
            with pytest.raises(RuntimeError, match="out of luck"):
                comparison.update(torch.randn(2, 3, 9, 9))
    torch.testing.assert_close(comparison.compute().matrix, pooled(images(20), 16), rtol=0, atol=1e-6)


def test_features_that_do_not_join() -> None:
    with pytest.raises(OptionError, match="average them over positions, features='mean'"):
        compare(alone(), features="flatten")
    with pytest.raises(OptionError, match="join_batches=3"):
        compare(alone(), join_batches=3)


# Refused early


class Listed:
    """A loader that does not say how large its batches are."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)


@pytest.mark.parametrize("kind", ["DataLoader", "list", "without a size", "generator"])
def test_only_small_batches_are_refused_at_once(kind: str) -> None:
    x = torch.randn(250, 3, 8, 8)
    loader: Any = {
        "DataLoader": DataLoader(x, batch_size=1),
        "list": list(x.split(1)),
        "without a size": Listed(list(x.split(3))),
        "generator": iter(list(x.split(2))),
    }[kind]
    calls = Always()
    with pytest.raises(TooFewSamplesError, match=r"join_batches=32 and features='mean'"):
        compare(loader, join_batches=None, forward=calls)
    # The first batch is looked at more than once, to find out where its samples are.
    assert calls.calls <= (8 if kind in ("DataLoader", "list") else 16)


def test_some_small_batches_are_left_out_as_ever() -> None:
    x = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for batches in (list(x.split([1, 2, 40, 17])), Listed(list(x.split([1, 2, 40, 17])))):
        assert compare(batches, join_batches=None).samples == 57
