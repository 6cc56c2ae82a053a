"""Read a loader's batches: how to call the model, how many samples there are, and which positions are padding."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from types import UnionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils import data

from cka_hooks import precision
from cka_hooks.errors import BatchError, CKAError, OptionError
from cka_hooks.recording import outputs

Forward = Callable[[nn.Module, Any], Any]

# Keys of a batch that are targets, not inputs. Given these, some models compute a loss that nobody needs.
LABELS = frozenset(
    {"label", "labels", "label_ids", "target", "targets", "next_sentence_label", "start_positions", "end_positions"}
)


@dataclasses.dataclass(frozen=True)
class Form:
    """How to read the batches of a run. The first batch decides, since a short one may look like something else.

    Attributes:
        listed: where to find a list with one entry per sample, as detectors take it: "batch" if the batch is that
            list, "input" if its first entry is, None if samples are a dimension of tensors.
    """

    listed: str | None = None

    @classmethod
    def of(cls, batch: Any) -> Form:
        """The form of a run that begins with this batch."""
        if is_sample_list(batch):
            return cls("batch")
        inside = isinstance(batch, tuple | list) and bool(batch) and is_sample_list(batch[0], is_input=True)
        return cls("input" if inside else None)

    def input_of(self, batch: Any) -> Any:
        """The model's input: the first entry of a tuple or list, a mapping itself."""
        is_pair = isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence) and self.listed != "batch"
        return batch[0] if is_pair and batch else batch

    def shape(self, batch: Any) -> tuple[int, ...]:
        """The shape of the first tensor of a batch, (n,) for n listed samples, () if nothing has a shape."""
        value = self.input_of(batch)
        if self.listed is not None and isinstance(value, Sequence):
            return (len(value),)
        return leading_shape(value) or leading_shape(batch)


class Given(NamedTuple):
    """A batch that a model is about to be called with.

    Attributes:
        parts: what `call` takes, and what can be cut to fewer samples.
        batch: where to read masks from.
        form: form of the batch.
        shape: shape of its first tensor.
        value: the model's input, None if a function of the user's comes in between.
        call: calls the model; None if only the user calls it.
    """

    parts: Any
    batch: Any
    form: Form
    shape: tuple[int, ...]
    value: Any
    call: Callable[[Any], Any] | None

    @classmethod
    def of_call(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """A batch made of the arguments of somebody else's call."""
        seen = kwargs if not args else (*args, kwargs) if kwargs else args
        value = args[0] if len(args) == 1 and not kwargs else None
        shape = leading_shape(*args, kwargs)
        return cls((args, kwargs), seen, Form(), shape, value, lambda parts: module(*parts[0], **parts[1]))


def is_sample_list(value: Any, *, is_input: bool = False) -> bool:
    """Whether a list has one entry per sample: images (C, H, W), dicts with the same keys, texts or objects.

    A list of one or two entries is taken as an input and its target, or as two views of the samples.
    """
    if not isinstance(value, tuple | list) or not value or isinstance(value, PackedSequence):
        return False
    first, is_list = value[0], len(value) > 2 or is_input
    if isinstance(first, str):
        return all(isinstance(item, str) for item in value)
    if isinstance(first, Tensor):
        are_images = all(isinstance(item, Tensor) and item.ndim == 3 and item.shape[0] in (1, 3, 4) for item in value)
        # A tuple inside a batch does not come from torch's default collation, which makes lists of views.
        return are_images and is_list and (len(value) != 2 or isinstance(value, tuple))
    if isinstance(first, Mapping):
        return is_list and all(isinstance(item, Mapping) and item.keys() == first.keys() for item in value)
    is_data = first is None or isinstance(first, bool | int | float | tuple | list | np.ndarray)
    return is_list and not is_data and all(type(item) is type(first) for item in value)


def leading_shape(*values: Any) -> tuple[int, ...]:
    """The shape of the first tensor in a call's arguments, (n,) for n entries or graphs, () if there is none."""
    return next(filter(None, map(_shape, values)), ())


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor | np.ndarray):
        return (value.size(0),) if isinstance(value, Tensor) and value.is_nested else tuple(value.shape)
    if isinstance(value, PackedSequence):
        return (int(value.batch_sizes[0]),)
    if isinstance(graphs := getattr(value, "num_graphs", None), int):
        return (graphs,)
    if is_sample_list(value, is_input=True):
        return (len(value),)
    return leading_shape(*_entries(value))


