"""What loaders yield, and how models are called with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_models import bert
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import cka_hooks
from cka_hooks.recording import batches

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:a batch came twice")
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
    assert set(seen) == {None}, "labels make the model compute a loss"
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


class Frozen(Mapping[str, Any]):
    """A mapping that is made of its fields, not of a dict."""

    def __init__(self, *, x: Any, y: Any) -> None:
        self.fields = {"x": x, "y": y}

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def test_a_mapping_that_takes_no_dict_becomes_one() -> None:
    moved = batches.to_device(Frozen(x=X, y=[Y]), torch.device("meta"))
    assert type(moved) is dict
    assert moved["x"].device == moved["y"][0].device == torch.device("meta")


def test_a_forward_without_a_signature() -> None:
    model = nn.Identity()
    model.forward = torch.relu  # type: ignore[method-assign]
    (seen,) = cka_hooks.LayerRecorder(model).stream([X])
    assert torch.equal(seen["(model)"], X.relu())


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
    with pytest.raises(cka_hooks.BatchError, match=r"cannot be called with batch 0 .*of \(pixels=\).*forward=lambda"):
        cka_hooks.compare(net(), [{"pixels": X}], progress=False)


def test_sample_counts() -> None:
    assert batches.sample_count({"a": None, "b": [torch.tensor(3.0), X]}) == 24
    assert batches.sample_count([torch.zeros(3, 8, 8)] * 5) == 5
    assert batches.sample_count(([torch.zeros(3, 8, 8)], [{}])) == 1
    assert batches.sample_count(["a", "b"]) == 2
    assert batches.sample_count("text") is None
    assert batches.leading_shape((X, Y)) == (24, 5)


def test_max_samples_of_a_padded_batch() -> None:
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[2, 3:] = 0
    batch = {"input_ids": torch.randint(0, 50, (8, 6), generator=GENERATOR), "attention_mask": mask}
    result = cka_hooks.compare(bert(), [batch], features="mean", max_samples=5, progress=False)
    assert result.samples == 5


# Batches of others' making


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.conv(image).mean((2, 3)))


def pictures(samples: int = 6, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 3, 5, 5, generator=generator) for _ in range(count)]


EMPTY: dict[str, Any] = {
    "none": None,
    "list": [],
    "tuple": (),
    "dict": {},
    "no rows": torch.zeros(0, 3, 5, 5),
    "pair without rows": (torch.zeros(0, 3, 5, 5), torch.zeros(0)),
    "pair of nothing": (None, None),
    "empty lists": ([], []),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_batches_that_a_collate_fn_emptied_are_skipped_and_counted(kind: str) -> None:
    model = Images()
    batches = [(x, 0) for x in pictures()]
    expected = cka_hooks.compare(model, batches, progress=False)
    some = [EMPTY[kind], batches[0], EMPTY[kind], *batches[1:]]
    with pytest.warns(cka_hooks.CKAWarning, match="2 batches without samples were skipped") as caught:
        result = cka_hooks.compare(model, some, progress=False)
    assert len(caught) == 1
    assert torch.equal(result.matrix, expected.matrix)
    assert (result.samples, result.minibatches) == (18, 3)


@pytest.mark.filterwarnings("ignore:.*batches without samples")
def test_nothing_but_empty_batches() -> None:
    with pytest.raises(cka_hooks.TooFewSamplesError):
        cka_hooks.compare(Images(), [None, ()], progress=False)


def test_arrays_become_tensors() -> None:
    model = Images()
    expected = cka_hooks.compare(model, pictures(), progress=False)
    arrays = (lambda x: x.numpy(), lambda x: x.numpy().astype(">f4"))
    for batch in (*arrays, lambda x: (x.numpy()[::-1][::-1], 0), lambda x: {"image": x.numpy()}):
        assert torch.equal(cka_hooks.compare(model, map(batch, pictures()), progress=False).matrix, expected.matrix)
    # What the user's own function gets is what the loader yields.
    seen = []

    def forward(model: nn.Module, batch: Any) -> Any:
        seen.append(type(batch))
        return model(torch.from_numpy(batch))

    own = cka_hooks.compare(model, [x.numpy() for x in pictures()], forward=forward, progress=False)
    assert torch.equal(own.matrix, expected.matrix)
    assert set(seen) == {np.ndarray}


UNFIT: dict[str, tuple[Any, str]] = {
    "uint8": (
        lambda x: ((x * 9).byte(), 0),
        r"uint8 \(6, .*and the model float32.*in the loader, with \.to\(torch\.float32\) / 255",
    ),
    "uint8 alone": (lambda x: (x * 9).byte(), r"\.to\(torch\.float32\) / 255"),
    "float64": (lambda x: (x.double(), 0), r"float64 .* and the model float32.*\.to\(torch\.float32\),"),
    "float64 array": (lambda x: (x.double().numpy(), 0), r"float64 .* and the model float32"),
    "masked array": (lambda x: (np.ma.masked_greater(x.numpy(), 0), 0), "has masked entries"),
    "float64 in a dict": (lambda x: {"image": x.double()}, r"float64 .* and the model float32.*in the loader"),
    "index": (lambda x: (torch.arange(len(x)), x), r"int64 \(6,\) .*if it is an index, .*model\(batch\[1\]\)"),
    "views": (lambda x: ([x, x + 1], 0), r"a builtins.list, not a tensor.*such as one of two views"),
    "object": (lambda x: (SimpleNamespace(image=x), 0), "SimpleNamespace, not a tensor"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_batch_that_the_model_cannot_take(kind: str) -> None:
    make, message = UNFIT[kind]
    first, *others = pictures()
    good = {"image": first} if isinstance(make(first), dict) else first if kind == "uint8 alone" else (first, 0)
    with pytest.raises(cka_hooks.BatchError, match=message) as caught:
        cka_hooks.compare(Images(), [good, make(others[0])], progress=False)
    if kind == "masked array":
        return
    assert isinstance(caught.value.__cause__, RuntimeError | TypeError | AttributeError)
    assert str(caught.value).endswith(")")
    assert type(caught.value.__cause__).__name__ in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_batches_of_their_parts() -> None:
    class Sums(nn.Module):
        def forward(self, texts: Tensor) -> Tensor:
            return torch.stack([text.sum(0) for text in texts.unbind()])

    model = nn.Sequential(nn.Linear(4, 5), Sums(), nn.Linear(5, 2))
    texts = [[torch.randn(n, 4) for n in (2, 3, 2, 5, 4, 3)] for _ in range(3)]
    for layout in (torch.jagged, torch.strided):
        nested = [torch.nested.nested_tensor(some, layout=layout) for some in texts]
        result = cka_hooks.compare(model, nested, progress=False)
        assert (result.layers, result.samples) == (("1", "2"), 18)


def test_what_cannot_be_copied_stays_in_the_batch() -> None:
    class Locked(Images):
        def forward(self, image: Tensor, lock: Any) -> Tensor:
            with lock:
                return super().forward(image).relu()

    found = cka_hooks.compare(Locked(), [{"image": x, "lock": Lock()} for x in pictures()], progress=False)
    assert found.samples == 18


@pytest.mark.parametrize("container", [nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)}), nn.ModuleList([nn.Identity()])])
def test_a_model_without_a_forward(container: nn.Module) -> None:
    with pytest.raises(cka_hooks.BatchError, match=r"no forward of its own: pass forward="):
        cka_hooks.compare(container, pictures(), progress=False)
    part = next(container.children())
    cka_hooks.compare(container, pictures(), forward=lambda model, batch: part(batch), progress=False)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_without_values(whole: bool) -> None:
    model = Images()
    (model if whole else model.head).to("meta")
    with pytest.raises(cka_hooks.BatchError, match="on the meta device and have no values: load its weights"):
        cka_hooks.compare(model, pictures(), progress=False)


def test_another_device_than_the_models() -> None:
    class Elsewhere(Images):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) + torch.zeros(2, device="meta")

    with pytest.raises(cka_hooks.BatchError, match="something is elsewhere: move the whole model") as caught:
        cka_hooks.compare(Elsewhere(), pictures(), progress=False)
    assert "device" in str(caught.value.__cause__)


def test_errors_of_the_models_own_stay_what_they_are() -> None:
    class Fails(Images):
        def forward(self, image: Tensor) -> Tensor:
            return image @ torch.zeros(7, 7)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        cka_hooks.compare(Fails(), pictures(), progress=False)


class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("samples", [1, 3, 4, 6])
@pytest.mark.parametrize("entries", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:.*samples at the end")
def test_series_and_targets_are_no_images_at_a_remainder(entries: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 + samples, 9, 7, generator=generator)
    loader = DataLoader(TensorDataset(*[x] * entries), batch_size=16)
    model = Series()
    expected = cka_hooks.compare(model, x.split(16), progress=False)
    for forward in (None, lambda model, batch: model(batch[0])):
        result = cka_hooks.compare(model, loader, forward=forward, progress=False)
        assert torch.equal(result.matrix, expected.matrix)
    streamed = list(cka_hooks.LayerRecorder(model).stream(loader))
    assert [len(activations["first"]) for activations in streamed] == [16, samples]


def test_a_pair_of_four_series() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 9, 7, generator=generator)
    expected = cka_hooks.compare(Series(), x.split(4), progress=False)
    assert expected.samples == 16
    result = cka_hooks.compare(Series(), DataLoader(TensorDataset(x, x[:, :4]), batch_size=4), progress=False)
    assert (result.samples, result.minibatches) == (16, 4)


class TakesLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        assert isinstance(images, list | tuple)
        return self.head(self.conv(torch.stack(list(images))).mean((2, 3)))


@pytest.mark.parametrize("last", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:.*samples at the end")
@pytest.mark.parametrize("collate", ["list", "list and targets", "tuple and targets"])
def test_lists_of_images_stay_lists_at_a_remainder(collate: str, last: int) -> None:
    made: dict[str, Callable[[Tensor], Any]] = {
        "list": list,
        "list and targets": lambda x: (list(x), [{"boxes": None}] * len(x)),
        "tuple and targets": lambda x: (tuple(x), ({"boxes": None},) * len(x)),
    }
    loader = [made[collate](x) for x in (*pictures(count=2), pictures(last)[0])]
    result = cka_hooks.compare(TakesLists(), loader, progress=False)
    assert result.samples == 12
    streamed = list(cka_hooks.LayerRecorder(TakesLists()).stream(loader))
    assert [len(activations["head"]) for activations in streamed] == [6, 6, last]


def test_texts_in_a_list() -> None:
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(128, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, texts: list[str]) -> Tensor:
            return self.head(torch.stack([self.embed(torch.tensor(list(map(ord, text)))).mean(0) for text in texts]))

    texts = ["a", "few", "short", "texts", "of", "words"]
    for batch in (texts, (texts, torch.arange(6))):
        result = cka_hooks.compare(Texts(), [batch] * 2, progress=False)
        assert result.layers == ("head",)
        assert result.samples == 12


@pytest.mark.parametrize("kind", ["namespace", "class"])
def test_objects_of_a_class_for_batches(kind: str) -> None:
    class Batch:
        def __init__(self, image: Tensor) -> None:
            self.image = image
            self.lengths = [1, 2, 3]

    make = (lambda image: SimpleNamespace(image=image)) if kind == "namespace" else Batch
    model = Images()
    result = cka_hooks.compare(
        model, map(make, pictures()), forward=lambda model, batch: model(batch.image), progress=False
    )
    assert torch.equal(result.matrix, cka_hooks.compare(model, pictures(), progress=False).matrix)


# Labels


class Teacher(nn.Module):
    """Its decoder runs on the target, as in training."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 4)
        self.decode = nn.Linear(9, 4)

    def forward(self, src: Tensor, target: Tensor) -> Tensor:
        return self.decode(torch.cat([self.encode(src), target], 1))


