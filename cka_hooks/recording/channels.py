"""Find the dimension of an activation that holds the channels: named, or known from the modules that just ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cka_hooks.errors import warn
from cka_hooks.names import PerLayer, first_few
from cka_hooks.recording.layers import torch_file
from cka_hooks.recording.outputs import tensors_in

# Kinds of modules, the dimension in which they put their channels, and the attribute with the number of channels.
# Classes of torchvision, timm and transformers without a base class in torch, or with channels elsewhere, go by name.
_DECLARED: dict[type[nn.Module] | str, tuple[int, str]] = {
    nn.modules.conv._ConvNd: (1, "out_channels"),
    nn.modules.batchnorm._NormBase: (1, "num_features"),
    nn.GroupNorm: (1, "num_channels"),
    nn.Linear: (-1, "out_features"),
    nn.Embedding: (-1, "embedding_dim"),
    nn.MultiheadAttention: (-1, "embed_dim"),
    nn.LayerNorm: (-1, "normalized_shape"),
    nn.RMSNorm: (-1, "normalized_shape"),
    "Conv1D": (-1, "nf"),
    "FrozenBatchNorm2d": (1, "weight"),
    "LayerNorm2d": (1, "normalized_shape"),
    "RmsNorm2d": (1, "normalized_shape"),
    "SimpleNorm2d": (1, "normalized_shape"),
}
# Modules of these files of torch.nn leave the channels where they are.
_TRANSPARENT = frozenset({"activation", "dropout", "padding", "pixelshuffle", "pooling", "upsampling"})


class Channels:
    """Finds the dimension with the channels, for activations that are averaged or reduced to one position.

    The dimension is known for the output of a module of a known kind, if it has as many channels there as the module
    declares, and for what torch's activations, dropouts and pools make of that very tensor. What comes after such a
    module counts as known if it has as many channels in the same place, and a different number in the other.
    Everything else is taken as (n, T, C) or (n, C, ...), with one warning if it matters.

    Args:
        names: the model's modules.
        channel_dim: the dimension in the layer's output, for every layer, or a mapping from layer pattern to it.
    """

    def __init__(self, names: Mapping[str, nn.Module], channel_dim: int | Mapping[str, int] | None) -> None:
        self._given = PerLayer(channel_dim, names, "channel_dim")
        self._found: dict[tuple[str, int], int] = {}
        self._guessed: dict[str, tuple[int, ...]] = {}
        self._has_warned = False
        self.restart()

    def restart(self) -> None:
        """Begin a forward pass. What one pass has found holds for all others."""
        self._follows = not self._found
        # Keyed by number of dimensions, since tokens made of images say nothing about images. Values: dimension,
        # channels.
        self._last: dict[int, tuple[int, int]] = {}
        self._known = WeakTensorKeyDictionary()

    def pass_through(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Learn from a module that has run."""
        tensor = next(tensors_in(output), None) if self._follows else None
        if tensor is None or tensor.ndim < 3:
            return
        dim = _declared_dim(module, tensor.shape)
        if dim is None and args and isinstance(args[0], Tensor) and args[0].ndim == tensor.ndim:
            dim = _kept_dim(module, self._known.get(args[0]))
        if dim is None and _puts_second(module, tensor.ndim):
            dim = 1
        if dim is not None:
            self._known[tensor] = dim
            self._last[tensor.ndim] = dim, tensor.shape[dim]

    def of(self, name: str, label: str, activation: Tensor, batch_dim: int) -> int | None:
        """The dimension with the channels; None for (n, d), which has no other.

        Args:
            name: name of the module.
            label: label of the layer.
            activation: the module's output.
            batch_dim: the dimension with its samples.
        """
        given: int | None = self._given.of(name, None)
        if given is not None or activation.ndim < 3:
            return given if activation.ndim > 2 else None
        key = label, activation.ndim
        if key not in self._found:
            self._found[key] = self._dim_of(label, activation, batch_dim)
        return self._found[key]

    def _dim_of(self, label: str, activation: Tensor, batch_dim: int) -> int:
        shape, rank = tuple(activation.shape), activation.ndim
        known: int | None = self._known.get(activation)
        if known is not None and known != batch_dim:
            return known
        others = [dim for dim in range(rank) if dim != batch_dim]
        usual, unusual = (others[-1], others[0]) if rank == 3 else (others[0], others[-1])
        elsewhere = {usual: unusual, unusual: usual}
        last, count = self._last.get(rank, (-1, 0))
        if last in elsewhere and shape[last] == count != shape[elsewhere[last]]:
            return last
        if rank > 3 or last == unusual:
            self._guessed[label] = shape
        return usual

    def warn(self) -> None:
        """Warn once about layers whose channels were assumed to be in the usual place."""
        if self._guessed and not self._has_warned:
            self._has_warned = True
            some = first_few([f"{label!r} {shape}" for label, shape in self._guessed.items()])
            warn(
                f"nothing says which dimension has the channels of {some}: images are taken as (n, C, ...) and "
                "tokens as (n, T, C). channel_dim= names it, such as channel_dim=1 or channel_dim={'stages.*': 1}"
            )


def matters(module: nn.Module) -> bool:
    """Whether a module's output shows where the channels are."""
    is_known = _declared(module) is not None or _is_transparent(module) or isinstance(module, nn.Fold | nn.Unfold)
    return is_known or type(module).__name__ == "Permute"


def _declared(module: nn.Module) -> tuple[int, str] | None:
    keys = (key for kind in type(module).__mro__ for key in (kind.__name__, kind) if key in _DECLARED)
    return _DECLARED.get(next(keys, ""))


def _declared_dim(module: nn.Module, shape: Sequence[int]) -> int | None:
    """The dimension in which a kind of module puts its channels, if it holds as many as the module declares."""
    dim, attribute = _declared(module) or (0, "")
    count = getattr(module, attribute, None)
    if getattr(module, "data_format", None) == "channels_first":
        dim = 1
    # Numbers of channels are given as such, as (C,), or as a tensor of that shape.
    count = getattr(count, "shape", count)
    fits = not isinstance(module, nn.modules.conv._ConvNd) or len(shape) == len(module.stride) + 2
    is_there = attribute and fits and count in (shape[dim], (shape[dim],))
    return dim % len(shape) if is_there else None


def _kept_dim(module: nn.Module, dim: int | None) -> int | None:
    """Where the channels are in a module's output, if they are known in its input."""
    if dim is None or _is_transparent(module):
        return dim
    dims = getattr(module, "dims", None) if type(module).__name__ == "Permute" else None
    return list(dims).index(dim) if isinstance(dims, Sequence) and dim in dims else None


def _is_transparent(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or torch_file(module) in _TRANSPARENT


def _puts_second(module: nn.Module, rank: int) -> bool:
    """Whether the module pools over all dimensions after the second, or makes patches. Both return (n, C, ...)."""
    is_pool = torch_file(module) == "pooling" and type(module).__name__.endswith(f"{rank - 2}d")
    return is_pool or isinstance(module, nn.Fold | nn.Unfold)
