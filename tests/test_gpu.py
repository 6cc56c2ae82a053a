"""On an NVIDIA GPU: `pytest -m gpu`. Skipped where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import cka_hooks
from cka_hooks.similarity.products import fused
from cka_hooks.similarity.state import DECLARED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:one sample decides"),
]
vision = pytest.importorskip("torchvision.models")
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")


@pytest.fixture(autouse=True)
def _fused_is_used() -> Iterator[None]:
    """Nothing here passes because PyTorch's products took over."""
    before = fused._failed
    fused._failed = False
    yield
    assert not fused._failed
    assert fused._runs_on(0)
    fused._failed = before


def error(model: nn.Module, batches: list[Tensor], **options: Any) -> float:
    """Largest error of all leaf layers and calls against float64 of activations cloned inside the hook."""
    result = cka_hooks.compare(model, batches, progress=False, **options)
    labels, expected, _ = oracle.cka_of_model(model, batches, **options)
    order = [labels.index(label) for label in result.layers]
    return float(np.nanmax(np.abs(result.matrix.numpy() - expected[np.ix_(order, order)])))


def images(count: int = 2, batch: int = 32, pixels: int = 96, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, pixels, pixels, generator=generator).cuda().to(dtype) for _ in range(count)]


ARCHITECTURES = ("resnet18", "resnet50", "densenet121", "efficientnet_b0", "swin_t", "vit_b_16", "convnext_tiny")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    model = getattr(vision, name)().cuda().eval()
    assert error(model, images(pixels=224 if name.startswith(("vit", "swin")) else 96)) < 1e-6


@pytest.mark.parametrize(
    ("samples", "minibatch"), [(n, None) for n in (4, 5, 16, 31, 64, 127, 128)] + [(128, 12), (300, 100), (200, 200)]
)
def test_sizes_of_a_batch(samples: int, minibatch: int | None) -> None:
    assert error(vision.resnet18().cuda().eval(), images(batch=samples, pixels=32), minibatch=minibatch) < 1e-6


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32(allowed: bool) -> None:
    # Attributes that monkeypatch cannot give back.
    switches: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        assert error(vision.resnet50().cuda().eval(), images()) < 1e-6
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    model = vision.resnet50().cuda().eval()
    batches = images(dtype=torch.float32 if autocast else dtype)
    if not autocast:
        model.to(dtype)
    region: AbstractContextManager[object] = torch.autocast("cuda", dtype) if autocast else nullcontext()
    with region:
        assert error(model, batches) < 1e-6


def test_channels_last() -> None:
    model = vision.resnet50().cuda().eval().to(memory_format=torch.channels_last)
    assert error(model, [batch.to(memory_format=torch.channels_last) for batch in images()]) < 1e-6


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("minibatch", [None, 8])
def test_kernels(kernel: str, minibatch: int | None) -> None:
    x = {str(i): torch.randn(64, 3, 500, device="cuda") + i for i in range(3)}
    x |= {"mixed": x["0"] + x["1"], "wide": x["0"].double(), "last": x["1"][:, :1]}
    on_gpu, on_cpu = (cka_hooks.CKAAccumulator(kernel=kernel, minibatch=minibatch) for _ in range(2))
    for _ in range(2):
        on_gpu.update(x)
        on_cpu.update({label: tensor.cpu() for label, tensor in x.items()})
    np.testing.assert_allclose(on_gpu.compute().matrix, on_cpu.compute().matrix, atol=1e-6)


@pytest.mark.parametrize("minibatch", [None, 12])
def test_sums_are_those_of_a_cpu(minibatch: int | None) -> None:
    on_gpu, on_cpu = (cka_hooks.CKAAccumulator(minibatch=minibatch, keep_minibatches=True) for _ in range(2))
    for samples in (40, 50, 40):
        x = {str(i): torch.randn(samples, 300) + i for i in range(20)}
        x["1"][7 if samples == 50 else 3] *= 30
        x["2"][:, 4] = torch.nan if samples == 50 else 0.0
        for cka, device in ((on_gpu, "cuda"), (on_cpu, "cpu")):
            if samples == 50:
                cka.start_pass()
            cka.update({label: tensor.to(device) for label, tensor in x.items()})
    for name in DECLARED:
        found, expected = getattr(on_gpu.state, name), getattr(on_cpu.state, name)
        if name == "kept":
            found, expected = torch.cat(found), torch.cat(expected)
        if isinstance(expected, Tensor):
            scale = float(expected.nan_to_num(posinf=0).abs().max()) if expected.numel() else 0
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6 * scale, msg=name)
        else:
            assert found == expected, name


