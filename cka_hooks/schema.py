"""Whether plain data from a file has the form it should: what a checksum cannot say of a file made on purpose."""

from __future__ import annotations

from typing import Any

from cka_hooks.errors import OptionError

# What `check` compares with: a type, a tuple of alternatives, [item] for a list of them, {str: value} for a
# mapping from any keys of a type, or {"key": form, ...} for exactly these keys. COUNT is a whole number, 0 or more.
COUNT = "count"


def check(value: Any, form: Any, where: str) -> None:
    """Compare nested data with a form.

    Raises:
        OptionError: it has another one, with the place.
    """
    if isinstance(form, tuple):
        for alternative in form:
            try:
                return check(value, alternative, where)
            except OptionError:
                continue
    elif form is None or form == COUNT:
        if value is None if form is None else type(value) is int and value >= 0:
            return
    elif isinstance(form, list):
        if isinstance(value, list):
            for i, item in enumerate(value):
                check(item, form[0], f"{where}[{i}]")
            return
    elif isinstance(form, dict):
        kind = next(iter(form))
        if isinstance(value, dict) and (isinstance(kind, type) or value.keys() == form.keys()):
            for key, item in value.items():
                if isinstance(kind, type):
                    check(key, kind, f"a key of {where}")
                check(item, form[kind] if isinstance(kind, type) else form[key], f"{where}.{key}")
            return
    elif isinstance(value, form) and not (form is int and isinstance(value, bool)):
        return
    raise OptionError(f"{where} is {_shown(value)}, which is not what belongs there")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"
