"""Choose labels: one by its name, several by globs, or those of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cka_hooks.errors import LayerError, OptionError
from cka_hooks.names import closest, matching


def known(label: str, labels: Sequence[str]) -> str:
    """The label, if it is one of ``labels``; otherwise an error with the closest ones.

    Raises:
        LayerError: there is no such label.
    """
    if label in labels:
        return label
    close = closest(label, labels, 3)
    raise LayerError(
        f"no layer {label!r} in this result: the closest of its {len(labels)} are "
        f"{', '.join(map(repr, close))}; result.layers lists all of them"
    )


def known_model(name: str, models: tuple[str, ...]) -> None:
    """Raise unless a model of this name was compared.

    Raises:
        LayerError: there is none. The message names the models that were compared.
    """
    if name not in models:
        why = f"its models are {', '.join(map(repr, models))}"
        if not models:
            why = "its layers come from one unnamed model. Name models by comparing a mapping, "
            why += "compare({'a': model_a, 'b': model_b}, loader)"
        raise LayerError(f"no model {name!r} in this result: {why}")


def pair_of(pair: tuple[str, str]) -> tuple[str, str]:
    """The two labels of a pair.

    Raises:
        OptionError: this is not a pair.
    """
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(label, str) for label in pair)):
        raise OptionError(f"{pair!r} is not a pair of layers: expected two labels, such as ('conv1', 'fc')")
    return pair


def patterns_of(choice: str | Sequence[str]) -> tuple[str, ...]:
    """One label or glob, or several, as a tuple.

    Raises:
        OptionError: this is something else, or empty.
    """
    patterns = (choice,) if isinstance(choice, str) or not isinstance(choice, Iterable) else tuple(choice)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"{choice!r} chooses no layers: expected a label, a glob, or a sequence of them")
    return patterns


def chosen(patterns: tuple[str, ...], labels: tuple[str, ...]) -> list[str]:
    """The labels that the patterns choose, in their own order.

    Raises:
        LayerError: a pattern chooses none.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = matching(pattern, labels)
        if not matches:
            known(pattern, labels)
        found.update(matches)
    return [label for label in labels if label in found]


def model_of(label: str, models: frozenset[str]) -> str:
    """The model whose name a label begins with, or is; ``""`` if there is none.

    Example:
        >>> model_of("a/b/conv1", frozenset({"a", "a/b"}))
        'a/b'
    """
    if label in models:
        return label
    # The longest first, because one model may be called "a" and another "a/b".
    end = label.rfind("/")
    while end > 0 and label[:end] not in models:
        end = label.rfind("/", 0, end)
    return label[: max(end, 0)]