def _entries(value: Any) -> Iterable[Any]:
    return value if isinstance(value, tuple | list) else (fields_of(value) or {}).values()


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a mapping, a dataclass or an object of a class for batches; None for anything else."""
    fields = {} if isinstance(value, Tensor | nn.Module | type) else getattr(value, "__dict__", {})
    is_object = any(isinstance(item, Tensor) for item in fields.values())
    return outputs.fields_of(value) or (dict(fields) if is_object else None)


def sample_count(batch: Any) -> int | None:
    """The number of samples in a batch; None if nothing says it."""
    return next(iter(Form.of(batch).shape(batch)), None)


def is_empty(batch: Any) -> bool:
    """Whether a batch has no samples: None, an empty container, or a first tensor without rows.

    A ``collate_fn`` that drops bad samples yields such batches. A run skips them.
    """
    is_container = batch is None or isinstance(batch, tuple | list | Mapping)
    return (is_container and all(map(is_empty, _entries(batch)))) or leading_shape(batch)[:1] == (0,)


_ONE_BATCH = "one batch: pass [batch], or the loader that it came from"
_LOADER = "pass torch.utils.data.DataLoader({})"
_DATA_SET = "which yields single samples: " + _LOADER
# What does not yield batches, and what to do with it. The first kind that fits decides; None: it is a loader.
_NO_LOADERS: tuple[tuple[type | UnionType, str | None], ...] = (
    (data.BatchSampler, _LOADER.format("dataset, batch_sampler=sampler")),
    (data.Sampler, _LOADER.format("dataset, sampler=sampler")),
    (data.IterableDataset, None),
    (data.Dataset, _DATA_SET.format("dataset, batch_size=64")),
    (Tensor | np.ndarray, _LOADER.format("tensor, batch_size=64") + ", or [tensor] for one batch"),
    (nn.Module, "a model: the models come first, compare({'a': a, 'b': b}, loader)"),
    (Mapping, _ONE_BATCH),
)


def check_loader(loader: Any) -> None:
    """Refuse an iterable that does not yield batches.

    Raises:
        OptionError: it is a data set, a sampler, or one batch.
    """
    kind = f"{type(loader).__module__}.{type(loader).__qualname__}"
    advice = next((advice for kinds, advice in _NO_LOADERS if isinstance(loader, kinds)), None)
    if kind.startswith("datasets."):
        advice = _DATA_SET.format('dataset.with_format("torch"), batch_size=64')
    elif _is_pair(loader):
        advice = _ONE_BATCH
    elif isinstance(loader, str) or not (advice or hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        advice = "not iterable: pass a DataLoader or a list of batches"
    if advice is not None:
        raise OptionError(f"the loader is a {kind}, {advice}")


def _is_pair(value: Any) -> bool:
    """Whether a tuple or list is an input with its classes, rather than two batches."""
    classes = targets(value) if isinstance(value, tuple | list) and len(value) == 2 else None
    return (
        classes is not None and isinstance(value[0], Tensor) and value[0].ndim > 1 and len(value[0]) == len(classes)
    )


# Changing batches


def mapped(value: Any, change: Callable[[Any, str], Any], key: str = "") -> Any:
    """Replace every item of a batch by `change(item, key)`. Where that is None, go into the item, or leave it.

    The key is the one of the innermost mapping or object, "" outside of any. Mappings, named tuples, dataclasses and
    objects of classes for batches keep their types.
    """
    changed = change(value, key)
    if changed is not None:
        return changed
    if isinstance(value, Mapping):
        items = {name: mapped(item, change, str(name)) for name, item in value.items()}
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except (TypeError, ValueError):
            return items
    if isinstance(value, tuple | list):
        entries = [mapped(item, change, key) for item in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if (fields := fields_of(value)) is None:
        return value
    items = {name: mapped(item, change, name) for name, item in fields.items()}
    if dataclasses.is_dataclass(value):
        own = {field.name for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: item for name, item in items.items() if name in own})  # type: ignore[type-var]
    new = copy.copy(value)
    vars(new).update(items)
    return new


def to_device(value: Any, device: torch.device | None) -> Any:
    """Move every tensor of a batch to `device`, by `precision.moved`. Tensors already there stay the same objects.

    Graphs and other objects with a method ``to`` are moved with it.
    """
    if device is None:
        return value

    def moved(item: Any, _: str) -> Any:
        if isinstance(item, Tensor):
            return item if item.device == device else precision.moved(item, device)
        has_own = not isinstance(item, Mapping | type | nn.Module) and callable(getattr(item, "to", None))
        return item.to(device) if has_own else None

    return mapped(value, moved)


def cut(value: Any, samples: int, index: Sequence[int]) -> Any:
    """Copy a batch of `samples`, keeping the samples that `index` names, in that order.

    This cuts tensors and arrays whose dimension 0 has that size, lists with one entry per sample, packed sequences
    and batches of graphs. Everything else is copied whole.
    """

    def chosen(item: Any, _: str) -> Any:
        if isinstance(item, Tensor) and item.is_nested:
            parts = item.unbind()
            return torch.nested.as_nested_tensor([parts[i] for i in index], layout=item.layout)
        if isinstance(item, Tensor | np.ndarray) and item.ndim and item.shape[0] == samples:
            return item[list(index)]
        if isinstance(item, Tensor | np.ndarray):
            return item.clone() if isinstance(item, Tensor) else item.copy()
        if isinstance(item, PackedSequence):
            unpacked = unpack_sequence(item)
            return pack_sequence([unpacked[i] for i in index], enforce_sorted=False)
        if is_sample_list(item, is_input=True) and len(item) == samples:
            return type(item)([copy.deepcopy(item[i]) for i in index])
        if getattr(item, "num_graphs", None) == samples:
            return type(item).from_data_list([item[i] for i in index])
        if isinstance(item, tuple | list) or fields_of(item) is not None:
            return None
        try:
            # The model may write to a cache or a counter.
            return copy.deepcopy(item)
        except Exception:
            # Locks, open files and the like are the same for every part of the batch.
            return item

    return mapped(value, chosen)


# Calling a model


def arguments(batch: Any, model: nn.Module, form: Form | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments for calling a model with a batch.

    A mapping or dataclass is passed as keywords, without the keys that only a loss needs. Of a tuple or list, the
    first entry is the input. Anything else is the input itself. A list with one entry per sample, as detectors take
    it, is one input. NumPy arrays become tensors.

    Labels are kept if the model's ``forward`` has a parameter of that name or takes any keyword. Among the models of
    transformers, only encoder-decoders without a decoder input get them, since they make it from the labels.
    """
    value = with_tensors((form or Form.of(batch)).input_of(batch))
    named = outputs.fields_of(value)
    if named is None:
        return (value,), {}
    return (), {key: item for key, item in named.items() if key not in LABELS or keeps_labels(model, key, named)}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has numbers that can be read as they are."""
    is_other = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return type(tensor) is Tensor and tensor.layout is torch.strided and not is_other


def with_tensors(value: Any) -> Any:
    """A batch with tensors in place of NumPy arrays of numbers.

    Raises:
        BatchError: an array has masked entries.
    """

    def as_tensor(item: Any, key: str) -> Tensor | None:
        if not isinstance(item, np.ndarray) or item.dtype.kind not in "bifc":
            return None
        if np.ma.is_masked(item):
            raise BatchError(f"an array of shape {item.shape} has masked entries: fill them with .filled(...)")
        return torch.tensor(np.ascontiguousarray(item, item.dtype.newbyteorder("=")), device="cpu")

    return mapped(value, as_tensor)


def keeps_labels(model: nn.Module, key: str, keywords: Mapping[str, Any]) -> bool:
    """Whether to give a model its labels."""
    parameters = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    named = parameters.get(key)
    if hasattr(config, "is_encoder_decoder"):
        is_required = named is not None and named.default is named.empty
        has_input = any(name.startswith("decoder_input") for name in keywords)
        return is_required or (bool(config.is_encoder_decoder) and not has_input)
    return named is not None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def targets(batch: Any) -> Tensor | None:
    """The class of each sample, if the batch has it: the second entry of a pair, or the labels of a mapping."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in batch if key in LABELS), None)
    elif isinstance(batch, tuple | list) and len(batch) >= 2 and Form.of(batch).listed != "batch":
        found = batch[1]
    if not isinstance(found, Tensor) or found.ndim != 1 or found.is_floating_point() or found.device.type != "cpu":
        return None
    return found


