"""Run somebody's model as a guest: afterwards the model and torch's random state are as they were.

Everything here is undone by a method that may be called twice, so that Ctrl-C in the middle loses nothing: ``try:
undo() finally: undo()``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import ModelError, warn
from cka_hooks.recording.layers import wrapped_attribute
from cka_hooks.recording.snapshot import restore_torch_random, torch_random_state

# Who is measuring: the thread, and the ids of the modules.
_claims: dict[object, tuple[int, frozenset[int]]] = {}
# Who needs compiled code to run uncompiled, and the switch for it.
_lock = threading.Lock()
_eager: set[object] = set()
_stance: list[Any] = []
# Modules by class name that drop parts at random, and the attribute with the rate.
_RANDOM = {"DropPath": "drop_prob", "StochasticDepth": "p"}


def runnable(model: nn.Module) -> nn.Module:
    """The module to call, without wrappers that synchronise ranks, use several devices or run compiled code.

    ``FullyShardedDataParallel`` stays, since its parameters are whole only while it runs.
    """
    while (attribute := wrapped_attribute(model)) is not None and "fsdp" not in attribute:
        model = getattr(model, attribute)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all ranks that hold parts of the model: FSDP, tensor parallel."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def claim(owner: object, model: nn.Module) -> None:
    """Reserve a model for this thread, until :func:`release`. One thread may do so several times.

    Raises:
        ModelError: another thread is measuring the model or a part of it.
    """
    modules = frozenset(map(id, model.modules()))
    own = threading.get_ident()
    before = _claims.get(owner)
    # Claim first, then look: of two threads at the same time, at least one sees the other.
    _claims[owner] = own, modules
    alive = {thread.ident: thread.name for thread in threading.enumerate()}
    for thread, claimed in (before or (own, modules), *_claims.copy().values()):
        if thread != own and thread in alive and not modules.isdisjoint(claimed):
            _claims.pop(owner, None)
            if before is not None:
                _claims[owner] = before
            raise ModelError(
                f"the model, or a part of it, is being measured in thread {alive[thread]!r}: wait until that run "
                "has ended, or give each thread a copy of the model (copy.deepcopy(model))"
            )


def release(owner: object) -> None:
    """End a :func:`claim`. Does nothing if there is none."""
    _claims.pop(owner, None)


def run_eagerly(owner: object) -> None:
    """Make compiled code run uncompiled until `run_compiled`, since hooks do not fire in compiled code."""
    with _lock:
        _eager.add(owner)
        # A program that compiled something has imported this module. For others, the import would take seconds.
        if "torch._dynamo" in sys.modules and not _stance:
            _stance.append(torch.compiler.set_stance("force_eager"))


def run_compiled(owner: object) -> None:
    """End `run_eagerly`. Compiled code runs again when the last owner is done, in whatever order."""
    with _lock:
        _eager.discard(owner)
        if not _eager and _stance:
            _stance[0].__exit__(None, None, None)
            _stance.clear()


def remove_hooks(module: nn.Module, *owners: object) -> None:
    """Remove every forward hook that is a method of an owner, even if its registration was interrupted."""
    for hooks, marks in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        ours = [number for number, hook in hooks.items() if any(getattr(hook, "__self__", None) is o for o in owners)]
        for number in ours:
            hooks.pop(number, None)
            marks.pop(number, None)


def varies_in_train_mode(module: nn.Module) -> bool:
    """Whether a module's output in train mode depends on chance or on the other samples of the batch."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.RReLU):
        return True
    rate = _RANDOM.get(type(module).__name__)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        rate = "p"
    elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        rate = "dropout"
    return rate is not None and (getattr(module, rate, None) or 0) > 0


def warned_of_train_mode(varying: Mapping[str, nn.Module]) -> bool:
    """Warn if one of these modules is in train mode, and return whether it is."""
    names = [name for name, module in varying.items() if module.training]
    if names:
        warn(
            f"{len(names)} module(s) in train mode, {names[0]!r} ({type(varying[names[0]]).__name__}) first, make "
            "activations depend on chance or on the other samples of the batch: call model.eval() before the forward "
            "pass, and model.train() after it"
        )
    return bool(names)


class untouched:
    """Put the model in eval mode, and afterwards restore every mode, and every buffer to the bit.

    This sets flags one by one instead of calling ``eval()``, which some modules override to do more. A buffer or
    parameter that was None is None again.

    Raises:
        ModelError: another thread is measuring the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modes: list[tuple[nn.Module, bool]] = []
        self._kept: list[tuple[dict[str, Any], str, Tensor | None, Tensor | None, int]] = []

    def __enter__(self) -> None:
        try:
            claim(self, self._model)
            for module in self._model.modules():
                entries: dict[str, Any]
                for entries in (module._buffers, module._parameters):
                    for name, tensor in entries.items():
                        if tensor is None:
                            self._kept.append((entries, name, None, None, 0))
                        elif entries is module._buffers and not tensor.is_inference():
                            self._kept.append((entries, name, tensor, tensor.detach().clone(), tensor._version))
            self._modes = [(module, module.training) for module in self._model.modules()]
            for module, _ in self._modes:
                module.training = False
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            self._restore()
        finally:
            self._restore()

    def _restore(self) -> None:
        for module, training in self._modes:
            module.training = training
        for entries, name, tensor, copy, version in self._kept:
            if tensor is not None and copy is not None:
                _write_back(tensor, copy, version)
            if entries.get(name) is not tensor:
                entries[name] = tensor
        release(self)
        self._modes, self._kept = [], []


def _write_back(buffer: Tensor, copy: Tensor, version: int) -> None:
    if buffer.shape != copy.shape:
        # Resized in place, as observers of quantisation do.
        buffer.data = copy
    elif buffer._version != version:
        buffer.detach().copy_(copy)
    elif buffer.layout is torch.strided and 0 not in buffer.stride():
        # A write through `.data` does not count as a version, and neither does this. (Expanded tensors cannot be
        # written to.)
        buffer.data.copy_(copy)


class RandomStream:
    """A random stream for code that takes turns with the caller: neither sees the other's draws.

    Inside ``with``, the stream continues where the last block left it, at first from the caller's state. Afterwards
    the caller's state is as before, on the CPU and on every device in use.
    """

    def __init__(self) -> None:
        self._own: list[Tensor] | None = None

    def __enter__(self) -> None:
        self._outer = torch_random_state()
        try:
            if self._own is not None:
                restore_torch_random(self._own)
        except BaseException:
            restore_torch_random(self._outer)
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            self._own = torch_random_state()
        finally:
            restore_torch_random(self._outer)
