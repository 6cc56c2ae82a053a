"""What a loader yields: how the model is called with it, how many samples it has, which of it is padding."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import BatchError
from cka_hooks.recording.outputs import tensors_in

Forward = Callable[[nn.Module, Any], Any]

# Keys of a batch that are targets, not inputs: with them some models compute a loss that nobody needs.
LABELS = frozenset(
    {"label", "labels", "label_ids", "target", "targets", "next_sentence_label", "start_positions", "end_positions"}
)
MASK = "attention_mask"


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with a batch: positional and keyword arguments.

    A mapping or dataclass is passed as keywords, its labels dropped; of a tuple or list the first entry is the
    input; anything else is the input itself. A list of images, as detectors take it, is one input.
    """
    if isinstance(batch, tuple | list) and not is_image_list(batch):
        if not batch:
            raise BatchError("the loader yielded an empty sequence: expected (input, target), or a tensor")
        batch = batch[0]
    keywords = _keywords(batch)
    return ((batch,), {}) if keywords is None else ((), keywords)


def _keywords(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        items = dict(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return None
    return {str(key): item for key, item in items.items() if key not in LABELS}


def is_image_list(value: Any) -> bool:
    """Whether a list holds unbatched images (C, H, W), one a sample."""
    return (
        isinstance(value, tuple | list)
        and len(value) > 0
        and all(isinstance(item, Tensor) and item.ndim == 3 and item.shape[0] in (1, 3, 4) for item in value)
    )


def sample_count(*values: Any) -> int | None:
    """The number of samples in a call's arguments: the size of dimension 0 of the first tensor, None without one."""
    shape = leading_shape(*values)
    return shape[0] if shape else None


def leading_shape(*values: Any) -> tuple[int, ...]:
    """The shape of the first tensor that has one in a call's arguments, (n,) for n unbatched images, else ()."""
    for value in values:
        shape: tuple[int, ...] = ()
        if is_image_list(value):
            return (len(value),)
        if isinstance(value, Mapping):
            shape = leading_shape(*value.values())
        elif isinstance(value, tuple | list):
            shape = leading_shape(*value)
        else:
            shape = next((tuple(tensor.shape) for tensor in tensors_in(value) if tensor.ndim > 0), ())
        if shape:
            return shape
    return ()


def attention_masks(batch: Any) -> Callable[[str], Tensor | None]:
    """From the name of a layer to the (n, T) attention mask of its tokens, None where there is none.

    In a batch for an encoder and a decoder, layers with "decoder" in their name have the decoder's mask.
    """
    if isinstance(batch, tuple | list) and batch and not is_image_list(batch):
        batch = batch[0]
    keywords = _keywords(batch) or {}
    found = {key: keywords.get(key) for key in (MASK, f"decoder_{MASK}")}
    masks = {key: mask for key, mask in found.items() if isinstance(mask, Tensor) and mask.ndim == 2}
    two = any(key.startswith("decoder_") for key in keywords)

    def mask_of(layer: str) -> Tensor | None:
        return masks.get(f"decoder_{MASK}" if two and "decoder" in layer.split(".") else MASK)

    return mask_of


def targets(batch: Any) -> Tensor | None:
    """The class of each sample, where the batch says it: the second of a pair, or the labels of a mapping."""
    found = batch[1] if isinstance(batch, tuple | list) and len(batch) >= 2 and not is_image_list(batch) else None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in batch if key in LABELS), None)
    usable = (
        isinstance(found, Tensor) and found.ndim == 1 and not found.is_floating_point() and found.device.type == "cpu"
    )
    return found if usable else None


def to_device(value: Any, device: torch.device | None) -> Any:
    """A batch with every tensor on `device`, moved without waiting for it; the same objects where they are there."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value.to(device)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        moved = {key: to_device(item, device) for key, item in value.items()}
        return moved if type(value) is dict else _rebuilt(value, moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **moved)
    return value


def _rebuilt(value: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """A mapping of the same type where that type can be made from a dict, else a dict."""
    try:
        return type(value)(moved)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return moved


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model wants its input: the device of its first parameter or buffer, None for a model without."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return None


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run the model on a batch, by `forward(model, batch)` where that is given.

    Raises:
        BatchError: the model cannot be called with the batch; the cause is chained.
    """
    if forward is not None:
        return forward(model, batch)
    args, kwargs = arguments(batch)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join((*(type(a).__name__ for a in args), *(f"{k}=" for k in kwargs)))
        raise BatchError(
            f"{type(model).__name__} cannot be called with a batch of ({given}): {error}. Pass "
            "forward=lambda model, batch: model(...) to say how"
        ) from error
    except ValueError:
        pass
    return model(*args, **kwargs)
