"""Programs that tests start: fresh processes, never forks, that are gone when their test ends, in whatever way.

A fork shares locks with the process that it comes from. One that is killed while it holds such a lock leaves it
locked, and a later test waits for it without end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FRESH = multiprocessing.get_context("spawn")


@contextmanager
def started(*words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python program with pipes for what it prints; at the end it is killed with all that it started itself."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, *words], **pipes | options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finished(*words: str, seconds: float = 240, **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python program that ends by itself in so many seconds."""
    with started(*words, **options) as process:
        out, err = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


def driver_without_gpu(folder: Path) -> tuple[str, dict[str, str]]:
    """The driver of no_gpu.c, made here by a C compiler, and an environment in which Triton launches into it."""
    library = str(folder / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("no_gpu.c")], check=True)
    places = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_LIBCUDA_PATH": str(folder)}
    # Importing fused_checks.py, as the search for doctests does, chooses the interpreter.
    return library, os.environ | places | {"LD_LIBRARY_PATH": str(folder), "TRITON_INTERPRET": "0"}


@contextmanager
def spawned(function: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A function of a module in a process of its own, which imports that module anew."""
    process = FRESH.Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(30)
