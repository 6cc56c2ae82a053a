"""Running somebody's model as a guest: afterwards it, and torch's random state, are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cka_hooks.recording.layers import wrapped_attribute


def runnable(model: nn.Module) -> nn.Module:
    """The module to call: without wrappers that synchronise ranks, spread over devices or run compiled code.

    ``FullyShardedDataParallel`` stays, since its parameters are whole only while it runs.
    """
    while (attribute := wrapped_attribute(model)) is not None and "fsdp" not in attribute:
        model = getattr(model, attribute)
    return model


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and after it every mode, and every buffer to the bit, as before.

    The flags are set one by one and not by ``eval()``, which some modules override to do more.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor, int]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_inference():
                buffers.append((module, name, buffer, buffer.detach().clone(), buffer._version))
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, copy, version in buffers:
                if buffer._version != version:
                    buffer.copy_(copy)
                elif buffer.layout is torch.strided and 0 not in buffer.stride():
                    # What a module wrote through `.data` counts as no version, and neither does this. (Expanded
                    # tensors cannot be written to.)
                    buffer.data.copy_(copy)
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer


class RandomStream:
    """Torch's random state for code that runs in turns with the caller's: neither sees the other's draws.

    Inside ``with`` the stream goes on where the last block left it (at first: from the caller's state), and
    after it the caller's state is as before, on the CPU and on every device in use.
    """

    def __init__(self) -> None:
        self._own: list[Tensor] | None = None

    def __enter__(self) -> None:
        self._outer = self._state()
        if self._own is not None:
            self._restore(self._own)

    def __exit__(self, *exception: object) -> None:
        self._own = self._state()
        self._restore(self._outer)

    @staticmethod
    def _state() -> list[Tensor]:
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else [])]

    @staticmethod
    def _restore(states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if states[1:]:
            torch.cuda.set_rng_state_all(states[1:])
