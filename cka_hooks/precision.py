"""What products run under: where float64 lives, products that really are float32, and no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# Backends whose hardware has no float64: what is n x n goes to the CPU there.
_WITHOUT_FLOAT64 = frozenset({"mps"})


def accumulation_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where the device has no float64."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def exact_products(device: torch.device) -> AbstractContextManager[None]:
    """Products in the dtype they are written in: no autocast, no TF32, no bfloat16 inside float32.

    A user's autocast region or ``torch.set_float32_matmul_precision("medium")`` holds inside a hook too.
    """
    if torch.get_float32_matmul_precision() == "highest" and not _in_autocast(device):
        return nullcontext()
    return _exact_products(device)


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False) if _in_autocast(device) else nullcontext():
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def _in_autocast(device: torch.device) -> bool:
    return bool(torch.amp.is_autocast_available(device.type)) and torch.is_autocast_enabled(device.type)


def without_gradients() -> AbstractContextManager[None]:
    """Inside, what is computed has no gradients, and can be worked on in place later.

    Nothing is entered where that holds already: a hook asks for this in every layer.
    """
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return _without_gradients()
    return nullcontext()


@contextmanager
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield
