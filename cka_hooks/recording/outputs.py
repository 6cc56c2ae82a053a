"""Find the one tensor in a layer's output or input that is its activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class NotRecordable(Exception):
    """Why a value holds no activation. The recorder decides what to do about it."""


def activation_of(value: Any, part: str = "") -> Tensor:
    """The tensor at `part` of a value; without `part`, the first floating-point tensor in it. Never another one.

    Args:
        value: a tensor, or tuples, lists, mappings and dataclasses of them, nested.
        part: indices, keys and attributes separated by colons. Negative indices count from the end.

    Raises:
        NotRecordable: there is nothing at `part`, or nothing that is a floating-point tensor.
    """
    found = value
    for step in part.split(":") if part else ():
        found = _child(found, step, part)
    reason = None
    for leaf in leaves_in(found):
        problem = _unusable(leaf)
        if problem is None and isinstance(leaf, Tensor):
            # A distributed tensor is a part of this one.
            return leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf
        reason = reason or problem
        # Integer tensors come before what a layer computed. After a packed sequence come a recurrent layer's states,
        # and after a nested tensor attention weights; these are not the layer's output.
        if isinstance(leaf, PackedSequence) or leaf.is_nested or leaf.is_quantized or leaf.is_complex():
            break
    kind = "nothing" if found is None else f"a {type(found).__name__}"
    raise NotRecordable(reason or f"returned no tensor but {kind}")


def _child(value: Any, step: str, part: str) -> Any:
    try:
        if isinstance(value, Mapping):
            return value[step] if step in value else list(value.values())[int(step)]
        if step.lstrip("-").isdigit() and isinstance(value, Sequence):
            return value[int(step)]
        if not isinstance(value, Tensor) and not step.startswith("_"):
            return getattr(value, step)
    except (LookupError, ValueError, AttributeError):
        pass
    size = f" of {len(value)}" if isinstance(value, Sequence) else ""
    keys = f" with {', '.join(fields)}" if (fields := fields_of(value)) else ""
    raise NotRecordable(f"there is no {step!r} (of {part!r}) in a {type(value).__name__}{size}{keys}")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses, depth first, in order."""
    return (leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor))


def leaves_in(value: Any) -> Iterator[Tensor | PackedSequence]:
    """Every tensor and packed sequence in nested mappings, sequences and dataclasses, depth first, in order."""
    if isinstance(value, Tensor | PackedSequence):
        yield value
        return
    for item in value if isinstance(value, tuple | list) else (fields_of(value) or {}).values():
        yield from leaves_in(item)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a mapping or a dataclass; None for anything else."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def _unusable(tensor: Tensor | PackedSequence) -> str | None:
    if isinstance(tensor, PackedSequence):
        # It has one row per step of all samples together, sorted by length, so no dimension is the batch.
        return "returned a packed sequence: choose a layer after pad_packed_sequence"
    if tensor.is_nested:
        return (
            "a nested tensor of samples that differ in size: set use_nested_tensor = False of nn.TransformerEncoder"
        )
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if not tensor.is_floating_point():
        return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}, not of real floating-point numbers"
    return None
