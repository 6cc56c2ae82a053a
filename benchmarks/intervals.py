"""How often does an interval of cka_hooks hold the true CKA? Simulated runs with known truth, a table of shares.

    python benchmarks/intervals.py            # 1000 runs a row, some minutes
    python benchmarks/intervals.py --runs 200

A population of which any number of samples can be drawn (ten classes of unequal size, through a random ReLU network,
with one sparse layer and one of heavy tails) stands for a model and its data. The truth comes from a huge
sample of it. Every run goes through the package's own Gram matrices, HSIC, estimates and `CKAResult`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from measure import parsed, parser_of, print_machine
from torch import Tensor

from cka_hooks import CKAResult
from cka_hooks.hsic import all_pairs, centre, pack
from cka_hooks.run.loop import FIRST_LOOK, LOOK_RATIO
from cka_hooks.similarity import estimate
from cka_hooks.similarity.products.choose import linear_grams
from cka_hooks.similarity.state import moments_of

SAMPLES = 32
# Minibatches worked on at a time: what they take fits into a cache.
CHUNK = 500


class Population:
    """Layers of a random network over samples from a mixture of ten classes of unequal size."""

    layers = ("input", "relu1", "relu2", "relu3", "sparse", "heavy")

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._width = width
        self._centres = 1.2 * self._normal(10, width)
        self._weights = [self._normal(width, width) * (2 / width) ** 0.5 for _ in range(3)]
        self._shares = 1 / torch.arange(2.0, 12.0)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def draw(self, samples: int) -> Tensor:
        """(L, samples, width) activations of fresh samples."""
        classes = torch.multinomial(self._shares, samples, replacement=True, generator=self._generator)
        states = [self._centres[classes] + self._normal(samples, self._width)]
        for weight in self._weights:
            states.append((states[-1] @ weight).relu())
        sparse = (states[0] - 2.5).relu()
        heavy = states[2] * (0.4 * self._normal(samples, 1)).exp()
        return torch.stack([*states, sparse, heavy])


def hsic_of(activations: Tensor) -> Tensor:
    """(L, M * n, d) activations of M minibatches -> (M, L, L) weighted HSIC, by the package's functions."""
    minibatches = activations.shape[1] // SAMPLES
    grams = [linear_grams(layer.unsqueeze(1), minibatches).values for layer in activations]
    return all_pairs(pack(centre(torch.stack(grams))))


def simulate(population: Population, runs: int, minibatches: int) -> Tensor:
    """(runs, minibatches, L, L) HSIC values of independent runs."""
    total = runs * minibatches
    chunks = [hsic_of(population.draw(min(CHUNK, total - done) * SAMPLES)) for done in range(0, total, CHUNK)]
    return torch.cat(chunks).unflatten(0, (runs, minibatches))


def simulate_passes(population: Population, runs: int, minibatches: int, passes: int) -> Tensor:
    """(runs, passes * minibatches, L, L): each run has its own samples, shuffled anew for every pass."""
    values = []
    for _ in range(runs):
        activations = population.draw(minibatches * SAMPLES)
        orders = [torch.randperm(minibatches * SAMPLES) for _ in range(passes)]
        values.append(torch.cat([hsic_of(activations[:, order]) for order in orders]))
    return torch.stack(values)


