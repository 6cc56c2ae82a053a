"""`CKAResult`: labels, CKA values, their standard errors, and what was left out and why.

    CKAResult    the matrix with its labels and uncertainty; save, load, cut, draw, export
    Influence    the largest share a single sample has in one layer's own HSIC

This file does not know models. What writes and draws a result are functions in other files, which are methods here.
They import matplotlib and pandas when they are called, so a result needs neither until you draw or export it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import torch

from cka_hooks.errors import LayerError, OptionError, warn
from cka_hooks.files import PathLike
from cka_hooks.names import closest, matching
from cka_hooks.null import null_tail
from cka_hooks.results import tables, words
from cka_hooks.results.uncertainty import Difference, adjusted, paired_difference, t_quantile
from cka_hooks.views import page, pictures

# Number of dimensions, of which the last two are layers.
_DIMENSIONS = {"matrix": 2, "stderr": 2, "null_variance": 2, "null_skewness": 2, "permuted": 3, "minibatch_hsic": 3}


@dataclass(frozen=True)
class Influence:
    """How much a single sample weighs in one layer's own HSIC.

    Attributes:
        share: the part of the layer's own HSIC that is in pairs with the sample for which this part is largest. It is
            near 2 / samples if all samples are alike, and 1 if everything depends on one. The run warns above 0.25
            (20 / samples in runs of fewer than 80 samples).
        sample: the 0-based position of this sample in the run, counted through all passes.
        identifier: what identifies it: what `sample_ids` named, else its index in the data set, behind any
            ``Subset``, if a plain ``DataLoader`` shows it. On the command line, the file of an image.
    """

    share: float
    sample: int
    identifier: int | str | None = None

    @property
    def spelled(self) -> str:
        """The sample in words."""
        it = f"{self.identifier} in the data set" if isinstance(self.identifier, int) else repr(self.identifier)
        return f"sample {self.sample} of the run" + ("" if self.identifier is None else f" ({it})")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CKAResult:
    """CKA between every row layer and every column layer, with standard errors.

    A comparison gives a square result, whose rows and columns are the same layers. :meth:`between` and :meth:`select`
    cut rectangular ones out of it. Two equal runs give equal results: ``==`` compares everything except
    ``settings["seconds"]``, the time that the run took.

    Attributes:
        rows: labels of the R rows in order of execution; ``name/layer`` if models are named.
        columns: labels of the C columns, likewise.
        matrix: (R, C) CKA values, float64 on the CPU; NaN where CKA is undefined. Unbiased estimates may be slightly
            below 0. They are not clamped.
        stderr: (R, C) standard errors, float64 on the CPU; 0 on the diagonal, NaN if the value is NaN or if there
            were fewer than 3 minibatches.
        samples: number of distinct samples.
        minibatches: number of minibatches, over all passes.
        degrees_of_freedom: minibatches of one pass minus 1.
        degenerate: layer -> why CKA is undefined for it. Its entries in ``matrix`` are NaN.
        skipped: layer -> why it was left out. It has no row and no column.
        models: names of the compared models; empty for a single unnamed model.
        settings: provenance (options, seeds, shapes, versions), plain JSON values.
        influence: layer -> the sample that weighs most in it (:class:`Influence`).
        minibatch_hsic: (B, L, L) weighted HSIC of every minibatch and pair, float64, or None if they were not kept.
            Cuts keep all of it.
        minibatch_layers: the L labels of ``minibatch_hsic``.
        passes: number of passes over the loader. One pass has B / passes minibatches.
        null_variance: (R, C) variance of each value under random permutation of one layer's samples within every
            minibatch, float64, or None if it is not known (:attr:`null_unknown`).
        null_skewness: (R, C) skewness of the same distribution, whose mean is 0.
        permuted: (B, R, C) the values in B random permutations of this kind, 0 for a layer with itself; None without
            ``permutations=``.

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
    null_variance: torch.Tensor | None = None
    null_skewness: torch.Tensor | None = None
    permuted: torch.Tensor | None = None

    def __post_init__(self) -> None:
        vars(self).update(checked(self))  # frozen for others

    # ---- reading values -------------------------------------------------------------------------

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """All labels: the rows, then the columns that are not rows."""
        return tuple(dict.fromkeys(self.rows + self.columns))

    @property
    def square(self) -> bool:
        """Whether rows and columns are the same layers in the same order."""
        return self.rows == self.columns

    def __getitem__(self, pair: tuple[str, str]) -> float:
        """CKA of two layers, in either order.

        Raises:
            LayerError: a label is not in this result, or this cut does not pair the two.
            OptionError: the argument is not two labels.
        """
        first, second = _labels_of(pair)
        for row, column in ((first, second), (second, first)):
            if row in self.rows and column in self.columns:
                return float(self.matrix[self.rows.index(row), self.columns.index(column)])
        for label in pair:
            _known(label, self.layers)
        raise LayerError(f"{first!r} and {second!r} are both rows or both columns: look them up in the whole result")

    def interval(self, level: float = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
        """Confidence intervals of all entries, by Student's t over minibatches. They are not clamped to 0..1.

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
        half = t_quantile(level, self.degrees_of_freedom) * self.stderr
        # An exact value has an interval of width 0, even if t has no degrees of freedom.
        half = half.masked_fill(self.stderr == 0, 0.0)
        return self.matrix - half, self.matrix + half

    @property
    def null_stderr(self) -> torch.Tensor:
        """(R, C) standard deviation of each value under the null of :meth:`pvalue`; NaN if it is not known."""
        return torch.full_like(self.matrix, math.nan) if self.null_variance is None else self.null_variance.sqrt()

    @property
    def null_unknown(self) -> str | None:
        """Why this result has no p-values; None if it has some."""
        if self.null_variance is not None:
            return None
        if self.settings.get("estimator") == "biased":
            return 'the null distribution of biased estimates is not known; compare with estimator="unbiased"'
        if self.settings.get("per") == "position":
            return 'positions of one input depend on one another and cannot be permuted; compare with per="sample"'
        if self.passes > 1:
            return "minibatches of several passes share their samples; compare with epochs=1"
        return "the result was made by a version that did not keep what they need; run the comparison again"

    def pvalue(self, *, family_wise: bool = False) -> torch.Tensor:
        """Probability of a CKA at least as large if the two layers were unrelated: one-sided, for each entry alone.

        Unrelated means that the samples of one layer could be permuted within every minibatch. Under such
        permutations, the unbiased estimate has mean 0, and its variance and skewness are known exactly. The tail is
        that of the Pearson type III distribution with these three. Nearly all layers that see the same inputs are
        related. A value above 0.05 says that, with these samples, the two are indistinguishable from unrelated
        layers.

        Args:
            family_wise: adjust for the number of pairs of different layers in this result. With the level 0.05, the
                probability that any pair of unrelated layers is below it is then at most 0.05, however the pairs
                depend on each other. After a comparison with ``permutations=999``, the smallest p-values of real
                permutations decide (Westfall & Young 1993, step-down), and none is below 1 / (permutations + 1).
                Without (:attr:`permuted` is None), Holm's method (1979) does, which gives larger values if pairs
                depend on each other. Cut out the pairs of interest first, with :meth:`select` or :meth:`between`:
                fewer pairs cost less.

        Returns:
            (R, C) float64; NaN where CKA is undefined. All are NaN, with a warning that says why, if the null is not
            known (:attr:`null_unknown`): for biased estimates, positions as samples, and several passes.

        Example:
            >>> example = CKAResult.example()
            >>> null = {"null_variance": example.matrix * 0 + 0.25, "null_skewness": example.matrix * 0 + 1}
            >>> f"{dataclasses.replace(example, **null).pvalue()[0, 1]:.3f}"
            '0.055'
            >>> from cka_hooks import CKAAccumulator
            >>> x, noise, other = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0))
            >>> cka = CKAAccumulator(minibatch=16, permutations=99)
            >>> cka.update({"x": x, "x and noise": x + noise, "other": other})
            >>> [round(p, 2) for p in cka.compute().pvalue(family_wise=True)[0, 1:].tolist()]
            [0.01, 0.97]
        """
        if self.null_variance is None or self.null_skewness is None:
            warn(f"there are no p-values: {self.null_unknown}")
            return torch.full_like(self.matrix, math.nan)
        null = (self.null_variance, self.null_skewness)
        alone = null_tail(self.matrix, *null)
        return adjusted(alone, self.rows, self.columns, self.permuted, null) if family_wise else alone

    def difference(self, first: tuple[str, str], second: tuple[str, str]) -> Difference:
        """CKA of the pair ``first`` minus CKA of the pair ``second``, with a paired standard error.

        Both values come from the same minibatches and move together, so the error of their difference is not the sum
        of their errors. You can also ask for pairs that a cut has removed.

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
                "a difference needs the values of every minibatch, and this result has none: "
                "run the comparison again with keep_minibatches=True"
            )
        layers = self.minibatch_layers
        (a, b), (c, d) = ([layers.index(_known(it, layers)) for it in _labels_of(pair)] for pair in (first, second))
        if self.degenerate.keys() & {*first, *second}:
            return Difference(math.nan, math.nan, self.degrees_of_freedom)
        return paired_difference(self.minibatch_hsic, (a, b), (c, d), self.degrees_of_freedom)

    # ---- cutting --------------------------------------------------------------------------------

    def model_of(self, label: str) -> str:
        """Name of the model that a label belongs to, or ``""`` if the models have no names.

        Example:
            >>> CKAResult.example(models=("a", "b")).model_of("b/conv1")
            'b'
        """
        # The longest, because one model may be called "a" and another "a/b".
        return max((name for name in self.models if f"{label}/".startswith(f"{name}/")), key=len, default="")

    def layer_of(self, label: str) -> str:
        """The label without the name of its model; all of it if there is nothing else.

        Example:
            >>> CKAResult.example(models=("a", "b")).layer_of("b/conv1")
            'conv1'
        """
        model = self.model_of(label)
        return label.removeprefix(f"{model}/") if model else label

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
        rows = tuple(label for label in self.rows if self.model_of(label) == first)
        columns = tuple(label for label in self.columns if self.model_of(label) == second)
        for name, found, side in ((first, rows, "row"), (second, columns, "column")):
            if not found:
                models = ", ".join(map(repr, self.models)) or "unnamed; name them by comparing a mapping of models"
                raise LayerError(f"no layer of model {name!r} is a {side} of this result: its models are {models}")
        skipped = [label for label in self.skipped if self.model_of(label) in (first, second)]
        return self._cut(rows, columns, skipped, (first, second))

    def select(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        rows: str | Sequence[str] | None = None,
        columns: str | Sequence[str] | None = None,
    ) -> CKAResult:
        """The part of the matrix whose labels match, in their present order.

        Args:
            layers: labels or globs for both rows and columns. ``*`` stops at dots and slashes, ``**`` crosses them,
                ``?`` is one character, ``[12]`` one of several. An exact label wins.
            rows: labels or globs for the rows only. None keeps what ``layers`` chose.
            columns: the same for the columns.

        Raises:
            LayerError: a label or glob matches nothing. The message names the closest labels.

        Example:
            >>> CKAResult.example().select("conv*").layers
            ('conv1', 'conv2')
        """
        both = _patterns(layers)
        for_rows, for_columns = (both if choice is None else _patterns(choice) for choice in (rows, columns))
        asked = for_rows + for_columns
        return self._cut(
            _chosen(for_rows, self.rows),
            _chosen(for_columns, self.columns),
            [label for label in self.skipped if not asked or any(matching(p, [label]) for p in asked)],
            self.models,
        )

    def _cut(
        self, rows: tuple[str, ...], columns: tuple[str, ...], skipped: list[str], models: tuple[str, ...]
    ) -> CKAResult:
        kept = dict.fromkeys(rows + columns)
        at = [self.rows.index(row) for row in rows], [self.columns.index(column) for column in columns]
        entries: dict[str, Any] = {
            name: whole[..., at[0], :][..., at[1]]
            for name in ("matrix", "stderr", "null_variance", "null_skewness", "permuted")
            if (whole := getattr(self, name)) is not None
        }
        hsic = self.minibatch_hsic
        gone = [i for i, label in enumerate(self.minibatch_layers) if label in self.degenerate and label not in kept]
        if hsic is not None and gone:
            # You can still ask for pairs that were cut off in `difference`, so the reason goes with the label.
            hsic = hsic.clone()
            hsic[:, gone] = hsic[:, :, gone] = torch.nan
        return dataclasses.replace(
            self,
            rows=rows,
            columns=columns,
            **entries,
            degenerate={label: why for label, why in self.degenerate.items() if label in kept},
            skipped={label: self.skipped[label] for label in skipped},
            influence={label: value for label, value in self.influence.items() if label in kept},
            models=tuple(name for name in dict.fromkeys(models) if name in {self.model_of(label) for label in kept}),
            minibatch_hsic=hsic,
        )

    # ---- keeping and exporting ------------------------------------------------------------------

    def save(self, path: PathLike, *, minibatches: bool = True) -> None:
        """Write this result as JSON: readable in any language, with every digit, NaN as ``null``.

        The file appears whole or not at all: it is written beside ``path`` and then moved there.

        Args:
            path: where to write it, with any suffix.
            minibatches: False leaves out ``minibatch_hsic`` and ``permuted``, by far the largest parts if kept.

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

        small = dataclasses.replace(self, minibatch_hsic=None, minibatch_layers=(), permuted=None)
        write_result(self if minibatches else small, path)

    @classmethod
    def load(cls, path: PathLike) -> CKAResult:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ResultFileError: the file is anything else: truncated, edited, or of another version. The message has the
                path and the reason.
            FileNotFoundError: there is no such file.
        """
        from cka_hooks.results.file import read_result

        return read_result(path)

    def export(self, path: PathLike) -> None:
        """Write this result in the format that the suffix of ``path`` names.

        ``.json`` is what :meth:`save` writes. ``.csv`` and ``.npz`` hold the matrix for other tools. ``.html`` is a
        page to explore. ``.png``, ``.svg``, ``.pdf`` and others are the heatmap. :meth:`to_csv`, :meth:`to_html`,
        :meth:`plot` and so on write the same with options.

        Raises:
            OptionError: no format has this suffix. The message lists the formats.
            MissingExtraError: the format needs a package that is not installed.
            OSError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     CKAResult.example().export(f"{folder}/cka.csv")
            ...     print(open(f"{folder}/cka.csv").readline())
            layer,conv1,conv2,fc
        """
        suffix = os.path.splitext(os.fspath(path))[1].lower()
        if suffix not in FORMATS:
            raise OptionError(
                f"{os.fspath(path)} ends in {suffix or 'no suffix'}, which is not a format of a result: use one of "
                f"{', '.join(FORMATS)}"
            )
        FORMATS[suffix](self, path)

    # ---- what other files make of a result: functions that take it first --------------------------

    to_dataframe, to_csv, to_npz = tables.to_dataframe, tables.to_csv, tables.to_npz
    to_html, _repr_html_ = page.to_html, page.notebook_html
    plot, plot_profile = pictures.plot, pictures.plot_profile
    summary, __repr__ = words.summary, tables.as_text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CKAResult):
            return NotImplemented
        from cka_hooks.results.file import fields_as_json

        # How long a run took is not part of what it found.
        mine, theirs = (fields_as_json(it) | {"settings": {**it.settings, "seconds": None}} for it in (self, other))
        return mine == theirs

    @classmethod
    def example(cls, models: tuple[str, ...] = ()) -> CKAResult:
        """A small made-up result for trying things out: three layers, for each model if names are given.

        Example:
            >>> CKAResult.example()
            CKAResult(3 layers, 640 samples, 20 minibatches)
                           1       2       3
            1 conv1    1.000   0.900   0.500
            2 conv2    0.900   1.000   0.600
            3 fc       0.500   0.600   1.000
        """
        block = torch.tensor([[1.0, 0.9, 0.5], [0.9, 1.0, 0.6], [0.5, 0.6, 1.0]], dtype=torch.float64, device="cpu")
        names = [f"{name}/" for name in models] or [""]
        labels = tuple(f"{name}{layer}" for name in names for layer in ("conv1", "conv2", "fc"))
        matrix = torch.kron(block.new_full((len(names),) * 2, 0.95).fill_diagonal_(1.0), block)
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


