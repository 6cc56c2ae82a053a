"""Find out which positions of which layers are padding: a mask is used only where it is known to belong.

A layer that has as many positions as a mask need not belong to it: a picture may have as many as its caption. So some
samples of the first batch run once more, with fewer positions of what the mask describes. The dimensions that follow
have its positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cka_hooks.errors import BatchError, OptionError, warn
from cka_hooks.names import PerLayer
from cka_hooks.recording import batches
from cka_hooks.recording.layers import ROOT
from cka_hooks.recording.probe import Glance, Probe, is_same

MaskOf = Callable[[Any], Tensor | None]
MaskOption = MaskOf | Mapping[str, MaskOf | None] | None
# A key of the batch, or the user's function.
Source = str | MaskOf

MASK, DECODER_MASK, LABELS = "attention_mask", "decoder_attention_mask", "labels"
# The value of labels that losses leave out.
_IGNORED = -100
_FRAMES = "_get_feature_vector_attention_mask"
# Batches that are looked at for padding that nobody named.
_LOOKED_AT = 32


_WRONG = {
    "kept": "the batch's attention mask has zeros, and features='flatten' keeps padding as data in {layers}: use "
    "features='mean', 'token' or 'last' to leave padding out",
    "unused": "the {mask} has zeros and was not used in {layers}, which are not known to have its positions: padding "
    "there counts as data. Pass mask= to name the mask of each layer: a function of the batch that returns (n, T), "
    "nonzero where a position counts, or a mapping from layer pattern to such functions",
    "by size": "mask= was used in {layers}, which have as many positions: that these are the mask's could not be "
    "confirmed. Name them: a mapping from layer pattern to the function",
    "suspect": "{what}, and was not used: padding counts as data in {layers}. With features='mean', 'token' or "
    "'last', mask=lambda batch: {use} uses it (nonzero where a position counts)",
}


class _Fit(NamedTuple):
    """The dimensions of a layer with a mask's positions, and how to turn the mask into one of these positions."""

    dims: tuple[int, ...]
    frames: Callable[[int, Tensor], Tensor] | None = None


