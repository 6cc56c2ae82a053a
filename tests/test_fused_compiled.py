"""The fused kernels, compiled for real GPUs without one: Triton brings the compiler, and needs a GPU only to launch.

The interpreter, in which test_fused.py checks their numbers, takes what no GPU would: too much shared memory, types
that do not fit together, products that tensor cores do not have.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cka_hooks import CKAAccumulator
from cka_hooks.similarity.products import fused

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the extra `test` has Triton on Linux only"
)
# Bytes of shared memory that a program may use on any GPU that has products in bfloat16 (CUDA C++ Programming Guide,
# table of technical specifications): those with compute capability 8.6, 8.9 and 12.0 have the least.
SHARED = 99 << 10


class Pretended:
    """A driver for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Compiles each kernel that would be launched, once for all sizes, and launches nothing."""
    driver = pytest.importorskip("triton.runtime").driver
    kinds, found = set[Any](), []

    def compile_only(program: fused.Program, stream: int, tensors: Sequence[Tensor], *numbers: int) -> None:
        if program.kind not in kinds:
            kinds.add(program.kind)
            kernel = getattr(fused._kernels(), program.kernel)
            arguments = (*tensors, *numbers, *program.numbers)
            found.append(kernel.warmup(*arguments, grid=program.grid, **program.constants, **program.options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused, "launch", compile_only)
    monkeypatch.setattr(fused, "takes", lambda features, minibatches: features.dtype in fused.PIECES)
    monkeypatch.setattr(fused, "adds_up", lambda vectors: True)
    monkeypatch.setattr(fused, "processors_of", lambda device: 132)
    monkeypatch.setattr(driver, "_active", Pretended(capability))
    return found


def layers_of(n: int) -> Iterator[Tensor]:
    """Activations of n samples: wide, of half the bits, in parts that do not follow one another."""
    wide = torch.zeros(n, 4096)
    yield from (wide, wide.bfloat16(), torch.zeros(64, n, 128).transpose(0, 1))


# The smallest tile, the tile of most runs, and the largest, which is the first to find no room.
@pytest.mark.parametrize(("capability", "n"), [(90, 12), (90, 64), (90, 100), (80, 100)])
def test_kernels_compile_and_fit(n: int, compiled: list[Any]) -> None:
    cka = CKAAccumulator()
    cka.update({str(i): features for i, features in enumerate(layers_of(n))})
    names = {kernel.metadata.name for kernel in compiled}
    assert names == {"partial_grams", "add_partials", "centre_grams", "add_hsic"}
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED
