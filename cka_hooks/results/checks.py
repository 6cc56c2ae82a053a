"""Check the fields of a result, whether a run, a file or a caller made it."""

from __future__ import annotations

import json
import operator
from typing import TYPE_CHECKING, Any

import torch

from cka_hooks.errors import OptionError

if TYPE_CHECKING:
    from cka_hooks.results.result import CKAResult

# Larger counts are mistakes, and a float cannot hold them.
_MOST = 1 << 53


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
    fields["settings"] = _plain_json(result.settings)
    shape = (len(fields["rows"]), len(fields["columns"]))
    if 0 in shape:
        raise OptionError(f"a result of {shape[0]} x {shape[1]} layers: expected at least one row and column")
    _check_tensor("matrix", result.matrix, shape)
    _check_tensor("stderr", result.stderr, shape)
    if bool((result.stderr < 0).any()):
        raise OptionError("stderr contains negative numbers; a standard error must be 0 or more, or NaN")
    if result.null_variance is not None and result.null_skewness is not None:
        _check_tensor("null_variance", result.null_variance, shape)
        _check_tensor("null_skewness", result.null_skewness, shape)
        if bool((result.null_variance < 0).any()):
            raise OptionError("null_variance contains negative numbers; a variance must be 0 or more, or NaN")
    elif result.null_variance is not result.null_skewness:
        raise OptionError("null_variance and null_skewness belong together: give both or neither")
    if result.permuted is not None:
        _check_tensor("permuted", result.permuted, (*result.permuted.shape[:1], *shape))
    if result.minibatch_hsic is not None:
        count = len(fields["minibatch_layers"])
        batches = len(result.minibatch_hsic) if result.minibatch_hsic.dim() else 0
        _check_tensor("minibatch_hsic", result.minibatch_hsic, (max(batches, 1), count, count))
    elif fields["minibatch_layers"]:
        raise OptionError("minibatch_layers has labels, but there is no minibatch_hsic they could belong to")
    return fields


def _labels(name: str, labels: Any) -> tuple[str, ...]:
    """The labels as plain text.

    Raises:
        OptionError: a label is not text, is the empty name of a model, or is repeated.
    """
    plain = []
    seen = set()
    for label in (labels,) if isinstance(labels, str) else labels:
        if not isinstance(label, str):
            raise OptionError(f"{name} contains {label!r}: labels must be strings, such as {str(label)!r}")
        if not label and name == "models":
            raise OptionError("models contains an empty name: give every model a name")
        if label in seen:
            raise OptionError(f"{name} has {label!r} more than once: labels must differ")
        seen.add(label)
        plain.append(str.__str__(label))  # of NumPy's text, too
    return tuple(plain)


def _count(name: str, value: Any, least: int) -> int:
    """A whole number, possibly NumPy's, as a plain one.

    Raises:
        OptionError: this is not a whole number, or it is below ``least``.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number <= _MOST:
        raise OptionError(f"{name} is {value!r:.60}: expected a whole number, {least} or more")
    return number


def _check_tensor(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is float64 on the CPU, of this shape, and NaN or finite throughout.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64 or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise OptionError(f"{name} is {found}: expected a float64 tensor on the CPU")
    if tuple(tensor.shape) != shape:
        raise OptionError(f"{name} has shape {tuple(tensor.shape)}; its labels need {shape}")
    if bool(tensor.isinf().any()):
        raise OptionError(f"{name} contains infinity: expected finite numbers, or NaN where undefined")


def _plain_json(settings: object) -> dict[str, Any]:
    """The settings as a file would give them back, so that problems show now and not when a long run is saved.

    NumPy's numbers become plain ones. Infinity and NaN, which JSON does not have, become their names.

    Raises:
        OptionError: the settings hold anything else that JSON does not have.
    """
    try:
        plain = json.loads(json.dumps(settings, default=_plain_number), parse_constant=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"settings cannot be written as JSON ({error}): use plain numbers, strings, lists and dicts"
        ) from error
    if not isinstance(plain, dict):
        raise OptionError(f"settings is {type(settings).__name__}: expected a dict")
    return plain


def _plain_number(value: Any) -> Any:
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a type that JSON has")