# A layer with other positions, and one that does not depend on what the mask describes.
_OTHER, _APART = _Fit(()), _Fit((-1,))


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
        self._frames = {name: module for name, module in names.items() if hasattr(module, _FRAMES)}
        self._probed: set[Source] = set()
        self._fits: dict[tuple[str, Source], _Fit] = {}
        self._found: dict[Source, Tensor] = {}
        self._framed: dict[tuple[Source, int], Tensor] = {}
        self._zeros: bool | None = None
        self._is_first = True
        self._looks = _LOOKED_AT
        self._suspect: _Suspect | None = None
        # What is wrong -> labels of the layers, and the mask of each.
        self._wrong: dict[str, dict[str, Source]] = defaultdict(dict)
        self._warned: set[str] = set()

    # The masks of a batch

    def start(self, batch: Any, form: batches.Form, samples: int | None) -> None:
        """Begin a forward pass of a batch.

        Raises:
            BatchError: `mask` did not return a mask of the batch.
        """
        self._found, self._framed, self._zeros = {}, {}, None
        for function in self._given.values:
            if function is not None:
                mask = function(batch)
                if mask is not None:
                    self._found[function] = _checked(mask, samples)
        keywords = _keywords(batch, form)
        if self._is_named or not any(self._given.values):
            found: dict[str, Any] = {key: keywords.get(key) for key in (MASK, DECODER_MASK)}
            labels = keywords.get(LABELS)
            if found[DECODER_MASK] is None and isinstance(labels, Tensor) and not labels.is_floating_point():
                makes_input = hasattr(getattr(self._model, "config", None), "is_encoder_decoder")
                if makes_input and batches.keeps_labels(self._model, LABELS, keywords):
                    found[LABELS] = labels != _IGNORED
            self._found |= {key: it for key, it in found.items() if isinstance(it, Tensor) and it.ndim == 2}
            if self._looks and self._suspect is None and not self._is_named:
                self._looks -= 1
                self._suspect = _suspect(batch, form, keywords)

    @property
    def needs_probe(self) -> bool:
        """Whether the batch has a mask whose layers are not known yet."""
        return not self._probed.issuperset(self._found)

    @property
    def is_due(self) -> bool:
        """Whether the warning about padding that is kept as data may still come."""
        return (self._suspect is not None and "suspect" not in self._warned) or (
            "kept" not in self._warned and self.has_zeros
        )

    @property
    def has_zeros(self) -> bool:
        """Whether a mask of the batch has zeros. A mask on an accelerator is read in the first pass only.

        Reading it waits for the device, as the probe before the first pass does.
        """
        if self._zeros is None:
            seen = (mask for mask in self._found.values() if self._is_first or mask.device.type == "cpu")
            self._zeros = any(not bool((mask != 0).all()) for mask in seen)
        return self._zeros

    # Which layer has which

    def confirm(self, probe: Probe, samples: int) -> None:
        """Find out with a probe which dimensions of which layers have the positions of the batch's masks.

        Args:
            probe: probe of the batch.
            samples: number of samples in the batch.
        """
        for source, mask in self._found.items():
            length = mask.shape[1]
            # One step of a recording stands for many of its numbers.
            less = length - (max(1, length // 4) if self._frames else 1)
            if source not in self._probed and len(mask) == samples and less > 0:
                self._fits |= self._fits_of(source, probe, length, less)
        self._probed.update(self._found)

    def _fits_of(self, source: Source, probe: Probe, length: int, less: int) -> dict[tuple[str, Source], _Fit]:
        """How a mask fits each layer. Empty if that is not known, as for layers after an error."""
        few = probe.first.samples
        whole: list[dict[tuple[str, Source], _Fit]] = []
        broken: list[dict[tuple[str, Source], _Fit]] = []
        for tries in _tries(probe.few, few, length, source, self._found[source][probe.chosen]):
            for chosen in tries:
                look = probe.look(_shortened(probe.few, few, length, less, chosen), few)
                fits = {
                    (label, source): self._fit(label, before, look.seen[label], length, less)
                    for label, before in probe.first.seen.items()
                    if label in look.seen
                }
                followed = {key: fit for key, fit in fits.items() if fit not in (_OTHER, _APART)}
                if followed and look.problem is None:
                    whole.append(fits)
                elif followed:
                    broken.append(followed)
            if whole:
                break
        # If two parts of the batch may be what the mask describes, neither is known to be.
        return found[0] if len(found := whole or broken) == 1 else {}

    def _fit(self, label: str, before: Glance, after: Glance, length: int, less: int) -> _Fit:
        if len(before.shape) != len(after.shape):
            return _OTHER
        sizes = list(zip(before.shape, after.shape, strict=True))
        dims = tuple(dim for dim, size in enumerate(sizes) if size == (length, less))
        if dims:
            return _Fit(dims)
        for name, module in self._frames.items():
            if name != ROOT and not label.startswith(f"{name}."):
                continue
            for more in ({"add_adapter": False}, {"add_adapter": True}, {}):
                wanted = _frames_of(module, length, more), _frames_of(module, less, more)
                dims = tuple(dim for dim, size in enumerate(sizes) if None not in wanted and size == wanted)
                if dims:
                    return _Fit(dims, partial(getattr(module, _FRAMES), **more))
        return _APART if is_same(before, after) else _OTHER

    def of(self, name: str, label: str, shape: tuple[int, ...]) -> list[tuple[Tensor, tuple[int, ...]]]:
        """The masks of a layer, each with the dimensions whose positions it describes.

        Args:
            name: name of the module.
            label: label of the layer.
            shape: shape of the module's output.
        """
        self._suspects(label, shape)
        if len(shape) < 3 or not self._found:
            return []
        masks, unused = [], None
        for source in self._sources(name):
            fit = self._fits.get((label, source))
            mask: Tensor | None = self._found[source]
            assert mask is not None
            if callable(source) and (fit is None or (self._is_named and fit in (_OTHER, _APART))):
                # Only the user can know.
                fit = _Fit(tuple(dim for dim, size in enumerate(shape) if dim > 0 and size == mask.shape[1]))
                if fit.dims and not self._is_named:
                    self._wrong["by size"][label] = source
            if fit is _APART:
                continue
            dims = fit.dims if fit is not None else ()
            if fit is not None and fit.frames is not None:
                mask = self._frame(source, fit.frames, shape[dims[0]])
            dims = tuple(dim for dim in dims if dim < len(shape) and shape[dim] == mask.shape[1])
            if dims:
                masks.append((mask, dims))
            else:
                unused = source
        if unused is not None and not masks:
            self._wrong["unused"].setdefault(label, unused)
        return masks

    def _sources(self, name: str) -> list[Source]:
        given = self._given.of(name, LABELS)
        if callable(given):
            return [given] if given in self._found else []
        if given is None and self._is_named:
            return []
        return [source for source in self._found if isinstance(source, str)]

    def _frame(self, source: Source, frames: Callable[[int, Tensor], Tensor], size: int) -> Tensor:
        if (source, size) not in self._framed:
            self._framed[source, size] = frames(size, (self._found[source] != 0).long())
        return self._framed[source, size]

    # Warnings

    def keeps(self, label: str, name: str, shape: tuple[int, ...]) -> None:
        """Note that a layer keeps all positions as data. An unconfirmed one may be padded if sizes are alike."""
        self._suspects(label, shape)
        for source in self._sources(name) if self.has_zeros and len(shape) > 2 else ():
            fit, length = self._fits.get((label, source)), self._found[source].shape[1]
            lengths = {length, *(_frames_of(module, length, {}) for module in self._frames.values())}
            if fit.dims != (-1,) and fit.dims if fit is not None else not lengths.isdisjoint(shape[1:]):
                self._wrong["kept"][label] = source

    def _suspects(self, label: str, shape: tuple[int, ...]) -> None:
        if self._suspect is not None and "suspect" not in self._warned and len(shape) > 2:
            self._wrong["suspect"][label] = MASK

    def warn(self) -> None:
        """At the end of a pass, warn once about padding that counts as data."""
        for wrong, labels in self._wrong.items():
            if wrong in self._warned or not (wrong == "suspect" or self.has_zeros):
                continue
            self._warned.add(wrong)
            source = next(iter(labels.values()))
            mask = f"batch's {source}" if isinstance(source, str) else "mask"
            what, use = self._suspect or (mask, "")
            warn(_WRONG[wrong].format(mask=mask, what=what, use=use, layers=_listed(list(labels))))
        if self._suspect is not None:
            self._warned.add("suspect")
        self._is_first = False


def _listed(labels: list[str]) -> str:
    more = f" and {len(labels) - 5} more layers" if len(labels) > 5 else ""
    return ", ".join(map(repr, labels[:5])) + more


def _checked(mask: Any, samples: int | None) -> Tensor:
    found = torch.as_tensor(mask, device="cpu") if isinstance(mask, np.ndarray) else mask
    fits = isinstance(found, Tensor) and found.ndim == 2 and samples in (None, found.shape[0])
    if not fits:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__qualname__
        raise BatchError(
            f"mask= returned {what} for a batch of {samples} samples, expected (n, T), bool or int, nonzero where a "
            "position counts"
        )
    return found


def _keywords(batch: Any, form: batches.Form) -> dict[str, Any]:
    """The fields that a batch has by name."""
    fields = batches.fields_of(form.input_of(batch))
    if fields is None and isinstance(batch, tuple) and batch and isinstance(batch[-1], Mapping):
        fields = batches.fields_of(batch[-1])
    return fields or {}


def _tries(batch: Any, samples: int, length: int, source: Source, mask: Tensor) -> Iterator[list[set[int]]]:
    """Sets of items that a mask may describe, by number, the likely ones first. All have as many positions as it.

    Tokens and recordings are (n, T). If the model cannot run with fewer of these, or they decide nothing, the mask
    belongs to something else of that length.
    """
    first, others, is_alone = set(), [], True
    for number, (key, item) in enumerate(_items(batch, samples, length)):
        is_other = (key in batches.LABELS) != (source == LABELS) or key.startswith("decoder_") != (
            source == DECODER_MASK
        )
        if isinstance(source, str) and is_other:
            continue
        if item.ndim == 2:
            first.add(number)
            is_alone = is_alone and _is_mask(key, item, mask)
        else:
            others.append(number)
    if first and (not is_alone or not others):
        yield [first]
    if others:
        yield [{*first, number} for number in others]
    if len(others) > 1:
        yield [{*first, *others}]


def _is_mask(key: str, item: Tensor, mask: Tensor) -> bool:
    """Whether an item is the mask itself or its inverse."""
    # Tokens may be 0 at padding, too.
    is_alike = len(item.unique()) <= 2 and any(
        torch.equal(one, mask.to(item.device) != 0) for one in (item != 0, item == 0)
    )
    return "mask" in key or is_alike


def _items(batch: Any, samples: int, length: int) -> list[tuple[str, Tensor]]:
    """The keys and values of all (n, T, ...) items of a batch."""
    found: list[tuple[str, Tensor]] = []

    def look(item: Any, key: str) -> None:
        if isinstance(item, Tensor | np.ndarray) and tuple(item.shape[:2]) == (samples, length):
            # Without a device, an array would become a tensor on the default device.
            found.append((key, item if isinstance(item, Tensor) else torch.as_tensor(item, device="cpu")))

    batches.mapped(batch, look)
    return found


def _shortened(batch: Any, samples: int, length: int, less: int, chosen: set[int]) -> Any:
    """A batch with fewer positions in the chosen ones of its `_items`."""
    number = count()

    def shorter(item: Any, key: str) -> Any:
        if not isinstance(item, Tensor | np.ndarray) or tuple(item.shape[:2]) != (samples, length):
            # Lengths beyond the end are an error.
            is_lengths = isinstance(item, Tensor) and item.shape == (samples,) and item.dtype is torch.int64
            return item.clamp(max=less) if is_lengths and bool((item <= length).all()) else None
        return item[:, :less] if next(number) in chosen else item

    return batches.mapped(batch, shorter)


def _frames_of(module: nn.Module, length: int, how: Mapping[str, bool]) -> int | None:
    """How many frames a speech model makes of a recording of this length; None if it does not say."""
    try:
        frames: Any = module._get_feat_extract_output_lengths  # noqa: SLF001
        return int(frames(torch.tensor(length, device="cpu"), **how))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


class _Suspect(NamedTuple):
    """What looks like padding that nobody used, and how it is used, both in words."""

    what: str
    use: str


def _suspect(batch: Any, form: batches.Form, keywords: Mapping[str, Any]) -> _Suspect | None:
    """A mask or lengths in the batch that nobody used; None if nothing looks like these."""
    first = form.input_of(batch)
    inside = "batch" if first is batch else "batch[0]" if batches.fields_of(first) is not None else "batch[-1]"
    entries = enumerate(batch) if isinstance(batch, tuple | list) and form.listed is None else ()
    items = [(f"batch[{number}]", "", item) for number, item in entries]
    items += [(f"{inside}[{key!r}]", key, item) for key, item in keywords.items() if key not in (MASK, DECODER_MASK)]
    items = [one for one in items if type(one[2]) is Tensor and one[2].device.type == "cpu" and not one[2].is_nested]
    for where, key, item in items:
        if item is first or item.is_floating_point() or item.is_complex() or not item.numel():
            continue
        if item.ndim in (2, 3) and item.shape[1] > 1:
            counts = item != 0
            is_named = bool(key) and ("mask" in key or "pad" in key or item.dtype is torch.bool)
            is_alike = is_named or (not key and isinstance(first, Tensor) and item.shape == first.shape[:2])
            ends = [(counts.diff(dim=dim) != 0).sum(dim).amax() for dim in range(1, item.ndim)]
            if is_alike and bool((item == counts).all()) and max(ends) == 1:
                what = f"{where} looks like a mask of padding, {tuple(item.shape)}"
                brought = "" if item.ndim == 2 else ", brought to (n, T) for T positions of a layer,"
                return _Suspect(what, f"{'~' if 'pad' in key else ''}{where}{brought}")
        for other, _, data in items if item.ndim == 1 and item.dtype is not torch.bool else ():
            dim = _ends(data, item, is_named="len" in key)
            if dim is not None:
                what = f"{where} looks like the lengths of padded sequences, {other} {tuple(data.shape)}"
                return _Suspect(what, f"torch.arange({other}.shape[{dim}]) < {where}[:, None]")
    return None


def _ends(data: Tensor, lengths: Tensor, *, is_named: bool) -> int | None:
    """The dimension along which each sample of a batch has so many entries and then padding: one number only.

    Classes are whole numbers, too, and what stands behind them is not all the same. Lengths that are named so are
    believed if the longest sample fills the batch.
    """
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or data.ndim not in (2, 3) or len(data) != len(lengths):
        return None
    for dim, size in enumerate(data.shape[1:], start=1):
        if low < size and high <= size:
            rows = data.movedim(dim, 1)
            ends = rows[lengths < size, -1]
            if is_named and high == size:
                return dim
            if len(ends) > 1 and bool((ends == ends.flatten()[0]).all()):
                padding = rows[torch.arange(size, device="cpu") >= lengths[:, None]]
                if padding.numel() > 3 and bool((padding == padding.flatten()[0]).all()):
                    return dim
    return None
