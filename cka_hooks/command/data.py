"""Load the data that the command line names: an image folder, ``torchvision:NAME:ROOT``, or ``file.py:name``."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from cka_hooks.command import numbers
from cka_hooks.command.models import SpecError, Transform, from_file, unknown
from cka_hooks.errors import imported
from cka_hooks.run.replay import Randomness

DATA = """\
data is one of
  photos/                        a folder of images, or with one subfolder per class
  torchvision:CIFAR10:data/      the test split of a torchvision data set, with the folder that holds it
  nets.py:test_loader            a loader or data set in your own Python file, or a function there that
                                 returns one

Images are prepared as the weights of --model ask for, or as is usual for ImageNet."""

KINDS = "an image folder, torchvision:NAME:ROOT or file.py:NAME"
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
# The formats that may be behind these suffixes. Pillow looks at the content, and would start Ghostscript for
# PostScript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """The images of a folder. Each subfolder is a class, named after the folder.

    Attributes:
        paths: paths of the images, sorted.
        sample_ids: their paths within the folder.
        classes: names of the subfolders, sorted; empty if the images are in the folder itself.
    """

    def __init__(self, root: Path, transform: Transform) -> None:
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        parts = [path.relative_to(root).parts for path in self.paths]
        self.classes = sorted({folder for folder, *file in parts if file})
        self.sample_ids = ["/".join(names) for names in parts]
        self._targets = [self.classes.index(folder) if file else 0 for folder, *file in parts]
        self._transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path, formats=FORMATS) as file:
                image = file.convert("RGB")
        except Exception as error:  # of many kinds: decoders raise what they like
            raise SpecError(f"could not read {path} as an image ({type(error).__name__}: {error})") from error
        return self._transform(image), self._targets[index]


def load_data(
    spec: str,
    *,
    transform: Transform | None = None,
    batch_size: int = 64,
    samples: int | None = None,
    seed: int = 0,
    workers: int = 0,
    download: bool = False,
) -> Iterable[Any]:
    """The loader that `spec` names, over a random subset in random order, the same for the same seed.

    A loader in a file is used as it is. A data set there is treated like the others.

    Args:
        spec: ``photos/``, ``torchvision:CIFAR10:data/`` or ``file.py:name``.
        transform: from a PIL image to a tensor; None for ImageNet's usual one.
        batch_size: batch size of the loader.
        samples: how many samples to draw, None for all.
        seed: seed of the subset and of its order.
        workers: number of processes that read images.
        download: whether torchvision may download a data set that is not at ROOT.

    Raises:
        SpecError: the folder, data set, file or name does not exist, or it is empty.
        MissingExtraError: torchvision is not installed.
    """
    dataset: Any
    if spec.startswith("torchvision:"):
        dataset = _torchvision(spec, transform or imagenet_transform(), download)
    elif ".py:" in spec:
        dataset = from_file(spec)
        indexed = hasattr(dataset, "__getitem__") and not isinstance(dataset, list | tuple | Mapping | str)
        if isinstance(dataset, DataLoader) or not indexed:
            if not isinstance(dataset, Iterable) or isinstance(dataset, Mapping | str):
                raise SpecError(f"{spec} is of type {type(dataset).__name__}: expected a loader or a data set")
            return dataset
    elif Path(spec).is_dir():
        dataset = ImageFiles(Path(spec), transform or imagenet_transform())
        if not len(dataset):
            raise SpecError(f"no images in the folder {spec}: looked for {', '.join(sorted(IMAGES))}")
    else:
        raise SpecError(f"{spec!r} is neither a folder nor the name of data: expected {KINDS}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return DataLoader(Subset(dataset, order[:samples]), batch_size=batch_size, num_workers=workers)


def loading_words(parser: Any) -> None:
    """Add ``--device`` and the arguments that :func:`loader_of` reads."""
    parser.add_argument("--device", default="auto", metavar="D", help="auto (cuda if there is one), cpu, cuda:1, mps")
    parser.add_argument("--batch-size", type=numbers.count, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=numbers.count_or_none, default=0, metavar="N",
        help="processes that read images; default: %(default)s")  # fmt: skip
    parser.add_argument("--download", action="store_true", help="let torchvision download the data set")


def loader_of(arguments: argparse.Namespace, transform: Transform | None) -> Iterable[Any]:
    """The loader of ``--data``, see :func:`load_data`."""
    names = ("batch_size", "samples", "seed", "workers", "download")
    return load_data(arguments.data, transform=transform, **{name: getattr(arguments, name) for name in names})


def identifiers(loader: Iterable[Any]) -> list[int | str] | None:
    """The identifier of each sample in the order of the loader; None for a loader from a file.

    For an image folder these are paths within it, for other data sets the positions of samples.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Subset):
        return None
    if isinstance(dataset.dataset, ImageFiles):
        return [dataset.dataset.sample_ids[index] for index in dataset.indices]
    return list(dataset.indices)


def _torchvision(spec: str, transform: Transform, download: bool) -> Any:
    datasets = imported("torchvision.datasets", "torchvision data sets need torchvision", '"cka-hooks[vision]"')
    _, name, root = (*spec.split(":", 2), "")[:3]
    cls = getattr(datasets, name, None)
    if name not in datasets.__all__ or cls is None:
        raise unknown("torchvision", "data set", name, datasets.__all__)
    takes = inspect.signature(cls).parameters
    if "root" in takes and not root:
        raise SpecError(f"{spec} lacks the folder it lies in: expected torchvision:{name}:FOLDER")

    def prepared(image: Any) -> Tensor:
        return transform(image.convert("RGB") if hasattr(image, "convert") else image)

    known = {"root": root, "download": download, "train": False, "transform": prepared}
    options = {option: value for option, value in known.items() if option in takes}
    problem: Exception | None = None
    for split in [{"split": word} for word in ("test", "val", "valid")] if "split" in takes else [{}]:
        try:
            return cls(**options, **split)
        except ValueError as error:  # no such split, as a rule
            problem = problem or error
        except (RuntimeError, OSError, ImportError) as error:
            is_there = download or "download" not in takes or isinstance(error, ImportError)
            hint = "" if is_there else "; --download gets it"
            raise SpecError(f"{spec}: {str(error).splitlines()[0]}{hint}") from error
    raise SpecError(f"{spec}: {problem}") from problem


def imagenet_transform() -> Transform:
    """Shorter side to 256, the middle 224 x 224, ImageNet's mean and spread: what most image models expect."""
    transforms = imported("torchvision.transforms", "image data needs torchvision", '"cka-hooks[vision]"')
    middle = [transforms.Resize(256), transforms.CenterCrop(224)]
    scaled = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return cast(Transform, transforms.Compose(middle + scaled))


def first_batch(loader: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch of a loader, and a loader that yields it again, first and in the same order.

    Raises:
        SpecError: the loader is empty.
    """
    randomness = Randomness(loader)
    before = randomness.state()
    iterator = iter(loader)
    try:
        first = next(iterator)
    except StopIteration:
        raise SpecError("the loader yielded no batch: it is empty") from None
    if iterator is loader:
        # What is yet to come must not be drawn like the first batch.
        return first, chain([first], iterator)
    randomness.restore(before)
    return first, loader


def described(spec: str, loader: Iterable[Any]) -> str:
    """Describe the data in a few words for the plan."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, Subset):
        return f"{len(dataset):,} of {len(dataset.dataset):,} samples of {spec}, drawn and ordered at random"  # type: ignore[arg-type]
    return f"{spec}, as it is"
