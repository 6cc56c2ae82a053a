"""Load the data that the command line names: a folder of images, ``torchvision:NAME:FOLDER``, or ``file.py:NAME``."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from cka_hooks.command.models import SpecError, Transform, from_file, unknown
from cka_hooks.command.shared import whole
from cka_hooks.errors import imported
from cka_hooks.recording.batches import check_loader
from cka_hooks.run.precomputed import Precomputed, identifiers

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
# The formats that may be behind these suffixes. Pillow looks at the content, and would start Ghostscript for
# PostScript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")


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


def data_words(parser: argparse.ArgumentParser, samples: str = "all") -> None:
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
    add("--samples", type=_count_or_all, default=argparse.SUPPRESS, metavar="N", help=drawn)
    add(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="for samples, their order, and random weights; default: 0",
    )
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
        raise argparse.ArgumentTypeError(
            f"{word} cannot be used ({why}): expected auto, cpu, cuda:1 or mps"
        ) from None


def loader_of(arguments: argparse.Namespace, transform: Transform | None) -> Iterable[Any]:
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
        return _torchvision(spec, transform, download)
    files = ImageFiles(Path(spec), transform)
    if not len(files):
        raise SpecError(f"no images in the folder {spec}: looked for {', '.join(sorted(IMAGES))}")
    return files


def _torchvision(spec: str, transform: Transform, download: bool) -> Any:
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
