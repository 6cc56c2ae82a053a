"""Every exception of the package crosses a process boundary as it is, and is explained in the docs."""

import copy
import importlib
import pickle
import pkgutil
import re
from contextlib import suppress
from pathlib import Path

import pytest

import cka_hooks
from cka_hooks.errors import CKAError, CKAWarning, NonFiniteError

for module in pkgutil.walk_packages(cka_hooks.__path__, "cka_hooks."):
    # Some need what is not installed everywhere.
    with suppress(ImportError):
        importlib.import_module(module.name)


def subclasses(kind):
    return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]


ARGUMENTS = {NonFiniteError: ("a layer is NaN", {"fc": 3}, cka_hooks.CKAResult.example())}


@pytest.mark.parametrize("kind", [*subclasses(CKAError), CKAWarning])
@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.copy, copy.deepcopy])
def test_every_exception_can_be_pickled(kind, copied):
    error = kind(*ARGUMENTS.get(kind, ("what was found",)))
    error.more = [1]
    again = copied(error)
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_all_public_errors_are_exported():
    public = {kind.__name__ for kind in subclasses(CKAError) if kind.__module__ == "cka_hooks.errors"}
    assert public <= set(cka_hooks.__all__)


def test_every_class_is_in_the_table_of_the_docs():
    """With the class of Python's own that it also is, and nothing else is there."""
    page = (Path(__file__).parent.parent / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (.+) \|$", page, re.MULTILINE)
    described = {name: python for name, python, when, todo in rows if len(when) > 10 and len(todo) > 10}
    errors = [kind for kind in [*subclasses(CKAError), CKAWarning] if kind.__module__ == "cka_hooks.errors"]
    assert described == {kind.__name__: kind.__bases__[-1].__name__ for kind in errors}
    assert len(rows) == len(errors)
