"""Handle running out of memory: recognise it among other errors, and free what can be freed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_divisor = ContextVar("_divisor", default=1)

# Errors that may mean that memory ran out; `raise_unless_exhausted` looks closer.
EXHAUSTED = (torch.OutOfMemoryError, RuntimeError, MemoryError)
# On the CPU and some backends, it is a bare RuntimeError.
_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


def raise_unless_exhausted(error: BaseException) -> None:
    """Raise `error` again unless it means that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(it in str(error) for it in _MESSAGES):
        raise error


def release(device: torch.device) -> None:
    """Return a device's cached memory to it, so that a smaller request finds room."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()


@contextmanager
def smaller_pieces() -> Iterator[None]:
    """Make scratch buffers a sixteenth of their usual size inside the block."""
    token = _divisor.set(16)
    try:
        yield
    finally:
        _divisor.reset(token)


def scratch(numbers: int) -> int:
    """The size of a scratch buffer that usually has `numbers`."""
    return numbers // _divisor.get()
