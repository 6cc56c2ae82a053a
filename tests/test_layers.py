"""Names, globs, types and predicates to modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as vision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cka_hooks
from cka_hooks.names import PerLayer, glob_regex
from cka_hooks.recording.layers import ROOT, named_layers, select_layers

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
RESNET = vision.resnet18(weights=None)


def names(layers: Any, model: nn.Module = RESNET) -> list[str]:
    return [selection.name for selection in select_layers(model, layers)]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("conv1", ["conv1"]),
        ("*", ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]),
        ("layer1.*.conv?", [f"layer1.{block}.conv{i}" for block in "01" for i in "12"]),
        ("layer[13].0.bn1", ["layer1.0.bn1", "layer3.0.bn1"]),
        ("layer[!13].0.bn1", ["layer2.0.bn1", "layer4.0.bn1"]),
        ("**.downsample.0", [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]),
        (["fc", "conv1", "conv*"], ["conv1", "fc"]),
        (nn.Linear, ["fc"]),
        ((nn.Linear, nn.MaxPool2d), ["maxpool", "fc"]),
        (
            lambda name, module: name.endswith("conv1"),
            ["conv1", *(f"layer{i}.{block}.conv1" for i in range(1, 5) for block in range(2))],
        ),
        (lambda module: isinstance(module, nn.AdaptiveAvgPool2d), ["avgpool"]),
        (ROOT, [ROOT]),
    ],
)
def test_entries(entry: Any, expected: list[str]) -> None:
    assert names(entry) == expected


def test_all_modules_but_containers_by_default() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)])})
    assert names(None, model) == ["a.0"]
    assert set(names(None)) == {name or ROOT for name, _ in RESNET.named_modules()}


def test_an_exact_name_wins_over_a_glob() -> None:
    model = nn.Module()
    model.add_module("layer*", nn.Linear(2, 2))
    model.add_module("layer1", nn.Linear(2, 2))
    model.add_module("a:b", nn.Linear(2, 2))
    assert names("layer*", model) == ["layer*"]
    assert [(s.name, s.part) for s in select_layers(model, "a:b:0")] == [("a:b", "0")]


def test_calls_and_parts() -> None:
    (selection,) = select_layers(RESNET, "relu#2:input:0")
    assert (selection.name, selection.call, selection.part) == ("relu", 2, "input:0")
    assert selection.label(2) == "relu#2:input:0"
    assert selection.named
    assert not any(s.named for s in select_layers(RESNET, "layer*.*.relu#2"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("con1", "no layer matches 'con1': the closest names are 'conv1'"),
        ("layer1.0.con*.x", "no layer matches"),
        (nn.LSTM, "no module matches LSTM: the model has modules of the types AdaptiveAvgPool2d, BasicBlock"),
        (lambda name, module: False, "no module matches"),
        ([], "layers is empty"),
        (["conv1", "layer5"], "no layer matches 'layer5'"),
    ],
)
def test_nothing_matches(entry: Any, message: str) -> None:
    with pytest.raises(cka_hooks.LayerError, match=message):
        select_layers(RESNET, entry)


@pytest.mark.parametrize("entry", [int, [3], [None]])
def test_entries_of_another_type(entry: Any) -> None:
    with pytest.raises(cka_hooks.OptionError):
        select_layers(RESNET, entry)


@given(st.lists(st.text("abc1_", min_size=1, max_size=3), min_size=1, max_size=4))
def test_globs_stop_at_dots(parts: list[str]) -> None:
    name = ".".join(parts)
    assert glob_regex(name).fullmatch(name)
    assert glob_regex("**").fullmatch(name)
    assert glob_regex(".".join("*" for _ in parts)).fullmatch(name)
    assert not glob_regex(".".join("*" for _ in [*parts, ""])).fullmatch(name)
    assert bool(glob_regex("*").fullmatch(name)) == (len(parts) == 1)


def test_shared_and_recursive_modules() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    assert list(named_layers(model)) == ["0", "1", "1.0", "1.1", ROOT]
    assert names("*.*", model) == ["1.0", "1.1"]
    assert names(None, model) == ["0", "1", "1.1", ROOT]


def test_values_per_layer() -> None:
    values = PerLayer({"a.*": 1, "a.b": 2, "**": 3}, ["a.b", "a.c", "d"], "option")
    assert [values.of(name, 0) for name in ("a.b", "a.c", "d")] == [2, 1, 3]
    assert PerLayer({"a": 1}, ["a", "b"], "option").of("b", 0) == 0
    assert PerLayer(7, ["a"], "option").of("a.b.c", 0) == 7


@pytest.mark.parametrize("call", [0, 3])
def test_calls_that_do_not_happen_are_skipped(call: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    make: Callable[[], Any] = lambda: cka_hooks.compare(model, [x], layers=["0", f"1#{call}"], progress=False)  # noqa: E731
    if call == 0:
        with pytest.raises(cka_hooks.LayerError, match="no layer matches '1#0'"):
            make()
    else:
        assert make().skipped == {"1#3": "was called 1 time(s)"}


# What cannot be meant


def lazy(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(8, 3), *last, nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.parametrize("last", [nn.Identity, nn.LazyBatchNorm2d])
def test_lazy_modules_run_one_batch_first(last: type[nn.Module]) -> None:
    """Their class, parameters and buffers are others after the first forward pass."""
    model, images = lazy(last()), torch.randn(16, 3, 8, 8)
    for use in (
        lambda: cka_hooks.compare(model, [images], progress=False),
        lambda: cka_hooks.LayerRecorder(model).describe(images),
        lambda: cka_hooks.LayerRecorder(model, layers=[nn.Linear]),
    ):
        with pytest.raises(
            cka_hooks.ModelError, match=r"submodule '0' is a LazyConv2d, .*run one batch .*model\(batch\)"
        ):
            use()
    with torch.no_grad():
        model(images)
    assert cka_hooks.compare(model, [images], progress=False).layers == ("0", "1", "2", "3", "4")
    assert [selection.name for selection in select_layers(model, [nn.Linear, nn.Conv2d])] == ["0", "4"]


class Net(nn.Module):
    """Builds itself."""


def test_a_class_is_no_model() -> None:
    """It would be built with random weights, and these measured."""
    loader = [torch.randn(8, 4)]
    for wrong in (
        Net,
        {"net": Net},
        {"other": nn.Linear(4, 2), "net": Net},
        {"net": Net, "built": lambda: nn.ReLU()},
    ):
        with pytest.raises(cka_hooks.ModelError, match=r"found the class Net: pass an instance, Net\(\)"):
            cka_hooks.compare(wrong, loader, progress=False)  # type: ignore[arg-type]
    with pytest.raises(cka_hooks.ModelError, match="the class Net"):
        cka_hooks.LayerRecorder(Net)  # type: ignore[arg-type]


def test_a_state_dict_is_no_model() -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"Tensor: a state_dict .*model\.load_state_dict\(weights\)"):
        cka_hooks.compare(nn.Linear(4, 2).state_dict(), [torch.randn(8, 4)], progress=False)  # type: ignore[arg-type]


def test_a_module_itself_has_a_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    for wrong in (model[1][1], [model[1][1]], ["0", model[1][1]]):
        with pytest.raises(cka_hooks.OptionError, match=r"a module itself, of type Linear: pass its name, '1\.1'"):
            cka_hooks.LayerRecorder(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(cka_hooks.OptionError, match=r"of type Sequential: pass its name, '1'"):
        cka_hooks.LayerRecorder(model, model[1])  # type: ignore[arg-type]
    with pytest.raises(cka_hooks.OptionError, match="of type ReLU: it is not part of the model"):
        cka_hooks.LayerRecorder(model, nn.ReLU())  # type: ignore[arg-type]
