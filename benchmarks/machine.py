"""What a benchmark ran on, printed above every table so that a number can be placed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from cka_hooks.similarity.products.native import VARIANTS

# Versions that can move a number; those that are not installed are left out.
PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "pytorch-cka",
    "cka-pytorch",
    "torch-cka",
)


def describe_machine() -> str:
    """Processor, cores, threads, GPU and versions in a few lines."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"{_cpu()}, {cores} cores, torch uses {torch.get_num_threads()} threads, "
        f"compiled products: {next(iter(VARIANTS), 'none')}"
    ]
    if torch.cuda.is_available():
        lines.append(f"{torch.cuda.get_device_name()}, driver {_driver()}, CUDA {torch.version.cuda}")
    versions = [f"{package} {version}" for package in PACKAGES if (version := _version(package))]
    lines.append(f"Python {sys.version.split()[0]}, {', '.join(versions)}")
    return "\n".join(lines)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(describe_machine())
