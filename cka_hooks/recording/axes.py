"""Find the dimension of an activation that holds the samples: named, known, or confirmed by a probe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import nn

from cka_hooks.errors import BatchError
from cka_hooks.names import PerLayer
from cka_hooks.recording.batches import Given
from cka_hooks.recording.layers import torch_file
from cka_hooks.recording.outputs import NotRecordable, tensors_in
from cka_hooks.recording.probe import Probe, Take

# Modules of these files of torch.nn keep the samples where they are, and the number of dimensions. GLU may halve any.
_KEEPING = frozenset(
    {"activation", "batchnorm", "conv", "dropout", "instancenorm", "linear", "normalization", "pooling"}
)
_SELF_ATTENTIVE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class SampleDimension:
    """Finds the dimension with the samples: named, known from the kinds of all modules, or confirmed by a probe.

    Args:
        names: the model's modules.
        batch_dim: the dimension for every layer and for the batch itself, or a mapping from layer pattern to it.

    Attributes:
        samples: number of samples in the current batch, None if nothing says it.
        found: for each label, the dimension that a probe confirmed, None if there is none, or why it is not known.
        is_settled: whether this has been found out, or need not be.
        evidence: for each label with a dimension, how that was found.
        sequence_first: modules with ``batch_first=False``, and their names.
    """

    def __init__(self, names: Mapping[str, nn.Module], batch_dim: int | Mapping[str, int] | None) -> None:
        self._given = PerLayer(batch_dim, names, "batch_dim")
        self._everywhere = isinstance(batch_dim, int)
        self.sequence_first = {module: name for name, module in names.items() if _is_sequence_first(module)}
        # Parts of these may say otherwise.
        parts = (part for module in self.sequence_first for part in module.modules())
        self._second = {part for part in parts if getattr(part, "batch_first", False) is False}
        self._inputs: dict[str, int] = {}
        self.samples: int | None = None
        self.found: dict[str, int | str | None] = {}
        self._ranks: dict[str, int] = {}
        self.is_settled = self._everywhere
        self._is_plain = False
        self.evidence: dict[str, str] = {}

    def start(self, given: Given) -> None:
        """Begin a batch. If the dimension is named for all layers, the first one says how many samples there are."""
        self.samples = given.shape[0] if given.shape and not self._everywhere else None

    def settle_plain(self, model: nn.Module, rank: int) -> None:
        """Skip the probe if the kinds of all modules already say it, for an (n, ...) batch of this rank."""
        if not self.is_settled:
            self._is_plain = self.is_settled = _plain_rank(rank, model) is not None

    def of(self, name: str, label: str, shape: tuple[int, ...]) -> int:
        """The dimension of `shape` that holds the samples.

        Raises:
            NotRecordable: there is none, or it is not known.
        """
        given = self._given.of(name, None)
        if given is not None:
            is_one = -len(shape) <= given < len(shape)
            if is_one and self.samples is None:
                self.samples = shape[given]
            if not is_one or shape[given] != self.samples:
                raise NotRecordable(f"batch_dim={given} of {shape} does not have size {self.samples}, the batch size")
            self.evidence[label] = "named"
            return int(given) % len(shape)
        if self._ranks.setdefault(label, len(shape)) != len(shape):
            raise NotRecordable(
                f"has {len(shape)} dimensions in a batch and {self._ranks[label]} in the first: keep that of the "
                "samples in a batch of one (squeeze() drops it), or pass batch_dim="
            )
        found = 0 if self._is_plain else self.found.get(label, "was not reached by the probe of the first batch")
        if not self.found and not self.is_settled:
            found = (
                "has its samples in a dimension that nothing confirmed, since only parts of the model were called "
                "(compare() and Comparison run all of it on a part of the batch first)"
            )
        if isinstance(found, str):
            raise NotRecordable(f"{found}; pass batch_dim= to say which dimension holds the samples")
        dim = self._confirmed(found, shape)
        self.evidence[label] = "known" if self._is_plain else "confirmed by a probe"
        return dim

    def _confirmed(self, dim: int | None, shape: tuple[int, ...]) -> int:
        samples, first = self.samples, shape[0] if shape else 0
        if dim is not None and dim < len(shape) and shape[dim] == samples:
            return dim
        several = 'with per="position", features=lambda rows: rows, each entry of dimension 0 is a sample'
        if samples and first > samples and first % samples == 0:
            why = f": {first // samples} windows, heads or beams of each are folded into dimension 0 ({several})"
        elif first == 1:
            why = ": it is the same for all samples"
        else:
            why = f". If it has several entries of each sample, such as nodes of graphs: {several}"
        raise NotRecordable(f"no dimension of {shape} has size {samples}, the batch size{why}")

    def is_second(self, module: nn.Module, *, is_first_output: bool) -> bool:
        """Whether PyTorch's documentation of the module puts the samples in dimension 1."""
        # Hidden states are (layers, n, d) whatever batch_first says. Attention weights are always (n, ...).
        return module in self._second if is_first_output else isinstance(module, nn.RNNBase)

    def look(self, module: nn.Module, given: Any, show: Take) -> None:
        """Show a probe the input of a module with ``batch_first=False``, too."""
        tensor = next(tensors_in(given), None)
        if module in self.sequence_first and tensor is not None and tensor.ndim > 2 and tensor.is_floating_point():
            # No layer has this label.
            label = f"{type(module).__name__} {self.sequence_first[module]!r} with batch_first=False"
            self._inputs.setdefault(label, tensor.shape[1])
            show(label, tensor, False)

    def confirm(self, probe: Probe, shape: tuple[int, ...]) -> None:
        """Find out with a probe what nothing names; see :meth:`cka_hooks.recording.probe.Probe.sample_dimensions`.

        Args:
            shape: shape of the batch, samples first.

        Raises:
            BatchError: a module with ``batch_first=False`` gets its samples in dimension 0, so either the loader or
                the module is not what its user thinks.
        """
        self.found, problem = probe.sample_dimensions()
        # If the model cannot run on the whole batch, it may run on the next one.
        self.is_settled = problem is None
        for label, second in self._inputs.items():
            if self.found.get(label) == 0:
                raise BatchError(
                    f"a batch of shape {shape} is read as {shape[0]} samples, and {label} reads it as {second}: pass "
                    "batch_dim=1 if the loader is right, or build the module with batch_first=True"
                )


def _is_sequence_first(module: nn.Module) -> bool:
    attention = module.self_attn if isinstance(module, _SELF_ATTENTIVE) else module
    return getattr(attention, "batch_first", None) is False


def _plain_rank(rank: int | None, module: nn.Module) -> int | None:
    """The rank of a module's output for an (n, ...) tensor of `rank`; None unless it surely keeps the samples.

    This covers torch's convolutions, linear layers, norms, pools, activations, dropouts and ``Flatten``, and a
    ``Sequential`` of them. In the ``forward`` of any other module, anything may happen in between.
    """
    kind = type(module)
    if rank is None or rank < 2 or "forward" in vars(module):
        return None
    if kind is nn.Sequential:
        after: int | None = rank
        return reduce(_plain_rank, module.children(), after)
    if isinstance(module, nn.Flatten):
        return rank - (module.end_dim % rank - module.start_dim) if module.start_dim > 0 else None
    # What has its number of dimensions in its name also takes one sample without a batch.
    spatial = re.search(r"(\d)d$", kind.__name__)
    fits = not spatial or rank == int(spatial[1]) + 2 or (rank == 2 and kind is nn.BatchNorm1d)
    return rank if torch_file(module) in _KEEPING and fits and kind is not nn.GLU else None
