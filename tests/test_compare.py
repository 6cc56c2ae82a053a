"""What goes into `compare` and what comes out: loaders, several models, memory, files, warnings."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import SMALL_LAYERS, SmallNet, image_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cka_hooks
from cka_hooks import CKAResult, compare

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")


class Keywords(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.images = torch.cat(image_batches())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": torch.tensor(index % 3)}


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.arange(len(batch)) % 3) for batch in image_batches()]


class Unsized:
    """Can be iterated over and says nothing else."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(image_batches())


LOADERS: dict[str, Callable[[], Any]] = {
    "list of pairs": pairs,
    "list of lists": lambda: [list(pair) for pair in pairs()],
    "keywords": lambda: [{"images": batch} for batch in image_batches()],
    "keywords and labels": lambda: [{"images": batch, "labels": target} for batch, target in pairs()],
    "generator": lambda: (batch for batch in image_batches()),
    "without a length": Unsized,
    "DataLoader of tensors": lambda: DataLoader(torch.cat(image_batches()), 16),
    "DataLoader of pairs": lambda: DataLoader(TensorDataset(torch.cat(image_batches()), torch.arange(48) % 3), 16),
    "DataLoader of mappings": lambda: DataLoader(Keywords(), 16),
}


@pytest.mark.parametrize("form", LOADERS)
def test_forms_of_loaders(form: str, net: SmallNet, batches: list[Tensor]) -> None:
    result = compare(net, LOADERS[form](), progress=False)
    assert torch.equal(result.matrix, compare(net, batches, progress=False).matrix)
    assert (result.samples, result.minibatches) == (48, 3)


@pytest.mark.parametrize("form", ["list of pairs", "without a length", "DataLoader of pairs"])
def test_progress_is_on_stderr(form: str, net: SmallNet, capsys: pytest.CaptureFixture[str]) -> None:
    compare(net, LOADERS[form]())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "48" in shown.err
    assert "sample/s" in shown.err
    compare(net, LOADERS[form](), progress=False)
    assert capsys.readouterr().err == ""


# Layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, SMALL_LAYERS),
        ("conv1", ("conv1",)),
        (["fc", "conv1"], ("conv1", "fc")),
        ("conv*", ("conv1", "conv2")),
        ("relu", ("relu", "relu#2")),
        ("relu#2", ("relu#2",)),
        (nn.Conv2d, ("conv1", "conv2")),
        ([nn.BatchNorm2d, "fc"], ("bn1", "bn2", "fc")),
        (lambda module: isinstance(module, nn.ReLU), ("relu", "relu#2")),
        (lambda name, module: name.endswith("2"), ("conv2", "bn2")),
    ],
)
def test_layers(layers: Any, expected: tuple[str, ...], net: SmallNet, batches: list[Tensor]) -> None:
    assert compare(net, batches, layers=layers, progress=False).layers == expected


def test_layers_chosen_are_the_submatrix_of_all(
    net: SmallNet, batches: list[Tensor], check: Callable[..., CKAResult]
) -> None:
    whole = check(net, batches)
    some = compare(net, batches, layers=["bn1", "relu", "fc"], progress=False)
    for first in some.layers:
        for second in some.layers:
            assert some[first, second] == pytest.approx(whole[first, second], abs=1e-12)
    assert whole["bn1", "relu"] < 0.999
    assert whole["relu", "relu#2"] < 0.999


def test_what_never_runs_is_skipped_with_the_reason(net: SmallNet, batches: list[Tensor]) -> None:
    assert compare(net, batches, progress=False).skipped == {"unused": "did not run in the forward pass"}


def test_a_layer_that_is_equal_for_all_samples(net: SmallNet, batches: list[Tensor]) -> None:
    with torch.no_grad():
        net.bn1.weight.zero_()
    result = compare(net, batches, layers=["conv1", "bn1", "relu#1"], progress=False)
    assert set(result.degenerate) == {"bn1", "relu"}
    assert "do not differ" in result.degenerate["bn1"]
    assert result.matrix.isnan().tolist() == [[False, True, True], [True, True, True], [True, True, True]]


# Several models


@pytest.fixture
def two(net: SmallNet) -> dict[str, nn.Module]:
    return {"a": net, "b": SmallNet()}


