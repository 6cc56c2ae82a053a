"""How the benchmarks take time and memory.

On a shared machine absolute times say little, so runs are interleaved in one process (bare, A, B, bare, A, B, ...,
bare) and each is divided by the mean of the bare runs before and after its round; the median over rounds counts.
Peak memory is read in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

BARE = "bare"
_clock = time.perf_counter
_device = torch.device("cpu")


OPTIONS: dict[str, dict[str, Any]] = {
    "rounds": {"type": int, "default": 5, "help": "interleaved rounds, whose median counts"},
    "figure": {"type": Path, "help": "where to write the figure"},
    "cpu-time": {
        "action": "store_true",
        "help": "count processor time, which other programs disturb less (set OMP_NUM_THREADS=1: waiting threads "
        "count)",
    },
    "device": {
        "default": "cpu",
        "help": "cpu or cuda: model and batches are on it before anything is timed, times are synchronised, and "
        "memory is what its allocator handed out",
    },
}


def parser_of(documented: str | None, *names: str, **defaults: object) -> argparse.ArgumentParser:
    """The parser of a benchmark, with those of OPTIONS that it has."""
    parser = argparse.ArgumentParser(description=documented, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the user asked for; its device and clock are those of every run from here on."""
    global _clock
    args = parser.parse_args()
    choose_device(getattr(args, "device", "cpu"))
    _clock = time.process_time if getattr(args, "cpu_time", False) else time.perf_counter
    return args


def print_machine() -> None:
    """What everything that is printed below ran on."""
    print(describe_machine())
    if _clock is time.process_time:
        print("processor time, not wall-clock time")


def choose_device(name: str) -> None:
    """Of every run from here on; ends the program with a sentence where it is not there."""
    global _device
    _device = torch.device(name)
    if _device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"--device {name}: PyTorch {torch.__version__} sees no NVIDIA GPU here; leave --device out for the CPU"
        )


def chosen_device() -> torch.device:
    return _device


def synchronised() -> None:
    """Wait for what was launched."""
    if _device.type == "cuda":
        torch.cuda.synchronize(_device)


@dataclasses.dataclass
class Timings:
    """Seconds of every run in every round.

    Attributes:
        seconds: run -> its times; the bare one has one time more than there are rounds.
    """

    seconds: dict[str, list[float]]

    def ratios(self, name: str) -> list[float]:
        """Relative to the bare runs before and after, one number a round."""
        bare = self.seconds[BARE]
        return [t / ((bare[i] + bare[i + 1]) / 2) for i, t in enumerate(self.seconds[name])]

    def ratio(self, name: str) -> float:
        return statistics.median(self.ratios(name))

    def spelled(self, name: str) -> str:
        """Median and range, as `1.23 (1.20 to 1.31)`."""
        ratios = self.ratios(name)
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, at_most: Mapping[str, int] | None = None
) -> Timings:
    """Time all runs, of which one is "bare", round by round, after one untimed round.

    Args:
        runs: name -> what to time.
        rounds: how often.
        at_most: name -> in how many of the rounds a slow run takes part; such a run is not warmed up.
    """
    limits = at_most or {}
    for name, run in runs.items():
        if name not in limits:
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = [BARE, *(name for name in runs if name != BARE)]
    for number in range(rounds):
        for name in order:
            if number < limits.get(name, rounds):
                seconds[name].append(timed(runs[name]))
    seconds[BARE].append(timed(runs[BARE]))
    return Timings(seconds)


def timed(run: Callable[[], object]) -> float:
    gc.collect()
    synchronised()
    started = _clock()
    run()
    synchronised()
    return _clock() - started


def peak_mib(run: Callable[[], object]) -> float:
    """The largest resident size of this process while `run` runs, in MiB; on a GPU, of what its allocator handed out.

    Linux's VmHWM is set back first, so that building the model does not count; elsewhere it is ru_maxrss of the
    whole process. (ru_maxrss also carries the size of the parent process over into a new one.)
    """
    gc.collect()
    if _device.type == "cuda":
        synchronised()
        torch.cuda.reset_peak_memory_stats(_device)
        run()
        synchronised()
        return torch.cuda.max_memory_allocated(_device) / (1 << 20)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024 if sys.platform.startswith("linux") else 1 << 20)
    run()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def in_own_process(arguments: Sequence[str], timeout: float | None = None) -> dict[str, object]:
    """Run this script again with other arguments and read the JSON of its last line.

    glibc is told to give freed tensors back at once: how much it keeps differs by tens of MiB from run to run.
    """
    script = Path(sys.modules["__main__"].__file__ or "").resolve()
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)},
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns in line."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
