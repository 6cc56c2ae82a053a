"""What a loader brings: its order, whether that can be repeated, and which samples of its data set a batch has."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from cka_hooks.errors import BatchError, OptionError
from cka_hooks.recording.batches import is_plain, sample_count, with_tensors
from cka_hooks.recording.guest import random_state
from cka_hooks.recording.outputs import tensors_in
from cka_hooks.run.precomputed import Identifier, identifiers

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_IN_ORDER = (SequentialSampler, BatchSampler, range, type(None))
# How many numbers of a sample go into a batch's fingerprint.
_LOOKED_AT = 64


class Randomness:
    """The state of everything that a loader may draw from: torch, Python, NumPy and its own generators."""

    def __init__(self, loader: Any) -> None:
        found = (getattr(part, "generator", None) for part in _parts(loader))
        own = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
        self._generators = list(own.values())

    def state(self) -> dict[str, Any]:
        """All states, as numbers, text, lists and tensors."""
        (of_torch, *_), (version, words, gauss), (name, key, *rest) = random_state()
        return {
            "torch": of_torch,
            "python": [version, list(words), gauss],
            "numpy": [name, torch.tensor(key, device="cpu"), *rest],
            "generators": [generator.get_state() for generator in self._generators],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: the loader has other generators now, or the state is not a state.
        """
        version, words, gauss = state["python"]
        name, key, position, *rest = state["numpy"]
        # NumPy trusts a position, and would read beyond its memory.
        if len(state["generators"]) != len(self._generators) or not 0 <= position <= 624:
            raise ValueError("the loader had other random generators")
        torch.set_rng_state(state["torch"])
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((name, key.numpy().astype(np.uint32), position, *rest))
        for generator, its in zip(self._generators, state["generators"], strict=True):
            generator.set_state(its)


def _parts(loader: Any) -> list[Any]:
    """The loader and its samplers; None where it has none."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def shuffles_unseeded(loader: Any) -> bool:
    """Whether a loader's order comes from a random sampler that has no generator of its own."""
    return any(isinstance(part, _SHUFFLING) and part.generator is None for part in _parts(loader))


def out_of_order(loader: Any) -> str | None:
    """Why a loader may not bring the samples of its data set in order; None if nothing says so."""
    for part in _parts(loader)[1:]:
        if isinstance(part, DistributedSampler) and not part.shuffle:
            if part.num_replicas > 1:
                return "each rank's loader has a part of the samples"
        elif isinstance(part, (DistributedSampler, *_SHUFFLING)):
            return "the loader shuffles"
        elif type(part) not in _IN_ORDER and not isinstance(getattr(loader, "dataset", None), IterableDataset):
            return f"its sampler {type(part).__name__} may bring them in another order"
    return None


def lengths(loader: Any) -> set[int] | None:
    """The possible sizes of a loader: the number of samples of its data set, and of those that it brings.

    None if it does not say.
    """
    _, sampler, batch_sampler, _ = _parts(loader)
    if isinstance(loader, list | tuple):
        counts = [sample_count(batch) for batch in loader]
        return None if None in counts else {sum(count for count in counts if count)}
    if type(batch_sampler) not in (BatchSampler, type(None)) or not hasattr(sampler, "__len__"):
        return None
    samples = len(sampler)
    return {samples, samples - samples % loader.batch_size if getattr(loader, "drop_last", False) else samples}


def distributed_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """The `DistributedSampler` that decides which samples this rank gets."""
    return next((part for part in _parts(loader) if isinstance(part, DistributedSampler)), None)


def own_samples(loader: Any) -> int | None:
    """How many samples of a rank are its own; None if all are.

    A `DistributedSampler` without `drop_last` pads its list so that every rank gets the same number. The samples that
    it repeats come at the end of each rank's part.
    """
    sampler = distributed_sampler(loader)
    if sampler is None or sampler.drop_last:
        return None
    total = len(sampler.dataset)  # type: ignore[arg-type]
    return len(range(sampler.rank, total, sampler.num_replicas)) if sampler.total_size > total else None


def repeats_samples(loader: Any) -> str | None:
    """Why some samples may be counted twice, for loaders whose repeated samples look like any others."""
    for part in _parts(loader):
        if getattr(part, "even_batches", False) and getattr(part, "num_processes", 1) > 1:
            together = (part.batch_size or 1) * (1 if part.split_batches else part.num_processes)
            if len(loader.dataset) % together:
                return (
                    "accelerate repeats samples where they do not divide evenly into the batches of all processes, "
                    "and these count twice: prepare the loader with even_batches=False"
                )
    return None


