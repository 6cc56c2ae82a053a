"""How a model is called with a batch, and what to do where that fails."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import BatchError, CKAError
from cka_hooks.recording.batches import Form, Forward, arguments, device_of, to_device, with_tensors
from cka_hooks.recording.outputs import tensors_in


def call(
    model: nn.Module, batch: Any, forward: Forward | None = None, form: Form | None = None, number: int | None = None
) -> Any:
    """Move a batch to the model's device and run the model on it, with `forward(model, batch)` if given.

    Args:
        number: number of the batch, counted from 0, for messages.

    Raises:
        BatchError: the model cannot be called with the batch; the cause is chained.
    """
    which = "a batch" if number is None else f"batch {number} (counted from 0)"
    kind, device = type(model).__name__, device_of(model)
    if forward is not None:
        run = partial(forward, model, to_device(batch, device))
    else:
        args, kwargs = to_device(arguments(batch, model, form), device)
        run = partial(model, *args, **kwargs)
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            given = ", ".join((*(type(a).__name__ for a in args), *(f"{k}=" for k in kwargs)))
            raise BatchError(
                f"{kind} cannot be called with {which} of ({given}): {error}. Pass forward=lambda model, batch: "
                "model(...) to say how"
            ) from error
        except ValueError:
            pass
    try:
        return run()
    except Exception as error:
        # Of a batch for the user's own function, only devices and dtypes are known.
        advice = _about_tensors(error, model, batch) or (_about_kind(error, batch) if forward is None else None)
        if advice is None or isinstance(error, CKAError):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BatchError(f"{kind} cannot run on {which}: {advice} ({reason})") from error


def _about_tensors(error: Exception, model: nn.Module, batch: Any) -> str | None:
    """Advice about the device or dtype of a batch's tensors; None if neither is the problem."""
    weights = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weights is None or not isinstance(error, RuntimeError):
        return None
    if "meta" in str(error) and any(p.is_meta for p in model.parameters()):
        return "some of its parameters are on the meta device and have no values: load its weights first"
    if re.search("device", str(error)) and re.search("same device|different from|xpected", str(error)):
        return (
            f"something is elsewhere: move the whole model, and tensors that its forward makes, to {weights.device}"
        )
    first = next(tensors_in(with_tensors(batch)), weights)
    if first.dtype is weights.dtype or not re.search("type|Byte|Long|Double|Half", str(error)):
        return None
    have, want = (str(tensor.dtype).removeprefix("torch.") for tensor in (first, weights))
    if isinstance(batch, tuple | list) and first.ndim == 1 and not first.is_floating_point():
        return (
            f"its input, {have} of shape {tuple(first.shape)}, may be the index of the samples: pass "
            "forward=lambda model, batch: model(batch[1])"
        )
    scaled = " / 255" if first.dtype is torch.uint8 else ""
    return f"the batch is {have} and the model {want}: convert it in the loader, with .to(torch.{want}){scaled}"


def _about_kind(error: Exception, batch: Any) -> str | None:
    """Advice for a model that was called with something other than a tensor; None if that is not the problem."""
    if isinstance(error, NotImplementedError) and "forward" in str(error):
        return "it has no forward of its own: pass forward=lambda model, batch: ... to say what runs"
    value = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(error, TypeError | AttributeError) or isinstance(value, Tensor | Mapping):
        return None
    what, part = f"a {type(value).__module__}.{type(value).__qualname__}, not a tensor", "..."
    if isinstance(value, tuple | list):
        what, part = f"a {type(value).__name__} of {len(value)}, which may be views of the samples", "batch[0][0]"
    return f"its input is {what}: pass forward=lambda model, batch: model({part}) to say which part it takes"
