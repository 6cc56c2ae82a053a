"""Run somebody's model as a guest: afterwards the model and random states are as they were.

Everything here is undone by a method that may be called twice, so that Ctrl-C in the middle loses nothing: ``try:
undo() finally: undo()``.
"""

from __future__ import annotations

import dataclasses
import operator
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cka_hooks.errors import ModelError, warn

# Who is measuring in which thread -> the ids of the modules. Ctrl-C could leave a lock on it taken.
_claims: dict[tuple[object, int], frozenset[int]] = {}
# While anybody measures, the switch that makes compiled code run uncompiled.
_stance: list[Any] = []
# Modules that drop parts at random, and the attributes that may have the rate.
_RANDOM = nn.modules.dropout._DropoutNd | nn.RNNBase | nn.MultiheadAttention
_RANDOM_BY_NAME, _RATES = ("DropPath", "StochasticDepth"), ("p", "dropout", "drop_prob")
# What cannot change. A container may have millions of these.
_CONSTANT = frozenset({bool, int, float, complex, str, bytes, type(None)})


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all ranks that hold parts of the model: FSDP, tensor parallel."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def claim(owner: object, model: nn.Module) -> None:
    """Reserve a model for this thread, until :func:`release`. One thread may do so several times.

    Meanwhile compiled code runs uncompiled, since hooks do not fire in it.

    Raises:
        ModelError: another thread is measuring the model or a part of it.
    """
    modules = frozenset(map(id, model.modules()))
    own = threading.get_ident()
    # Claim first, then look: of two threads at the same time, at least one sees the other.
    _claims[owner, own] = modules
    alive = {thread.ident: thread.name for thread in threading.enumerate()}
    for (_, thread), claimed in _claims.copy().items():
        if thread != own and thread in alive and not modules.isdisjoint(claimed):
            del _claims[owner, own]
            raise ModelError(
                f"the model, or a part of it, is being measured in thread {alive[thread]!r}: wait until that run "
                "has ended, or give each thread a copy of the model (copy.deepcopy(model))"
            )
    # A program that compiled something has imported this module. For others, the import would take seconds.
    if "torch._dynamo" in sys.modules and not _stance:
        _stance.append(torch.compiler.set_stance("force_eager"))


def release(owner: object) -> None:
    """End the claims of an owner, if there are any. Compiled code runs again when the last owner is done."""
    for key in [key for key in _claims.copy() if key[0] is owner]:
        _claims.pop(key, None)
    while _stance and not _claims:
        _stance[-1].__exit__(None, None, None)
        _stance.pop()


def remove_hooks(modules: Iterable[nn.Module], *owners: object) -> None:
    """Remove every forward hook that is a method of an owner, even if its registration was interrupted."""
    owned = set(map(id, owners))
    for module in modules:
        for hooks, marks in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for number in [key for key, hook in hooks.items() if id(getattr(hook, "__self__", None)) in owned]:
                hooks.pop(number, None)
                marks.pop(number, None)


def varies_in_train_mode(module: nn.Module) -> bool:
    """Whether a module's output in train mode depends on chance or on the other samples of the batch."""
    if isinstance(module, _RANDOM) or type(module).__name__ in _RANDOM_BY_NAME:
        rates = (getattr(module, name, None) for name in _RATES)
        return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.RReLU)


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
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        try:
            claim(self, self._model)
            for module in self._model.modules():
                unset = {name: None for name, parameter in module._parameters.items() if parameter is None}
                self._undo.append(partial(vars(module).update, training=module.training))
                # A buffer that the forward pass registers stays, since a flag beside it may say that it is there.
                self._undo.append(partial(module._buffers.update, dict(module._buffers)))
                self._undo.append(partial(module._parameters.update, unset))
                self._undo += [undo for buffer in module._buffers.values() for undo in undoing(buffer, {})]
                module.training = False
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        for undo in self._undo:
            undo()
        release(self)
        self._undo = []


