"""Compile and launch the fused kernels for a GPU that is not there: test_fused.py runs this.

    python tests/launch_checks.py LIBRARY CAPABILITY SAMPLES [SAMPLES ...]

Triton brings its compiler, and needs a GPU only to run what it made. The interpreter, in which fused_checks.py looks
at the numbers, takes what no GPU would: too much shared memory, types that do not fit together, products that tensor
cores do not have. Here all is real but the driver, `no_gpu.c` in LIBRARY, which keeps the arguments of a launch.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from cka_hooks import CKAAccumulator, CKAWarning
from cka_hooks.similarity.products import fused

# Bytes of shared memory that a program may use on any GPU that has products in bfloat16 (CUDA C++ Programming Guide,
# table of technical specifications): those with compute capability 8.6, 8.9 and 12.0 have the least.
SHARED = 99 << 10


class Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)]
    _fields_ += [("stream", ctypes.c_void_p), ("kernel", ctypes.c_size_t)]


class Launched(NamedTuple):
    """What the driver got: the bits of the arguments, and how to launch which kernel."""

    arguments: list[int]
    config: Config


def without_gpu(library: str, capability: int) -> Callable[..., Launched]:
    """Let Triton launch into a driver that does nothing. Return :func:`fused.launch`, which tells what arrived."""
    # A launch that fails is one.
    warnings.simplefilter("error", CKAWarning)
    cuda = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    launches, wanted = (ctypes.c_int.in_dll(cuda, name) for name in ("launches", "wanted"))
    arguments, last = (ctypes.c_uint64 * 32).in_dll(cuda, "arguments"), Config.in_dll(cuda, "last")
    # The device of a tensor on a CPU.
    torch.cuda.current_device = lambda: None  # type: ignore[assignment, return-value]
    here = CudaDriver()
    here.get_current_device, here.get_current_stream = (lambda: 0), (lambda device: 0)
    here.get_device_capability = lambda device: divmod(capability, 10)
    driver.set_active(here)
    real = fused.launch
    fused.takes = lambda features, minibatches: (
        features.dtype in fused.PIECES
        and features.shape[0] <= minibatches * fused.MAX_SAMPLES
        and features.numel() > 0
    )
    fused.adds_up = lambda vectors: True

    def launch(program: fused.Program, stream: int, tensors: Sequence[Tensor], *numbers: int) -> Launched:
        before, wanted.value = launches.value, len(tensors) + len(numbers) + len(program.numbers)
        real(program, stream, tensors, *numbers)
        assert launches.value == before + 1
        return Launched(arguments[: wanted.value], last)

    return launch


def is_passed(number: int | float, bits: int) -> bool:
    """Whether a number is what the 8 bytes at its place begin with: an int may have 4, and an old float."""
    if isinstance(number, float):
        passed = struct.pack("Q", bits)
        return struct.pack("d", number) == passed or struct.pack("f", number) == passed[:4]
    return number == bits or (number < 1 << 31 and number == bits & 0xFFFFFFFF)


def main(library: str, capability: int, samples: Sequence[int]) -> None:
    real, seen = without_gpu(library, capability), Counter[tuple[str, bool]]()

    def launch(program: fused.Program, stream: int, tensors: Sequence[Tensor], *numbers: int) -> None:
        given = [*(tensor.data_ptr() for tensor in tensors), *numbers, *program.numbers]
        was_compiled = bool(program.compiled)
        found, last = real(program, stream, tensors, *numbers)
        assert all(map(is_passed, given, found)), (program.kernel, was_compiled, given, found)
        assert tuple(last.grid) == program.grid
        assert last.shared <= SHARED, (program.kernel, program.constants, last.shared)
        seen[program.kernel, was_compiled] += 1

    fused.launch = launch
    fused.processors_of = lambda device: 132
    for n in samples:
        cka = CKAAccumulator()
        for _ in range(3):
            cka.update(
                {"x": torch.zeros(n, 4096), "y": torch.zeros(64, n, 128, dtype=torch.bfloat16).transpose(0, 1)}
            )
    # Strides of more than 31 bits.
    x = torch.zeros(16, 4)
    buffers = torch.empty(1 << 12), torch.empty(1 << 12, dtype=torch.float64), torch.empty(1 << 12)
    program = fused.program_of((16, 3, 64), (1 << 33, (1 << 32) + 16, 1), x.dtype, 1, 132)
    for _ in range(2):
        launch(program, 0, (x, *buffers), 5)
    kernels = {"partial_grams", "add_partials", "centre_grams", "add_hsic"}
    ways = (False, True) if fused._kernels().TAKES_CONSTANTS else (False,)
    assert set(seen) == {(kernel, way) for kernel in kernels for way in ways}, seen


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(n) for n in sys.argv[3:]])
