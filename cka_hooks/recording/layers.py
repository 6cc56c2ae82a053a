"""Turn names, globs, types and predicates into an ordered choice of modules. No tensors here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cka_hooks.errors import LayerError, ModelError, OptionError
from cka_hooks.names import closest, matching

Layer = str | type[nn.Module] | Callable[..., bool]
Layers = Layer | Sequence[Layer] | None

# The label of the model itself, whose name in `named_modules()` is empty.
ROOT = "(model)"
# Wrappers whose prefix is not part of the names that a user writes, and the attribute that holds the model.
_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
}
# What may be taken for a model, by the name of its class.
_NO_MODELS = {
    "ExportedProgram": "torch.export.unflatten(program) is one",
    "Tensor": "a state_dict is weights without a model, which model.load_state_dict(weights) puts into one",
    **dict.fromkeys(("list", "tuple"), "several models are a mapping with a name for each, {'a': a, 'b': b}"),
}
# Containers, which are never called themselves.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CALL = re.compile(r"#([1-9]\d*)\Z")


def unwrap(model: nn.Module, *, keeps_sharded: bool = False) -> nn.Module:
    """The user's own module inside ``DistributedDataParallel``, ``torch.compile`` and the like.

    Args:
        keeps_sharded: whether ``FullyShardedDataParallel`` stays, since its parameters are whole only while it runs.
    """
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__)
    attribute = next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
    if attribute is None or (keeps_sharded and "fsdp" in attribute):
        return model
    return unwrap(getattr(model, attribute), keeps_sharded=keeps_sharded)


def torch_file(module: nn.Module) -> str:
    """The file of torch.nn that defines a module's class, "" for a class from elsewhere."""
    folder, _, file = type(module).__module__.rpartition(".")
    return file if folder == "torch.nn.modules" else ""


def check_model(model: object) -> nn.Module:
    """Return `model` if forward hooks can see into it.

    Raises:
        ModelError: it is not an ``nn.Module``, it is of a kind whose submodules Python does not call, or it has lazy
            modules that never ran.
    """
    if isinstance(model, type):
        name = model.__name__
        raise ModelError(f"found the class {name}: pass an instance, {name}(), that has the weights you mean")
    if not isinstance(model, nn.Module):
        kind = type(model)
        advice = f": {_NO_MODELS[kind.__name__]}" if kind.__name__ in _NO_MODELS else ""
        raise ModelError(f"expected an nn.Module, found {kind.__module__}.{kind.__qualname__}{advice}")
    if any(cls.__name__ == "Model" and cls.__module__.startswith("keras.") for cls in type(model).__mro__):
        raise ModelError(
            f"the model is a Keras model ({type(model).__name__}), whose layers PyTorch does not see: give what "
            "keras.Model(model.inputs, [it.output for it in model.layers]) returns to CKAAccumulator().update(...)"
        )
    for name, module in model.named_modules():
        found = None
        if isinstance(module, torch.jit.ScriptModule):
            found = "a ScriptModule ({}), whose layers hooks do not see: give the eager model it was made from"
        elif _is_exported(module):
            found = "an exported program, which calls no submodules: torch.export.unflatten(program) does"
        elif any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            found = "a {}, whose first input sets its shapes: run one batch first, with torch.no_grad(): model(batch)"
        if found is not None:
            where = f"its submodule {name!r}" if name else "the model"
            raise ModelError(f"{where} is {found.format(type(module).__name__)}")
    return model


def refuse_weights(named: Mapping[str, object]) -> None:
    """Refuse a ``state_dict`` where models by name are expected: nobody names their own features "fc.weight".

    Raises:
        ModelError: this is a ``state_dict``.
    """
    are_tensors = all(isinstance(it, torch.Tensor) for it in named.values())
    if are_tensors and any(name.rpartition(".")[2] in ("weight", "bias") for name in named):
        check_model(next(iter(named.values())))


def _is_exported(module: nn.Module) -> bool:
    """Whether this is a graph of operators. Graphs of ``torch.fx.symbolic_trace`` call modules, so they are not."""
    nodes = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
    called = {node.target for node in nodes if node.op == "call_module"}
    return any(node.op == "get_attr" for node in nodes) and not called - {"_guards_fn"}


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that could be a layer, under the names that the user knows, in order of definition.

    The names come without the ``module.`` and ``_orig_mod.`` of wrappers, and parametrizations are left out. A module
    that has several names is listed under each of them.
    """
    names: dict[str, nn.Module] = {}

    def walk(module: nn.Module, name: str, above: tuple[nn.Module, ...]) -> None:
        module = unwrap(module)
        if any(module is other for other in above):
            return
        names.setdefault(name, module)
        for child_name, child in module._modules.items():
            # Where a module is parametrized, its child of this name is what does it.
            if child is not None and child_name != "parametrizations":
                walk(child, f"{name}.{child_name}" if name else child_name, (*above, module))

    walk(model, "", ())
    root = names.pop("")
    return {**names, ROOT: root}


@dataclass(frozen=True)
class Selection:
    """A chosen module.

    Attributes:
        name: its name; the first one if it has several and none was asked for.
        module: the module.
        call: which call is a layer, counted from 1; None if all of them are.
        part: which part of the output or input is the layer: the path after the colon, "" for the default.
        named: whether the user asked for this layer by name, so that leaving it out is an error.
        also: other names of the same module that were asked for.
    """

    name: str
    module: nn.Module
    call: int | None = None
    part: str = ""
    named: bool = False
    also: tuple[str, ...] = ()

    def label(self, call: int, name: str | None = None) -> str:
        """The label of one call of the layer, such as ``name#2:part``."""
        return (name or self.name) + (f"#{call}" if call > 1 else "") + (f":{self.part}" if self.part else "")


