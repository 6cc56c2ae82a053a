"""The fused kernels as they are compiled for a GPU, on a CPU: the checks of fused_checks.py, and whole runs.

    python tests/slow/compiled.py                      # for three generations of GPUs, with a minute of whole runs
    python tests/slow/compiled.py --seconds 600 --seed 7

In Triton's interpreter, the kernels are right, and launch_checks.py shows that a GPU would get the right arguments.
Here, ptx.py runs what Triton compiled and launched, with the arguments that the driver got: the layouts, copies,
barriers and instructions for tensor cores are those that the compiler chose. Whole runs have layers of mixed dtypes,
shapes and strides, and are compared with PyTorch's products. The first wrong number or undefined access ends the
script with exit code 1. It needs Triton 3.3 or newer and a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import ptx
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import processes

import cka_hooks
from cka_hooks.similarity.products import fused

TESTS = Path(__file__).resolve().parents[1]
# A100, H100 (with other tensor cores) and RTX 50. Those of a B200 (100) are not known to ptx.py.
CAPABILITIES = (80, 90, 120)
OPTIONS = [
    {},
    {},
    {"minibatch": 6},
    {"minibatch": 17},
    {"estimator": "biased"},
    {"kernel": "rbf"},
    {"kernel": "rbf", "sigma": 2.0},
    {"kernel": "cosine"},
]
NEAR = 2e-6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long whole runs go on, for each capability")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library, environment = processes.driver_without_gpu(Path(folder))
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "slow")))
        for capability in CAPABILITIES:
            call = f"import compiled; compiled.checked({library!r}, {capability}, {options.seconds}, {options.seed})"
            if code := subprocess.run([sys.executable, "-c", call], env=environment, check=False).returncode:
                return code
    return 0


def memory_of(tensor: Tensor, name: str) -> ptx.Memory:
    """All that a tensor is a part of."""
    whole = tensor.untyped_storage()
    data = np.frombuffer((ctypes.c_char * whole.nbytes()).from_address(whole.data_ptr()), np.uint8)
    return ptx.Memory(data, whole.data_ptr(), name, min(4, tensor.element_size()))


def on_a_cpu(real: Callable[..., object]) -> Callable[..., None]:
    """:func:`fused.launch` that runs what was launched."""
    kernels: dict[int, ptx.Kernel] = {}

    def launch(program: fused.Program, stream: int, tensors: Sequence[Tensor], *numbers: int) -> None:
        arguments, config = real(program, stream, tensors, *numbers)
        if config.kernel not in kernels:
            [compiled] = [it for it in fused._compiled.values() if it.function == config.kernel]
            kernels[config.kernel] = ptx.Kernel(compiled.asm["ptx"])
        kernel = kernels[config.kernel]
        wholes = {it.untyped_storage().data_ptr(): (it, f"tensor {i}") for i, it in enumerate(tensors)}
        # Triton adds two arguments that these kernels do not use.
        arguments += [0] * (len(kernel.parameters) - len(arguments))
        kernel.run(tuple(config.grid), arguments, [memory_of(*it) for it in wholes.values()], config.shared)

    return launch


def checked(library: str, capability: int, seconds: float, seed: int) -> None:
    import fused_checks
    import launch_checks

    fused.launch, fused.fail = on_a_cpu(launch_checks.without_gpu(library, capability)), fail
    # Launches keep track of all memory that they are given.
    fused.ROOM = 1 << 18
    fused.MOST_ROWS = fused.ROOM // (2 * fused.MAX_SAMPLES)
    for check in fused_checks.CHECKS:
        # It launches a kernel that is not one of ours, and has tensors of 14 GiB.
        if check.__name__ != "addresses_beyond_32_bits":
            begin = time.time()
            torch.manual_seed(0)
            fused.processors_of = lambda device: 1
            check()
            print(f"{capability} {check.__name__}: {time.time() - begin:.0f} s", flush=True)
    end, worst = time.time() + seconds, 0.0
    while time.time() < end:
        worst = max(worst, whole_run(seed))
        seed += 1
    print(f"{capability} whole runs: largest difference {worst:.1e}; the next seed is {seed}", flush=True)


def layer_of(choose: random.Random, n: int, dtype: torch.dtype) -> Tensor:
    """Features of one layer, as they may lie in memory."""
    positions, channels = choose.choice([1, 2, 5]), choose.choice([1, 3, 8, 16, 33, 64, 130])
    x = torch.randn(n, positions, channels) + choose.choice([0, 3, 50])
    x = (x * 10.0 ** choose.choice([0, -1] if dtype == torch.float16 else [0, 0, -12, 9])).to(dtype)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.flatten(1),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, : max(1, channels - 1)],
        lambda x: x[:, :1].expand(n, positions, channels),
        lambda x: torch.cat([x, x], 2)[..., ::2],
        lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:],
    ]
    return choose.choice(ways)(x)


def whole_run(seed: int) -> float:
    """The largest difference between a run with the fused kernels and one with PyTorch's products."""
    choose = random.Random(seed)
    options = choose.choice(OPTIONS)
    dtypes = choose.choices([torch.float32, torch.float32, torch.bfloat16, torch.float16], k=choose.choice([1, 2, 4]))
    batches = choose.choices([4, 7, 16, 20, 33, 64, 131], k=choose.choice([1, 2]))
    torch.manual_seed(seed)
    kinds = choose.randrange(1 << 30)
    batches = [
        {f"layer {i}": layer_of(random.Random(kinds + i), n, dtype) for i, dtype in enumerate(dtypes)}
        for n in batches
    ]
    processors = choose.choice([1, 2, 3])
    fused.processors_of = lambda device: processors
    fused.program_of.cache_clear()
    compared = fused.takes, fused.adds_up
    results = []
    for fused.takes, fused.adds_up in (compared, (lambda features, minibatches: False, lambda vectors: False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cka_hooks.CKAWarning)
            cka = cka_hooks.CKAAccumulator(**options)
            for batch in batches:
                cka.update(batch)
            results.append(cka.compute().matrix)
    fused.takes, fused.adds_up = compared
    one, other = results
    assert torch.equal(one.isnan(), other.isnan()), seed
    off = float((one - other).nan_to_num().abs().max())
    assert off <= NEAR, (seed, off, options, [(tuple(x.shape), x.stride(), x.dtype) for x in batches[0].values()])
    return off


def fail(error: BaseException) -> None:
    """Stands for `fused.fail`, after which PyTorch's products would go on."""
    raise error


if __name__ == "__main__":
    sys.exit(main())
