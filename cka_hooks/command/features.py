"""Load the features that the command line names: a file, with its rows in the order of the data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cka_hooks.command.data import identifiers
from cka_hooks.command.models import SpecError
from cka_hooks.run.feature_files import is_feature_file
from cka_hooks.run.precomputed import Precomputed

FEATURES = """\
features are a .npy, .npz, .safetensors (as cka-hooks record writes it) or .h5 file, whose arrays have a row for
each sample; file.h5::NAME is one array in it. If the file has identifiers (an array sample_ids beside the others),
rows are found by them: paths within an image folder, such as cat/1.jpg, or positions in another data set, from 0.
Without identifiers, the rows are those of the whole data set, in its own order."""


def sample_ids_word(parser: Any) -> None:
    """Add ``--sample-ids``."""
    parser.add_argument("--sample-ids", type=lambda word: int(word) if word.isdigit() else word, metavar="KEY",
        help="the entry of each batch that identifies its samples, for your own loader")  # fmt: skip


def features_of(spec: str | None, loader: Iterable[Any], key: str | int | None, model: str) -> dict[str, Precomputed]:
    """The features that `spec` names, under a name that no model has; empty if it names no file of features.

    Args:
        spec: the value of ``--against``.
        loader: the loader whose order the rows get.
        key: the value of ``--sample-ids``, to find rows with during the run.
        model: the name that is taken.

    Raises:
        SpecError: the number of rows is not that of the data set, or nothing says what the identifiers refer to.
        SampleCountError: a sample has no row.
    """
    if spec is None or not is_feature_file(spec):
        return {}
    file, _, array = spec.partition("::")
    name = array or Path(file).stem
    given, samples, dataset = Precomputed.load(spec), identifiers(loader), getattr(loader, "dataset", None)
    if key is None and given.sample_ids is not None:
        if samples is None:
            raise SpecError(
                f"{spec} has identifiers of samples: name the entry of a batch that has them with --sample-ids"
            )
        given = given.ordered(given.rows_of(samples))
    elif key is None and samples is not None:
        total = len(dataset.dataset)  # type: ignore[union-attr]
        if given.samples != total:
            raise SpecError(
                f"{spec} has {given.samples} rows and the data set {total} samples: expected a row for each, or "
                "identifiers"
            )
        given = given.ordered(dataset.indices)  # type: ignore[union-attr]
    return {name if name != model else f"{name} features": given}
