"""Check the fields of a result, whether a run, a file or a caller made it."""

from __future__ import annotations

import json
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

from cka_hooks.errors import OptionError

if TYPE_CHECKING:
    from cka_hooks.results.result import CKAResult

# Number of dimensions, of which the last two are layers.
_DIMENSIONS = {"matrix": 2, "stderr": 2, "null_variance": 2, "null_skewness": 2, "permuted": 3, "minibatch_hsic": 3}


def checked(result: CKAResult) -> dict[str, Any]:
    """The fields that are text, counts or dicts, as plain values. Tensors are checked.

    Raises:
        OptionError: labels are repeated, or shapes, types or values do not fit together.
    """
    fields: dict[str, Any] = {
        name: _labels(name, getattr(result, name)) for name in ("rows", "columns", "models", "minibatch_layers")
    }
    for name, least in (("samples", 0), ("minibatches", 0), ("degrees_of_freedom", 0), ("passes", 1)):
        fields[name] = _count(name, getattr(result, name), least)
    # Copy, so that no two results share a dict that one of them could change.
    fields |= {name: dict(getattr(result, name)) for name in ("degenerate", "skipped", "influence")}
    for reason in (*fields["degenerate"].values(), *fields["skipped"].values()):
        if not isinstance(reason, str):
            raise OptionError(f"degenerate and skipped contain {reason!r:.60}: expected a reason in words")
    for found in fields["influence"].values():
        _count("influence: sample", found.sample, 0)
        if not isinstance(found.share, Real):
            raise OptionError(f"influence: share is {found.share!r:.60}: expected a number")
    fields["settings"] = _plain_json(result.settings)
    shape = (len(fields["rows"]), len(fields["columns"]))
    if 0 in shape:
        raise OptionError(f"a result of {shape[0]} x {shape[1]} layers: expected at least one row and column")
    own = (len(fields["minibatch_layers"]),) * 2
    for name, tensor in ((name, getattr(result, name)) for name in _DIMENSIONS):
        if tensor is not None or name in ("matrix", "stderr"):
            _check_tensor(name, tensor, own if name == "minibatch_hsic" else shape)
    return fields


def _labels(name: str, labels: Any) -> tuple[str, ...]:
    """The labels as plain text.

    Raises:
        OptionError: a label is not text, or is repeated.
    """
    plain: dict[str, None] = {}
    for label in (labels,) if isinstance(labels, str) else labels:
        if not isinstance(label, str):
            raise OptionError(f"{name} contains {label!r}: labels must be strings, such as {str(label)!r}")
        if label in plain:
            raise OptionError(f"{name} has {label!r} more than once: labels must differ")
        plain[str.__str__(label)] = None  # of NumPy's text, too
    return tuple(plain)


def _count(name: str, value: Any, least: int) -> int:
    """A whole number, possibly NumPy's, as a plain one.

    Raises:
        OptionError: this is not a whole number, or it is below ``least``.
    """
    # Larger counts are mistakes, and a float cannot hold them.
    if not (isinstance(value, Integral) and least <= int(value) <= 1 << 53):
        raise OptionError(f"{name} is {value!r:.60}: expected a whole number, {least} or more")
    return int(value)


def _check_tensor(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is float64 on the CPU, of this shape for each minibatch, and NaN or finite throughout.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64 or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise OptionError(f"{name} is {found}: expected a float64 tensor on the CPU")
    expected = (*tensor.shape[: _DIMENSIONS[name] - 2], *shape)
    if tensor.shape != expected:
        raise OptionError(f"{name} has shape {tuple(tensor.shape)}; its labels need {expected}")
    if bool(tensor.isinf().any()):
        raise OptionError(f"{name} contains infinity: expected finite numbers, or NaN where undefined")
    if name in ("stderr", "null_variance") and bool((tensor < 0).any()):
        raise OptionError(f"{name} contains negative numbers: expected 0 or more, or NaN where undefined")


def _plain_json(settings: Any) -> dict[str, Any]:
    """The settings as a file would give them back, so that problems show now and not when a long run is saved.

    NumPy's numbers become plain ones. Infinity and NaN, which JSON does not have, become their names.

    Raises:
        OptionError: the settings hold anything else that JSON does not have.
    """
    try:
        text = json.dumps(dict(settings), default=lambda number: number.item())
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise OptionError(
            f"settings cannot be written as JSON ({error}): use a dict of plain numbers, strings, lists and dicts"
        ) from error
    plain: dict[str, Any] = json.loads(text, parse_constant=str)
    return plain