def test_models_in_one_pass(two: dict[str, nn.Module], batches: list[Tensor]) -> None:
    result = compare(two, (batch for batch in batches), progress=False)
    assert result.layers == tuple(f"{model}/{layer}" for model in two for layer in SMALL_LAYERS)
    assert result.models == ("a", "b")
    recorded = [oracle.grams_of_model(model, batches) for model in two.values()]
    grams = [first + second for first, second in zip(recorded[0][1], recorded[1][1], strict=True)]
    matrix, _ = oracle.cka_of_grams(grams, np.concatenate([flags for _, _, flags in recorded]))
    np.testing.assert_allclose(result.matrix.numpy(), matrix, rtol=0, atol=1e-6)
    between = result.between("a", "b")
    assert between.matrix.shape == (8, 8)
    assert between.rows[0] == "a/conv1"
    assert between.columns[-1] == "b/fc"
    np.testing.assert_array_equal(between.matrix.numpy(), result.matrix[:8, 8:].numpy())
    assert set(result.skipped) == {"a/unused", "b/unused"}


def test_a_model_with_itself_is_1(net: SmallNet, batches: list[Tensor]) -> None:
    between = compare({"x": net, "y": net}, batches, progress=False).between("x", "y")
    torch.testing.assert_close(between.matrix.diagonal(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)


def test_layers_for_each_model(two: dict[str, nn.Module], batches: list[Tensor]) -> None:
    result = compare(two, batches, layers={"a": ["conv1", "fc"], "b": nn.BatchNorm2d}, progress=False)
    assert result.layers == ("a/conv1", "a/fc", "b/bn1", "b/bn2")
    with pytest.raises(cka_hooks.OptionError, match=r"'c'.*'a', 'b'"):
        compare(two, batches, layers={"c": ["conv1"]}, progress=False)


def test_a_forward_for_each_model(net: SmallNet, batches: list[Tensor]) -> None:
    views = {"plain": lambda model, batch: model(batch), "flipped": lambda model, batch: model(batch.flip(3))}
    result = compare({"plain": net, "flipped": net}, batches, forward=views, progress=False)
    assert result["plain/fc", "flipped/fc"] < 0.999
    assert result["plain/fc", "plain/fc"] == 1


# Invariances of a whole run


def test_any_order_of_minibatches(net: SmallNet, batches: list[Tensor]) -> None:
    there = compare(net, batches, progress=False)
    back = compare(net, batches[::-1], progress=False)
    torch.testing.assert_close(there.matrix, back.matrix, rtol=0, atol=1e-12)


def test_order_of_samples_in_a_minibatch(net: SmallNet, batches: list[Tensor]) -> None:
    shuffled = [batch[torch.randperm(len(batch))] for batch in batches]
    result = compare(net, shuffled, progress=False)
    torch.testing.assert_close(result.matrix, compare(net, batches, progress=False).matrix, rtol=0, atol=2e-6)


# Memory


class Watching(nn.Module):
    """Looks, before each layer, at what is alive of the layers before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(4))
        self.seen: list[int] = []
        self.alive: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x)
            activation = weakref.ref(out)
            pointer = out.untyped_storage().data_ptr()
            x = out.mean((2, 3), keepdim=True).expand(-1, -1, 32, 32)
            del out
            self.alive.append(activation() is not None or any(t.data_ptr() == pointer for t in tensors()))
            self.seen.append(live_bytes())
        return x


def tensors() -> list[Tensor]:
    # By type: isinstance() asks the object for its class, and torch.distributed has one that warns when it is asked.
    found = [it for it in gc.get_objects() if issubclass(type(it), Tensor)]
    # What other tests have left alive may have no memory of its own.
    return [
        it for it in found if it.layout is torch.strided and type(it) in (Tensor, nn.Parameter) and has_memory(it)
    ]


def has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() is not None
    except RuntimeError:
        return False


def live_bytes() -> int:
    """Bytes in the storages of all tensors that Python holds."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}.values())


@pytest.mark.parametrize("options", [{}, {"minibatch": 4}, {"kernel": "rbf"}, {"estimator": "biased"}], ids=str)
def test_nothing_of_an_activation_is_alive_after_its_hook(options: dict[str, Any]) -> None:
    model = Watching()
    batch = torch.randn(8, 3, 32, 32)
    gc.collect()
    gc.disable()
    try:
        compare(model, [batch], progress=False, **options)
    finally:
        gc.enable()
    assert model.alive == [False] * 4
    # An activation is 512 kB; what accumulates from layer to layer is Gram matrices of 8 x 8.
    assert max(np.diff(model.seen)) < 16 * 1024


def test_streamed_activations_are_copies(net: SmallNet, batches: list[Tensor]) -> None:
    _, expected = oracle.record(net, batches)
    streamed = list(cka_hooks.LayerRecorder(net).stream(batches))
    assert len(streamed) == 3
    for found, wanted in zip(streamed, expected, strict=True):
        assert list(found) == list(wanted)
        assert all(torch.equal(found[layer], wanted[layer]) for layer in wanted)
    assert bool((streamed[0]["bn1"] < 0).any())


def test_a_loop_of_ones_own_gives_what_compare_gives(net: SmallNet, batches: list[Tensor]) -> None:
    net.eval()
    cka = cka_hooks.CKAAccumulator()
    with cka_hooks.LayerRecorder(net, consumer=cka.observe), torch.no_grad():
        for batch in batches:
            net(batch)
            cka.step()
    assert torch.equal(cka.compute().matrix, compare(net, batches, progress=False).matrix)


# What is warned of, and what is kept


def labelled(order: Tensor) -> list[tuple[Tensor, Tensor]]:
    images = torch.cat(image_batches(8))
    return list(zip(images.split(16), (order % 4).split(16), strict=True))


def test_a_loader_in_order_of_classes_is_warned_of(net: SmallNet) -> None:
    with pytest.warns(cka_hooks.CKAWarning, match="one class.*[Ss]huffle"):
        compare(net, labelled(torch.arange(128) // 32), progress=False)


@pytest.mark.parametrize(
    "order",
    [torch.randperm(128, generator=torch.Generator().manual_seed(0)), torch.arange(128), torch.zeros(128).long()],
    ids=["shuffled", "round robin", "one class"],
)
def test_other_loaders_are_not(order: Tensor, net: SmallNet) -> None:
    # Warnings of the package are errors here.
    compare(net, labelled(order), progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": ["conv1", nn.BatchNorm2d], "kernel": "rbf", "bandwidth": 0.5, "estimator": "biased"},
        {"kernel": lambda x: x @ x.mT, "features": lambda x: x.flatten(1), "keep_minibatches": True, "minibatch": 8},
        {"features": {"conv*": "mean"}, "forward": lambda model, batch: model(batch), "max_samples": 40, "epochs": 2},
    ],
)
def test_a_run_through_a_file(options: dict[str, Any], net: SmallNet, batches: list[Tensor], tmp_path: Path) -> None:
    with torch.no_grad():
        net.bn2.weight.zero_()
    result = compare(net, batches, progress=False, **options)
    path = tmp_path / "cka.json"
    result.save(path)
    loaded = CKAResult.load(path)
    for name in ("matrix", "stderr"):
        assert getattr(loaded, name).numpy().tobytes() == getattr(result, name).numpy().tobytes()
    for name in ("rows", "columns", "samples", "minibatches", "degenerate", "skipped", "settings", "influence"):
        assert getattr(loaded, name) == getattr(result, name)
    document = json.loads(path.read_text())
    assert document["settings"]["estimator"] == options.get("estimator", "unbiased")
    assert not any(isinstance(v, float) and math.isnan(v) for row in document["matrix"] for v in row)
    result.plot(tmp_path / "cka.png")
    assert (tmp_path / "cka.png").stat().st_size > 1000


def test_settings_say_what_was_run(net: SmallNet, batches: list[Tensor]) -> None:
    settings = compare(net, batches, layers=["conv1", nn.Linear], progress=False).settings
    assert settings["models"] == {"model": "SmallNet"}
    assert settings["layers"][0] == "conv1"
    assert "Linear" in settings["layers"][1]
    assert settings["torch"] == torch.__version__
    assert settings["shapes"] == {"conv1": [8, 8, 8], "fc": [5]}
    assert {"kernel", "estimator", "minibatch", "features", "tolerance", "max_samples", "epochs"} <= set(settings)
