"""Set the conditions for products: where float64 is available, real float32 products, and no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from threading import RLock
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

# Backends whose hardware has no float64: everything n x n goes to the CPU there.
_WITHOUT_FLOAT64 = frozenset({"mps"})
# Precisions of float32 products that change nothing. "none" means that nobody chose one.
_EXACT = frozenset({"none", "ieee", "highest"})
# Only one thread at a time changes switches, so that no other thread takes its values for the user's.
_switching = RLock()


def accumulation_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device. Only for a CPU this waits, which might read numbers before they are there."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def exactly(device: torch.device, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` with products in the dtype that they are written in: no autocast, no TF32, no bfloat16.

    A user's autocast region or ``torch.set_float32_matmul_precision("medium")`` would otherwise hold inside a hook,
    too. Afterwards all switches are as they were, even after exceptions and Ctrl-C.
    """
    kind = device.type
    switch = _switch("cuda" if kind == "cuda" else "mkldnn", "matmul")
    product = partial(function, *args, **kwargs)
    with _switching:
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        lowered = switch.get() not in _EXACT
        if autocast or lowered:
            # What switches is written in C. Ctrl-C comes before or after that, so that `try` catches it.
            try:
                if autocast:
                    torch.set_autocast_enabled(kind, False)
                return _with_exact(switch, product) if lowered else product()
            finally:
                if autocast:
                    torch.set_autocast_enabled(kind, True)
    return product()


def _with_exact(switch: _Switch, function: Callable[[], T]) -> T:
    before = _own(switch)
    try:
        switch.set(switch.exact)
        return function()
    finally:
        switch.set(before)


class _Switch(NamedTuple):
    """One of PyTorch's switches for the precision of float32 products.

    Attributes:
        get: the value in effect, from this switch or from one that it inherits from.
        set: sets the value; "none" inherits.
        exact: the value for exact products.
        parent: backend and operation of the switch that it inherits from.
    """

    get: Callable[[], str]
    set: Callable[[str], None]
    exact: str
    parent: tuple[str, str] | None


@cache
def _switch(backend: str, operation: str) -> _Switch:
    """Since 2.9, PyTorch has a switch for each backend, and reading the older one for all of them may raise."""
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    set = getattr(torch._C, "_set_fp32_precision_setter", None)
    if get is None or set is None:
        # The functions written in C; those of the same name in `torch` are written in Python.
        get, set = (getattr(torch._C, f"_{verb}_float32_matmul_precision") for verb in ("get", "set"))
        return _Switch(get, set, "highest", None)
    parent = (backend, "all") if operation != "all" else ("generic", "all") if backend != "generic" else None
    return _Switch(partial(get, backend, operation), partial(set, backend, operation), "ieee", parent)


def _own(switch: _Switch) -> str:
    """The value that was set on a switch that is not exact, "none" if it inherits. PyTorch does not say which."""
    value = switch.get()
    if switch.parent is None:
        return value
    parent = _switch(*switch.parent)
    return value if parent.get() != value or _with_exact(parent, switch.get) == value else "none"


def without_gradients() -> AbstractContextManager[None]:
    """Compute without gradients inside the block, on tensors that may be changed in place later.

    If that already holds, nothing is entered, because a hook asks for this in every layer.
    """
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return _without_gradients()
    return nullcontext()


@contextmanager
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield
