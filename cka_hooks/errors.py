"""Every exception and warning of the package. Messages say what was found, what was expected, what to do.

All errors derive from :class:`CKAError`, so ``except cka_hooks.CKAError`` catches what this package raises on purpose
and nothing else.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from traceback import walk_stack
from typing import TYPE_CHECKING, Any

__all__ = [
    "BatchError",
    "CKAError",
    "CKAWarning",
    "CheckpointError",
    "LayerError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "OptionError",
    "OutOfMemoryError",
    "RankError",
    "ResultFileError",
    "SampleCountError",
    "TooFewSamplesError",
]

if TYPE_CHECKING:
    from cka_hooks.results.result import CKAResult


class CKAError(Exception):
    """Base class of every error this package raises on purpose."""


class LayerError(CKAError, ValueError):
    """A layer choice that matches nothing, or a chosen layer that cannot be recorded."""


class ModelError(CKAError, TypeError):
    """A model that forward hooks cannot see into, such as a ``ScriptModule``."""


class BatchError(CKAError, ValueError):
    """A batch that the model cannot be called with, or whose number of samples is not known."""


class SampleCountError(CKAError, ValueError):
    """Activations of one minibatch, or tensors to compare, that differ in their number of samples."""


class TooFewSamplesError(CKAError, ValueError):
    """No minibatch of the run had the four samples an HSIC estimate needs, or the loader was empty."""


class OptionError(CKAError, ValueError):
    """An option with an invalid value."""


class NonFiniteError(CKAError, ArithmeticError):
    """NaN or infinity in an activation.

    Attributes:
        layers: for each label, the 0-based number of the first minibatch in which it was not finite.
        partial: the result of all other layers over all minibatches, or None if nothing is left.
    """

    def __init__(self, message: str, layers: dict[str, int], partial: CKAResult | None) -> None:
        super().__init__(message)
        self.layers = layers
        self.partial = partial

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, unpickling passes the message alone, which fails, and hangs a multiprocessing.Pool.
        return type(self), (*self.args, self.layers, self.partial), self.__dict__


class OutOfMemoryError(CKAError, MemoryError):
    """The device ran out of memory inside a hook, even after a retry in smaller pieces."""


class ResultFileError(CKAError, ValueError):
    """A file that is not a result this package saved: truncated, edited, or of another version."""


class CheckpointError(CKAError, ValueError):
    """A checkpoint that cannot be resumed: damaged, or written by a run with other settings."""


class RankError(CKAError, RuntimeError):
    """Another rank of a distributed run failed, was stopped, or does not answer."""


class MissingExtraError(CKAError, ImportError):
    """An optional dependency that is not installed. The message has the ``pip install`` line."""


def imported(module: str, sentence: str, install: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: name of the module.
        sentence: what needs the package.
        install: the argument for ``pip install``.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{sentence}: pip install {install}") from error


class CKAWarning(UserWarning):
    """Category of every warning of this package. Filter it to silence warnings, or to raise them."""


# Code that may be between a user's line and this package.
_BETWEEN = frozenset({"torch", "lightning", "pytorch_lightning", "transformers", "accelerate"})


def warn(message: str) -> None:
    """Warn with :class:`CKAWarning`, pointing at the line in the user's code that called this package.

    In a hook or a callback, this is the line of the user's own code that led to it, not one of PyTorch or of a
    trainer.
    """
    packages = (str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in walk_stack(sys._getframe(1)))
    levels = list(enumerate(packages, 2))
    outermost = max(level for level, package in levels if package == __package__)
    of_the_user = (level for level, package in levels if level > outermost and package not in _BETWEEN)
    warnings.warn(message, CKAWarning, stacklevel=next(of_the_user, outermost))