def test_labels_that_a_signature_asks_for_are_kept() -> None:
    model, batches = Teacher(), [{"src": x, "target": x.flip(1)} for x in X.split(12)]
    result = cka_hooks.compare(model, batches, progress=False)
    own = cka_hooks.compare(model, batches, forward=lambda model, batch: model(**batch), progress=False)
    assert result.layers == ("encode", "decode")
    assert torch.equal(result.matrix, own.matrix)


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.filterwarnings("ignore:.*mask")
def test_encoder_decoders_make_their_decoders_input_from_labels(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "bart":
        config = transformers.BartConfig(
            vocab_size=50,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=32,
        )
        model, layers = transformers.BartForConditionalGeneration(config), "model.*coder.layers.0"
    else:
        config = transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model, layers = transformers.T5ForConditionalGeneration(config), "*coder.block.0"
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(3, 50, (8, 7), generator=generator),
            "labels": torch.randint(3, 50, (8, 4), generator=generator),
        }
        for _ in range(2)
    ]
    result = cka_hooks.compare(model, batches, layers=layers, progress=False)
    own = cka_hooks.compare(
        model, batches, layers=layers, forward=lambda model, batch: model(**batch), progress=False
    )
    assert result.settings["shapes"] == own.settings["shapes"]
    assert torch.equal(result.matrix, own.matrix)
    assert any(shape == [4, 16] for shape in result.settings["shapes"].values())
    # With an input of the decoder's own, labels are only for a loss.
    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss))
    for batch in batches:
        batch["decoder_input_ids"] = batch["labels"].flip(1)
    cka_hooks.compare(model, batches, layers=layers, progress=False)
    assert set(losses) == {None}


@pytest.mark.parametrize(("signature", "kept"), [("x", False), ("x, label=None", True), ("x, **others", True)])
def test_labels_go_where_a_forward_takes_them(signature: str, kept: bool) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {signature}): return self.fc(x)", scope)
    kind = type("Net", (nn.Module,), {"forward": scope["forward"]})
    _, keywords = batches.arguments({"x": X, "label": Y}, kind())
    assert set(keywords) == ({"x", "label"} if kept else {"x"})


def test_a_loaders_generator_matters_only_to_a_checkpoint() -> None:
    class Odd(list[Tensor]):
        @property
        def generator(self) -> torch.Generator:
            raise RuntimeError("no generator yet")

    assert cka_hooks.compare(nn.Linear(4, 4), Odd(torch.randn(3, 8, 4)), progress=False).samples == 24
