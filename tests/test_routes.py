"""The short way of an activation, hook -> route -> product: taken where it may be, and never to another number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import oracle
import pytest
import torch
from test_features import text
from test_models import bert
from torch import Tensor, nn

import cka_hooks
from cka_hooks.features import memory_order
from cka_hooks.recording.routes import slots_of

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")


class Products:
    """A consumer with a product for each layer; keeps what came by which way."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Tensor]] = []
        self.slots: list[str] = []

    def __call__(self, layer: str, activation: Tensor) -> None:
        raise AssertionError("there is a product for every layer")

    def slot(self, layer: str) -> Callable[[Tensor], None]:
        self.slots.append(layer)
        return lambda rows: self.rows.append((layer, rows))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def run(model: nn.Module, inputs: Iterable[Any], **options: Any) -> tuple[Products, cka_hooks.LayerRecorder]:
    products = Products()
    recorder = cka_hooks.LayerRecorder(model, consumer=products, **options)
    with recorder, torch.no_grad():
        for x in inputs:
            model(x)
    return products, recorder


def images(*sizes: int, n: int = 6) -> list[Tensor]:
    return [torch.randn(n, 5, size, size + 1) for size in sizes]


# What a module returns of (n, 5, H, W), and the dimension that has its samples.
LAID_OUT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "contiguous": (lambda x: x, 0),
    "channels last": (lambda x: x.contiguous(memory_format=torch.channels_last), 0),
    "a row of each": (lambda x: x.flatten(1), 0),
    "one number of each": (lambda x: x.mean((1, 2, 3)), 0),
    "sequence first": (lambda x: x.flatten(2).permute(2, 0, 1).contiguous(), 1),
    "sequence first, a view": (lambda x: x.flatten(2).permute(2, 0, 1), 1),
    "heads in front": (lambda x: x.permute(0, 2, 1, 3), 0),
    "samples last": (lambda x: x.flatten(1).T, 1),
    "every second column": (lambda x: x[..., ::2], 0),
    "the first token": (lambda x: x.flatten(2)[:, :, 0], 0),
    "expanded": (lambda x: x[:, :, :, :1].expand(-1, -1, -1, 4), 0),
    "five dimensions": (lambda x: x[:, :, None].contiguous(memory_format=torch.channels_last_3d), 0),
    "nothing of each": (lambda x: x[:, :0], 0),
}


@pytest.mark.parametrize("how", LAID_OUT)
def test_rows_are_those_of_memory_order(how: str) -> None:
    """Also where sizes change from batch to batch, and where a size of 1 leaves the order of strides open."""
    function, axis = LAID_OUT[how]
    inputs = images(4, 4, 3, 7, 1, 5)
    products, recorder = run(Apply(function), inputs, batch_dim=axis, layers="(model)")
    assert len(products.rows) == len(inputs)
    for x, (_, rows) in zip(inputs, products.rows, strict=True):
        expected = memory_order(function(x).movedim(axis, 0))
        assert rows.shape[0] == 6
        assert torch.equal(rows.flatten(1).sort(1).values, expected.flatten(1).sort(1).values)
        # One order of features for all samples, or Gram matrices would differ.
        torch.testing.assert_close(rows.flatten(1) @ rows.flatten(1).T, expected.flatten(1) @ expected.flatten(1).T)
    assert not recorder.skipped


