"""A result in the forms other tools read: a pandas DataFrame, CSV, NumPy ``.npz``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cka_hooks.errors import MissingExtraError
from cka_hooks.files import PathLike, replace_file
from cka_hooks.results.result import CKAResult

if TYPE_CHECKING:
    import pandas

_TIDY = ("row", "column", "cka", "stderr")


def to_dataframe(result: CKAResult, *, tidy: bool = False) -> pandas.DataFrame:
    """The matrix as a DataFrame; see :meth:`CKAResult.to_dataframe`.

    Raises:
        MissingExtraError: pandas is not installed.

    Example:
        >>> to_dataframe(CKAResult.example(), tidy=True).head(2)
             row column  cka  stderr
        0  conv1  conv1  1.0    0.00
        1  conv1  conv2  0.9    0.02
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError(
            'to_dataframe needs pandas, which is not installed: pip install "cka-hooks[dataframe]"'
        ) from error
    if tidy:
        return pandas.DataFrame(list(_pairs(result)), columns=list(_TIDY))
    # Copied: an edit of the frame must not reach into the result.
    return pandas.DataFrame(result.matrix.numpy().copy(), index=list(result.rows), columns=list(result.columns))


def to_csv(result: CKAResult, path: PathLike, *, tidy: bool = False) -> None:
    """Write the matrix as CSV in UTF-8; see :meth:`CKAResult.to_csv`.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_csv(CKAResult.example(), f"{folder}/cka.csv")
        ...     print(open(f"{folder}/cka.csv").read())
        layer,conv1,conv2,fc
        conv1,1.0,0.9,0.5
        conv2,0.9,1.0,0.6
        fc,0.5,0.6,1.0
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if tidy:
        writer.writerow(_TIDY)
        writer.writerows([row, column, _cell(cka), _cell(stderr)] for row, column, cka, stderr in _pairs(result))
    else:
        writer.writerow(["layer", *result.columns])
        for label, values in zip(result.rows, result.matrix.tolist(), strict=True):
            writer.writerow([label, *map(_cell, values)])
    replace_file(path, lambda file: file.write(text.getvalue().encode("utf-8", "backslashreplace")))


def to_npz(result: CKAResult, path: PathLike) -> None:
    """Write ``rows``, ``columns``, ``matrix`` and ``stderr`` as NumPy arrays; ``np.load`` needs no pickle.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_npz(CKAResult.example(), f"{folder}/cka.npz")
        ...     with np.load(f"{folder}/cka.npz") as file:
        ...         print(file["rows"], file["matrix"].shape)
        ['conv1' 'conv2' 'fc'] (3, 3)
    """
    replace_file(
        path,
        lambda file: np.savez_compressed(
            file,
            rows=np.array(result.rows, dtype=np.str_),
            columns=np.array(result.columns, dtype=np.str_),
            matrix=result.matrix.numpy(),
            stderr=result.stderr.numpy(),
        ),
    )


def _pairs(result: CKAResult) -> Iterator[tuple[str, str, float, float]]:
    values, errors = result.matrix.tolist(), result.stderr.tolist()
    for i, row in enumerate(result.rows):
        for j, column in enumerate(result.columns):
            yield row, column, values[i][j], errors[i][j]


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(value)