# The formats that matplotlib can always write.
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps", ".pgf", ".svgz")
#: What writes a result into a file with this suffix: for :meth:`CKAResult.export` and ``cka-hooks show --out``.
FORMATS: dict[str, Callable[[CKAResult, PathLike], object]] = {
    ".json": CKAResult.save,
    ".html": page.to_html,
    ".csv": tables.to_csv,
    ".npz": tables.to_npz,
    **dict.fromkeys(_PICTURES, pictures.plot),
}


def _labels_of(pair: tuple[str, str]) -> tuple[str, str]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(label, str) for label in pair)):
        raise OptionError(f"{pair!r} is not a pair of layers: expected two labels, such as ('conv1', 'fc')")
    return pair


def _known(label: str, labels: tuple[str, ...]) -> str:
    if label not in labels:
        close = ", ".join(map(repr, closest(label, labels, 3)))
        raise LayerError(f"no layer {label!r} among the {len(labels)} of this result: the closest are {close}")
    return label


def _patterns(choice: str | Sequence[str] | None) -> tuple[str, ...]:
    """One label or glob, or several, as a tuple; an empty one for all labels."""
    if choice is None:
        return ()
    patterns = (choice,) if isinstance(choice, str) or not isinstance(choice, Iterable) else tuple(choice)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"{choice!r} chooses no layers: expected a label, a glob, or a sequence of them")
    return patterns