def device_of(model: nn.Module) -> torch.device | None:
    """The device that a model expects its input on: that of its first parameter or buffer; None without any."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)


def call(model: nn.Module, batch: Any, forward: Forward | None, form: Form | None, number: int | None) -> Any:
    """Move a batch to the model's device and run the model on it, with `forward(model, batch)` if given.

    Args:
        number: number of the batch, counted from 0, for messages.

    Raises:
        BatchError: the model cannot be called with the batch; the cause is chained.
    """
    which = "a batch" if number is None else f"batch {number} (counted from 0)"
    kind, device = type(model).__name__, device_of(model)
    if forward is not None:
        run = partial(forward, model, to_device(batch, device))
    else:
        args, kwargs = to_device(arguments(batch, model, form), device)
        run = partial(model, *args, **kwargs)
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            given = ", ".join((*(type(a).__name__ for a in args), *(f"{k}=" for k in kwargs)))
            how = f"{error}. Pass forward=lambda model, batch: model(...) to say how"
            raise BatchError(f"{kind} cannot be called with {which} of ({given}): {how}") from error
        except ValueError:
            pass
    try:
        return run()
    except Exception as error:
        # Of a batch for the user's own function, only devices and dtypes are known.
        advice = _about_tensors(error, model, batch) or (_about_kind(error, batch) if forward is None else None)
        if advice is None or isinstance(error, CKAError):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BatchError(f"{kind} cannot run on {which}: {advice} ({reason})") from error


def _about_tensors(error: Exception, model: nn.Module, batch: Any) -> str | None:
    """Advice about the device or dtype of a batch's tensors; None if neither is the problem."""
    weights = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weights is None or not isinstance(error, RuntimeError):
        return None
    if "meta" in str(error) and any(p.is_meta for p in model.parameters()):
        return "some of its parameters are on the meta device and have no values: load its weights first"
    if re.search("device", str(error)) and re.search("same device|different from|xpected", str(error)):
        return f"something is elsewhere: move the whole model, and what its forward makes, to {weights.device}"
    first = next(outputs.tensors_in(with_tensors(batch)), weights)
    if first.dtype is weights.dtype or not re.search("type|Byte|Long|Double|Half", str(error)):
        return None
    have, want = (str(tensor.dtype).removeprefix("torch.") for tensor in (first, weights))
    scaled = " / 255" if first.dtype is torch.uint8 else ""
    return (
        f"the batch is {have} {tuple(first.shape)} and the model {want}: convert it in the loader, with "
        f".to(torch.{want}){scaled}, or if it is an index, pass forward=lambda model, batch: model(batch[1])"
    )


def _about_kind(error: Exception, batch: Any) -> str | None:
    """Advice for a model that was called with something other than a tensor; None if that is not the problem."""
    if isinstance(error, NotImplementedError) and "forward" in str(error):
        return "it has no forward of its own: pass forward=lambda model, batch: ... to say what runs"
    value = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(error, TypeError | AttributeError) or isinstance(value, Tensor | Mapping):
        return None
    what = f"its input is a {type(value).__module__}.{type(value).__qualname__}, not a tensor"
    return (
        f"{what}: pass forward=lambda model, batch: model(...) to say which part it takes, such as one of two views"
    )
