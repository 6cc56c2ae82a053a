"""Load the models that the command line names: ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME``, ``file.py:NAME``."""

from __future__ import annotations

import copy
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cka_hooks.errors import CKAError, OptionError, imported
from cka_hooks.names import closest

Transform = Callable[[Any], Tensor]

MODELS = """\
a model is one of
  torchvision:resnet50           torchvision's, with its default weights (downloaded once)
  timm:vit_tiny_patch16_224      timm's, pretrained
  hf:google-bert/bert-base-uncased   a Hugging Face model, by its name or folder
  nets.py:net                    a model in your own Python file, or a function there that returns one

weights are the name of torchvision weights (IMAGENET1K_V2), "none" for random ones, or a checkpoint file
(.pt, .pth, .safetensors), which is loaded without running any code in it."""

KINDS = "torchvision:NAME, timm:NAME, hf:NAME or file.py:NAME"
# Where training scripts keep the state dict in a checkpoint, and the prefixes that wrappers put before its names.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


class SpecError(CKAError, ValueError):
    """The words for a model or for data do not name anything that can be loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what is known about its input.

    Attributes:
        name: a short name, for labels and file names.
        model: the model, in eval mode, on the CPU.
        transform: from a PIL image to the tensor that the weights expect; None if they do not say.
        input_shape: (C, H, W) of one image; None if the model does not take images.
    """

    name: str
    model: nn.Module
    transform: Transform | None = None
    input_shape: tuple[int, ...] | None = None


def load_model(spec: str, weights: str | None = None, *, seed: int = 0) -> LoadedModel:
    """The model that `spec` names.

    Args:
        spec: ``torchvision:resnet50``, ``timm:vit_tiny_patch16_224``, ``hf:bert-base-uncased`` or ``file.py:name``,
            where the name is that of a module, or of a function that returns one.
        weights: None uses what the name stands for: pretrained weights, or for a file, what it has. "none" draws
            random ones. Otherwise the name of torchvision weights, or a checkpoint file, which is loaded without
            running any code in it.
        seed: seed of random weights.

    Raises:
        SpecError: the model, function, name of weights or file does not exist, or they do not fit together.
        MissingExtraError: the package is not installed.
    """
    kind, _, name = spec.partition(":")
    torch.manual_seed(seed)
    if kind not in _BUILDERS and ".py:" not in spec:
        if Path(spec).is_file():
            raise SpecError(
                f"{spec} is a file, and not a model: expected {KINDS}; pass a file of weights with --weights"
            )
        raise SpecError(f"{spec!r} is not the name of a model: expected {KINDS}")
    if not name:
        raise SpecError(f"{spec!r} lacks the name of a model: expected {KINDS}")
    file = Path(weights) if weights is not None and _is_file(weights) else None
    if file is not None or (weights is not None and weights.lower() == "none"):
        weights = "none"
    elif weights is not None and kind != "torchvision":
        hint = f"; timm names weights in the model, as in {spec}.TAG" if kind == "timm" else ""
        raise SpecError(f"weights {weights!r} for {spec}: expected a checkpoint file or none{hint}")
    try:
        loaded = _BUILDERS[kind](name, weights) if kind in _BUILDERS else _from_file(spec)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CKAError):
            raise
        raise SpecError(
            f"could not load {spec} with its weights ({_reason(error)}). Without a network, pass a checkpoint file "
            "with --weights, or --weights none for random weights"
        ) from error
    if file is not None:
        load_weights(loaded.model, file)
    loaded.model.eval()
    return loaded


def _is_file(weights: str) -> bool:
    """Whether these weights are a file, possibly a missing one, rather than a name."""
    return Path(weights).is_file() or (weights.lower() != "none" and Path(weights).suffix != "")


def _from_file(spec: str) -> LoadedModel:
    found = from_file(spec)
    if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
        raise SpecError(
            f"{spec} is a state dict, and not a model: name a function that builds the model, and pass the file of "
            "weights with --weights"
        )
    if not isinstance(found, nn.Module):
        raise SpecError(
            f"{spec} is of type {type(found).__name__}: expected an nn.Module or a function that returns one"
        )
    return LoadedModel(spec.rpartition(":")[2], found)


def unknown(package: str, kind: str, name: str, names: Sequence[str]) -> SpecError:
    """The error for a package that has no model or data set of this name."""
    return SpecError(f"{package} has no {kind} {name!r}: the closest are {', '.join(closest(name, names))}")


def _torchvision(name: str, weights: str | None) -> LoadedModel:
    models = imported("torchvision.models", "torchvision models need torchvision", '"cka-hooks[vision]"')
    if name not in models.list_models():
        raise unknown("torchvision", "model", name, models.list_models())
    members = models.get_model_weights(name).__members__
    known, wanted = {**members, "none": None}, weights or "DEFAULT"
    if wanted not in known:
        raise SpecError(
            f"torchvision's {name} has no weights {wanted!r}: expected {', '.join(known)}, or a checkpoint file"
        )
    model = models.get_model(name, weights=known[wanted])
    like = known[wanted] or next(reversed(members.values()), None)
    transform = like.transforms() if like is not None else None
    size = getattr(transform, "crop_size", [224])
    return LoadedModel(name, model, transform, (3, size[0], size[-1]))


