"""Keep everything that a forward pass may change in a model and in random states, and restore it."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterable
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
        self._undo: list[Callable[[], object]] = []
        # Held, so that no other object can get the same id meanwhile.
        self._seen: dict[int, Any] = {}
        for module in model.modules():
            # Sharding replaces parameters before and after each forward pass.
            self._seen[id(module._parameters)] = module._parameters
            self._keep(vars(module))
        self._random = random_state()

    def restore(self) -> None:
        """Restore everything. Calling it again is harmless."""
        with torch.no_grad():
            for undo in self._undo:
                undo()
        states, python, numpy = self._random
        restore_torch_random(states)
        random.setstate(python)
        np.random.set_state(numpy)

    def drew(self) -> bool:
        """Whether random numbers have been drawn since."""
        states, python, numpy = random_state()
        before, python_before, numpy_before = self._random
        return (
            python != python_before
            or not all(map(torch.equal, states, before))
            or numpy[2] != numpy_before[2]
            or not np.array_equal(numpy[1], numpy_before[1])
        )

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen or isinstance(value, nn.Module | nn.Parameter):
            return
        self._seen[id(value)] = value
        if type(value) is Tensor:
            if value.layout is torch.strided and not (value.is_inference() or value.is_meta or value.is_nested):
                copy = value.detach().clone()
                self._undo.append(lambda: _write_back(value, copy))
        elif isinstance(value, np.ndarray):
            numbers = value.copy()
            self._undo.append(lambda: np.copyto(value, numbers))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, dict):
            items = dict(value)
            self._undo.append(lambda: _fill(value, items))
            self._keep_each(items.values())
        elif isinstance(value, list | deque):
            entries = list(value)
            self._undo.append(lambda: _fill_sequence(value, entries))
            self._keep_each(entries)
        elif isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: value.symmetric_difference_update(value ^ members))
        elif isinstance(value, tuple):
            self._keep_each(value)
        elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__") and not isinstance(value, type):
            self._keep(vars(value))

    def _keep_each(self, values: Iterable[Any]) -> None:
        values = list(values)
        for value in values if len(values) <= _MANY else ():
            self._keep(value)


def _write_back(tensor: Tensor, copy: Tensor) -> None:
    # Leave alone what has not changed: a graph that holds it would notice a write.
    if tensor.shape != copy.shape:
        # Resized in place, as observers of quantisation do.
        tensor.data = copy.clone()
    elif not torch.equal(tensor, copy):
        tensor.copy_(copy)


def _fill(mapping: dict[Any, Any], items: dict[Any, Any]) -> None:
    # The mapping is never empty in between, since Ctrl-C would then leave a module without its attributes.
    mapping.update(items)
    for key in [key for key in mapping if key not in items]:
        del mapping[key]


def _fill_sequence(sequence: list[Any] | deque[Any], entries: list[Any]) -> None:
    if list(map(id, sequence)) != list(map(id, entries)):
        sequence.clear()
        sequence.extend(entries)


def random_state() -> tuple[list[Tensor], Any, Any]:
    """The states of Python's, NumPy's and torch's random generators, on the CPU and on devices in use."""
    return torch_random_state(), random.getstate(), np.random.get_state()


def torch_random_state() -> list[Tensor]:
    """The states of torch's random generators, on the CPU and on devices in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else [])]


def restore_torch_random(states: list[Tensor]) -> None:
    """Go back to states of :func:`torch_random_state`."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