def _chosen(patterns: tuple[str, ...], labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels that any pattern chooses, in their own order."""
    found = set()
    for pattern in patterns:
        found.update(matching(pattern, labels) or [_known(pattern, labels)])
    return tuple(label for label in labels if label in found or not patterns)


def checked(result: CKAResult) -> dict[str, Any]:
    """The fields that are text, counts or dicts, as plain values. Tensors are checked.

    Raises:
        OptionError: labels are repeated, or shapes, types or values do not fit together.
    """
    fields: dict[str, Any] = {
        name: _labels(name, getattr(result, name)) for name in ("rows", "columns", "models", "minibatch_layers")
    }
    for name, least in (("samples", 0), ("minibatches", 0), ("degrees_of_freedom", 0), ("passes", 1)):
        fields[name] = _count(name, getattr(result, name), least)
    # Copy, so that no two results share a dict that one of them could change.
    fields |= {name: dict(getattr(result, name)) for name in ("degenerate", "skipped", "influence")}
    for reason in (*fields["degenerate"].values(), *fields["skipped"].values()):
        if not isinstance(reason, str):
            raise OptionError(f"degenerate and skipped contain {reason!r:.60}: expected a reason in words")
    for found in fields["influence"].values():
        _count("influence: sample", found.sample, 0)
        if not isinstance(found.share, Real):
            raise OptionError(f"influence: share is {found.share!r:.60}: expected a number")
    fields["settings"] = _plain_json(result.settings)
    shape = (len(fields["rows"]), len(fields["columns"]))
    if 0 in shape:
        raise OptionError(f"a result of {shape[0]} x {shape[1]} layers: expected at least one row and column")
    if (result.null_variance is None) != (result.null_skewness is None):
        raise OptionError("a result has only one of null_variance and null_skewness: expected both, or neither")
    own = (len(fields["minibatch_layers"]),) * 2
    for name, tensor in ((name, getattr(result, name)) for name in _DIMENSIONS):
        if tensor is not None or name in ("matrix", "stderr"):
            _check_tensor(name, tensor, own if name == "minibatch_hsic" else shape)
    return fields


def _labels(name: str, labels: Any) -> tuple[str, ...]:
    """The labels as plain text.

    Raises:
        OptionError: a label is not text, or is repeated.
    """
    plain: dict[str, None] = {}
    for label in (labels,) if isinstance(labels, str) else labels:
        if not isinstance(label, str):
            raise OptionError(f"{name} contains {label!r}: labels must be strings, such as {str(label)!r}")
        if label in plain:
            raise OptionError(f"{name} has {label!r} more than once: labels must differ")
        plain[str.__str__(label)] = None  # of NumPy's text, too
    return tuple(plain)


def _count(name: str, value: Any, least: int) -> int:
    """A whole number, possibly NumPy's, as a plain one.

    Raises:
        OptionError: this is not a whole number, or it is below ``least``.
    """
    # Larger counts are mistakes, and a float cannot hold them.
    if not (isinstance(value, Integral) and least <= int(value) <= 1 << 53):
        raise OptionError(f"{name} is {value!r:.60}: expected a whole number, {least} or more")
    return int(value)


def _check_tensor(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is float64 on the CPU, of this shape for each minibatch, and NaN or finite throughout.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64 or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise OptionError(f"{name} is {found}: expected a float64 tensor on the CPU")
    expected = (*tensor.shape[: _DIMENSIONS[name] - 2], *shape)
    if tensor.shape != expected:
        raise OptionError(f"{name} has shape {tuple(tensor.shape)}; its labels need {expected}")
    if bool(tensor.isinf().any()):
        raise OptionError(f"{name} contains infinity: expected finite numbers, or NaN where undefined")
    if name in ("stderr", "null_variance") and bool((tensor < 0).any()):
        raise OptionError(f"{name} contains negative numbers: expected 0 or more, or NaN where undefined")


def _plain_json(settings: Any) -> dict[str, Any]:
    """The settings as a file would give them back, so that problems show now and not when a long run is saved.

    NumPy's numbers become plain ones. Infinity and NaN, which JSON does not have, become their names.

    Raises:
        OptionError: the settings hold anything else that JSON does not have.
    """
    try:
        text = json.dumps(dict(settings), default=lambda number: number.item())
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise OptionError(
            f"settings cannot be written as JSON ({error}): use a dict of plain numbers, strings, lists and dicts"
        ) from error
    plain: dict[str, Any] = json.loads(text, parse_constant=str)
    return plain