def _timm(name: str, weights: str | None) -> LoadedModel:
    timm = imported("timm", "timm models need timm", "timm")
    if not timm.is_model(name):
        raise unknown("timm", "model", name, timm.list_models())
    model = timm.create_model(name, pretrained=weights is None)
    config = timm.data.resolve_data_config({}, model=model)
    return LoadedModel(name, model, timm.data.create_transform(**config), tuple(config["input_size"]))


def _hf(name: str, weights: str | None) -> LoadedModel:
    transformers = imported("transformers", "Hugging Face models need transformers", "transformers")
    if weights is None:
        model = transformers.AutoModel.from_pretrained(name)
    else:
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))
    short = name.rstrip("/").rpartition("/")[2]
    size = getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        return LoadedModel(short, model)
    shape = getattr(model.config, "num_channels", 3), size, size
    return LoadedModel(short, model, _hf_transform(transformers, name), shape)


def _hf_transform(transformers: Any, name: str) -> Transform | None:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return None
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]


# Takes a name, and the name of weights: "none" for random ones, None for the usual ones.
_BUILDERS = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}


def device_of(name: str) -> torch.device:
    """The device that a word names, "auto" for the best one available.

    Raises:
        OptionError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file into `model`, ``.safetensors`` or from ``torch.save``, without running any code in it.

    A state dict under "state_dict" or "model" is found, and prefixes of wrappers are dropped.

    Raises:
        SpecError: the file does not exist, holds more than tensors, or does not fit the model.
    """
    if not path.is_file():
        raise SpecError(f"no weights file {path}")
    state = _state_dict(path)
    wanted = set(model.state_dict())
    for prefix in _PREFIXES:
        if not wanted & set(state) and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        shown = "; ".join(line[:160] for line in lines[1:4]) or _reason(error)
        raise SpecError(f"{path} does not fit {type(model).__name__}: {shown}") from error


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SpecError(
            f"could not load {path}: it is damaged, or holds Python objects, which are not loaded because that could "
            "run code. Save it with torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:
        raise SpecError(
            f"could not load {path} ({_reason(error)}): expected what torch.save(model.state_dict(), path) writes, "
            "or a .safetensors file"
        ) from error
    if isinstance(found, Mapping):
        found = next((found[key] for key in _NESTED if isinstance(found.get(key), Mapping)), found)
    entries = found.items() if isinstance(found, Mapping) else ()
    odd = [key for key, value in entries if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd or not entries:
        because = f", because its entry {odd[0]!r:.60} is not a tensor with a name" if odd else ""
        raise SpecError(f"{path} holds no state dict{because}: save it with torch.save(model.state_dict(), path)")
    return dict(found)


def from_file(spec: str) -> Any:
    """What ``file.py:name`` names: what a function or class of this name returns, anything else as it is.

    A module is copied, so that two sets of weights can be loaded into it.

    Raises:
        SpecError: the file or name does not exist, or the function raised. Its own error is chained.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise SpecError(f"no file {file} to find {name!r} in")
    try:
        module = _imported(path)
        if hasattr(module, name):
            found = getattr(module, name)
            if isinstance(found, nn.Module):
                return copy.deepcopy(found)
            is_data = not isinstance(found, type) and isinstance(found, Iterable | Dataset)
            return found() if callable(found) and not is_data else found
    except (Exception, SystemExit) as error:
        raise SpecError(f"{spec} raised {_where(error, path)}") from error
    raise SpecError(f"{file} has no {name!r}: it has {', '.join(_own_names(module)) or 'nothing'}")


def _own_names(module: ModuleType) -> list[str]:
    """The functions, classes, modules and data that a user's file defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (getattr(value, "__module__", "") == module.__name__ or isinstance(value, nn.Module | Dataset))
    ]


def _imported(path: Path) -> ModuleType:
    """Import a file as a module, with its folder on the import path as for a script; the same module each time."""
    resolved = path.resolve()
    name = f"cka_hooks_file_{resolved.stem}_{abs(hash(str(resolved)))}"
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(resolved))
    module = ModuleType(name)
    module.__file__ = str(resolved)
    if str(resolved.parent) not in sys.path:
        sys.path.insert(0, str(resolved.parent))
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _where(error: BaseException, path: Path) -> str:
    """An error in a user's file, in one line: kind, message and the line of the file that it came from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
    return f"{type(error).__name__}: {error}" + (f" ({path}, line {lines[-1]})" if lines else "")


def _reason(error: Exception) -> str:
    """The first line of an error's message; its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