class Snapshot:
    """A copy of a model's buffers, its modules' attributes, and the contents of lists and tensors in these.

    Parameters are not copied, since a forward pass does not write to them. If an attribute holds an object of another
    class, the attribute is restored, but not the object's contents.

    Args:
        model: the model to copy, as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        # Sharding replaces parameters before and after each forward pass.
        seen: dict[int, Any] = {id(module._parameters): module._parameters for module in model.modules()}
        self._undo = [undo for module in model.modules() for undo in undoing(vars(module), seen)]
        states, python, numpy = self._random = random_state()
        self._undo += [partial(restore_torch_random, states), partial(random.setstate, python)]
        self._undo.append(partial(np.random.set_state, numpy))

    def restore(self) -> None:
        """Restore everything. Calling it again is harmless."""
        for undo in self._undo:
            undo()

    def drew(self) -> bool:
        """Whether random numbers have been drawn since."""
        states, *others = random_state()
        before, *others_before = self._random
        return others != others_before or not all(map(torch.equal, states, before))


def undoing(value: Any, seen: dict[int, Any]) -> Iterator[Callable[[], object]]:
    """Functions that restore a value, and what is in it, to what they are now. Calling one again is harmless.

    Args:
        value: a container, a tensor, an array or a generator of random numbers; nothing else is copied.
        seen: what was copied before, by its id. It is held, so that no other object can get the same id meanwhile.
    """
    for one in (todo := [value]):
        if id(one) in seen or isinstance(one, nn.Module):
            continue
        seen[id(one)] = one
        contents: Any = ()
        if isinstance(one, dict):
            yield partial(_fill, one, dict(one))
            contents = one.values()
        elif isinstance(one, list | deque | set):
            yield partial(_refill, one, list(one))
            contents = one
        elif isinstance(one, tuple):
            contents = one
        elif isinstance(one, Tensor):
            is_other = isinstance(one, nn.Parameter) or one.is_inference() or one.is_meta or one.is_nested
            if not is_other and one.layout is torch.strided:
                yield partial(_write_back, one, one.detach().clone(), one._version)
        elif isinstance(one, np.ndarray):
            yield partial(np.copyto, one, one.copy())
        elif isinstance(one, torch.Generator):
            yield partial(one.set_state, one.get_state())
        elif dataclasses.is_dataclass(one) and hasattr(one, "__dict__") and not isinstance(one, type):
            contents = [vars(one)]
        todo += [item for item in contents if type(item) not in _CONSTANT]


def _write_back(tensor: Tensor, copy: Tensor, version: int) -> None:
    if tensor.shape != copy.shape:
        # Resized in place, as observers of quantisation do.
        tensor.data = copy.clone()
    elif tensor._version != version:
        tensor.detach().copy_(copy)
    elif 0 not in tensor.stride() and not torch.equal(tensor, copy):
        # A write through `.data` does not count as a version, and neither does this: a graph that holds the tensor
        # would notice. (Expanded tensors, and memory that is only for reading, cannot be written to.)
        tensor.data.copy_(copy)


def _fill(mapping: dict[Any, Any], items: dict[Any, Any]) -> None:
    # The mapping is never empty in between, since Ctrl-C would then leave a module without its attributes.
    mapping.update(items)
    for key in mapping.keys() - items if len(mapping) > len(items) else ():
        del mapping[key]


def _refill(container: list[Any] | deque[Any] | set[Any], entries: list[Any]) -> None:
    if len(container) == len(entries) and all(map(operator.is_, container, entries)):
        return
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(entries)


class RandomStream:
    """A random stream for code that takes turns with the caller: neither sees the other's draws.

    Inside ``with``, the stream continues where the last block left it, at first from the caller's state. Afterwards
    the caller's state is as before, on the CPU and on every device in use.

    Attributes:
        states: where the stream is, as :func:`torch_random_state` returns it; empty before the first block.
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def __enter__(self) -> None:
        self._outer = torch_random_state()
        if self.states:
            restore_torch_random(self.states)

    def __exit__(self, *exception: object) -> None:
        try:
            self.states = torch_random_state()
        finally:
            restore_torch_random(self._outer)

    def go_on_from(self, states: Sequence[Tensor]) -> None:
        """Go on where another stream was, on the devices that are here.

        Raises:
            RuntimeError, TypeError: these are not the states of one.
        """
        for of_cpu in states[:1]:
            torch.Generator().set_state(of_cpu)
        self.states = list(states[: 1 + torch.cuda.device_count()])


def random_state() -> tuple[list[Tensor], Any, Any]:
    """The states of Python's, NumPy's and torch's random generators, on the CPU and on devices in use."""
    numpy: Any = np.random.get_state()
    return torch_random_state(), random.getstate(), (numpy[0], numpy[1].tolist(), *numpy[2:])


def torch_random_state() -> list[Tensor]:
    """The states of torch's random generators, on the CPU and on devices in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _uses_cuda() else [])]


def draw_anew() -> None:
    """Let all of these go on with other numbers. A device that is not in use yet keeps the seed that waits for it."""
    seed = torch.initial_seed() ^ 1
    torch.default_generator.manual_seed(seed)
    if _uses_cuda():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def restore_torch_random(states: list[Tensor]) -> None:
    """Go back to states of :func:`torch_random_state`."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])
