"""How a model is called with a batch, and what to do where that fails."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import BatchError, CKAError
from cka_hooks.recording.batches import Form, Forward, arguments, device_of, fields_of, to_device, with_tensors
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
    device = device_of(model)
    which = "a batch" if number is None else f"batch {number} (counted from 0)"
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
                f"{type(model).__name__} cannot be called with {which} of ({given}): {error}. Pass "
                "forward=lambda model, batch: model(...) to say how"
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
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BatchError(
            f"{type(model).__name__} cannot run on {which}: {advice} ({type(error).__name__}: {reason})"
        ) from error


def _about_tensors(error: Exception, model: nn.Module, batch: Any) -> str | None:
    """Advice about the device or dtype of a batch's tensors; None if neither is the problem."""
    text = str(error)
    if any(p.is_meta for p in model.parameters()) and "meta" in text:
        return "some of its parameters are on the meta device and have no values: load its weights first"
    weights = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weights is None or not isinstance(error, RuntimeError):
        return None
    if "device" in text and any(word in text for word in ("same device", "different from", "xpected")):
        return (
            f"its input was moved to {weights.device}, where its first parameter is, and something is elsewhere: "
            "move the whole model, model.to(device), or the tensors that its forward makes"
        )
    if not any(word in text for word in ("dtype", "type", "Byte", "Long", "Double", "Half")):
        return None
    first = next(tensors_in(with_tensors(batch)), None)
    if first is None or first.dtype is weights.dtype:
        return None
    have, want = (str(tensor.dtype).removeprefix("torch.") for tensor in (first, weights))
    if first.ndim == 1 and not first.is_floating_point() and isinstance(batch, tuple | list) and len(batch) > 1:
        return (
            f"the first entry of the batch, {have} of shape {tuple(first.shape)}, may be the index of the samples: "
            "pass forward=lambda model, batch: model(batch[1])"
        )
    scaled = " / 255" if first.dtype is torch.uint8 else ""
    entry = "batch[0]" if isinstance(batch, tuple | list) else "batch"
    convert = (
        "" if fields_of(batch) else f", or pass forward=lambda model, batch: model({entry}.to(torch.{want}){scaled})"
    )
    return f"the batch is {have} and the model {want}: convert it in the loader{convert}"


def _about_kind(error: Exception, batch: Any) -> str | None:
    """Advice for a model that was called with something other than a tensor; None if that is not the problem."""
    if isinstance(error, NotImplementedError) and "forward" in str(error):
        return "it has no forward of its own: pass forward=lambda model, batch: ... to say what runs"
    if not isinstance(error, TypeError | AttributeError):
        return None
    value = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(value, tuple | list):
        return (
            f"its input is a {type(value).__name__} of {len(value)}. Of two views of the samples, pass one: "
            "forward=lambda model, batch: model(batch[0][0]); or compare them, under two names of the model with a "
            "mapping as forward="
        )
    if not isinstance(value, Tensor | Mapping):
        return (
            f"its input is a {type(value).__module__}.{type(value).__qualname__}, not a tensor: pass "
            "forward=lambda model, batch: model(...) to say which part of the batch it takes"
        )
    return None
