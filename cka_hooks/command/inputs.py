"""Load the models and the data that the command line names.

A model is ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME`` or ``file.py:NAME``. Data is a folder of images,
``torchvision:NAME:FOLDER`` or ``file.py:NAME``.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from cka_hooks.command.shared import whole
from cka_hooks.errors import CKAError, imported
from cka_hooks.names import closest
from cka_hooks.recording.batches import check_loader
from cka_hooks.run.precomputed import Precomputed, identifiers

Transform = Callable[[Any], Tensor]

# Where training scripts keep the state dict in a checkpoint, and the prefixes that wrappers put before its names.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
# The formats that may be behind these suffixes. Pillow looks at the content, and would start Ghostscript for
# PostScript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")


class SpecError(CKAError, ValueError):
    """The words for a model or for data do not name anything that can be loaded."""


def unknown(where: str, kind: str, name: str, names: Sequence[str]) -> SpecError:
    """The error for a package or file that has nothing of this kind and name."""
    return SpecError(f"{where} has no {kind} {name!r}: the closest are {', '.join(closest(name, names))}")


# ---- what a file has ------------------------------------------------------------------------------


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


# ---- models ---------------------------------------------------------------------------------------


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


def model_words(parser: ArgumentParser, weights: str | None = None) -> None:
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
    usual = weights or "pretrained, or as the file has it"
    add("--weights", default=weights, metavar="W", help=f"see above; default: {usual}")
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


def _torchvision_model(name: str, weights: str | None) -> LoadedModel:
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
_BUILDERS = {"torchvision": _torchvision_model, "timm": _timm, "hf": _hf}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file into `model`, ``.safetensors`` or from ``torch.save``, without running any code in it.

    A state dict under "state_dict" or "model" is found, and prefixes of wrappers are dropped.

    Raises:
        SpecError: the file does not exist, holds more than tensors, or does not fit the model.
    """
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
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


# ---- data -----------------------------------------------------------------------------------------


class ImageFiles(Dataset[Tensor]):
    """The images of a folder and of its subfolders.

    Attributes:
        paths: paths of the images, sorted.
        sample_ids: their paths within the folder.
    """

    def __init__(self, root: Path, transform: Transform) -> None:
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        self.sample_ids = [path.relative_to(root).as_posix() for path in self.paths]
        self._transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path, formats=FORMATS) as file:
                image = file.convert("RGB")
        except Exception as error:  # of many kinds: decoders raise what they like
            raise SpecError(f"could not read {path} as an image ({type(error).__name__}: {error})") from error
        return self._transform(image)


class DrawnSamples(Subset[Any]):
    """Some samples of a data set, in another order.

    Attributes:
        sample_ids: what identifies each of them: what the data set's own `sample_ids` has, else its index.
    """

    def __init__(self, dataset: Any, order: Sequence[int]) -> None:
        super().__init__(dataset, order)
        ids = getattr(dataset, "sample_ids", range(len(dataset)))
        self.sample_ids = identifiers([ids[index] for index in order], "sample_ids of the data set")


def data_words(parser: ArgumentParser, samples: str = "all") -> None:
    """DATA is one of
      photos/                        a folder of images, or with one subfolder per class
      torchvision:CIFAR10:data/      the test split of a torchvision data set, with the folder that holds it
      nets.py:test_loader            a loader or data set in your own Python file, or a function there that
                                     returns one
    Images are prepared as the weights of --model ask for, or as is usual for ImageNet.
    """
    add = parser.add_argument_group("the data", inspect.getdoc(data_words)).add_argument
    add("--data", required=True, metavar="DATA", help="see above")
    ids = "the entry of each batch that identifies its samples, for your own loader"
    add("--sample-ids", type=lambda word: int(word) if word.isdecimal() else word, metavar="KEY", help=ids)
    drawn = f'number of samples, drawn at random, or "all"; default: {samples}'
    add("--samples", type=_count_or_all, default=SUPPRESS, metavar="N", help=drawn)
    seeded = "for samples, their order, and random weights; default: %(default)s"
    add("--seed", type=whole(0), default=0, metavar="N", help=seeded)
    add("--batch-size", type=whole(1), default=64, metavar="N", help="default: %(default)s")
    add("--workers", type=whole(0), default=0, metavar="N", help="processes that read images; default: %(default)s")
    add("--download", action="store_true", help="let torchvision download the data set")
    devices = "auto (cuda if there is one), cpu, cuda:1, mps"
    add("--device", type=_device, default="auto", metavar="D", help=devices)