def result_of(hsic: Tensor, minibatches_per_pass: int, layers: Sequence[str] = Population.layers) -> CKAResult:
    """What a run with these (B, L, L) HSIC values reports."""
    count = len(hsic)
    moments = moments_of(hsic)
    return CKAResult(
        rows=tuple(layers),
        columns=tuple(layers),
        matrix=estimate.cka(moments),
        stderr=estimate.stderr(moments, count, minibatches_per_pass),
        samples=minibatches_per_pass * SAMPLES,
        minibatches=count,
        degrees_of_freedom=minibatches_per_pass - 1,
        minibatch_hsic=hsic,
        minibatch_layers=tuple(layers),
        passes=max(1, count // minibatches_per_pass),
    )


def looks(first: int, last: int) -> Iterator[int]:
    """After how many minibatches `compare(tolerance=...)` looks at the standard errors."""
    look = first
    while look < last:
        yield look
        look = int(look * LOOK_RATIO) + 1
    yield last


def stopped(
    hsic: Tensor, tolerance: float, first: int = FIRST_LOOK, layers: Sequence[str] = Population.layers
) -> CKAResult:
    """The result of a run over (B, L, L) HSIC values that ends at the first look below `tolerance`."""
    for count in looks(first, len(hsic)):
        result = result_of(hsic[:count], count, layers)
        if float(result.stderr.max()) < tolerance:
            break
    return result


class Coverage(NamedTuple):
    """Share of runs in which the interval held the truth, on average over pairs, and for the worst pair."""

    mean: float
    lowest: float


def normal(result: CKAResult) -> tuple[Tensor, Tensor]:
    """The interval of 1.96 standard errors."""
    return result.matrix - 1.96 * result.stderr, result.matrix + 1.96 * result.stderr


def student(result: CKAResult) -> tuple[Tensor, Tensor]:
    """The package's own interval."""
    return result.interval(0.95)


def coverage(
    results: Sequence[CKAResult],
    truth: Tensor,
    interval: Callable[[CKAResult], tuple[Tensor, Tensor]] = normal,
) -> Coverage:
    """How often `interval` holds the truth, over pairs off the diagonal."""
    held = torch.zeros_like(truth)
    for result in results:
        low, high = interval(result)
        held += (low <= truth) & (truth <= high)
    rows, columns = torch.tril_indices(len(truth), len(truth), -1)
    shares = held[rows, columns] / len(results)
    return Coverage(float(shares.mean()), float(shares.min()))


def difference_coverage(results: Sequence[CKAResult], truth: Tensor) -> Coverage:
    """How often `CKAResult.difference(...).interval` holds the true difference, over pairs that share a layer."""
    layers = results[0].layers
    shares = []
    for a in range(len(layers)):
        b, c = (a + 1) % len(layers), (a + 2) % len(layers)
        held = 0
        for result in results:
            low, high = result.difference((layers[a], layers[b]), (layers[a], layers[c])).interval(0.95)
            held += low <= float(truth[a, b] - truth[a, c]) <= high
        shares.append(held / len(results))
    return Coverage(sum(shares) / len(shares), min(shares))


def true_cka(population: Population, minibatches: int) -> Tensor:
    """CKA of a sample so large that its own error does not matter."""
    return result_of(simulate(population, 1, minibatches)[0], minibatches).matrix


def rows(runs: int) -> Iterator[tuple[str, str, Coverage]]:
    """Name, target and coverage of everything that is promised."""
    population = Population()
    truth = true_cka(population, 40_000)
    for minibatches, target in ((10, "at least 85"), (30, "90 to 98"), (100, "93 to 97")):
        results = [result_of(hsic, minibatches) for hsic in simulate(population, runs, minibatches)]
        yield f"{minibatches} minibatches, 1.96 stderr", target, coverage(results, truth)
        if minibatches == 10:
            yield "10 minibatches, Student t", "90 to 98", coverage(results, truth, student)
        if minibatches == 30:
            yield "30 minibatches, difference of two entries", "90 to 98", difference_coverage(results, truth)
    results = [result_of(hsic, 5) for hsic in simulate(population, runs, 5)]
    yield "5 minibatches, Student t", "90 to 98", coverage(results, truth, student)
    yield "5 minibatches, 1.96 stderr (for contrast)", "", coverage(results, truth)
    yield "5 minibatches, difference of two entries", "90 to 98", difference_coverage(results, truth)
    few = max(runs // 2, 100)
    many = simulate_passes(population, few, 30, 20)
    for passes in (5, 20):
        results = [result_of(hsic[: 30 * passes], 30) for hsic in many]
        yield f"30 minibatches, {passes} passes, 1.96 stderr", "90 to 98", coverage(results, truth)
        naive = [result_of(hsic[: 30 * passes], 30 * passes) for hsic in many]
        yield f"30 minibatches, {passes} passes, as if independent (contrast)", "", coverage(naive, truth)
    long = simulate(population, few, 200)
    # All layers together, and the one pair of layers for which stopping by a lucky small spread is easiest.
    for chosen in (slice(0, 6), slice(1, 3)):
        layers, values = Population.layers[chosen], long[:, :, chosen, chosen]
        # Half the runs reach it at the first look, the others later.
        first_errors = torch.stack([result_of(hsic[:30], 30, layers).stderr.max() for hsic in values])
        tolerance = float(first_errors.median())
        for first in (FIRST_LOOK, 3):
            results = [stopped(hsic, tolerance, first, layers) for hsic in values]
            counts = [result.minibatches for result in results]
            name = f"{len(layers)} layers, tolerance {tolerance:.3f}, first look at {first}"
            name += f", ended after {min(counts)} to {max(counts)}"
            target = "90 to 98" if first == FIRST_LOOK else ""
            yield name, target, coverage(results, truth[chosen, chosen])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs a row (passes and tolerance: half)")
    runs = parsed(parser).runs
    torch.manual_seed(0)
    started = time.perf_counter()
    print_machine()
    error = 100 * math.sqrt(0.95 * 0.05 / runs)
    print(f"{runs} runs a row, {SAMPLES} samples a minibatch; simulation error of a single pair {error:.1f} points\n")
    print(f"| {'interval':<66} | target % | covered % | worst pair % |")
    print(f"|{'-' * 68}|{'-' * 10}|{'-' * 11}|{'-' * 14}|")
    for name, target, found in rows(runs):
        print(f"| {name:<66} | {target} | {100 * found.mean:.1f} | {100 * found.lowest:.1f} |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
