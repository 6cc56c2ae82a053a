"""Identify a model, a loader, a function or a setting, so that only the same run is resumed."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.arrays import as_features
from cka_hooks.options import spelled


def of_model(model: nn.Module) -> dict[str, Any]:
    """What a model's modules do; names, shapes and some numbers of its parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    some = [_some(tensor) for _, tensor in tensors]
    return {
        "type": type(model).__qualname__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "names and shapes": _digest(*(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors)),
        "modules": _digest(*(part for name, module in model.named_modules() for part in (name, *_kind(module)))),
        "values": _digest(torch.cat(some).numpy().tobytes()) if some else _digest(),
    }


def _some(tensor: Tensor) -> Tensor:
    """Some numbers of a parameter or buffer; none if it has no plain ones."""
    local = getattr(tensor, "to_local", lambda: tensor)().detach()
    if local.is_meta or local.layout is not torch.strided or local.is_quantized:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    return local.reshape(-1)[:: max(1, local.numel() // 64)][:65].cpu().to(torch.float64)


def _kind(module: nn.Module) -> list[str | bytes]:
    """The class of a module, its settings and hooks; unless it is PyTorch's, its floats, texts and code, too.

    Integers and flags may be counters of what ran.
    """
    parts: list[str | bytes] = [type(module).__qualname__, module.extra_repr()]
    if not type(module).__module__.startswith("torch."):
        plain = sorted((key, it) for key, it in vars(module).items() if isinstance(it, float | str))
        parts += [*map(repr, plain), *_code(module.forward, 0)]
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return parts + [part for hook in hooks for part in _code(hook, 0)]


def of_rows(arrays: Mapping[str, Any], sample_ids: Any) -> dict[str, Any]:
    """Shapes of precomputed features, some of their rows, and a digest of the identifiers."""
    some = [
        part
        for name, array in arrays.items()
        for row in (0, array.shape[0] // 2, array.shape[0] - 1)
        for part in (name, str(tuple(array.shape)), as_features(array[row : row + 1], name, counts=True))
    ]
    return {
        "type": "Precomputed",
        "values": _digest(*(piece for part in some for piece in _pieces(part, 0))),
        "sample_ids": None if sample_ids is None else _digest(*map(repr, sample_ids)),
    }


def of_loader(loader: Any) -> dict[str, Any]:
    """The identity of a loader, without asking it for a batch."""
    found: dict[str, Any] = {"batch_size": getattr(loader, "batch_size", None)}
    with suppress(TypeError, AttributeError):
        found["length"] = len(loader)
        found["samples"] = len(loader.dataset)
    return {key: value for key, value in found.items() if isinstance(value, int)}


def of_option(option: Any) -> Any:
    """An option as a result's settings spell it; for a callable, with a digest of its code and what it refers to."""
    return spelled(option, lambda function: "" if isinstance(function, type) else f" {_digest(*_code(function, 0))}")


def _code(function: Any, depth: int) -> list[str | bytes]:
    """What a callable does, as far as it is known: its code, constants, defaults and closure."""
    if depth > 3:
        return []
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.items()]
    elif isinstance(function, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType):
            return [getattr(function, "__qualname__", "")]
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        parts = [function.__code__, *(function.__defaults__ or ()), *cells]
    else:
        # For an object, the code of its class: what the object holds may change while it runs.
        return [type(function).__qualname__, *_code(type(function).__call__, depth + 1)]
    return [piece for part in parts for piece in _pieces(part, depth)]


def _pieces(part: Any, depth: int) -> list[str | bytes]:
    if isinstance(part, bytes):
        return [part]
    if isinstance(part, types.CodeType):
        inner = [item for item in part.co_consts if isinstance(item, types.CodeType)]
        plain = [item for item in part.co_consts if not isinstance(item, types.CodeType)]
        return [part.co_code, *(piece for it in (*plain, *part.co_names, *inner) for piece in _pieces(it, depth))]
    if isinstance(part, Tensor):
        return [str(tuple(part.shape)), part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()]
    if isinstance(part, nn.Module):
        return [type(part).__qualname__]
    if callable(part) and not isinstance(part, type):
        return _code(part, depth + 1)
    # Without a spelling of its own, an object is spelled by its address, which differs between processes.
    text = repr(part)
    return [type(part).__qualname__ if " at 0x" in text else text]


def _digest(*parts: str | bytes) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else part.encode("utf-8", "backslashreplace"))
        hasher.update(b"\0")
    return hasher.hexdigest()
