"""Find out which positions of which layers are padding: a mask is used only where it is known to belong.

A layer that has as many positions as a mask need not belong to it: a picture may have as many as its caption. So some
samples of the first batch run once more, with fewer positions of what the mask describes. The dimensions that follow
have its positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cka_hooks.errors import BatchError, OptionError, warn
from cka_hooks.names import PerLayer, first_few
from cka_hooks.recording import batches
from cka_hooks.recording.layers import ROOT
from cka_hooks.recording.probe import Glance, Probe, is_same

MaskOf = Callable[[Any], Tensor | None]
MaskOption = MaskOf | Mapping[str, MaskOf | None] | None
# A key of the batch, or the user's function.
Source = str | MaskOf
# Makes a mask of so many positions from one of others.
Frames = Callable[[int, Tensor], Tensor]
# The name of a model, the numbers of positions in its layers, and what makes a mask of these.
Way = tuple[str, tuple[int, ...], Frames | None]

MASK, DECODER_MASK, LABELS = "attention_mask", "decoder_attention_mask", "labels"
# The value of labels that losses leave out.
_IGNORED = -100
_LENGTHS, _FRAMES = "_get_feat_extract_output_lengths", "_get_feature_vector_attention_mask"
# What is wrong with the padding of some layers.
_KEPT = "counts as data: the attention mask has zeros, and features='flatten' keeps them ('mean' and 'last' do not)"
_UNUSED = (
    "counts as data: the {} has zeros and was not used, since these layers are not known to have its positions. "
    "mask= names it: a function of the batch that returns (n, T), or a mapping from layer pattern to such functions"
)
_BY_SIZE = "was left out by size, which confirms nothing: pass mask= as a mapping from layer pattern to the function"
_SUSPECT = (
    "counts as data: {}, and was not used. With features='mean', 'token' or 'last', mask=lambda batch: {} uses it, "
    "as (n, T) for T positions of a layer and nonzero where one counts"
)


class _Fit(NamedTuple):
    """The dimensions of a layer with a mask's positions, and how to turn the mask into one of these positions."""

    dims: tuple[int, ...]
    frames: Frames | None = None


# A layer that does not depend on what the mask describes, and one that no probe showed. Compared by identity.
_APART, _UNKNOWN = _Fit(()), _Fit(())


