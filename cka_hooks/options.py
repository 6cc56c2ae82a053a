"""The options of a comparison: converted or refused before anything is computed, and always spelled the same way."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from cka_hooks.errors import OptionError
from cka_hooks.hsic import MIN_SAMPLES

# Whole numbers with the least that they can be, and numbers above 0.
_OF_SAMPLES = ("positions", "minibatch", "join_batches", "max_samples")
_WHOLE = {**dict.fromkeys(_OF_SAMPLES, MIN_SAMPLES), "seed": 0, "epochs": 1, "permutations": 0}
_ABOVE_ZERO = ("bandwidth", "sigma", "tolerance")


# Slow, and asked for in each run.
_signature = cache(inspect.signature)


@dataclass(frozen=True)
class Options:
    """The options that a comparison's numbers depend on; :func:`cka_hooks.compare` explains all of them.

    Raises:
        OptionError: an option has an invalid value.
    """

    kernel: Any = "linear"
    bandwidth: float | None = None
    sigma: float | None = None
    estimator: str = "unbiased"
    minibatch: int | None = None
    features: Any = "flatten"
    seed: int = 0
    per: str = "sample"
    positions: int | None = None
    keep_minibatches: bool = False
    permutations: int = 0
    layers: Any = None
    batch_dim: Any = None
    channel_dim: Any = None
    mask: Any = None
    forward: Any = None
    sample_ids: Any = None
    join_batches: int | None = None
    tolerance: float | None = None
    max_samples: int | None = None
    epochs: int = 1

    def __post_init__(self) -> None:
        for name, words in {"estimator": ("unbiased", "biased"), "per": ("sample", "position")}.items():
            if not isinstance(word := getattr(self, name), str) or word not in words:
                raise OptionError(f"{name}={word!r} is unknown: use {words[0]!r} or {words[1]!r}")
        if self.per == "position":
            for name in ("minibatch", "join_batches"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f'per="position" and {name}={getattr(self, name)} exclude each other: a minibatch holds all '
                        "positions of a batch, since those of one input depend on one another. positions= draws fewer"
                    )
        elif self.positions is not None:
            raise OptionError(f'positions={self.positions!r} needs per="position": pass that, too, or leave it out')
        for name, least in _WHOLE.items():
            number = whole(name, getattr(self, name), least)
            object.__setattr__(self, name, getattr(Options, name) if number is None else number)
        for name in ("batch_dim", "channel_dim"):
            object.__setattr__(self, name, dimensions(name, getattr(self, name)))
        for name in _ABOVE_ZERO:
            object.__setattr__(self, name, above_zero(name, getattr(self, name)))
        needed = {"estimator": "unbiased", "per": "sample", "epochs": 1} if self.permutations else {}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise OptionError(
                    f"permutations={self.permutations} needs {name}={value!r}: without it, permuted samples do not "
                    "show how unrelated layers compare"
                )
        object.__setattr__(self, "keep_minibatches", bool(self.keep_minibatches))

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Options:
        """The options among the arguments of a call, given as its ``locals()`` in the first line."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def arguments_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The options that a function or class takes, by name."""
        return {name: vars(self)[name] for name in _signature(function).parameters if name in vars(self)}

    def spelled(self, *names: str) -> dict[str, Any]:
        """These options, or all of them, as a result's settings have them: plain JSON values."""
        return {name: spelled(getattr(self, name)) for name in names or vars(self)}


def whole(name: str, value: Any, least: int, most: float = math.inf) -> Any:
    """Convert a whole number of any type, or None.

    Raises:
        OptionError: this is anything else, or below `least` or above `most`.
    """
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise OptionError(f"{name}={value!r}: expected a whole number {bounds}")
    return number


def dimensions(name: str, value: Any) -> Any:
    """A dimension of tensors, None, or a mapping from layer pattern to these.

    Raises:
        OptionError: it is anything else.
    """
    if isinstance(value, Mapping):
        return {pattern: dimensions(f"{name} of {pattern!r}", dim) for pattern, dim in value.items()}
    return whole(name, value, -64, 63)


def above_zero(name: str, value: Any) -> float | None:
    """Convert a finite number above 0 of any type, or None.

    Raises:
        OptionError: this is anything else.
    """
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0 < number < math.inf:
        raise OptionError(f"{name}={value!r}: expected a number above 0")
    return number


def spelled(option: Any, detail: Callable[[Any], str] = lambda function: "") -> Any:
    """Spell an option for a result's settings: a plain JSON value, a callable by its name and what `detail` adds.

    Example:
        >>> spelled({"head": len, "**": ["conv1", "fc"]})
        {'head': 'builtins.len', '**': ['conv1', 'fc']}
    """
    if option is None or isinstance(option, str | bool | int | float):
        return option
    if isinstance(option, Mapping):
        return {str(key): spelled(value, detail) for key, value in option.items()}
    if callable(option):
        name = getattr(option, "__qualname__", type(option).__qualname__)
        return f"{getattr(option, '__module__', '?')}.{name}{detail(option)}"
    return [spelled(item, detail) for item in option] if isinstance(option, Iterable) else repr(option)


def difference(ours: Any, theirs: Any, name: str = "", where: tuple[str, str] = ("here", "there")) -> str:
    """The first setting that differs, in words.

    Example:
        >>> difference({"epochs": 1, "models": {"a": "Net"}}, {"epochs": 1, "models": {"a": "ResNet"}})
        "models a is 'Net' here and 'ResNet' there"
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in (*ours, *theirs):
            if ours.get(key) != theirs.get(key):
                return difference(ours.get(key), theirs.get(key), f"{name} {key}".strip(), where)
    return f"{name or 'everything'} is {ours!r:.200} {where[0]} and {theirs!r:.200} {where[1]}"
