"""How often does a p-value of cka_hooks call unrelated layers related? Simulated runs, a table of shares.

    python benchmarks/null.py            # 4000 runs a row, some minutes
    python benchmarks/null.py --runs 400

Two layers with features of one kind, drawn independently of one another, so that every p-value below a level is a
false alarm: of all runs, there should be as many as the level says. Every run goes through the package's own Gram
matrices, HSIC and null distribution. A second table compares the p-value at quantiles of 10,000 real permutations
with the shares of these.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from measure import parsed, parser_of, print_machine
from torch import Tensor

from cka_hooks.hsic import all_pairs, centre, pack
from cka_hooks.null import null_cumulants, null_numbers, pearson3_tail
from cka_hooks.similarity.products.choose import linear_grams

WIDTH = 32
LEVELS = (0.05, 0.01, 0.001)
# Numbers of the (L, m, n, n) Gram matrices that are worked on at a time.
CHUNK = 1 << 22


def normal(samples: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(samples, width, generator=generator, dtype=torch.float64)


def gauss(samples: int, generator: torch.Generator) -> Tensor:
    return normal(samples, WIDTH, generator)


def relu(samples: int, generator: torch.Generator) -> Tensor:
    """One random layer with ReLU, the same for all samples."""
    weights = normal(WIDTH, WIDTH, torch.Generator().manual_seed(0))
    return (normal(samples, WIDTH, generator) @ weights).relu()


def classes(samples: int, generator: torch.Generator) -> Tensor:
    """Ten classes, three times as far apart as their samples scatter."""
    centres = 3 * normal(10, WIDTH, torch.Generator().manual_seed(0))
    return centres[torch.randint(10, (samples,), generator=generator)] + gauss(samples, generator)


def one_direction(samples: int, generator: torch.Generator) -> Tensor:
    """One feature has nearly all of the variance."""
    return gauss(samples, generator) * torch.tensor([10.0] + (WIDTH - 1) * [1.0])


def heavy(samples: int, generator: torch.Generator) -> Tensor:
    """Samples whose norms have a long tail: log-normal factors with a standard deviation of 1."""
    return gauss(samples, generator) * normal(samples, 1, generator).exp()


def outlying(samples: int, generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom in every sample: single samples decide."""
    squares = normal(samples, 3, generator).square().sum(1, keepdim=True)
    return gauss(samples, generator) / (squares / 3).sqrt()


Draw = Callable[[int, torch.Generator], Tensor]
KINDS: dict[str, Draw] = {
    "Gaussian": gauss,
    "ReLU": relu,
    "ten classes": classes,
    "one direction": one_direction,
    "heavy tails, log-normal": heavy,
    "heavy tails, t of 3": outlying,
}


class Sums(NamedTuple):
    """Of one run: S_ij (L, L), and its variance and third moment under permutations (2, L, L)."""

    value: Tensor
    cumulants: Tensor

    def tail(self) -> Tensor:
        deviation = self.cumulants[0].sqrt()
        return pearson3_tail(self.value / deviation, self.cumulants[1] / deviation**3)


def runs_of(layers: list[Tensor], n: int, minibatches: int) -> Iterator[Sums]:
    """Runs over (runs * minibatches * n, d) features of each layer, by the package's functions."""
    total = len(layers[0]) // n
    grams = torch.stack([linear_grams(layer.unsqueeze(1), total).values for layer in layers])
    centred = centre(grams)
    hsic, numbers = all_pairs(pack(centred)), null_numbers(centred)
    own = hsic.diagonal(dim1=1, dim2=2).mT
    for start in range(0, total, minibatches):
        some = slice(start, start + minibatches)
        yield Sums(hsic[some].sum(0), null_cumulants(own[:, some], numbers[:, some], n))


def p_values(draw: Draw, n: int, minibatches: int, runs: int) -> tuple[Tensor, Tensor]:
    """Of so many runs of two unrelated layers: the package's, and those of a normal distribution (for contrast)."""
    generator = torch.Generator().manual_seed(n)
    at_a_time = max(1, CHUNK // (2 * minibatches * n * n))
    found: list[tuple[float, float]] = []
    while len(found) < runs:
        count = min(at_a_time, runs - len(found)) * minibatches * n
        for run in runs_of([draw(count, generator), draw(count, generator)], n, minibatches):
            z = run.value[0, 1] / run.cumulants[0, 0, 1].sqrt()
            found.append((float(run.tail()[0, 1]), float(torch.special.erfc(z / 2**0.5) / 2)))
    return torch.tensor([p for p, _ in found]), torch.tensor([p for _, p in found])


def false_alarms(p: Tensor) -> str:
    return " | ".join(f"{100 * float((p < level).double().mean()):.2f}" for level in LEVELS)


def permuted(n: int, minibatches: int, draws: int = 10_000) -> Iterator[tuple[str, str, Tensor]]:
    """Ten pairs of layers: their kinds, and p-values at the quantiles of real permutations that have the LEVELS."""
    generator = torch.Generator().manual_seed(n)
    kinds = list(KINDS)[:5]
    layers = [KINDS[kind](minibatches * n, generator) for kind in kinds]
    (run,) = runs_of(layers, n, minibatches)
    sums = torch.zeros(draws, 5, 5, dtype=torch.float64)
    rows, columns = torch.tril_indices(n, n, -1)
    for b in range(minibatches):
        centred = torch.stack([centre(x @ x.mT) for x in (layer[b * n : (b + 1) * n] for layer in layers)])
        lower = 2 / n * centred[:, rows, columns]
        for some in sums.split(500):
            order = torch.rand(len(some), n, generator=generator).argsort(1)
            index = order[:, rows] * n + order[:, columns]
            some += torch.stack([matrix.take(index) @ lower.mT for matrix in centred], 1)
    for i, j in itertools.combinations(range(5), 2):
        quantiles = sums[:, i, j].quantile(1 - torch.tensor(LEVELS, dtype=torch.float64))
        deviation = run.cumulants[0, i, j].sqrt()
        skewness = run.cumulants[1, i, j] / deviation**3
        yield kinds[i], kinds[j], pearson3_tail(quantiles / deviation, skewness.expand(len(LEVELS)))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=4000, help="simulated runs a row")
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 128], help="per minibatch")
    parser.add_argument("--minibatches", type=int, nargs="+", default=[10, 40], help="per run")
    parser.add_argument("--draws", type=int, default=10_000, help="real permutations")
    arguments = parsed(parser)
    started = time.perf_counter()
    print_machine()
    error = 100 * (0.05 * 0.95 / arguments.runs) ** 0.5
    print(f"{arguments.runs} runs a row; simulation error at 5 % {error:.2f} points\n")
    heads = " | ".join(f"below {100 * level:g} %" for level in LEVELS)
    print(f"| features | samples | minibatches | {heads} | with a normal distribution: {heads} |")
    print("|" + 9 * "---|")
    for kind, n, minibatches in itertools.product(KINDS, arguments.samples, arguments.minibatches):
        p, contrast = p_values(KINDS[kind], n, minibatches, arguments.runs)
        print(f"| {kind} | {n} | {minibatches} | {false_alarms(p)} | {false_alarms(contrast)} |", flush=True)
    print(f"\n| layers | samples | {' | '.join(f'p where {100 * level:g} % are above, %' for level in LEVELS)} |")
    print("|" + 5 * "---|")
    for n in arguments.samples:
        for one, other, p in permuted(n, min(arguments.minibatches), arguments.draws):
            shares = " | ".join(f"{100 * value:.3f}" for value in p.tolist())
            print(f"| {one}, {other} | {n} | {shares} |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