def test_a_steady_batch_asks_for_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first pass nothing is looked up: the long way is closed, and all sizes may change."""
    model = nn.Sequential(nn.Conv2d(5, 4, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    products = Products()
    recorder = cka_hooks.LayerRecorder(model, consumer=products)
    with recorder, torch.no_grad():
        model(images(4)[0])

        def refused(*args: object) -> None:
            raise AssertionError("the long way")

        monkeypatch.setattr("cka_hooks.recording.dimensions.SampleDimension.of", refused)
        monkeypatch.setattr("cka_hooks.names.PerLayer.of", refused)
        for x in (*images(3, 8), *images(5, n=9)):
            model(x)
    assert products.slots == ["0", "1", "2", "3"]
    assert [len(rows) for _, rows in products.rows] == [6] * 12 + [9] * 4


KEYS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "dtype": (lambda x: x, lambda x: x.double()),
    "rank": (lambda x: x, lambda x: x.flatten(1)),
    "order of strides": (lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "a tuple": (lambda x: x, lambda x: (x, x * 2)),
    "nested tuples": (lambda x: x, lambda x: ([x], x * 2)),
    "a mapping": (lambda x: (x,), lambda x: {"first": x, "second": x * 2}),
    "a parameter": (lambda x: x, lambda x: nn.Parameter(x)),
    "with a gradient": (lambda x: x, lambda x: x.clone().requires_grad_()),
}


@pytest.mark.parametrize("what", KEYS)
def test_what_changes_between_batches_goes_the_long_way_and_is_right(what: str) -> None:
    first, other = KEYS[what]
    functions = iter([first, other, first, other, other])
    model = Apply(lambda x: next(functions)(x))
    inputs = images(4, 4, 3, 5, 6)
    # Named: a probe would call the functions, too.
    products, recorder = run(model, inputs, layers="(model)", batch_dim=0)
    for x, (_, rows) in zip(inputs, products.rows, strict=True):
        assert torch.equal(rows.flatten(1).sort(1).values, x.flatten(1).to(rows.dtype).sort(1).values)
        assert not rows.requires_grad
    assert not recorder.skipped


NOT_ACTIVATIONS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.flatten(1).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "integers": lambda x: x.long(),
    "other samples": lambda x: x[:3],
    "nothing": lambda x: None,
    "an empty tuple": lambda x: (),
    "a packed sequence": lambda x: nn.utils.rnn.pack_sequence(list(x.flatten(2))),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR")
@pytest.mark.parametrize("what", NOT_ACTIVATIONS)
def test_a_route_takes_nothing_else(what: str) -> None:
    functions = iter([lambda x: x, NOT_ACTIVATIONS[what], lambda x: x])
    model = nn.Sequential(nn.Identity(), Apply(lambda x: next(functions)(x)))
    products, recorder = Products(), None
    recorder = cka_hooks.LayerRecorder(model, consumer=products, batch_dim=0)
    with recorder, torch.no_grad():
        for i, x in enumerate(images(4, 4, 4)):
            model(x)
            assert ("1" in recorder.skipped) == (i == 1), "left out with a reason, and no longer than that"
    assert [layer for layer, _ in products.rows] == ["0", "1", "0", "0", "1"]


def test_a_part_has_a_route() -> None:
    model = nn.Sequential(Apply(lambda x: {"a": x, "b": (x * 2, x * 3)}), Apply(lambda found: found["a"]))
    layers = ["0:b:1", "0", "1:input:0:a", "1"]
    products, _ = run(model, images(4, 4, 3), layers=layers)
    assert products.slots == ["0:b:1", "0", "1:input:0:a", "1"]
    for x, i in zip(images(4, 4, 3), range(0, 12, 4), strict=True):
        got = dict(products.rows[i : i + 4])
        assert got["0"].shape == got["0:b:1"].shape == (6, 1, x[0].numel())
        torch.testing.assert_close(got["0:b:1"], got["0"] * 3)
        torch.testing.assert_close(got["1:input:0:a"], got["1"])


def test_every_call_of_a_module_has_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.relu(x).flatten(1) - 1)

    products, _ = run(Twice(), images(4, 3))
    assert [layer for layer, _ in products.rows] == ["relu", "relu#2"] * 2
    assert products.slots == ["relu", "relu#2"]


def test_a_module_is_a_layer_where_nothing_in_it_ran() -> None:
    """In one pass a block works by its parts, in the next one alone, then by its parts again."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.alone = False

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.alone else self.fc(x)

    model = nn.Sequential(Block())
    products = Products()
    with cka_hooks.LayerRecorder(model, consumer=products, batch_dim=0), torch.no_grad():
        for alone in (False, False, True, True, False):
            model[0].alone = alone
            model(torch.randn(6, 4))
    assert [layer for layer, _ in products.rows] == ["0.fc", "0.fc", "0", "0", "0.fc"]


