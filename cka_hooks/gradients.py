"""Ordinary tensors without gradients, whatever mode the user's code is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


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
