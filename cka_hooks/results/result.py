"""What a comparison found: labels, CKA values, their standard errors, and what was left out and why.

    CKAResult    the matrix with its labels and uncertainty; save, load, cut, draw, export
    Difference   the difference of two entries of one result, with its own standard error
    Influence    the largest share a single sample has in one layer's own HSIC

Nothing in this file knows a model. Drawing and writing live in ``plot``, ``report``, ``export``,
``reading`` and ``resultfile``; the methods here open those only when they are called, so that a
result needs neither matplotlib nor plotly nor pandas until it is drawn or exported.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from scipy.special import stdtrit

from cka_hooks.errors import LayerError, OptionError
from cka_hooks.files import PathLike
from cka_hooks.names import closest, matching

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Influence:
    """How much a single sample weighs in one layer's own HSIC.

    Attributes:
        share: of the layer's own HSIC, the part from pairs with the one sample for which it is largest.
            Near 2 / samples where samples are alike, 1 where everything hangs on one; above 0.25 (20 / samples in
            runs of fewer than 80 samples) the run warns.
        sample: which sample that is, its 0-based position in the run, counted on through all passes.
    """

    share: float
    sample: int


@dataclass(frozen=True)
class Difference:
    """The difference between two CKA values of one run, with a standard error that knows they are correlated.

    Attributes:
        value: first CKA value minus the second.
        stderr: standard error of ``value``; NaN with fewer than 3 minibatches.
        degrees_of_freedom: of the Student t distribution that :meth:`interval` uses.
    """

    value: float
    stderr: float
    degrees_of_freedom: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference: ``(low, high)``, NaN where the standard error is.

        Raises:
            OptionError: ``level`` is not between 0 and 1.

        Example:
            >>> low, high = Difference(0.25, 0.05, degrees_of_freedom=19).interval(0.95)
            >>> f"{low:.3f} {high:.3f}"
            '0.145 0.355'
        """
        half = _t_quantile(level, self.degrees_of_freedom) * self.stderr
        return self.value - half, self.value + half


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CKAResult:
    """CKA between every row layer and every column layer, with standard errors.

    A comparison gives a square result, whose rows and columns are the same layers. :meth:`between`
    and :meth:`select` cut rectangular ones out of it.

    Attributes:
        rows: labels of the R rows in order of execution; ``name/layer`` where models are named.
        columns: labels of the C columns, likewise.
        matrix: (R, C) CKA values, float64 on the CPU; NaN where CKA is undefined. Unbiased estimates
            may lie slightly below 0 and are not clamped.
        stderr: (R, C) standard errors, float64 on the CPU; 0 on the diagonal, NaN where the value is
            NaN or there were fewer than 3 minibatches.
        samples: number of distinct samples.
        minibatches: number of minibatches, over all passes.
        degrees_of_freedom: minibatches of one pass minus 1.
        degenerate: layer -> why CKA is undefined for it. Its entries in ``matrix`` are NaN.
        skipped: layer -> why it was left out. It has no row and no column.
        models: names of the compared models, empty when a single unnamed one was measured.
        settings: provenance (options, seeds, shapes, versions), plain JSON values.
        influence: layer -> the sample that weighs most in it (:class:`Influence`).
        minibatch_hsic: (B, L, L) weighted HSIC of every minibatch and pair, float64, or None where
            they were not kept. Cuts keep it whole.
        minibatch_layers: the L labels of ``minibatch_hsic``.
        passes: how often the loader was run through; the B minibatches are B / passes a pass.

    Raises:
        OptionError: labels are repeated, or shapes, types or values do not fit together.

    Example:
        >>> result = CKAResult(
        ...     rows=("conv1", "fc"), columns=("conv1", "fc"),
        ...     matrix=torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64),
        ...     stderr=torch.tensor([[0.0, 0.02], [0.02, 0.0]], dtype=torch.float64),
        ...     samples=640, minibatches=20, degrees_of_freedom=19)
        >>> result["conv1", "fc"]
        0.5
        >>> result
        CKAResult(2 layers, 640 samples, 20 minibatches)
                       1       2
        1 conv1    1.000   0.500
        2 fc       0.500   1.000
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    matrix: torch.Tensor
    stderr: torch.Tensor
    samples: int
    minibatches: int
    degrees_of_freedom: int
    degenerate: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    influence: dict[str, Influence] = field(default_factory=dict)
    minibatch_hsic: torch.Tensor | None = None
    minibatch_layers: tuple[str, ...] = ()
    passes: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "models", "minibatch_layers"):
            labels = tuple(getattr(self, name))
            _check_labels(name, labels)
            object.__setattr__(self, name, labels)
        shape = (len(self.rows), len(self.columns))
        if 0 in shape:
            raise OptionError(f"a result of {shape[0]} x {shape[1]} layers; expected at least one row and column")
        _check_tensor("matrix", self.matrix, shape)
        _check_tensor("stderr", self.stderr, shape)
        if bool((self.stderr < 0).any()):
            raise OptionError("stderr holds negative numbers; standard errors are 0 or more, or NaN")
        for name, least in (("samples", 0), ("minibatches", 0), ("degrees_of_freedom", 0), ("passes", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(f"{name} is {value!r}; expected a whole number, {least} or more")
        if self.minibatch_hsic is not None:
            count = len(self.minibatch_layers)
            batches = len(self.minibatch_hsic) if self.minibatch_hsic.dim() else 0
            _check_tensor("minibatch_hsic", self.minibatch_hsic, (max(batches, 1), count, count))
        elif self.minibatch_layers:
            raise OptionError("minibatch_layers has labels, but there is no minibatch_hsic they could belong to")
        for name in ("degenerate", "skipped", "influence"):
            # Copied, so that two results never share a dict that one of them could change.
            object.__setattr__(self, name, dict(getattr(self, name)))
        object.__setattr__(self, "settings", _plain_json(self.settings))

    # ---- reading values -------------------------------------------------------------------------

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """All labels: the rows, then the columns that are not rows."""
        return tuple(dict.fromkeys(self.rows + self.columns))

    @property
    def square(self) -> bool:
        """Whether rows and columns are the same layers in the same order."""
        return self.rows == self.columns

    @cached_property
    def _row_index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.rows)}

    @cached_property
    def _column_index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.columns)}

    def __getitem__(self, pair: tuple[str, str]) -> float:
        """CKA of two layers, in either order.

        Raises:
            LayerError: a label is not in this result, or this cut does not pair the two.
            OptionError: not two labels were given.
        """
        row, column = self._position(pair)
        return float(self.matrix[row, column])

    def _position(self, pair: tuple[str, str]) -> tuple[int, int]:
        first, second = _two_labels(pair)
        for row, column in ((first, second), (second, first)):
            if row in self._row_index and column in self._column_index:
                return self._row_index[row], self._column_index[column]
        _known(first, self.layers)
        _known(second, self.layers)
        side = "rows" if first in self._row_index else "columns"
        raise LayerError(
            f"{first!r} and {second!r} are both {side} of this result, which pairs rows with columns only. "
            "Ask the whole result, before it was cut."
        )

    def interval(self, level: float = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
        """Confidence intervals of all entries, by Student's t over minibatches. Not clamped to 0..1.

        Args:
            level: share of repeated runs in which the interval holds the true value.

        Returns:
            ``(low, high)``, two (R, C) float64 tensors; NaN where the standard error is NaN.

        Raises:
            OptionError: ``level`` is not between 0 and 1.

        Example:
            >>> low, high = CKAResult.example().interval(0.95)
            >>> f"{low[0, 1]:.3f} {high[0, 1]:.3f}"
            '0.858 0.942'
        """
        half = _t_quantile(level, self.degrees_of_freedom) * self.stderr
        # An exact value has an interval of no width, also where t has no degrees of freedom.
        half = torch.where(self.stderr == 0, torch.zeros_like(half), half)
        return self.matrix - half, self.matrix + half

    def difference(self, first: tuple[str, str], second: tuple[str, str]) -> Difference:
        """CKA of the pair ``first`` minus CKA of the pair ``second``, with a paired standard error.

        Both values come from the same minibatches and move together, so the error of their
        difference is not the sum of their errors. Pairs that a cut has removed can be asked for too.

        Args:
            first: two labels ``(a, b)``.
            second: two labels ``(c, d)``.

        Returns:
            ``theta_ab - theta_cd`` as a :class:`Difference`; NaN where either value is undefined.

        Raises:
            OptionError: the run did not keep its minibatch values, or a pair is not two labels.
            LayerError: a label was not measured.

        Example:
            >>> d = CKAResult.example().difference(("conv1", "conv2"), ("conv1", "fc"))
            >>> f"{d.value:.2f}"
            '0.40'
        """
        if self.minibatch_hsic is None:
            raise OptionError(
                "a difference needs the values of every minibatch, and this result has none. "
                "Run the comparison again with keep_minibatches=True."
            )
        theta_ab, errors_ab = self._linearised(self.minibatch_hsic, first)
        theta_cd, errors_cd = self._linearised(self.minibatch_hsic, second)
        batches = len(errors_ab)
        stderr = math.nan
        if self.degrees_of_freedom >= 2:
            spread = float(((errors_ab - errors_cd) ** 2).sum())
            # Passes over the same samples are not independent: what counts is the minibatches of one.
            stderr = math.sqrt(batches / self.degrees_of_freedom * spread)
        return Difference(theta_ab - theta_cd, stderr, self.degrees_of_freedom)

    def _linearised(self, hsic: torch.Tensor, pair: tuple[str, str]) -> tuple[float, torch.Tensor]:
        """CKA of a pair and each minibatch's part in its error, to first order: float, (B,)."""
        a, b = _two_labels(pair)
        i, j = (self.minibatch_layers.index(_known(label, self.minibatch_layers)) for label in (a, b))
        own_i, own_j = hsic[:, i, i], hsic[:, j, j]
        total_i, total_j = float(own_i.sum()), float(own_j.sum())
        if a in self.degenerate or b in self.degenerate or not (total_i > 0 and total_j > 0):
            return math.nan, torch.full((len(hsic),), math.nan, dtype=torch.float64)
        if i == j:
            return 1.0, torch.zeros(len(hsic), dtype=torch.float64)
        cross = hsic[:, i, j] / math.sqrt(total_i) / math.sqrt(total_j)
        theta = float(cross.sum())
        return theta, cross - theta / 2 * (own_i / total_i + own_j / total_j)

    # ---- cutting --------------------------------------------------------------------------------

    def model_of(self, label: str) -> str:
        """Name of the model a label belongs to, or ``""`` where the models have no names.

        Example:
            >>> CKAResult.example(models=("a", "b")).model_of("b/conv1")
            'b'
        """
        owners = [name for name in self.models if label.startswith(name + "/")]
        # The longest, because one model may be called "a" and another "a/b".
        return max(owners, key=len, default="")

    def layer_of(self, label: str) -> str:
        """The label without the name of its model.

        Example:
            >>> CKAResult.example(models=("a", "b")).layer_of("b/conv1")
            'conv1'
        """
        model = self.model_of(label)
        return label[len(model) + 1 :] if model else label

    def between(self, first: str, second: str) -> CKAResult:
        """The block that compares one model with another: its rows are ``first``, its columns ``second``.

        Args:
            first: name of the model whose layers become the rows.
            second: name of the model whose layers become the columns; the same name gives that
                model's own square block.

        Raises:
            LayerError: a name is not one of :attr:`models`, or no layer of it is in this result.

        Example:
            >>> CKAResult.example(models=("a", "b")).between("a", "b").rows
            ('a/conv1', 'a/conv2', 'a/fc')
        """
        for name in (first, second):
            if name not in self.models:
                raise LayerError(
                    f"no model {name!r} in this result; "
                    + (
                        f"its models are {', '.join(map(repr, self.models))}."
                        if self.models
                        else "its layers come from one unnamed model. Name models by comparing a mapping, "
                        "compare({'a': model_a, 'b': model_b}, loader)."
                    )
                )
        rows = [label for label in self.rows if self.model_of(label) == first]
        columns = [label for label in self.columns if self.model_of(label) == second]
        for name, found, side in ((first, rows, "row"), (second, columns, "column")):
            if not found:
                raise LayerError(f"no layer of model {name!r} is a {side} of this result")
        skipped = [label for label in self.skipped if self.model_of(label) in (first, second)]
        return self._cut(rows, columns, skipped, tuple(dict.fromkeys((first, second))))

    def select(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        rows: str | Sequence[str] | None = None,
        columns: str | Sequence[str] | None = None,
    ) -> CKAResult:
        """The part of the matrix whose labels match, in their present order.

        Args:
            layers: labels or globs for rows and columns alike. ``*`` stops at dots and slashes,
                ``**`` crosses them, ``?`` is one character, ``[12]`` one of several; an exact label wins.
            rows: for the rows only. None keeps what ``layers`` chose.
            columns: for the columns only.

        Raises:
            LayerError: a label or glob matches nothing; the closest labels are named.

        Example:
            >>> CKAResult.example().select("conv*").layers
            ('conv1', 'conv2')
        """
        both = None if layers is None else _patterns(layers)
        for_rows = both if rows is None else _patterns(rows)
        for_columns = both if columns is None else _patterns(columns)
        asked = (for_rows or ()) + (for_columns or ())
        return self._cut(
            self.rows if for_rows is None else _matching(for_rows, self.rows),
            self.columns if for_columns is None else _matching(for_columns, self.columns),
            [label for label in self.skipped if not asked or any(matching(p, [label]) for p in asked)],
            self.models,
        )

    def _cut(
        self, rows: Iterable[str], columns: Iterable[str], skipped: Iterable[str], models: tuple[str, ...]
    ) -> CKAResult:
        rows, columns = tuple(rows), tuple(columns)
        row_at = torch.tensor([self._row_index[label] for label in rows])
        column_at = torch.tensor([self._column_index[label] for label in columns])
        kept = set(rows) | set(columns)
        owners = {self.model_of(label) for label in kept}
        return dataclasses.replace(
            self,
            rows=rows,
            columns=columns,
            matrix=self.matrix[row_at][:, column_at],
            stderr=self.stderr[row_at][:, column_at],
            degenerate={label: why for label, why in self.degenerate.items() if label in kept},
            skipped={label: self.skipped[label] for label in skipped},
            influence={label: value for label, value in self.influence.items() if label in kept},
            models=tuple(name for name in models if name in owners),
        )

    # ---- keeping and exporting ------------------------------------------------------------------

    def save(self, path: PathLike, *, minibatches: bool = True) -> None:
        """Write this result as JSON: readable in any language, losing no digit, NaN as ``null``.

        The file appears whole or not at all: it is written beside ``path`` and then moved there.

        Args:
            path: where to; any suffix.
            minibatches: False leaves ``minibatch_hsic`` out, by far the largest part where kept.

        Raises:
            OptionError: the result is larger than :meth:`load` would read.
            OSError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     CKAResult.example().save(f"{folder}/cka.json")
            ...     CKAResult.load(f"{folder}/cka.json") == CKAResult.example()
            True
        """
        from cka_hooks.results.file import write_result

        kept = self if minibatches else dataclasses.replace(self, minibatch_hsic=None, minibatch_layers=())
        write_result(kept, path)

    @classmethod
    def load(cls, path: PathLike) -> CKAResult:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ResultFileError: the file is anything else: truncated, edited, of another version. The
                message has the path and the reason.
            FileNotFoundError: there is no such file.
        """
        from cka_hooks.results.file import read_result

        return read_result(path)

    def to_dataframe(self, *, tidy: bool = False) -> pandas.DataFrame:
        """The matrix as a pandas DataFrame, index ``rows`` and columns ``columns``.

        Args:
            tidy: one line per pair instead, with the columns ``row``, ``column``, ``cka``, ``stderr``.

        Raises:
            MissingExtraError: pandas is not installed.

        Example:
            >>> float(CKAResult.example().to_dataframe().loc["conv1", "fc"])
            0.5
        """
        from cka_hooks.results.tables import to_dataframe

        return to_dataframe(self, tidy=tidy)

    def to_csv(self, path: PathLike, *, tidy: bool = False) -> None:
        """Write the matrix as CSV with a header line and the row labels in front; NaN is left empty.

        Args:
            path: where to.
            tidy: one line per pair instead, with the columns ``row``, ``column``, ``cka``, ``stderr``.
        """
        from cka_hooks.results.tables import to_csv

        to_csv(self, path, tidy=tidy)

    def to_npz(self, path: PathLike) -> None:
        """Write the NumPy arrays ``rows``, ``columns``, ``matrix`` and ``stderr`` as ``.npz``; no pickle."""
        from cka_hooks.results.tables import to_npz

        to_npz(self, path)

    def to_html(self, path: PathLike, *, title: str | None = None) -> None:
        """Write a page that needs no network: hover for values, click a row, search layers.

        Args:
            path: where to.
            title: heading of the page; by default it is made from the names of the models.

        Raises:
            MissingExtraError: plotly is not installed.
        """
        from cka_hooks.views.page import write_page

        write_page(self, path, title=title)

    # ---- showing --------------------------------------------------------------------------------

    def plot(
        self,
        path: PathLike | None = None,
        *,
        ax: Axes | None = None,
        values: bool = False,
        stderr: bool = False,
        title: str | None = None,
    ) -> tuple[Figure, Axes]:
        """Draw the matrix as a heatmap, scale 0 to 1, depth upwards from the origin.

        Args:
            path: also write the picture there; the suffix says the format (``.png``, ``.svg``, ``.pdf``).
            ax: draw into these axes instead of a new figure.
            values: write each value into its cell, where cells are large enough to read it.
            stderr: colour by standard error instead; with ``values``, colour by CKA and write both.
            title: title; by default it is made from the names of the models and the number of samples.

        Returns:
            The matplotlib figure and axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from cka_hooks.views.plot import heatmap

        return heatmap(self, path, ax=ax, values=values, stderr=stderr, title=title)

    def plot_profile(
        self, path: PathLike | None = None, *, ax: Axes | None = None, title: str | None = None
    ) -> tuple[Figure, Axes]:
        """Draw each layer's similarity to the next one, or its best match in the other network.

        A square result shows, within each model, the CKA of every layer with the one after it: dips
        are where the representation changes. A rectangular one shows for every row the largest CKA
        among the columns. Error bars are 95 % intervals.

        Args:
            path: also write the picture there.
            ax: draw into these axes instead of a new figure.
            title: title; a plain one by default.

        Returns:
            The matplotlib figure and axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from cka_hooks.views.plot import profile

        return profile(self, path, ax=ax, title=title)

    def summary(self) -> str:
        """A short reading of the matrix in words, a few lines."""
        from cka_hooks.results.words import summary

        return summary(self)

    def __repr__(self) -> str:
        size = f"{len(self.rows)}" if self.square else f"{len(self.rows)} x {len(self.columns)}"
        head = f"CKAResult({size} layers, {self.samples} samples, {self.minibatches} minibatches)"
        if max(len(self.rows), len(self.columns)) > 8:
            return head
        # Columns are numbered, because labels side by side would be wider than a terminal.
        width = max((len(label) for label in self.rows), default=0)
        lines = [head, " " * (width + 2) + "".join(f"{i + 1:>8}" for i in range(len(self.columns)))]
        for index, label in enumerate(self.rows):
            number = f"{index + 1} " if self.square else "  "
            cells = "".join(f"{float(value):>8.3f}" for value in self.matrix[index])
            lines.append(f"{number}{label:<{width}}{cells}")
        if not self.square:
            lines.append("columns: " + ", ".join(f"{i + 1} {label}" for i, label in enumerate(self.columns)))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from cka_hooks.views.notebook import notebook_html

        return notebook_html(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CKAResult):
            return NotImplemented
        for entry in dataclasses.fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
                if mine.shape != theirs.shape or not torch.allclose(mine, theirs, 0, 0, equal_nan=True):
                    return False
            elif entry.name == "influence":
                # A share may be NaN, which equals nothing; written out it equals itself.
                if {k: repr(v) for k, v in mine.items()} != {k: repr(v) for k, v in theirs.items()}:
                    return False
            elif type(mine) is not type(theirs) or mine != theirs:
                return False
        return True

    @classmethod
    def example(cls, models: tuple[str, ...] = ()) -> CKAResult:
        """A small made-up result for trying things out: three layers, for each model where names are given.

        Example:
            >>> CKAResult.example()
            CKAResult(3 layers, 640 samples, 20 minibatches)
                           1       2       3
            1 conv1    1.000   0.900   0.500
            2 conv2    0.900   1.000   0.600
            3 fc       0.500   0.600   1.000
        """
        block = torch.tensor([[1.0, 0.9, 0.5], [0.9, 1.0, 0.6], [0.5, 0.6, 1.0]], dtype=torch.float64)
        names = [f"{name}/" for name in models] or [""]
        labels = tuple(f"{name}{layer}" for name in names for layer in ("conv1", "conv2", "fc"))
        matrix = torch.kron(torch.full((len(names),) * 2, 0.95, dtype=torch.float64), block)
        for start in range(0, len(labels), 3):
            matrix[start : start + 3, start : start + 3] = block
        return cls(
            rows=labels,
            columns=labels,
            matrix=matrix,
            stderr=torch.full_like(matrix, 0.02).fill_diagonal_(0.0),
            samples=640,
            minibatches=20,
            degrees_of_freedom=19,
            models=models,
            minibatch_hsic=matrix.expand(20, -1, -1) / 20,
            minibatch_layers=labels,
        )


def _t_quantile(level: float, degrees_of_freedom: int) -> float:
    if not (isinstance(level, (int, float)) and 0 < level < 1):
        raise OptionError(f"level is {level!r}; expected a number between 0 and 1, such as 0.95")
    return float(stdtrit(degrees_of_freedom, (1 + level) / 2))


def _two_labels(pair: tuple[str, str]) -> tuple[str, str]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(label, str) for label in pair)):
        raise OptionError(f"{pair!r} is not a pair of layers; expected two labels, such as ('conv1', 'fc')")
    return pair


def _known(label: str, labels: Sequence[str]) -> str:
    if label in labels:
        return label
    close = closest(label, labels, 3)
    raise LayerError(
        f"no layer {label!r} in this result; the closest of its {len(labels)} are "
        f"{', '.join(map(repr, close))}. result.layers lists them all."
    )


def _patterns(choice: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (choice,) if isinstance(choice, str) or not isinstance(choice, Iterable) else tuple(choice)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"{choice!r} chooses no layers; expected a label, a glob, or a sequence of them")
    return patterns


def _matching(patterns: tuple[str, ...], labels: tuple[str, ...]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = matching(pattern, labels)
        if not found:
            _known(pattern, labels)
        chosen.update(found)
    return [label for label in labels if label in chosen]


def _check_labels(name: str, labels: tuple[object, ...]) -> None:
    for label in labels:
        if not isinstance(label, str):
            raise OptionError(f"{name} holds {label!r}; expected text")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise OptionError(f"{name} has {twice!r} more than once; labels must differ")


def _check_tensor(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64 or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise OptionError(f"{name} is {found}; expected a float64 tensor on the CPU")
    if tuple(tensor.shape) != shape:
        raise OptionError(f"{name} has shape {tuple(tensor.shape)}; its labels ask for {shape}")
    if bool(tensor.isinf().any()):
        raise OptionError(f"{name} holds infinity; expected finite numbers, or NaN where undefined")


def _plain_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a file would give them back: found out here, not when a long run is saved."""
    try:
        plain = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"settings cannot be written as JSON ({error}); use plain numbers, text, lists, dicts"
        ) from error
    if not isinstance(plain, dict):
        raise OptionError(f"settings is {type(settings).__name__}; expected a dict")
    return plain
