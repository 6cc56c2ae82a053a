"""Nothing in the loop waits for the device, and every tensor is where it belongs, on a pretended `cuda` device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision.models as vision
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cka_hooks
from cka_hooks import precision
from cka_hooks.hsic import features_differ
from cka_hooks.precision import accumulation_device
from cka_hooks.recording import long_way
from cka_hooks.recording.batches import to_device
from cka_hooks.recording.positions import Positions
from cka_hooks.similarity.batch import Minibatches
from cka_hooks.similarity.products.reference import Grams
from cka_hooks.similarity.state import State

# What waits for a value of the device, or has a size that depends on values.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}
# Of all numbers of a tensor, which look at a count inside.
WAITING |= {"median", "nanmedian"}
# What launches no kernel.
VIEWS = {
    "device",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
}
VIEWS |= {"squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view"}


class HostSync(Exception):
    """An operator had the host wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Refuses operators that wait for the device and copies from it; counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise HostSync(name)
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            if source.device.type == "cuda" and out.device.type != "cuda":
                raise HostSync(f"{name} from {source.device} to {out.device}")
        if name not in VIEWS:
            self.launches[name] += 1
        return out


@pytest.fixture
def pretended() -> Iterator[None]:
    # Models are built inside the mode: it cannot take in tensors that are really there.
    with FakeTensorMode():
        if torch.__version__.startswith("2.6."):
            try:
                torch.empty(2, 2, device="cuda")[0]
            except RuntimeError as error:
                pytest.skip(f"PyTorch 2.6 asks the CUDA driver about a view of a pretended tensor: {error!s:.70}")
        yield


def resnet() -> nn.Module:
    with torch.device("cuda"):
        return vision.ResNet(vision.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()


def transformer() -> nn.Module:
    with torch.device("cuda"):
        block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.Sequential(nn.Linear(8, 16), block, nn.Linear(16, 4)).eval()


def half_transformer() -> nn.Module:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return transformer()
    finally:
        torch.set_default_dtype(torch.float32)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet": (resnet, lambda: torch.randn(32, 3, 64, 64, device="cuda")),
    "transformer": (transformer, lambda: torch.randn(32, 20, 8, device="cuda")),
    "bfloat16": (half_transformer, lambda: torch.randn(32, 20, 8, device="cuda", dtype=torch.bfloat16)),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"minibatch": 8},
    {"minibatch": 12, "estimator": "biased"},
    {"kernel": "rbf"},
    {"kernel": "rbf", "sigma": 2.0, "minibatch": 8},
    {"kernel": "distance"},
    {"kernel": "cosine"},
    {"keep_minibatches": True},
]


