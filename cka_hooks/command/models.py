"""Load the models that the command line names: ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME``, ``file.py:NAME``."""

from __future__ import annotations

import argparse
import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cka_hooks.errors import CKAError, imported
from cka_hooks.names import closest

Transform = Callable[[Any], Tensor]

# Where training scripts keep the state dict in a checkpoint, and the prefixes that wrappers put before its names.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


class SpecError(CKAError, ValueError):
    """The words for a model or for data do not name anything that can be loaded."""


class LoadedModel(NamedTuple):
    """A model, and what is known about its input.

    Attributes:
        name: a short name, for labels and file names.
        model: the model, in eval mode, on the CPU.
        transform: from a PIL image to the tensor that the weights expect; None if they do not say.
    """

    name: str
    model: nn.Module
    transform: Transform | None = None


def model_words(parser: argparse.ArgumentParser, weights: str | None = None) -> None:
    """MODEL is one of
      torchvision:resnet50               torchvision's, with its default weights (downloaded once)
      timm:vit_tiny_patch16_224          timm's, pretrained
      hf:google-bert/bert-base-uncased   a Hugging Face model, by its name or folder
      nets.py:net                        a model in your own Python file, or a function there that returns one
    W is the name of torchvision weights (IMAGENET1K_V2), "none" for random ones, or a checkpoint file (.pt, .pth,
    .safetensors), which is loaded without running any code in it.
    """
    add = parser.add_argument_group("the model", inspect.getdoc(model_words)).add_argument
    add("--model", required=True, metavar="MODEL", help="see above")
    add(
        "--weights",
        default=weights,
        metavar="W",
        help=f"see above; default: {weights or 'pretrained, or as the file has it'}",
    )
    add("--layers", nargs="+", metavar="L", help="names or globs (* stops at dots, ** does not); default: every leaf")


def load_model(spec: str, weights: str | None = None, *, seed: int = 0) -> LoadedModel:
    """The model that `spec` names.

    Args:
        spec: see :func:`model_words`.
        weights: None uses what the name stands for: pretrained weights, or for a file, what it has. For anything
            else, see :func:`model_words`.
        seed: seed of random weights.

    Raises:
        SpecError: the model, function, name of weights or file does not exist, or they do not fit together.
        MissingExtraError: the package is not installed.
    """
    torch.manual_seed(seed)
    kind, _, name = spec.partition(":")
    is_named = weights is None or weights == "none" or (kind == "torchvision" and not Path(weights).is_file())
    if kind in _BUILDERS:
        try:
            loaded = _BUILDERS[kind](name, weights if is_named else "none")
        except CKAError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise SpecError(
                f"could not load {spec} with its weights ({shorten(str(error), 200)}). Without a network, pass a "
                "checkpoint file with --weights, or --weights none for random weights"
            ) from error
    else:
        loaded = LoadedModel(spec.rpartition(":")[2], from_file(spec))
        if not isinstance(loaded.model, nn.Module):
            raise SpecError(
                f"{spec} is of type {type(loaded.model).__name__}: expected an nn.Module or a function that returns "
                "one; pass weights with --weights"
            )
    if weights is not None and not is_named:
        load_weights(loaded.model, Path(weights))
    loaded.model.eval()
    return loaded


def unknown(where: str, kind: str, name: str, names: Sequence[str]) -> SpecError:
    """The error for a package or file that has nothing of this kind and name."""
    return SpecError(f"{where} has no {kind} {name!r}: the closest are {', '.join(closest(name, names))}")


def _torchvision(name: str, weights: str | None) -> LoadedModel:
    models = imported("torchvision.models", "torchvision models need torchvision", '"cka-hooks[vision]"')
    if name not in models.list_models():
        raise unknown("torchvision", "model", name, models.list_models())
    known = {**models.get_model_weights(name).__members__, "none": None}
    wanted = weights or "DEFAULT"
    if wanted not in known:
        raise SpecError(
            f"torchvision's {name} has no weights {wanted!r}: expected {', '.join(known)}, or a checkpoint file"
        )
    model = models.get_model(name, weights=known[wanted])
    return LoadedModel(name, model, (known[wanted] or known["DEFAULT"]).transforms())


def _timm(name: str, weights: str | None) -> LoadedModel:
    timm = imported("timm", "timm models need timm", "timm")
    if not timm.is_model(name):
        raise unknown("timm", "model", name, timm.list_models())
    model = timm.create_model(name, pretrained=weights is None)
    return LoadedModel(name, model, timm.data.create_transform(**timm.data.resolve_data_config({}, model=model)))


def _hf(name: str, weights: str | None) -> LoadedModel:
    transformers = imported("transformers", "Hugging Face models need transformers", "transformers")
    if weights is None:
        model = transformers.AutoModel.from_pretrained(name)
    else:
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))
    short = name.rstrip("/").rpartition("/")[2]
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # it does not take images
        return LoadedModel(short, model)
    return LoadedModel(short, model, lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0])


# Takes a name, and the name of weights: "none" for random ones, None for the usual ones.
_BUILDERS = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file into `model`, ``.safetensors`` or from ``torch.save``, without running any code in it.

    A state dict under "state_dict" or "model" is found, and prefixes of wrappers are dropped.

    Raises:
        SpecError: the file does not exist, holds more than tensors, or does not fit the model.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), state)
        for prefix in _PREFIXES:
            if not model.state_dict().keys() & state.keys() and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        model.load_state_dict(state)
    except Exception as error:  # of many kinds, from torch, pickle, zipfile and safetensors
        reason = shorten(str(error), 300) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds Python objects, which are not loaded because that could run code"
        raise SpecError(
            f"could not load {path} into {type(model).__name__} ({reason}): expected what "
            "torch.save(model.state_dict(), path) writes, or a .safetensors file"
        ) from error


def from_file(spec: str) -> Any:
    """What ``file.py:name`` names: what a function or class of this name returns, anything else as it is.

    A module is copied, so that two sets of weights can be loaded into it.

    Raises:
        SpecError: the words are not of this form, or the file has nothing of this name.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py"):
        raise SpecError(
            f"{spec!r} names nothing that can be loaded: expected torchvision:NAME, timm:NAME or hf:NAME for a "
            "model, a folder of images or torchvision:NAME:FOLDER for data, or file.py:NAME for either"
        )
    if not Path(file).is_file():
        raise SpecError(f"no file {file} to find {name!r} in")
    names = vars(_imported(Path(file).resolve()))
    if name not in names:
        raise unknown(file, "object", name, [name for name in names if not name.startswith("_")])
    found = names[name]
    if callable(found) and not isinstance(found, nn.Module | Dataset | Iterable):
        found = found()
    return copy.deepcopy(found) if isinstance(found, nn.Module) else found


@cache
def _imported(path: Path) -> ModuleType:
    """A file as a module, with its folder on the import path as for a script."""
    module = ModuleType(str(path.with_suffix("")))
    module.__file__ = str(path)
    sys.path.insert(0, str(path.parent))
    sys.modules[module.__name__] = module
    SourceFileLoader(module.__name__, str(path)).exec_module(module)
    return module