class Padding:
    """Finds the masks of each batch, and which mask belongs to the positions of which layer.

    Args:
        names: the model's modules.
        mask: a function of the batch that returns its mask (n, T), nonzero where a position counts; or a mapping from
            layer pattern to such a function, or to None for no mask. None: the masks that the batch has under the
            names that transformers uses.

    Raises:
        OptionError: `mask` is anything else.
    """

    def __init__(self, names: Mapping[str, nn.Module], mask: MaskOption) -> None:
        self._given = PerLayer(mask, names, "mask")
        for value in self._given.values:
            if value is not None and not callable(value):
                raise OptionError(
                    f"mask= has {type(value).__qualname__}: expected a function of a batch that returns the mask "
                    "(n, T), such as lambda batch: batch[1], or a mapping from layer pattern to such functions"
                )
        self._is_named = isinstance(mask, Mapping)
        self._model = names[ROOT]
        self._speech = {name: it for name, it in names.items() if hasattr(it, _FRAMES)}
        self._fits: dict[Source, dict[str, _Fit]] = {}
        self._found: dict[Source, Tensor] = {}
        self._framed: dict[tuple[Source, int], Tensor] = {}
        self._is_first = True
        self._looks = not self._is_named
        self._suspect: str | None = None
        # What is wrong -> labels of the layers.
        self._wrong: dict[str, dict[str, None]] = defaultdict(dict)
        self._warned: set[str] = set()

    # The masks of a batch

    def start(self, batch: Any, form: batches.Form, samples: int | None) -> None:
        """Begin a forward pass of a batch.

        Raises:
            BatchError: `mask` did not return a mask of the batch.
        """
        self._found, self._framed = {}, {}
        for function in filter(None, self._given.values):
            mask = function(batch)
            if mask is not None:
                self._found[function] = _checked(mask, samples)
        where, fields = _fields(batch, form)
        if self._is_named or not any(self._given.values):
            masks = {key: fields.get(key) for key in (MASK, DECODER_MASK)}
            labels = fields.get(LABELS)
            makes_input = hasattr(getattr(self._model, "config", None), "is_encoder_decoder")
            has_mask = masks[DECODER_MASK] is not None or not isinstance(labels, Tensor)
            if makes_input and not has_mask and batches.keeps_labels(self._model, LABELS, fields):
                masks[LABELS] = labels != _IGNORED
            self._found |= {key: it for key, it in masks.items() if isinstance(it, Tensor) and it.ndim == 2}
            if self._looks:
                self._suspect = _suspect(batch, form, where, fields)
                self._looks = self._suspect is None
        vars(self).pop("_has_zeros", None)

    @cached_property
    def _has_zeros(self) -> bool:
        """Whether a mask of this batch has zeros. Reading one on an accelerator waits: only in the first pass."""
        seen = (mask for mask in self._found.values() if self._is_first or mask.device.type == "cpu")
        return any(not bool((mask != 0).all()) for mask in seen)

    @property
    def needs_probe(self) -> bool:
        """Whether the batch has a mask whose layers are not known yet."""
        return not self._fits.keys() >= self._found.keys()

    @property
    def is_due(self) -> bool:
        """Whether the warning about padding that is kept as data may still come."""
        return self._suspect is not None or (_KEPT not in self._warned and self._has_zeros)

    # Which layer has which

    def confirm(self, probe: Probe, samples: int) -> None:
        """Find out with a probe which dimensions of which layers have the positions of the batch's masks.

        Args:
            probe: probe of the batch.
            samples: number of samples in the batch.
        """
        for source, mask in self._found.items():
            if source not in self._fits:
                can_shorten = len(mask) == samples and mask.shape[1] > 1
                self._fits[source] = self._fits_of(source, probe, mask.shape[1]) if can_shorten else {}

    def _fits_of(self, source: Source, probe: Probe, length: int) -> dict[str, _Fit]:
        """How a mask fits each layer. Empty if that is not known, as for layers after an error."""
        # One step of a recording stands for many of its numbers.
        less = length - (max(1, length // 4) if self._speech else 1)
        few, ways = probe.first.samples, list(self._ways(length, less))
        whole: list[dict[str, _Fit]] = []
        broken: list[dict[str, _Fit]] = []
        for tries in _tries(probe.few, few, length, source, self._found[source][probe.chosen]):
            for chosen in tries:
                look = probe.look(_shortened(probe.few, few, length, less, chosen), few)
                both = look.seen.keys() & probe.first.seen.keys()
                fits = {label: _followed(label, probe.first.seen[label], look.seen[label], ways) for label in both}
                followed = {label: fit for label, fit in fits.items() if fit.dims}
                if followed:
                    (broken if look.problem else whole).append(followed if look.problem else fits)
            if whole:
                break
        # If two parts of the batch may be what the mask describes, neither is known to be.
        return found[0] if len(found := whole or broken) == 1 else {}

    def _ways(self, *lengths: int) -> Iterator[Way]:
        """What a layer may have of so many positions: these, or the frames that a speech model makes of them."""
        yield ROOT, lengths, None
        for name, module in self._speech.items():
            for how in ({"add_adapter": False}, {"add_adapter": True}, {}):
                with suppress(AttributeError, TypeError, ValueError, RuntimeError):
                    count = getattr(module, _LENGTHS)
                    sizes = tuple(int(count(torch.tensor(length, device="cpu"), **how)) for length in lengths)
                    yield name, sizes, partial(getattr(module, _FRAMES), **how)

    def of(self, name: str, label: str, shape: tuple[int, ...]) -> list[tuple[Tensor, tuple[int, ...]]]:
        """The masks of a layer, each with the dimensions whose positions it describes.

        Args:
            name: name of the module.
            label: label of the layer.
            shape: shape of the module's output.
        """
        masks, unused = [], None
        for source in self._sources(name, label, shape):
            mask, fit = self._found[source], self._fit(source, label)
            if callable(source) and (fit is _UNKNOWN or (self._is_named and not fit.dims)):
                # Only the user can know.
                fit = _Fit(tuple(dim for dim, size in enumerate(shape) if dim > 0 and size == mask.shape[1]))
                if fit.dims and not self._is_named:
                    self._note(_BY_SIZE, label)
            if fit.frames is not None:
                key = source, shape[fit.dims[0]]
                if key not in self._framed:
                    self._framed[key] = fit.frames(key[1], (mask != 0).long())
                mask = self._framed[key]
            dims = tuple(dim for dim in fit.dims if dim < len(shape) and shape[dim] == mask.shape[1])
            if dims:
                masks.append((mask, dims))
            elif fit is not _APART:
                unused = f"batch's {source}" if isinstance(source, str) else "mask"
        if unused is not None and not masks:
            self._note(_UNUSED.format(unused), label)
        return masks

    def keeps(self, name: str, label: str, shape: tuple[int, ...]) -> None:
        """Note that a layer keeps all positions as data. An unconfirmed one may be padded if sizes are alike."""
        for source in self._sources(name, label, shape) if self.is_due else ():
            fit, ways = self._fit(source, label), self._ways(self._found[source].shape[1])
            is_alike = any(size in shape[1:] for _, (size,), _ in ways)
            if is_alike if fit is _UNKNOWN else fit.dims:
                self._note(_KEPT, label)

    def _fit(self, source: Source, label: str) -> _Fit:
        return self._fits.get(source, {}).get(label, _UNKNOWN)

    def _sources(self, name: str, label: str, shape: tuple[int, ...]) -> list[Source]:
        """Which of the batch's masks may be those of a layer."""
        if len(shape) < 3:
            return []
        if self._suspect is not None:
            self._wrong[self._suspect][label] = None
        given = self._given.of(name, LABELS)
        if callable(given):
            return [given] if given in self._found else []
        return [source for source in self._found if isinstance(source, str) and (given or not self._is_named)]

    # Warnings

    def _note(self, wrong: str, label: str) -> None:
        if wrong not in self._warned and self._has_zeros:
            self._wrong[wrong][label] = None

    def warn(self) -> None:
        """At the end of a pass, warn once about padding that counts as data."""
        for wrong, labels in self._wrong.items():
            warn(f"padding in {first_few([*map(repr, labels)], 'more layers')} {wrong}")
        self._warned.update(self._wrong)
        self._wrong.clear()
        self._suspect, self._is_first = None, False


def _checked(mask: Any, samples: int | None) -> Tensor:
    found = torch.as_tensor(mask, device="cpu") if isinstance(mask, np.ndarray) else mask
    if isinstance(found, Tensor) and found.ndim == 2 and samples in (None, len(found)):
        return found
    what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__qualname__
    raise BatchError(
        f"mask= returned {what} for a batch of {samples} samples, expected (n, T), nonzero where one counts"
    )


def _fields(batch: Any, form: batches.Form) -> tuple[str, dict[str, Any]]:
    """Where a batch has fields by name, and these."""
    first = form.input_of(batch)
    last = batch[-1] if isinstance(batch, tuple) and batch and isinstance(batch[-1], Mapping) else None
    if fields := batches.fields_of(first):
        return "batch" if first is batch else "batch[0]", fields
    return "batch[-1]", batches.fields_of(last) or {}


def _followed(label: str, before: Glance, after: Glance, ways: list[Way]) -> _Fit:
    sizes = list(zip(before.shape, after.shape, strict=False))
    for name, wanted, frames in ways:
        dims = tuple(dim for dim, size in enumerate(sizes) if size == wanted)
        if dims and (name == ROOT or label.startswith(f"{name}.")):
            return _Fit(dims, frames)
    return _APART if is_same(before, after) else _Fit(())


def _tries(batch: Any, samples: int, length: int, source: Source, mask: Tensor) -> Iterator[list[list[Any]]]:
    """Lists of items that a mask may describe, the likely ones first. All have as many positions as it.

    Tokens and recordings are (n, T). If the model cannot run with fewer of these, if they decide nothing, or if the
    mask alone is one, it belongs to something else of that length.
    """
    found: list[tuple[Any, str]] = []

    def look(item: Any, key: str) -> None:
        is_long = isinstance(item, Tensor | np.ndarray) and tuple(item.shape[:2]) == (samples, length)
        own = LABELS if key in batches.LABELS else DECODER_MASK if key.startswith("decoder_") else MASK
        if is_long and (callable(source) or source == own):
            found.append((item, key))

    batches.mapped(batch, look)
    tokens, others = [it for it, _ in found if it.ndim == 2], [it for it, _ in found if it.ndim > 2]
    is_alone = all(it.ndim > 2 or "mask" in key or _is_alike(it, mask) for it, key in found)
    if tokens and not (is_alone and others):
        yield [tokens]
    yield [[*tokens, one] for one in others]
    if len(others) > 1:
        yield [[*tokens, *others]]


def _is_alike(item: Any, mask: Tensor) -> bool:
    """Whether an item is a mask itself or its inverse. Tokens may be 0 at padding, too."""
    numbers = torch.as_tensor(item, device=mask.device)
    is_data = mask != 0
    return len(numbers.unique()) <= 2 and any(torch.equal(one, is_data) for one in (numbers != 0, numbers == 0))


def _shortened(batch: Any, samples: int, length: int, less: int, chosen: list[Any]) -> Any:
    """A batch with fewer positions in the chosen ones of its items."""

    def shorter(item: Any, _: str) -> Any:
        if any(item is one for one in chosen):
            return item[:, :less]
        # Lengths beyond the end are an error.
        is_lengths = isinstance(item, Tensor) and item.shape == (samples,) and item.dtype is torch.int64
        return item.clamp(max=less) if is_lengths and bool((item <= length).all()) else None

    return batches.mapped(batch, shorter)


def _suspect(batch: Any, form: batches.Form, inside: str, fields: Mapping[str, Any]) -> str | None:
    """What is wrong if a mask or lengths in the batch are not used; None if nothing looks like these."""
    first = form.input_of(batch)
    entries = enumerate(batch) if isinstance(batch, tuple | list) and form.listed is None else ()
    items = [(f"batch[{number}]", "", item) for number, item in entries]
    items += [(f"{inside}[{key!r}]", key, item) for key, item in fields.items() if key not in (MASK, DECODER_MASK)]
    items = [one for one in items if type(one[2]) is Tensor and one[2].device.type == "cpu" and not one[2].is_nested]
    for where, key, item in items:
        if item is first or item.is_floating_point() or item.is_complex() or not item.numel():
            continue
        if _is_mask(item, key, first):
            use = f"~{where}" if "pad" in key else where
            return _SUSPECT.format(f"{where} looks like a mask of padding, {tuple(item.shape)}", use)
        for other, _, data in items if item.ndim == 1 and item.dtype is not torch.bool else ():
            dim = _ends(data, item, is_named="len" in key)
            if dim is not None:
                what = f"{where} looks like the lengths of padded sequences, {other} {tuple(data.shape)}"
                return _SUSPECT.format(what, f"torch.arange({other}.shape[{dim}]) < {where}[:, None]")
    return None


def _is_mask(item: Tensor, key: str, first: Any) -> bool:
    """Whether whole numbers look like a mask by their name or shape, and change at most once along each dimension."""
    is_named = "mask" in key or "pad" in key or (bool(key) and item.dtype is torch.bool)
    is_alike = is_named or (not key and isinstance(first, Tensor) and item.shape == first.shape[:2])
    if not is_alike or item.ndim not in (2, 3) or bool((item != (item != 0)).any()):
        return False
    return max(int((item.diff(dim=dim) != 0).sum(dim).amax()) for dim in range(1, item.ndim)) == 1


def _ends(data: Tensor, lengths: Tensor, *, is_named: bool) -> int | None:
    """The dimension along which each sample of a batch has so many entries and then padding: one number only.

    Classes are whole numbers, too, and what stands behind them is not all the same. Lengths that are named so are
    believed if the longest sample fills the batch.
    """
    low, high = int(lengths.min()), int(lengths.max())
    for dim, size in enumerate(data.shape[1:] if data.ndim in (2, 3) and len(data) == len(lengths) else (), start=1):
        if 1 <= low < size and high <= size:
            padding = data.movedim(dim, 1)[torch.arange(size, device="cpu") >= lengths[:, None]]
            is_one = padding.numel() > 3 and bool((padding == padding.flatten()[0]).all())
            if is_one or (is_named and high == size):
                return dim
    return None