def _count_or_all(word: str) -> int | None:
    return None if word == "all" else whole(1)(word)


def _device(word: str) -> str:
    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Also fails if the device is not there.
        return str(torch.empty(0, device=word).device)
    except (RuntimeError, AssertionError) as error:
        why = shorten(str(error), 120)
        raise ArgumentTypeError(f"{word} cannot be used ({why}): expected auto, cpu, cuda:1 or mps") from None


def loader_of(arguments: Namespace, transform: Transform | None) -> Iterable[Any]:
    """The loader of ``--data``, over a random subset in random order, the same for the same seed.

    A loader in a file is used as it is. A data set there is treated like the others.

    Args:
        arguments: with `data`, `samples`, `seed`, `batch_size`, `workers` and `download`.
        transform: from a PIL image to a tensor; None for ImageNet's usual one.

    Raises:
        SpecError: the folder, data set, file or name does not exist, or it is empty.
        OptionError: what a file has is neither a loader nor a data set.
        MissingExtraError: torchvision is not installed.
    """
    data = _named(arguments.data, transform, arguments.download)
    if isinstance(data, DataLoader | list | tuple) or not hasattr(data, "__getitem__"):
        check_loader(data)
        return data  # type: ignore[no-any-return]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    drawn = DrawnSamples(data, order[: arguments.samples])
    return DataLoader(drawn, batch_size=arguments.batch_size, num_workers=arguments.workers)


def _named(spec: str, transform: Transform | None, download: bool) -> Any:
    is_folder = Path(spec).is_dir()
    if not (is_folder or spec.startswith("torchvision:")):
        return from_file(spec)
    if transform is None:
        models = imported("torchvision.models", "image data needs torchvision", '"cka-hooks[vision]"')
        transform = models.ResNet18_Weights.DEFAULT.transforms()
    if not is_folder:
        return _torchvision_data(spec, transform, download)
    files = ImageFiles(Path(spec), transform)
    if not len(files):
        raise SpecError(f"no images in the folder {spec}: looked for {', '.join(sorted(IMAGES))}")
    return files


def _torchvision_data(spec: str, transform: Transform, download: bool) -> Any:
    datasets = imported("torchvision.datasets", "torchvision data sets need torchvision", '"cka-hooks[vision]"')
    _, name, root = (*spec.split(":", 2), "")[:3]
    if name not in datasets.__all__:
        raise unknown("torchvision", "data set", name, datasets.__all__)
    cls = getattr(datasets, name)
    takes = inspect.signature(cls).parameters

    def prepared(image: Any) -> Tensor:
        return transform(image.convert("RGB") if hasattr(image, "convert") else image)

    known = {"root": root, "download": download, "train": False, "split": "test", "transform": prepared}
    options = {option: value for option, value in known.items() if option in takes}
    try:
        try:
            return cls(**options)
        except ValueError:  # without such a split, as a rule
            if "split" not in options:
                raise
            return cls(**{**options, "split": "val"})
    except (RuntimeError, OSError, ValueError) as error:
        raise SpecError(f"{spec}: {str(error).splitlines()[0]}; --download gets what is missing") from error


def features_of(spec: str, loader: Iterable[Any], key: str | int | None, model: str) -> dict[str, Precomputed]:
    """The features in the file that `spec` names, under a name that no model has.

    Args:
        spec: the value of ``--against``.
        loader: the loader whose order the rows get.
        key: the value of ``--sample-ids``, to find rows with during the run.
        model: the name that is taken.

    Raises:
        SpecError: the number of rows is not that of the data set.
        SampleCountError: a sample has no row.
    """
    file, _, array = spec.partition("::")
    given, drawn = Precomputed.load(spec), getattr(loader, "dataset", None)
    if key is None and isinstance(drawn, DrawnSamples):
        total = len(drawn.dataset)  # type: ignore[arg-type]
        if given.sample_ids is None and given.samples != total:
            raise SpecError(
                f"{spec} has {given.samples} rows and the data set {total} samples: expected a row for each, or "
                "identifiers"
            )
        given = given.ordered(drawn.indices if given.sample_ids is None else given.rows_of(drawn.sample_ids, spec))
    name = array or Path(file).stem
    return {name if name != model else f"{name} features": given}


def described(spec: str, loader: Iterable[Any]) -> str:
    """Describe the data in a few words."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, DrawnSamples):
        return f"{len(dataset):,} of {len(dataset.dataset):,} samples of {spec}, drawn and ordered at random"  # type: ignore[arg-type]
    return f"{spec}, as it is"
