"""The compiled Gram product: every variant that runs here, against PyTorch's own in float64."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator

import processes
import pytest
import torch
from test_gram import VIEWS, features, view
from torch import Tensor

from cka_hooks.features import memory_order
from cka_hooks.hsic import centre
from cka_hooks.similarity.products import native
from cka_hooks.similarity.products.choose import _measured
from cka_hooks.similarity.products.reference import Grams

BUILT = dict(native._native.variants()) if native._native is not None else {}


@pytest.fixture(params=sorted(BUILT) or ["none"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not BUILT:
        pytest.skip("no compiled code for this processor")
    monkeypatch.setattr(native, "VARIANTS", {request.param: BUILT[request.param]})
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def centred_error(x: Tensor, minibatches: int) -> float:
    """Of the centred Gram matrices, relative to the largest entry."""
    values, _ = native.grams(memory_order(x).unflatten(0, (minibatches, -1)))
    assert torch.equal(values, values.mT)
    wide = x.double().reshape(len(x), -1).unflatten(0, (minibatches, -1))
    wide = wide - wide.mean(1, keepdim=True)
    expected = wide @ wide.mT
    return float((centre(values, "biased") - expected).abs().max() / expected.abs().max())


def test_it_is_built_where_it_can_be() -> None:
    """An optional extension that stopped compiling would otherwise only be noticed by its slowness."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("built on Linux on x86-64 only")
    assert native._native is not None


@pytest.mark.parametrize("n", [4, 5, 7, 12, 13, 33, 128])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 1023, 1024, 1025, 5000])
def test_every_size_of_tile_and_block(variant: str, n: int, width: int) -> None:
    assert centred_error((features(n, width) + 5).float(), 1) < 1e-6


@pytest.mark.parametrize("width", [5, 512, 513, 3000])
def test_many_samples(variant: str, width: int) -> None:
    assert centred_error((features(2 * 301, width) + 5).float(), 2) < 1e-6


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize(("minibatches", "width"), [(1, 40_000), (2, 9000), (3, 9000), (5, 3000), (9, 1500)])
def test_threads_share_groups_and_blocks(
    variant: str, number: int, minibatches: int, width: int, threads: None
) -> None:
    torch.set_num_threads(number)
    x = (features(20 * minibatches, width) + 5).float()
    assert centred_error(x, minibatches) < 1e-6


@pytest.mark.parametrize("number", [2, 3, 7])
def test_results_repeat_to_the_bit(variant: str, number: int, threads: None) -> None:
    """Of features so different in size that float64 sums depend on their order."""
    torch.set_num_threads(number)
    x = memory_order(features(40, 40_000).float() * torch.linspace(-25, 25, 40_000).round().exp2())
    first = native.grams(x.unflatten(0, (2, -1)))
    for _ in range(20):
        again = native.grams(x.unflatten(0, (2, -1)))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("minibatches", [1, 2])
def test_strides(variant: str, name: str, minibatches: int) -> None:
    assert centred_error(view(name, (features(20, 864) + 3).float().unflatten(1, (24, 6, 6))), minibatches) < 1e-6


def test_minibatches_of_one_sample(variant: str) -> None:
    x = features(5, 24).float().view(5, 4, 6).mT
    values, measures = native.grams(x.unflatten(0, (5, 1)))
    assert not values.any()
    torch.testing.assert_close(measures[:, -1], x.double().flatten(1).norm(dim=1), rtol=1e-6, atol=0)


def test_what_it_measures(variant: str) -> None:
    x = memory_order((features(48, 3000) + 1).float())
    values, measures = native.grams(x.unflatten(0, (3, -1)))
    found = torch.tensor(_measured(Grams(values, measures[:, -1])), dtype=torch.float64)
    torch.testing.assert_close(measures[:, :-1], found, rtol=1e-12, atol=0)
    first, middle, last = (x.double().unflatten(0, (3, 16))[:, i].flatten(1) for i in (0, 8, 15))
    shift = torch.stack([first, middle, last]).median(0).values.norm(dim=1)
    torch.testing.assert_close(measures[:, -1], shift, rtol=1e-6, atol=0)


class Wrapped(Tensor):
    """A tensor whose numbers need not be where its address says."""


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(8, 1, 50, dtype=torch.float64),
        torch.zeros(8, 1, 50, dtype=torch.bfloat16),
        torch.zeros(8, 1, 50, device="meta"),
        torch.zeros(8, 1, 0),
        torch.zeros(8, 1, 50).as_subclass(Wrapped),
    ],
    ids=["float64", "bfloat16", "meta", "empty", "subclass"],
)
def test_what_it_leaves_to_pytorch(variant: str, x: Tensor) -> None:
    assert native.takes(torch.zeros(8, 1, 50))
    assert not native.takes(x)


def test_what_functions_are_given_under_transforms_is_left_to_pytorch(variant: str) -> None:
    taken = []

    def function(x: Tensor) -> Tensor:
        taken.append(native.takes(x))
        return x.sum()

    torch.func.grad(function)(torch.randn(8, 1, 50))
    assert taken == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_and_device_do_not_matter(variant: str, dtype: torch.dtype) -> None:
    x = torch.randn(8, 1, 3000)
    grams = native.grams(x.unflatten(0, (2, -1)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            other_grams = native.grams(x.unflatten(0, (2, -1)))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(other_grams[0], grams[0])


GROWTH = """
import threading, torch
from cka_hooks.similarity.products import native

torch.set_num_threads(8)
wide, narrow = torch.randn(256, 1, 20000), torch.randn(256, 1, 2000)

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024

def work():
    for x in (wide, narrow, narrow[:, :, :30]):
        native.grams(x[None])
        x.exp()

def rounds(count):
    for _ in range(count):
        work()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

rounds(5)
before = resident()
rounds(15)
print(resident() - before)
"""


@pytest.mark.skipif(not BUILT, reason="no compiled code for this processor")
def test_threads_that_end_leave_no_memory_behind() -> None:
    """Its buffers are those of threads, of which those of a Python thread's pool end with it.

    One arena of the allocator: with one for every thread, what was freed stays resident in any of them, up to 60 MB
    by chance. Buffers that are not freed come to 240 MB.
    """
    done = processes.finished(
        "-c",
        GROWTH,
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "CKA_HOOKS_NATIVE": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60


@pytest.mark.skipif(not BUILT, reason="no compiled code for this processor")
def test_it_can_be_switched_off() -> None:
    code = """
import importlib, os
from cka_hooks.similarity.products import native
for setting in ("0", "1"):
    os.environ["CKA_HOOKS_NATIVE"] = setting
    print(importlib.reload(native).VARIANTS)
"""
    done = processes.finished("-c", code)
    assert done.stdout.splitlines() == ["{}", str(BUILT)]
