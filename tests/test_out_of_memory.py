"""Memory that runs out in a hook or while adding up: smaller pieces, or an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cka_hooks
from cka_hooks import memory
from cka_hooks.similarity.products import native
from cka_hooks.similarity.products import reference as gram

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 800000000000 bytes."),
    MemoryError(),
]


def batches(count: int = 6) -> list[torch.Tensor]:
    return list(torch.randn(16 * count, 12, generator=torch.Generator().manual_seed(0)).split(16))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


class Short:
    """A device on which products of more than `samples` samples do not fit."""

    def __init__(self, cka: cka_hooks.CKAAccumulator, samples: int, error: Exception) -> None:
        self.kernel = cka._kernel
        self.samples = samples
        self.error = error
        self.scratch: list[int] = []

    def __call__(self, rows: torch.Tensor, minibatches: int):
        if len(rows) > self.samples:
            raise self.error
        self.scratch.append(memory.scratch(1 << 20))
        return self.kernel(rows, minibatches)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_retried_in_smaller_pieces(error: Exception) -> None:
    expected, ours = cka_hooks.CKAAccumulator(minibatch=4), cka_hooks.CKAAccumulator(minibatch=4)
    short = Short(ours, 4, error)
    ours._kernel = short
    # In float64: several products at once may round other than one of each.
    for batch in batches():
        for cka in (expected, ours):
            cka.update({"x": batch.double(), "y": batch.double().sin()})
    torch.testing.assert_close(ours.compute().matrix, expected.compute().matrix, rtol=0, atol=1e-12)
    assert set(short.scratch) == {1 << 16}
    assert memory.scratch(1 << 20) == 1 << 20


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_names_the_layer_and_what_to_do_and_goes_on(error: Exception) -> None:
    cka = cka_hooks.CKAAccumulator()
    first, *rest = batches()
    cka.update({"x": first, "y": first.sin()})
    kernel = cka._groups[0]._kernel
    cka._groups[0]._kernel = Short(cka, 0, error)
    with pytest.raises(
        cka_hooks.OutOfMemoryError, match=r"layer 'x': 16 samples of 12 features .*minibatch="
    ) as caught:
        cka.update({"x": rest[0], "y": rest[0].sin()})
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)
    cka._groups[0]._kernel = kernel
    for batch in rest[1:]:
        cka.update({"x": batch, "y": batch.sin()})
    whole = cka_hooks.CKAAccumulator()
    for batch in (first, *rest[1:]):
        whole.update({"x": batch, "y": batch.sin()})
    torch.testing.assert_close(cka.compute().matrix, whole.compute().matrix, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["centre", "pack", "sample_parts", "all_pairs"])
def test_while_adding_up_nothing_is_added(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Also where the first of two groups of minibatches went through."""
    cka = cka_hooks.CKAAccumulator(minibatch=6)
    first, second, third, *_ = (torch.cat([a, b]) for a, b in zip(batches(), batches()[1:], strict=False))
    cka.update({"x": first[:22], "y": first[:22].sin()})
    before = repr(cka.state_dict())
    from cka_hooks.similarity import batch, state

    module = state if where == "all_pairs" else batch
    real, calls = getattr(module, where), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise ERRORS[0]
        return real(*args)

    monkeypatch.setattr(module, where, failing)
    with pytest.raises(cka_hooks.OutOfMemoryError, match="comparing 2 layers of 22 samples"):
        cka.update({"x": second[:22], "y": second[:22].sin()})
    monkeypatch.undo()
    assert repr(cka.state_dict()) == before
    cka.update({"x": third[:22], "y": third[:22].sin()})
    assert cka.compute().samples == 44


def test_in_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()

    def exhausted(*_):
        raise ERRORS[0]

    monkeypatch.setattr(gram, "shifted", exhausted)
    monkeypatch.setattr(native, "grams", exhausted)
    with pytest.raises(cka_hooks.OutOfMemoryError, match="layer '0'"):
        cka_hooks.compare(net, batches(), progress=False)
    assert not any(module._forward_hooks for module in net.modules())
    assert net.training


def test_other_errors_pass_through() -> None:
    cka = cka_hooks.CKAAccumulator()
    cka._kernel = Short(cka, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        cka.update({"x": batches()[0]})
    assert not isinstance(caught.value, cka_hooks.CKAError)