def launches(
    model: nn.Module, inputs: Callable[[], Tensor], **options: Any
) -> tuple[float, cka_hooks.CKAAccumulator]:
    """Kernels launched per layer and batch beyond the model's own, over two minibatches after a first one."""
    accumulator = cka_hooks.CKAAccumulator(**options)
    total = 0
    with torch.no_grad():
        with NoHostSync() as bare:
            model(inputs())
        # Named, so that no probe looks at values of a device that is only pretended.
        with cka_hooks.LayerRecorder(model, consumer=accumulator.observe, batch_dim=0):
            for number in range(3):
                with NoHostSync() as counted:
                    model(inputs())
                    accumulator.step()
                # In the first one features are looked at one by one.
                total += 0 if number == 0 else sum(counted.launches.values()) - sum(bare.launches.values())
    return total / 2 / len(accumulator.layers), accumulator


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("case", "options"),
    [("resnet", {}), *(("transformer", options) for options in OPTIONS), ("bfloat16", {})],
    ids=str,
)
def test_accumulating_does_not_wait(case: str, options: dict[str, Any]) -> None:
    build, inputs = CASES[case]
    model = build()
    each, accumulator = launches(model, inputs, **options)
    assert accumulator.minibatches == 3 * {None: 1, 8: 4, 12: 3}[options.get("minibatch")]
    tensors = [value for value in vars(accumulator.state).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(tensor.device.type == "cuda" for tensor in tensors)
    # One small kernel takes some 5 microseconds to launch: 60 of them for 100 layers are 30 ms a batch. A remainder
    # is a group of its own.
    assert each < 60 * (2 if options.get("minibatch") == 12 else 1)


@pytest.mark.usefixtures("pretended")
def test_launches_of_a_wide_layer_do_not_grow_with_its_features() -> None:
    def layer(side: int) -> float:
        with torch.device("cuda"):
            model = nn.Sequential(nn.Conv2d(3, 8, 1))
        return launches(model, lambda: torch.randn(32, 3, side, side, device="cuda"))[0]

    assert layer(128) <= layer(16) + 5


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("samples", [8, 32])
def test_launches_of_tokens_do_not_grow_with_their_number(samples: int) -> None:
    """With the tokens in front, no run of features is longer than one token."""

    def layer(tokens: int) -> float:
        accumulator = cka_hooks.CKAAccumulator()
        activation = torch.randn(tokens, samples, 2500, device="cuda").transpose(0, 1)
        # In the first batch features are looked at one by one.
        accumulator.update({"layer": activation})
        with torch.no_grad(), NoHostSync() as counted:
            accumulator.observe("layer", activation)
        return sum(counted.launches.values())

    assert layer(200) == layer(20)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        # Three for the common vector, one to take it off, the product, its sum in float64, the vector's norm; three
        # for a power of two, one to divide by it, two to undo that.
        (torch.float32, {}, 13),
        (torch.float32, {"minibatch": 8}, 13),
        # One more widens the common vector.
        (torch.bfloat16, {}, 14),
    ],
    ids=str,
)
def test_launches_of_one_more_layer(dtype: torch.dtype, options: dict[str, Any], expected: int) -> None:
    def total(layers: int) -> float:
        with torch.device("cuda"):
            model = nn.Sequential(*(nn.Linear(16, 16, dtype=dtype) for _ in range(layers)))
        return layers * launches(model, lambda: torch.randn(32, 16, device="cuda", dtype=dtype), **options)[0]

    assert (total(12) - total(4)) / 8 == pytest.approx(expected)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("features", ["mean", "token", "last", lambda x: x.flatten(1)[:, :4]])