def test_what_is_captured_is_refused() -> None:
    x = torch.randn(16, 300, device="cuda")
    cka = cka_hooks.CKAAccumulator()
    cka.update({"x": x})
    with pytest.raises(cka_hooks.OptionError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cka.observe("x", x)


@pytest.mark.parametrize("power", [-30, -20, -10, 10, 20, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_range(power: int, dtype: torch.dtype) -> None:
    x = (torch.randn(32, 700, device="cuda") * 10.0**power).to(dtype)
    y = (torch.randn(32, 90, device="cuda") + 5).to(dtype)
    cka = cka_hooks.CKAAccumulator()
    cka.update({"x": x, "y": y, "half": x[:, :350]})
    grams = [[oracle.linear_gram(oracle.flatten(layer)) for layer in (x, y, x[:, :350])]]
    np.testing.assert_allclose(cka.compute().matrix, oracle.cka_minibatch(grams, "unbiased"), atol=1e-6)


def test_what_is_not_finite_is_named() -> None:
    x = torch.randn(16, 3000, device="cuda")
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[11, 2222] = bad
        cka = cka_hooks.CKAAccumulator()
        cka.update({"x": x, "y": y, "z": x + 1})
        with pytest.raises(cka_hooks.NonFiniteError, match="y"):
            cka.compute()


def test_a_compiled_model() -> None:
    model = vision.resnet18().cuda().eval()
    batches = images()
    expected = cka_hooks.compare(model, batches, progress=False)
    found = cka_hooks.compare(torch.compile(model), batches, progress=False)
    assert found.layers == expected.layers
    np.testing.assert_allclose(found.matrix, expected.matrix, atol=1e-4)


def test_nothing_waits_for_the_device() -> None:
    model = vision.resnet18().cuda().eval()
    cka = cka_hooks.CKAAccumulator()
    batches = images(4)
    with torch.no_grad(), cka_hooks.LayerRecorder(model, consumer=cka.observe, batch_dim=0):
        # The first batch compiles.
        for number, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            try:
                model(batch)
                cka.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert cka.compute().samples == 4 * 32


def test_the_same_bits_twice() -> None:
    model, batches = vision.resnet18().cuda().eval(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            first, second = (cka_hooks.compare(model, batches, progress=False).matrix for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def peak(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def test_memory() -> None:
    """At most 150 MiB beyond the Gram matrices of a batch, and no more with more batches."""
    model = vision.resnet50().cuda().eval()
    batches = images(2, batch=64, pixels=224)

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            model(batch)

    bare()
    below = peak(bare)
    above = [
        peak(lambda times=times: cka_hooks.compare(model, batches * times, progress=False)) for times in (1, 1, 4)
    ]
    grams = 158 * 64 * 64 * 8 / 2**20
    assert above[1] - below < 150 + grams
    assert above[2] - above[1] < 1


def test_nothing_is_allocated_anew_from_the_second_batch_on() -> None:
    model, batches = vision.resnet18().cuda().eval(), images(5)
    cka = cka_hooks.CKAAccumulator()
    reserved = []
    with torch.no_grad(), cka_hooks.LayerRecorder(model, consumer=cka.observe, batch_dim=0):
        for batch in batches:
            model(batch)
            cka.step()
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[-1]


class OnTwoStreams(nn.Module):
    """Branches that run side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(500, 3000), nn.Linear(500, 3000)
        self.join = nn.Linear(3000, 70)
        self.side = torch.cuda.Stream()

    def forward(self, x: Tensor) -> Tensor:
        now = torch.cuda.current_stream()
        self.side.wait_stream(now)
        with torch.cuda.stream(self.side):
            right = self.right(x)
        left = self.left(x)
        now.wait_stream(self.side)
        right.record_stream(now)
        return self.join(left * right)


def test_two_streams() -> None:
    model = OnTwoStreams().cuda().eval()
    batches = [torch.randn(64, 500, device="cuda") for _ in range(20)]
    assert error(model, batches) < 1e-6


@two_devices
def test_two_devices() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(500, 3000, device="cuda:0")
            self.second = nn.Linear(3000, 70, device="cuda:1")
            self.third = nn.Linear(70, 30, device="cuda:0")

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x).to("cuda:1")).to("cuda:0"))

    batches = [torch.randn(64, 500, device="cuda:0") for _ in range(5)]
    assert error(Split().eval(), batches) < 1e-6


def test_one_launch_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0]
    launch = fused.launch

    def counted(program: fused.Program, *rest: Any) -> None:
        count[0] += program.kernel == "partial_grams"
        launch(program, *rest)

    monkeypatch.setattr(fused, "launch", counted)
    model = vision.resnet18().cuda().eval()
    result = cka_hooks.compare(model, images(2), progress=False)
    assert count[0] == 2 * len(result.layers) + 1