def test_text_whose_length_changes_stays_on_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask that has zeros, too, once the warning that is due has come."""
    model = bert().eval()
    products = Products()
    recorder = cka_hooks.LayerRecorder(model, consumer=products, layers=["**.output.dense", "classifier"])
    with recorder, torch.no_grad():
        with pytest.warns(cka_hooks.CKAWarning, match="attention mask has zeros"):
            model(**text(12))
        monkeypatch.setattr("cka_hooks.recording.dimensions.SampleDimension.of", None)
        for length in (11, 15, 13):
            model(**text(length))
    assert len(products.rows) == 4 * len(products.slots)


@pytest.mark.parametrize("features", ["mean", "last", lambda x: x.flatten(1)[:, :7]])
def test_reduced_activations_reach_the_product(features: Any) -> None:
    model = bert().eval()
    kept: dict[str, Tensor] = {}
    products = Products()
    batch = text(12)
    for consumer in (products, lambda layer, x: kept.update({layer: x})):
        with cka_hooks.LayerRecorder(model, consumer=consumer, features=features), torch.no_grad():
            model(**batch)
            model(**batch)
    half = len(products.rows) // 2
    assert [layer for layer, _ in products.rows[:half]] == list(kept)
    for passes in (products.rows[:half], products.rows[half:]):
        for layer, rows in passes:
            assert torch.equal(rows.flatten(1), kept[layer])


# Who has products


def test_slots_belong_to_the_object_whose_method_is_the_consumer() -> None:
    class Silent(cka_hooks.CKAAccumulator):
        pass

    class Logged(cka_hooks.CKAAccumulator):
        def observe(self, layer: str, activation: Tensor) -> None:
            super().observe(layer, activation)

    class Unrelated(list):
        def slot(self, layer: str) -> None:
            raise AssertionError

    assert slots_of(Silent().observe) is not None
    assert slots_of(Logged().observe) is None, "the override would not be called"
    assert slots_of(Unrelated().append) is None  # type: ignore[arg-type]
    assert slots_of(Products()) is not None
    for plain in (None, print, lambda layer, activation: None, {}.update):
        assert slots_of(plain) is None  # type: ignore[arg-type]
    assert cka_hooks.CKAAccumulator(features="mean").slot("layer") is None


def test_an_override_of_observe_is_called() -> None:
    seen = []

    class Logged(cka_hooks.CKAAccumulator):
        def observe(self, layer: str, activation: Tensor) -> None:
            seen.append((layer, tuple(activation.shape)))
            super().observe(layer, activation)

    model, cka = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), Logged()
    with cka_hooks.LayerRecorder(model, consumer=cka.observe), torch.no_grad():
        for _ in range(2):
            model(torch.randn(6, 4))
            cka.step()
    assert seen == [("0", (6, 3)), ("1", (6, 3))] * 2


def test_another_consumer_gets_what_comes_after_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    first, second, plain = Products(), Products(), []
    recorder = cka_hooks.LayerRecorder(model, consumer=first)
    x = torch.randn(6, 4)
    with recorder, torch.no_grad():
        model(x)
        (streamed,) = recorder.stream([x])
        model(x)
        recorder.consumer = second
        model(x)
        recorder.consumer = lambda layer, activation: plain.append(layer)
        model(x)
    assert list(streamed) == ["0", "1"]
    assert (len(first.rows), len(second.rows), plain) == (4, 2, ["0", "1"])


def mean(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2) if x.ndim > 2 else x


@pytest.mark.parametrize(
    "options", [{}, {"minibatch": 8}, {"kernel": "rbf"}, {"features": mean}, {"estimator": "biased"}]
)
def test_the_accumulator_by_routes_is_the_oracles(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    inputs = [torch.randn(16, 5, size, size) for size in (4, 5, 6, 4)]
    cka = cka_hooks.CKAAccumulator(**options)
    with cka_hooks.LayerRecorder(model.eval(), consumer=cka.observe), torch.no_grad():
        for x in inputs:
            model(x)
            cka.step()
    if "features" in options:
        options = {"features": lambda x: oracle.flatten(mean(x.double()))}
    labels, matrix, _ = oracle.cka_of_model(model, inputs, **options)
    result = cka.compute()
    assert list(result.layers) == labels
    torch.testing.assert_close(result.matrix, torch.as_tensor(matrix), rtol=0, atol=1e-6)


def test_a_forgotten_step_names_the_batch() -> None:
    model, cka = nn.Sequential(nn.Linear(4, 3)), cka_hooks.CKAAccumulator()
    with cka_hooks.LayerRecorder(model, consumer=cka.observe), torch.no_grad():
        model(torch.randn(6, 4))
        cka.step()
        model(torch.randn(6, 4))
        with pytest.raises(cka_hooks.LayerError, match=r"'0' was observed twice in batch 1 .*call step\(\)"):
            model(torch.randn(6, 4))
