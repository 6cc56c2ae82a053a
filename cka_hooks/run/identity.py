"""Identify a model, a loader, a function or a setting, so that only the same run is resumed."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.arrays import as_features
from cka_hooks.options import spelled


def of_model(model: nn.Module) -> dict[str, Any]:
    """What a model's modules do; names, shapes and some numbers of its parameters and buffers."""
    kinds = [part for name, module in model.named_modules() for part in (name, *_kind(module))]
    names: list[str] = []
    some: list[Tensor] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach()
        if local.numel() and local.device.type != "meta" and local.layout is torch.strided and not local.is_quantized:
            numbers = local.reshape(-1)[:: max(1, local.numel() // 64)][:65]
            some.append(numbers.to(torch.float64 if local.device.type != "mps" else torch.float32))
    # One copy from each device instead of one for each tensor.
    values = [
        torch.cat([t for t in some if t.device == device]).cpu().numpy().tobytes()
        for device in dict.fromkeys(tensor.device for tensor in some)
    ]
    return {
        "type": type(model).__qualname__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "names and shapes": _digest(*names),
        "modules": _digest(*kinds),
        "values": _digest(*values),
    }


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
        "values": _digest(*(piece for part in some for piece in _piece(part, 0))),
        "sample_ids": None if sample_ids is None else _digest(*map(repr, sample_ids)),
    }


def of_loader(loader: Any) -> dict[str, Any]:
    """The identity of a loader, without asking it for a batch."""
    found: dict[str, Any] = {"batch_size": getattr(loader, "batch_size", None)}
    try:
        found["length"] = len(loader)
        found["samples"] = len(loader.dataset)
    except (TypeError, AttributeError):
        pass
    return {key: value for key, value in found.items() if isinstance(value, int)}


def of_option(option: Any) -> Any:
    """An option as a result's settings spell it; for a callable, a digest of its code and what it refers to."""
    if isinstance(option, Mapping):
        return {str(key): of_option(value) for key, value in option.items()}
    if isinstance(option, type) or not callable(option):
        if isinstance(option, Iterable) and not isinstance(option, str):
            return [of_option(item) for item in option]
        return spelled(option)
    return f"{spelled(option)} {_digest(*_code(option, 0))}"


def _code(function: Any, depth: int) -> list[str | bytes]:
    """What a callable does, as far as it is known: its code, constants, defaults and closure."""
    if depth > 3:
        return []
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.items()]
        return [piece for part in parts for piece in _piece(part, depth)]
    if not isinstance(function, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        # For an object, the code of its class: what the object holds may change while it runs.
        return [type(function).__qualname__, *_code(type(function).__call__, depth + 1)]
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return [getattr(function, "__qualname__", "")]
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    pieces = [*_constants(function.__code__), *(function.__defaults__ or ()), *cells]
    return [function.__code__.co_code, *(piece for part in pieces for piece in _piece(part, depth))]


def _constants(code: types.CodeType) -> list[Any]:
    inner = [item for item in code.co_consts if isinstance(item, types.CodeType)]
    plain = [item for item in code.co_consts if not isinstance(item, types.CodeType)]
    return [*plain, *code.co_names, *(part for one in inner for part in (one.co_code, *_constants(one)))]


def _piece(part: Any, depth: int) -> list[str | bytes]:
    if isinstance(part, bytes):
        return [part]
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