def select_layers(model: nn.Module, layers: Layers = None) -> list[Selection]:
    """The modules that `layers` choose, in order of definition. None chooses all modules that can be called.

    Args:
        model: the model, wrapped or not.
        layers: None; a name as ``named_modules()`` prints it; a glob, in which ``*`` and ``?`` stop at dots and
            ``**`` does not; a module type; a predicate ``(name, module) -> bool`` or ``(module) -> bool``; or a
            sequence of these. An exact name wins over a glob. ``name#2`` is the second call of a module in one
            forward pass. ``name:0``, ``name:key`` and ``name:input`` are parts of what it returned or was given.

    Raises:
        LayerError: an entry matches no module. The message has the closest names.
        OptionError: an entry is of another type.
    """
    candidates = named_layers(model)
    if layers is None:
        layers = lambda name, module: not isinstance(module, _CONTAINERS)  # noqa: E731
    is_one = isinstance(layers, str | torch.Tensor) or callable(layers)
    entries = list(layers) if isinstance(layers, Iterable) and not is_one else [layers]
    if not entries:
        raise LayerError("layers is empty: name at least one layer, or pass None for every leaf module that runs")
    found: dict[tuple[int, int | None, str], Selection] = {}
    for entry in entries:
        chosen = _chosen_by(entry, candidates)
        if not chosen:
            raise LayerError(_no_match(entry, candidates))
        for choice in chosen:
            key = (id(choice.module), choice.call, choice.part)
            before = found.get(key)
            if before is None or (choice.named and not before.named):
                found[key] = choice
            elif choice.named and choice.name != before.name:
                found[key] = replace(before, also=(*before.also, choice.name))
    order = {name: i for i, name in enumerate(candidates)}
    return sorted(found.values(), key=lambda selection: order[selection.name])


def _chosen_by(entry: Any, candidates: dict[str, nn.Module]) -> list[Selection]:
    if isinstance(entry, str):
        return _by_name(entry, candidates)
    if isinstance(entry, nn.Module):
        name = next((f"pass its name, {name!r}" for name, module in candidates.items() if module is entry), None)
        where = name or "it is not part of the model"
        raise OptionError(f"layers has a module itself, of type {type(entry).__name__}: {where}")
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return [Selection(name, module) for name, module in candidates.items() if isinstance(module, entry)]
    if callable(entry) and not isinstance(entry, type):
        keep = _predicate(entry)
        return [Selection(name, module) for name, module in candidates.items() if keep(name, module)]
    raise OptionError(f"layers has {entry!r}: expected a name, a glob, a module type or a predicate")


def _predicate(entry: Callable[..., bool]) -> Callable[[str, nn.Module], bool]:
    try:
        inspect.signature(entry).bind("name", None)
    except (TypeError, ValueError):
        return lambda name, module: bool(entry(module))
    return lambda name, module: bool(entry(name, module))


def _by_name(entry: str, candidates: dict[str, nn.Module]) -> list[Selection]:
    """What a name or glob chooses, with a call and a part. Names may hold colons: the longest one counts."""
    readings: list[tuple[str, int | None, str]] = []
    pieces = entry.split(":")
    for end in range(len(pieces), 0, -1):
        pattern, *numbers = _CALL.split(":".join(pieces[:end]))
        readings.append((pattern, int(numbers[0]) if numbers else None, ":".join(pieces[end:])))
    for pattern, call, part in readings:
        if pattern in candidates:
            return [Selection(pattern, candidates[pattern], call, part, named=True)]
    layers = [name for name, it in candidates.items() if name != ROOT and not isinstance(it, _CONTAINERS)]
    for pattern, call, part in readings:
        if found := matching(pattern, layers):
            return [Selection(name, candidates[name], call, part) for name in found]
    return []


def _no_match(entry: Any, candidates: dict[str, nn.Module]) -> str:
    if not isinstance(entry, str):
        kinds = sorted({type(module).__name__ for module in candidates.values()})
        what = getattr(entry, "__qualname__", repr(entry))
        return f"no module matches {what}: the model has modules of the types {', '.join(kinds[:12])}"
    close = ", ".join(map(repr, closest(entry, [name for name in candidates if name != ROOT]))) or "none"
    return f"no layer matches {entry!r}: the closest names are {close}; `*` stops at dots and `**` crosses them"
