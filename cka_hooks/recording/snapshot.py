"""Keep everything that a forward pass may change in a model and in random states, and restore it."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Containers with more entries than this hold data. Looking at each entry would take too long.
_MANY = 10_000


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
        self._random = random_state()

    def restore(self) -> None:
        """Restore everything. Calling it again is harmless."""
        for undo in self._undo:
            undo()
        states, python, numpy = self._random
        restore_torch_random(states)
        random.setstate(python)
        np.random.set_state(numpy)

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
    if id(value) in seen or isinstance(value, nn.Module | nn.Parameter):
        return
    seen[id(value)] = value
    contents: Any = ()
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not (value.is_inference() or value.is_meta or value.is_nested):
            yield partial(_write_back, value, value.detach().clone(), value._version)
    elif isinstance(value, np.ndarray):
        yield partial(np.copyto, value, value.copy())
    elif isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, dict):
        yield partial(_fill, value, dict(value))
        contents = value.values()
    elif isinstance(value, list | deque | set):
        yield partial(_refill, value, list(value))
        contents = value
    elif isinstance(value, tuple):
        contents = value
    elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__") and not isinstance(value, type):
        contents = [vars(value)]
    for item in contents if len(contents) <= _MANY else ():
        yield from undoing(item, seen)


def _write_back(tensor: Tensor, copy: Tensor, version: int) -> None:
    if tensor.shape != copy.shape:
        # Resized in place, as observers of quantisation do.
        tensor.data = copy.clone()
    elif tensor._version != version:
        tensor.detach().copy_(copy)
    elif 0 not in tensor.stride():
        # A write through `.data` does not count as a version, and neither does this: a graph that holds the tensor
        # would notice. (Expanded tensors cannot be written to.)
        tensor.data.copy_(copy)


def _fill(mapping: dict[Any, Any], items: dict[Any, Any]) -> None:
    # The mapping is never empty in between, since Ctrl-C would then leave a module without its attributes.
    mapping.update(items)
    for key in [key for key in mapping if key not in items]:
        del mapping[key]


def _refill(container: list[Any] | deque[Any] | set[Any], entries: list[Any]) -> None:
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(entries)


def random_state() -> tuple[list[Tensor], Any, Any]:
    """The states of Python's, NumPy's and torch's random generators, on the CPU and on devices in use."""
    numpy: Any = np.random.get_state()
    return torch_random_state(), random.getstate(), (numpy[0], numpy[1].tolist(), *numpy[2:])


def torch_random_state() -> list[Tensor]:
    """The states of torch's random generators, on the CPU and on devices in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else [])]


def restore_torch_random(states: list[Tensor]) -> None:
    """Go back to states of :func:`torch_random_state`."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])
