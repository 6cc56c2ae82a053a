"""A result as a table: text, a pandas DataFrame, CSV, or NumPy ``.npz``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from cka_hooks.errors import imported
from cka_hooks.files import PathLike, replace_file
from cka_hooks.names import printable

if TYPE_CHECKING:
    import pandas

    from cka_hooks.results.result import CKAResult


def as_text(result: CKAResult) -> str:
    """The printed form of a result: what it is, and up to 8 rows and columns of values.

    Example:
        >>> from cka_hooks import CKAResult
        >>> print(as_text(CKAResult.example().select("conv*")))
        CKAResult(2 layers, 640 samples, 20 minibatches)
                       1       2
        1 conv1    1.000   0.900
        2 conv2    0.900   1.000
    """
    size = f"{len(result.rows)}" if result.square else f"{len(result.rows)} x {len(result.columns)}"
    head = f"CKAResult({size} layers, {result.samples} samples, {result.minibatches} minibatches)"
    if max(len(result.rows), len(result.columns)) > 8:
        return head
    # Number the columns, because labels side by side would be wider than a terminal.
    rows, columns = map(printable, result.rows), map(printable, result.columns)
    labels = [f"{i} {row}" if result.square else f"  {row}" for i, row in enumerate(rows, 1)]
    width = max(map(len, labels))
    lines = [head, " " * width + "".join(f"{i + 1:>8}" for i in range(len(result.columns)))]
    for label, values in zip(labels, result.matrix.tolist(), strict=True):
        lines.append(f"{label:<{width}}" + "".join(f"{value:>8.3f}" for value in values))
    if not result.square:
        lines.append("columns: " + ", ".join(f"{i} {column}" for i, column in enumerate(columns, 1)))
    return "\n".join(lines)


def to_dataframe(result: CKAResult, *, tidy: bool = False) -> pandas.DataFrame:
    """The matrix as a pandas DataFrame, index ``rows`` and columns ``columns``.

    Args:
        tidy: one line per pair instead, with the columns ``row``, ``column``, ``cka``, ``stderr``, and ``pvalue`` if
            it is known.

    Raises:
        MissingExtraError: pandas is not installed.

    Example:
        >>> from cka_hooks import CKAResult
        >>> float(CKAResult.example().to_dataframe().loc["conv1", "fc"])
        0.5
        >>> CKAResult.example().to_dataframe(tidy=True).head(2)
             row column  cka  stderr
        0  conv1  conv1  1.0    0.00
        1  conv1  conv2  0.9    0.02
    """
    pandas = imported("pandas", "to_dataframe needs pandas, which is not installed", '"cka-hooks[dataframe]"')
    if tidy:
        head, *lines = _tidy(result)
        return pandas.DataFrame(lines, columns=head)
    # Copied, so that an edit of the frame does not change the result.
    return pandas.DataFrame(result.matrix.numpy().copy(), index=list(result.rows), columns=list(result.columns))


def to_csv(result: CKAResult, path: PathLike, *, tidy: bool = False) -> None:
    """Write the matrix as CSV, with a header line and a column of row labels. NaN is left empty.

    The file is in UTF-8. A label that a spreadsheet would run as a formula, because it begins with ``=``, ``+``,
    ``-`` or ``@``, is prefixed with ``'``.

    Args:
        path: where to write it.
        tidy: one line per pair instead, with the columns ``row``, ``column``, ``cka``, ``stderr``, and ``pvalue`` if
            it is known.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> from cka_hooks import CKAResult
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CKAResult.example().to_csv(f"{folder}/cka.csv")
        ...     print(open(f"{folder}/cka.csv").read())
        layer,conv1,conv2,fc
        conv1,1.0,0.9,0.5
        conv2,0.9,1.0,0.6
        fc,0.5,0.6,1.0
    """
    text = io.StringIO(newline="")
    matrix = zip(result.rows, result.matrix.tolist(), strict=True)
    lines = _tidy(result) if tidy else [["layer", *result.columns], *([label, *values] for label, values in matrix)]
    # Lines end with CR LF, so that a label with either of these is in quotation marks.
    csv.writer(text).writerows(map(_cell, line) for line in lines)
    replace_file(path, lambda file: file.write(text.getvalue().encode("utf-8", "backslashreplace")))


def to_npz(result: CKAResult, path: PathLike) -> None:
    """Write the NumPy arrays ``rows``, ``columns``, ``matrix`` and ``stderr`` as ``.npz``, without pickle.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> from cka_hooks import CKAResult
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CKAResult.example().to_npz(f"{folder}/cka.npz")
        ...     with np.load(f"{folder}/cka.npz") as file:
        ...         print(file["rows"], file["matrix"].shape)
        ['conv1' 'conv2' 'fc'] (3, 3)
    """
    names = ("rows", "columns", "matrix", "stderr")
    arrays: dict[str, Any] = {name: np.asarray(getattr(result, name)) for name in names}
    replace_file(path, lambda file: np.savez_compressed(file, **arrays))


def _tidy(result: CKAResult) -> Iterator[list[Any]]:
    """A line of names, then one line for each entry."""
    parts = {"cka": result.matrix, "stderr": result.stderr}
    if result.null_unknown is None:
        parts["pvalue"] = result.pvalue()
    yield ["row", "column", *parts]
    numbers = (part.flatten().tolist() for part in parts.values())
    for pair, *values in zip(product(result.rows, result.columns), *numbers, strict=True):
        yield [*pair, *values]


def _cell(value: Any) -> str:
    if not isinstance(value, str):
        return "" if math.isnan(value) else repr(value)
    # Spreadsheets skip what is not seen, and also accept the wide forms of the signs.
    first = next((character for character in value if character.isprintable() and not character.isspace()), " ")
    return f"'{value}" if first in "=+-@＝＋－＠" else value
