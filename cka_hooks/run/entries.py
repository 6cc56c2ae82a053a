"""Read the mapping that `compare` takes, and the options for each of its entries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from cka_hooks.errors import LayerError, ModelError, OptionError
from cka_hooks.recording.layers import refuse_weights, select_layers, unwrap
from cka_hooks.run.identity import of_model, of_rows
from cka_hooks.run.precomputed import Precomputed, is_features


def named_models(model: Any) -> dict[str, Any]:
    """The models by name, "" for a single one. Arrays in the mapping become `Precomputed`.

    Raises:
        OptionError: the mapping is empty, a name is not text, or features have no name.
        ModelError: an entry is a ``state_dict``, or text.
    """
    if not isinstance(model, Mapping):
        if is_features(model):
            raise OptionError("precomputed features need a name: pass a mapping, such as {'V4': array}")
        return {"": model}
    if not model:
        raise OptionError("the mapping of models is empty: name at least one model")
    for name in model:
        if not isinstance(name, str) or not name:
            raise OptionError(f"the name of a model is {name!r}: names are text, such as {{'epoch {name}': model}}")
    refuse_weights(model)
    found: dict[str, Any] = {}
    for name, it in model.items():
        if isinstance(it, str | os.PathLike):
            raise ModelError(f"{name!r} is {it!r}: expected an nn.Module, or features, Precomputed.load({it!r})")
        try:
            found[name] = Precomputed(it) if is_features(it) and not isinstance(it, Precomputed) else it
        except OptionError as error:
            raise OptionError(f"{name!r}: {error}") from error
    return found


def per_model(option: Any, models: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An option for each model, given once for all or as a mapping from model name."""
    if not isinstance(option, Mapping):
        return dict.fromkeys(models, option)
    unknown = [key for key in option if key not in models]
    if unknown:
        raise OptionError(f"{name}= names the models {unknown}, and the models are {list(models)}")
    return {key: option.get(key) for key in models}


def layers_of(models: Mapping[str, nn.Module], layers: Any) -> dict[str, Any]:
    """The choice of layers for each model.

    Of one list for several models, each entry has to match in at least one of them, and each model needs a match.
    """
    if len(models) < 2 or layers is None or isinstance(layers, Mapping | str | type) or callable(layers):
        return per_model(layers, models, "layers")
    chosen: dict[str, list[Any]] = {name: [] for name in models}
    for entry in layers:
        failures: list[LayerError] = []
        for name, model in models.items():
            try:
                select_layers(model, [entry])
                chosen[name].append(entry)
            except LayerError as error:
                failures.append(error)
        if len(failures) == len(models):
            raise failures[0]
    for name, entries in chosen.items():
        if not entries:
            raise LayerError(f"none of layers={list(layers)!r} matches a layer of the model {name!r}")
    return chosen


def types_of(entries: Mapping[str, Any]) -> dict[str, str]:
    """The class of each model, or of features, by name."""
    return {name: type(unwrap(it) if isinstance(it, nn.Module) else it).__qualname__ for name, it in entries.items()}


def identities_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of each model and of precomputed features, by name."""
    return {
        name: of_rows(it.arrays, it.sample_ids) if isinstance(it, Precomputed) else of_model(it)
        for name, it in entries.items()
    }
