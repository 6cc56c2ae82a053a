"""Show a progress bar on stderr, or nothing at all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from tqdm.auto import tqdm


def progress_bar(name: str, unit: str, total: int | None, *, shown: bool) -> AbstractContextManager[Any]:
    """A tqdm bar; without `shown`, an object that does nothing.

    `tqdm(disable=True)` would not do: it takes a lock that forked processes share, and waits forever if one of them
    was killed while it held the lock.
    """
    if not shown:
        return nullcontext(SimpleNamespace(update=lambda n: None, set_postfix_str=lambda s: None))
    return tqdm(total=total, unit=unit, unit_scale=True, desc=name)  # type: ignore[no-any-return]