def fingerprint(batch: Any) -> str:
    """A hash of some numbers of every sample and of every shape: equal for equal batches, and cheap.

    Only the shapes of tensors outside the CPU count, since reading them would wait. If all tensors are elsewhere, the
    hash begins with "?": equal hashes may then belong to different batches.
    """
    hasher, is_seen = hashlib.blake2b(digest_size=16), False
    for tensor in tensors_in(with_tensors(batch)):
        if tensor.is_nested:
            continue
        hasher.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        if is_plain(tensor) and tensor.device.type == "cpu" and tensor.numel():
            hasher.update(_some(tensor).numpy(force=True).tobytes())
            is_seen = True
    return ("" if is_seen else "?") + hasher.hexdigest()


def _some(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
    # A step without a common divisor with the width comes by every column of an image.
    step = max(1, rows.shape[1] // _LOOKED_AT)
    some = rows[:, :: next(it for it in itertools.count(step) if math.gcd(it, rows.shape[1]) == 1)]
    return some.to(torch.float64) if some.is_floating_point() else some


class Drawn:
    """A loader that tells which samples the last batch has.

    Only of a plain ``DataLoader`` over a data set with indices, if its workers do not persist and its collation keeps
    all samples in their order.

    Attributes:
        ids: their indices in the data set, behind any ``Subset``, or what its `sample_ids` has there; None where
            nothing surely tells.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.ids: list[Identifier] | None = None

    def __iter__(self) -> Iterator[Any]:
        drawn: deque[list[Any]] = deque()
        loader = self._loader
        if _keeps_order(loader):
            # A copy has the same data, samplers and generators, and the user's loader stays as it is.
            loader = copy.copy(loader)
            vars(loader)["batch_sampler"] = _noted(loader.batch_sampler, drawn)
        return self._told(iter(loader), drawn)

    def _told(self, stream: Iterator[Any], drawn: deque[list[Any]]) -> Iterator[Any]:
        for batch in stream:
            self.ids = self._ids_of(drawn.popleft()) if drawn else None
            yield batch

    def _ids_of(self, drawn: list[Any]) -> list[Identifier] | None:
        dataset: Any = self._loader.dataset
        try:
            found: Any = identifiers(drawn, "a sampler")
            while type(dataset) is Subset:
                found, dataset = [dataset.indices[index] for index in found], dataset.dataset
            names = getattr(dataset, "sample_ids", None)
            return identifiers(found if names is None else [names[index] for index in found], "sample_ids")
        except (OptionError, LookupError, TypeError):
            return None


class Replayed(Drawn):
    """A loader that is iterated once for each model, and has to bring the same batches each time.

    Attributes:
        known: a fingerprint of each batch of the first pass. Later passes have to have the same.

    Raises:
        OptionError: the loader is an iterator, which can be iterated only once.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise OptionError(
                "the loader is an iterator, which can be iterated only once: pass a DataLoader or a list"
            )
        super().__init__(loader)
        self._randomness = Randomness(loader)
        self._start = self._randomness.state()
        self.known: list[str] = []

    def rewind(self, model: str) -> Replayed:
        """Go back to the start, for the next model."""
        self._is_first, self._number, self._model = not self.known, 0, model
        self._randomness.restore(self._start)
        return self

    def __iter__(self) -> Iterator[Any]:
        """Make one pass over the loader.

        Raises:
            BatchError: a batch differs from the one for the first model.
        """
        for batch in super().__iter__():
            found = fingerprint(batch)
            if self._is_first:
                self.known.append(found)
            elif self.known[self._number : self._number + 1] != [found]:
                raise BatchError(
                    f"batch {self._number} (counted from 0) for model {self._model!r} differs from the one for the "
                    "first model. Each needs the same batches: seed the order, DataLoader(..., shuffle=True, "
                    "generator=torch.Generator().manual_seed(0)), and any random augmentation"
                )
            self._number += 1
            yield batch


def _noted(sampler: Iterable[Any], drawn: deque[list[Any]]) -> Iterator[Any]:
    """What a batch sampler draws, noted long before workers bring it."""
    for indices in sampler:
        drawn.append(list(indices))
        yield indices


def _keeps_order(loader: Any) -> bool:
    """Whether a loader brings what its batch sampler draws, all samples of it, in that order.

    Workers that persist are those of the user's loader and ask its own sampler.
    """
    collate = getattr(loader, "collate_fn", None)
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.batch_sampler is not None
        and not loader.persistent_workers
        and not isinstance(loader.dataset, IterableDataset)
        and getattr(loader, "in_order", True)
        and (collate is default_collate or str(getattr(collate, "__module__", "")).startswith("transformers.data."))
    )
