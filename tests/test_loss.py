"""`cka_loss`: its values are those of `cka`, its gradients those of finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_device import NoHostSync
from torch import Tensor, nn

import cka_hooks
from cka_hooks import cka, cka_loss

OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "rbf": {"kernel": "rbf"},
    "bandwidth": {"kernel": "rbf", "bandwidth": 0.5},
    "sigma": {"kernel": "rbf", "sigma": 3.0},
    "distance": {"kernel": "distance"},
    "cosine": {"kernel": "cosine"},
    "polynomial": {"kernel": "polynomial"},
    "callable": {"kernel": lambda x: 1 / (1 + (x.unsqueeze(1) - x).square().mean(-1))},
}
kernels = pytest.mark.parametrize("name", OPTIONS)
estimators = pytest.mark.parametrize("estimator", ["unbiased", "biased"])


def sides(n: int = 12, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    signal = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(n, *(shape or (5,)), generator=generator, dtype=torch.float64)
    y = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    x.flatten(1)[:, :3] += signal
    y[:, :3] += 2 * signal
    return x.to(dtype), y.to(dtype)


@kernels
@estimators
@pytest.mark.parametrize("shared", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_one_less_cka(name: str, estimator: Any, shared: float, dtype: torch.dtype) -> None:
    options = {**OPTIONS[name], "estimator": estimator}
    for shape in ((5,), (40,), (3, 4, 5)):
        x, y = sides(12, *shape)
        x, y = (x + shared).to(dtype).requires_grad_(), (y - shared).to(dtype)
        value = cka(x, y, **options)
        # The samples of bfloat16 do not differ by more than rounding there.
        wanted = 1.0 if math.isnan(value) else 1 - value
        for loss in (cka_loss(x, y, **options), cka_loss(y, x, **options), cka_loss(x.detach(), y, **options)):
            assert loss.item() == pytest.approx(wanted, abs=1e-6)
            assert loss.shape == ()
            assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


@kernels
@estimators
@pytest.mark.parametrize("n", [4, 9])
def test_gradients_are_those_of_finite_differences(name: str, estimator: Any, n: int) -> None:
    x, y = (side.requires_grad_() for side in sides(n, 2, 3))
    options = {**OPTIONS[name], "estimator": estimator}
    assert torch.autograd.gradcheck(lambda x, y: cka_loss(x, y, **options), (x, y))
    assert torch.autograd.gradcheck(lambda x: cka_loss(x + 100, y.detach(), **options), (x,))
    assert torch.autograd.gradcheck(lambda x: cka_loss(y.detach(), x, **options), (x,))


def test_gradients_of_gradients() -> None:
    x, y = (side.requires_grad_() for side in sides(5, 4))
    assert torch.autograd.gradgradcheck(cka_loss, (x, y))


@kernels
def test_duplicate_samples_have_gradients(name: str) -> None:
    """Distances of 0 have none of their own."""
    x, y = sides(12)
    x[1::2] = x[::2]
    x.requires_grad_()
    cka_loss(x, y, **OPTIONS[name]).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert float(x.grad.abs().max()) > 0


def degenerate() -> dict[str, Tensor]:
    live = sides(12)[0]
    one = torch.zeros(12, 5, dtype=torch.float64)
    one[7] = 1.0
    return {
        "zero": torch.zeros_like(live),
        "constant": torch.full_like(live, 0.1),
        "rounding": (1 + 1e-16 * live),
        "float32": torch.full((12, 5), 0.1) * (1 + 1e-7 * torch.sign(live).float()),
        "tiny": torch.full_like(live, 1e-160),
        "one sample": one + 0.3,
    }


@kernels
@pytest.mark.parametrize("case", degenerate())
def test_where_cka_is_undefined_the_loss_is_one_without_gradients(name: str, case: str) -> None:
    x, (_, y) = degenerate()[case].requires_grad_(), sides(12)
    if not math.isnan(cka(x, y, **OPTIONS[name])):
        assert case == "one sample", "other kernels see more than the distances between samples"
        return
    y.requires_grad_()
    for loss in (cka_loss(x, y, **OPTIONS[name]), cka_loss(y, x, **OPTIONS[name]), cka_loss(x, x, **OPTIONS[name])):
        assert loss.item() == 1
        loss.backward()
    for side in (x, y):
        assert side.grad is not None
        assert torch.equal(side.grad, torch.zeros_like(side))


def test_nan_is_nan() -> None:
    x, y = sides()
    x[3, 2] = torch.nan
    for name, options in OPTIONS.items():
        assert cka_loss(x, y, **options).isnan(), name


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("name", ["linear", "rbf", "distance", "cosine"])
def test_gradients_of_very_small_and_very_large_features(name: str, scale: float) -> None:
    x, y = sides(12, dtype=torch.float32)
    plain, scaled = x.clone().requires_grad_(), (x * scale).requires_grad_()
    for side in (plain, scaled):
        cka_loss(side, y, **OPTIONS[name]).backward()
    assert plain.grad is not None
    assert scaled.grad is not None
    torch.testing.assert_close(scaled.grad * scale, plain.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x, y = sides(32, 200, dtype=torch.float32)
    grads = []
    for enabled in (False, True):
        side = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = cka_loss(side, y)
        loss.backward()
        grads.append((loss.detach(), side.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@kernels
@pytest.mark.parametrize("learns", [(True, True), (True, False)], ids=str)
def test_nothing_waits_for_a_device(name: str, learns: tuple[bool, bool]) -> None:
    """On one that has no numbers; tests/test_device.py has a pretended GPU, where autograd would ask the driver."""
    with NoHostSync():
        x, y = (torch.randn(16, 5, 7, device="meta", requires_grad=grad) for grad in learns)
        loss = cka_loss(x, y.bfloat16(), **OPTIONS[name])
        loss.backward()
    assert loss.device.type == "meta"
    assert [side.grad is not None for side in (x, y)] == list(learns)


def test_features_of_a_teacher_may_be_inference_tensors_and_arrays() -> None:
    x, y = sides(12)
    with torch.inference_mode():
        teacher = y * 1
    side = x.clone().requires_grad_()
    for other in (teacher, y.numpy()):
        loss = cka_loss(side, other)
        loss.backward()
        assert loss.item() == pytest.approx(1 - cka(x, y), abs=1e-12)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_it_compiles(fullgraph: bool) -> None:
    x, y = (side.requires_grad_() for side in sides(16, 30, dtype=torch.float32))
    for name in ("linear", "rbf", "distance"):
        compiled = torch.compile(
            lambda x, y, options=OPTIONS[name]: cka_loss(x, y, **options), backend="aot_eager", fullgraph=fullgraph
        )
        found = torch.autograd.grad(compiled(x, y), (x, y))
        wanted = torch.autograd.grad(cka_loss(x, y, **OPTIONS[name]), (x, y))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_minimising_it_makes_features_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 10, generator=generator)
    teacher, student = (
        nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, width)).float() for width in (15, 8)
    )
    with torch.no_grad():
        wanted = teacher(images)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    before = cka(student(images), wanted)
    for _ in range(100):
        optimizer.zero_grad()
        cka_loss(student(images), wanted).backward()
        optimizer.step()
    assert cka(student(images), wanted) > max(before, 0.95)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "words"),
    [
        (torch.ones(5, 2), torch.ones(6, 2), {}, cka_hooks.SampleCountError, r"\[5, 6\]"),
        (torch.ones(3, 2), torch.ones(3, 2), {}, cka_hooks.TooFewSamplesError, "at least 4"),
        (torch.ones(5, 2).long(), torch.ones(5, 2), {}, cka_hooks.OptionError, "x is .*int64"),
        (torch.ones(5, 2), [1.0] * 5, {}, cka_hooks.OptionError, "y, builtins.list, cannot be taken as a tensor"),
        (torch.ones(5, 2), torch.ones(5, 2), {"sigma": 1.0}, cka_hooks.OptionError, "belongs to kernel='rbf'"),
        (torch.ones(5, 2), torch.ones(5, 2), {"estimator": "x"}, cka_hooks.OptionError, "'biased'"),
    ],
)
def test_bad_input(x: Any, y: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cka_loss(x, y, **options)
