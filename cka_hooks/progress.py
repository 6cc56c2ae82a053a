"""A progress bar on stderr, and nothing at all where none is shown."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tqdm.auto import tqdm


class _NoBar:
    """Takes the calls of a bar."""

    def update(self, n: float = 1) -> None: ...

    def set_postfix_str(self, s: str) -> None: ...


def progress_bar(name: str, unit: str, total: int | None, *, shown: bool) -> AbstractContextManager[Any]:
    """A tqdm bar, or without `shown` an object that does nothing.

    Not `tqdm(disable=True)`: that takes a lock which forked processes share, and waits without end where one of them
    was killed while it held the lock.
    """
    if not shown:
        return nullcontext(_NoBar())
    bar: AbstractContextManager[Any] = tqdm(total=total, unit=unit, unit_scale=True, desc=name)
    return bar