def test_reductions_with_a_mask_do_not_wait(features: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the first pass a device is asked once whether averages are only rounding. It is pretended here.
    monkeypatch.setattr(long_way, "_vanishes", lambda *_: False)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 16, device="cuda")
            self.out = nn.Linear(16, 16, device="cuda")

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.embed(input_ids))

    model = Tokens()
    batch = {"input_ids": torch.zeros(8, 12, dtype=torch.long), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    accumulator = cka_hooks.CKAAccumulator()
    recorder = cka_hooks.LayerRecorder(
        model,
        consumer=accumulator.observe,
        features=features,
        batch_dim=0,
        mask={"*": lambda batch: batch["attention_mask"]},
    )
    with NoHostSync(), recorder, torch.no_grad():
        for _ in range(2):
            with recorder.forward_pass(batch):
                model(**{key: value.to("cuda", non_blocking=True) for key, value in batch.items()})
            accumulator.step()
    assert accumulator.layers == ("embed", "out")


class Largest(TorchDispatchMode):
    """The most bytes that an operator put into memory that it was not given."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS and isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_look_takes_little_memory(dtype: torch.dtype) -> None:
    """At the first blocks of a ResNet-50, where a forward pass has most."""
    features = torch.empty(64, 1, 256 * 56 * 56, device="cuda", dtype=dtype)
    with Largest() as largest:
        features_differ(features, dtype)
    assert 0 < largest.bytes < 1 << 25


class Finished(Exception):
    pass


@pytest.mark.usefixtures("pretended")
def test_compare_waits_for_nothing_before_it_reads_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(state: State, *_: object) -> None:
        assert state.samples == 2 * 32
        raise Finished

    monkeypatch.setattr(sys.modules["cka_hooks.compare"], "finished", finished)
    models = {"a": transformer(), "b": transformer()}
    # Batches on the host: moved by `compare`.
    loader = [(torch.randn(32, 20, 8), None) for _ in range(2)]
    with NoHostSync(), pytest.raises(Finished):
        cka_hooks.compare(models, loader, minibatch=8, max_samples=2 * 32, batch_dim=0, progress=False)


class ReadTooEarly(TorchDispatchMode):
    """Refuses copies to a CPU that do not wait: it may read their memory before the numbers are there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu" and (kwargs or {}).get("non_blocking"):
            assert args[0].device.type == "cpu", func
        return out


@pytest.mark.usefixtures("pretended")
def test_a_cpu_waits_for_its_numbers() -> None:
    on_gpu, on_cpu = torch.randn(16, 6, 5, device="cuda"), torch.randn(16, 6, 5)
    grams = [Grams(torch.randn(2, 6, 6, device=device), torch.ones(2, device=device)) for device in ("cpu", "cuda")]
    positions = Positions(8, 0)
    with ReadTooEarly():
        assert Minibatches.of(("x", "y"), grams, "unbiased").vectors.device.type == "cpu"
        assert to_device([on_gpu], torch.device("cpu"))[0].device.type == "cpu"
        for activation in (on_gpu, on_cpu):
            assert positions.rows("x", activation, None, frozenset()).device == activation.device


@pytest.mark.usefixtures("pretended")
def test_what_was_restored_goes_on_where_activations_are() -> None:
    x = torch.empty(16, 5, 40, device="cuda")
    cka = cka_hooks.CKAAccumulator()
    cka.update({"x": x, "y": x[:, 0]})
    # As a checkpoint has it.
    cka.state = cka.state.to("cpu")
    with NoHostSync():
        cka.update({"x": x, "y": x[:, 0]})
    assert cka.state.moments.device.type == "cuda"


@pytest.mark.usefixtures("pretended")
def test_a_read_back_is_refused_here() -> None:
    with NoHostSync():
        x = torch.ones(3, device="cuda")
        with pytest.raises(HostSync):
            x.cpu()
        with pytest.raises(HostSync):
            x.sum().item()


@pytest.mark.usefixtures("pretended")
def test_a_model_on_two_devices() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 6, device="cuda:0")
            self.second = nn.Linear(6, 4, device="cuda:1")

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).to("cuda:1"))

    model = Split()
    accumulator = cka_hooks.CKAAccumulator()
    with cka_hooks.LayerRecorder(model, consumer=accumulator.observe, batch_dim=0), torch.no_grad():
        for _ in range(2):
            model(torch.randn(16, 8, device="cuda:0"))
            accumulator.step()
    assert accumulator.layers == ("first", "second")
    assert accumulator.state.moments.device == torch.device("cuda:0")


def test_accumulation_device() -> None:
    assert accumulation_device(torch.device("mps")) == torch.device("cpu")
    assert accumulation_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert accumulation_device(torch.device("cpu")) == torch.device("cpu")


class NoFloat64(TorchDispatchMode):
    """A device whose hardware has no float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                assert tensor.dtype is not torch.float64, func
        return out


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_device_without_float64(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "_WITHOUT_FLOAT64", frozenset({"cuda"}))
    accumulator = cka_hooks.CKAAccumulator(**options)
    with NoFloat64():
        for _ in range(2):
            x = torch.empty(16, 5, 40, device="cuda", dtype=dtype)
            accumulator.update({"x": x, "y": x[:, 0]})
    assert accumulator.state.moments.device.type == "cpu"


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("kernel", ["linear", "rbf", "distance", "cosine", "polynomial"])
@pytest.mark.parametrize("learns", [True, False])
def test_the_loss_does_not_wait(kernel: str, learns: bool) -> None:
    x = torch.randn(16, 5, 7, device="cuda", requires_grad=learns)
    y = torch.randn(16, 9, device="cuda", dtype=torch.bfloat16)
    with NoHostSync():
        loss = cka_hooks.cka_loss(x, y, kernel=kernel)
    assert loss.device.type == "cuda"
    assert loss.requires_grad == learns
