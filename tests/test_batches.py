"""What loaders yield, and how models are called with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_models import bert
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import cka_hooks
from cka_hooks.recording import batches

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR)
Y = torch.arange(24) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.net(x if scale is None else x * scale)


@dataclasses.dataclass
class Sample:
    x: Tensor
    scale: Tensor | None
    labels: Tensor


class Pair(NamedTuple):
    image: Tensor
    target: Tensor


BATCHES: dict[str, Any] = {
    "tensor": lambda x, y: x,
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "one": lambda x, y: (x,),
    "named tuple": Pair,
    "dict": lambda x, y: {"x": x, "labels": y},
    "dict with None": lambda x, y: {"x": x, "scale": None, "target": y},
    "dict in a tuple": lambda x, y: ({"x": x}, y),
    "dataclass": lambda x, y: Sample(x, None, y),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_every_kind_of_batch(kind: str) -> None:
    model = Keywords()
    expected = cka_hooks.compare(model, X.split(12), progress=False)
    loader = [BATCHES[kind](x, y) for x, y in zip(X.split(12), Y.split(12), strict=True)]
    result = cka_hooks.compare(model, loader, progress=False)
    assert torch.equal(result.matrix, expected.matrix)
    assert result.samples == 24
    streamed = list(cka_hooks.LayerRecorder(model).stream(loader))
    assert [list(seen) for seen in streamed] == [["net.0", "net.1", "net.2"]] * 2


def test_hugging_face_batch_encoding() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 50, (8, 6), generator=GENERATOR)
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(8, dtype=torch.long)}
    model = bert()
    seen = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append(output.loss), with_kwargs=True)
    loader = [transformers.BatchEncoding({**fields, "input_ids": each}) for each in (ids, ids.flip(1))]
    result = cka_hooks.compare(model, loader, progress=False)
    assert result.samples == 16
    assert seen == [None, None], "labels make the model compute a loss"
    moved = batches.to_device(transformers.BatchEncoding(fields), torch.device("meta"))
    assert isinstance(moved, transformers.BatchEncoding)
    assert moved["input_ids"].device.type == "meta"


def test_batches_follow_the_model_and_keep_their_type() -> None:
    meta = torch.device("meta")
    nested = {"a": (X, [X, "text"]), "pair": Pair(X, Y), "sample": Sample(X, None, Y)}
    moved = batches.to_device(nested, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == moved["pair"].target.device == meta
    assert isinstance(moved["pair"], Pair)
    assert isinstance(moved["sample"], Sample)
    assert moved["a"][1][1] == "text"
    assert batches.to_device(X, torch.device("cpu")) is X
    packed = nn.utils.rnn.pack_sequence([X, X[:3]], enforce_sorted=False)
    assert batches.to_device(packed, meta).data.device == meta


def test_moving_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Tensor, "to", lambda self, device, **how: asked.append(how) or self)
    batches.to_device((X, {"y": Y}), torch.device("meta"))
    assert asked == [{"non_blocking": True}] * 2


def test_an_iterable_dataset_without_length() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(X)

    result = cka_hooks.compare(net(), DataLoader(Stream(), batch_size=8), progress=True)
    assert (result.samples, result.minibatches) == (24, 3)
    assert cka_hooks.compare(net(), (x for x in X.split(8)), progress=False).samples == 24


def test_two_views_through_one_network() -> None:
    model = net()
    noise = torch.randn(X.shape, generator=GENERATOR)
    loader = DataLoader(TensorDataset(X, X + 0.3 * noise), batch_size=12)
    views = {"clean": lambda model, batch: model(batch[0]), "corrupted": lambda model, batch: model(batch[1])}
    result = cka_hooks.compare({"clean": model, "corrupted": model}, loader, forward=views, progress=False)
    assert result.layers == tuple(f"{view}/{layer}" for view in views for layer in "012")
    with torch.no_grad():
        twins = cka_hooks.compare({"clean": net(), "corrupted": net()}, loader, forward=views, progress=False)
    assert torch.equal(result.matrix, twins.matrix)
    assert 0.5 < result["clean/0", "corrupted/0"] < 0.9999
    assert not any(module._forward_hooks for module in model.modules())


def test_a_batch_that_does_not_fit() -> None:
    with pytest.raises(cka_hooks.BatchError, match=r"cannot be called with a batch of \(pixels=\).*forward=lambda"):
        cka_hooks.compare(net(), [{"pixels": X}], progress=False)
    with pytest.raises(cka_hooks.BatchError, match="empty sequence"):
        cka_hooks.compare(net(), [()], progress=False)


def test_sample_counts() -> None:
    assert batches.sample_count({"a": None, "b": [torch.tensor(3.0), X]}) == 24
    assert batches.sample_count([torch.zeros(3, 8, 8)] * 5) == 5
    assert batches.sample_count("text", 3) is None
    assert batches.leading_shape((X, Y)) == (24, 5)


def test_max_samples_of_a_padded_batch() -> None:
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[2, 3:] = 0
    batch = {"input_ids": torch.randint(0, 50, (8, 6), generator=GENERATOR), "attention_mask": mask}
    result = cka_hooks.compare(bert(), [batch], features="mean", max_samples=5, progress=False)
    assert result.samples == 5
