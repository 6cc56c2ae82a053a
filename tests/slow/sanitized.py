"""The compiled code under the address and the undefined-behaviour sanitizer: odd shapes, strides, numbers, threads.

    python tests/slow/sanitized.py                          # for a minute
    python tests/slow/sanitized.py --seconds 600 --seed 7

`_native.c` is built anew by gcc, which has to be there. Features fill their memory to the last number, so that a read
or write beyond them is noticed. That, undefined behaviour, or a wrong number ends the script with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "cka_hooks" / "similarity" / "products" / "_native.c"
NAME = "cka_hooks.similarity.products._native"


def built(folder: str) -> str:
    """The extension with sanitizers, as pyproject.toml has it else."""
    target = f"{folder}/_native.so"
    how = ["-O2", "-g", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-omit-frame-pointer"]
    how += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{sysconfig.get_path('include')}"]
    subprocess.run(["gcc", *how, str(SOURCE), "-o", target, "-lm"], check=True)
    return target


def call(chance: random.Random) -> None:
    """One product of features that lie anywhere."""
    import torch

    from cka_hooks.similarity.products import native

    groups, samples = chance.choice([1, 1, 2, 3, 7]), chance.choice([1, 2, 3, 4, 11, 12, 13, 64, 128, 257, 301])
    positions, channels = chance.choice([1, 1, 2, 49]), chance.choice([1, 2, 15, 16, 17, 100, 1024, 1025, 3000])
    while groups * samples * positions * channels > 1 << 22:
        positions, channels = max(1, positions // 2), max(1, channels // 2)
    order = chance.sample(range(3), 3)
    steps, sizes = [chance.choice([1, 1, 1, 2, 3]) for _ in range(3)], (groups * samples, positions, channels)
    strides, length = [0, 0, 0], 1
    for dim in order:
        is_repeated = dim > 0 and chance.random() < 0.05
        strides[dim] = 0 if is_repeated else length * steps[dim]
        length += 0 if is_repeated else (sizes[dim] - 1) * strides[dim]
    offset, kind = chance.choice([0, 0, 1, 5]), chance.choice(["normal", "normal", "shifted", "odd"])
    memory = torch.randn(offset + length, generator=torch.Generator().manual_seed(chance.getrandbits(32)))
    if kind == "shifted":
        memory += 1e4
    elif kind == "odd":
        for number in (torch.nan, torch.inf, -torch.inf, 3e38, 1e-42):
            memory[chance.randrange(len(memory))] = number
    x = memory.as_strided(sizes, strides, offset)
    native.VARIANTS = dict([chance.choice(native._native.variants())])
    torch.set_num_threads(chance.choice([1, 2, 3, 8]))
    values, measures = native.grams(x.unflatten(0, (groups, -1)))
    wide = x.double().reshape(groups, samples, -1)
    wide = wide - wide.median(1, keepdim=True).values if kind == "shifted" else wide
    grams = wide @ wide.mT

    def centred(of: torch.Tensor) -> torch.Tensor:
        return of - of.mean(1, keepdim=True) - of.mean(2, keepdim=True) + of.mean((1, 2), keepdim=True)

    if kind != "odd":
        scale = centred(grams).abs().max() + 1e-9 * grams.abs().max() + 1e-30
        wrong = float((centred(values) - centred(grams)).abs().max() / scale)
        assert wrong < (1e-2 if kind == "shifted" else 1e-5), (sizes, strides, offset, kind, wrong)
        assert bool(measures.isfinite().all())


def work(seed: int, seconds: float) -> None:
    """Calls from one and from several threads of Python."""
    spec = importlib.util.spec_from_file_location(NAME, os.environ["SANITIZED"])
    assert spec is not None
    assert spec.loader is not None

    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
    from cka_hooks.similarity.products import native

    assert native._native is sys.modules[NAME]
    until, first = time.monotonic() + seconds, seed
    with ThreadPoolExecutor(3) as pool:
        while time.monotonic() < until:
            at_once = 3 if seed % 5 == 0 else 1
            list(pool.map(call, map(random.Random, range(seed, seed + at_once))))
            seed += at_once
    print(f"{seed - first} calls, seeds {first} to {seed - 1}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first call (0)")
    words = parser.parse_args()
    if "SANITIZED" in os.environ:
        work(words.seed, words.seconds)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        libraries = [
            subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
            for name in ("libasan.so", "libubsan.so")
        ]
        env = os.environ | {
            "SANITIZED": built(folder),
            "LD_PRELOAD": ":".join(map(str.strip, libraries)),
            # Python and PyTorch keep memory until they end.
            "ASAN_OPTIONS": "detect_leaks=0",
            "CKA_HOOKS_NATIVE": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        done = subprocess.run([sys.executable, *sys.argv], env=env, timeout=words.seconds + 300)
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
