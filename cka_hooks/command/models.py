"""Models from the command line's words: ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME``, ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import CKAError, MissingExtraError

Transform = Callable[[Any], Tensor]

KINDS = "torchvision:NAME, timm:NAME, hf:NAME or file.py:function"
# Where training scripts keep the state dict in a checkpoint, and what wrappers put before its names.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


class SpecError(CKAError, ValueError):
    """Words for a model or for data that name nothing that could be loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what its weights were trained with.

    Attributes:
        name: short, for labels and file names.
        model: in eval mode, on the CPU.
        transform: from a PIL image to the tensor its weights expect, None where they do not say.
        input_shape: (C, H, W) of one image, None where the model does not take images.
    """

    name: str
    model: nn.Module
    transform: Transform | None = None
    input_shape: tuple[int, ...] | None = None


def load_model(spec: str, weights: str | None = None, *, seed: int = 0) -> LoadedModel:
    """The model that `spec` names.

    Args:
        spec: ``torchvision:resnet50``, ``timm:vit_tiny_patch16_224``, ``hf:bert-base-uncased`` or
            ``file.py:function`` with a function that returns a module.
        weights: None takes what the name stands for (pretrained ones; for a function, what it returns). "none"
            draws random ones. Else the name of torchvision weights, or a checkpoint file, which is loaded
            without running any code in it.
        seed: of random weights.

    Raises:
        SpecError: there is no such model, function, name of weights or file, or they do not fit together.
        MissingExtraError: the package is not installed.
    """
    kind, _, name = spec.partition(":")
    builders = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}
    torch.manual_seed(seed)
    is_file = weights is not None and weights.lower() != "none" and Path(weights).suffix != ""
    if kind in builders:
        if not name:
            raise SpecError(f"{spec!r} lacks the name of a model: {KINDS}")
        loaded = builders[kind](name, "none" if is_file else weights)
    elif ".py:" in spec:
        if weights is not None and not is_file and weights.lower() != "none":
            raise SpecError(f"weights {weights!r} for {spec}: a function's model takes a checkpoint file")
        model = call_function(spec)
        if not isinstance(model, nn.Module):
            raise SpecError(f"{spec} returned {type(model).__name__}: expected an nn.Module")
        loaded = LoadedModel(function_name(spec), model)
    else:
        raise SpecError(f"{spec!r} names no model: expected {KINDS}")
    if is_file:
        assert weights is not None
        load_weights(loaded.model, Path(weights))
    loaded.model.eval()
    return loaded


def _torchvision(name: str, weights: str | None) -> LoadedModel:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError('torchvision models need torchvision: pip install "cka-hooks[vision]"') from error
    if name not in models.list_models():
        raise SpecError(f"torchvision has no model {name!r}{_closest(name, models.list_models())}")
    try:
        enum = models.get_model_weights(name)
        members = list(enum)
        wanted = weights if weights is not None else "DEFAULT"
        if wanted.lower() == "none":
            chosen = None
        elif wanted in enum.__members__:
            chosen = enum[wanted]
        else:
            known = ", ".join([*enum.__members__, "none"])
            raise SpecError(f"weights {wanted!r} of torchvision's {name}: it has {known}; or name a checkpoint file")
        model = models.get_model(name, weights=chosen)
    except (OSError, RuntimeError) as error:
        raise SpecError(_no_download(f"torchvision's {name}", error)) from error
    like = chosen or (members[-1] if members else None)
    transform = like.transforms() if like is not None else None
    size = getattr(transform, "crop_size", [224])
    return LoadedModel(name, model, transform, (3, size[0], size[-1]))


def _timm(name: str, weights: str | None) -> LoadedModel:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise MissingExtraError("timm models need timm: pip install timm") from error
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}{_closest(name, timm.list_models())}")
    if weights is not None and weights.lower() != "none":
        raise SpecError(f"weights {weights!r}: timm names them in the model, as in {name}.tag; or give 'none'")
    try:
        model = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError) as error:
        raise SpecError(_no_download(f"timm's {name}", error)) from error
    config = timm.data.resolve_data_config({}, model=model)
    return LoadedModel(name, model, timm.data.create_transform(**config), tuple(config["input_size"]))


def _hf(name: str, weights: str | None) -> LoadedModel:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("Hugging Face models need transformers: pip install transformers") from error
    if weights is not None and weights.lower() != "none":
        raise SpecError(f"weights {weights!r}: hf:{name} takes a checkpoint file or 'none'")
    try:
        if weights is None:
            model = transformers.AutoModel.from_pretrained(name)
        else:
            model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(_no_download(f"the Hugging Face model {name}", error)) from error
    short = name.rstrip("/").rpartition("/")[2]
    size = getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        return LoadedModel(short, model)
    return LoadedModel(short, model, _hf_transform(name), (getattr(model.config, "num_channels", 3), size, size))


def _hf_transform(name: str) -> Transform | None:
    transformers: Any = importlib.import_module("transformers")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return None
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a checkpoint file, a ``.safetensors`` or what ``torch.save`` wrote, running no code in it.

    A state dict under "state_dict" or "model" is found, and prefixes that wrappers add are dropped.

    Raises:
        SpecError: no such file, one that holds more than tensors, or one that does not fit the model.
    """
    if not path.is_file():
        raise SpecError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(
            f"{path} was not loaded ({reason}): save model.state_dict() and nothing else, "
            "since files that hold Python objects would run code"
        ) from error
    if isinstance(state, dict):
        state = next((state[key] for key in _NESTED if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SpecError(f"{path} holds no state dict: save model.state_dict()")
    wanted = set(model.state_dict())
    for prefix in _PREFIXES:
        if not wanted & set(state) and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        shown = "; ".join(line[:160] for line in lines[1:4])
        raise SpecError(f"{path} does not fit {type(model).__name__}: {shown}") from error


def call_function(spec: str) -> Any:
    """What the function in ``file.py:function`` returns when called without arguments.

    Raises:
        SpecError: there is no such file or function, or it raised; its own error is chained.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise SpecError(f"no file {file}, to find the function {name} in")
    try:
        module = _imported(path)
    except Exception as error:
        raise SpecError(f"{file} cannot be imported: {_where(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise SpecError(f"{file} has no function {name!r}; it has {', '.join(there) or 'none'}")
    try:
        return function()
    except Exception as error:
        raise SpecError(f"{spec} raised {_where(error, path)}") from error


def function_name(spec: str) -> str:
    """The function in ``file.py:function``."""
    return spec.rpartition(":")[2]


def _imported(path: Path) -> ModuleType:
    """The file as a module, its folder on the import path as for a script, and the same one each time."""
    resolved = path.resolve()
    name = f"cka_hooks_file_{resolved.stem}_{abs(hash(str(resolved)))}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, resolved)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    if str(resolved.parent) not in sys.path:
        sys.path.insert(0, str(resolved.parent))
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _where(error: Exception, path: Path) -> str:
    """An error of somebody's file in a line: kind, message and the line of the file it came from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
    return f"{type(error).__name__}: {error}" + (f" ({path}, line {lines[-1]})" if lines else "")


def _closest(name: str, names: list[str]) -> str:
    from cka_hooks.names import closest

    return f"; the closest are {', '.join(closest(name, names))}"


def _no_download(what: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{what} could not be had with its weights ({reason}). Without a network, give a checkpoint file, "
        "or 'none' for random weights"
    )
