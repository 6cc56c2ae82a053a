"""Bias and spread of CKA estimates against the size of the minibatch they are made from.

    python benchmarks/estimators.py
    python benchmarks/estimators.py --figure benchmarks/figures/estimators.png

Layers of a network trained on images (of layer_identification.py; trained first where it is not in the cache). Each
repetition draws fresh samples and cuts them into minibatches of 8 to 512: biased CKA, unbiased minibatch CKA, and
for comparison one unbiased HSIC of all samples at once. The truth comes from a much larger sample.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from layer_identification import Digits, cached
from measure import parsed, parser_of, print_machine
from torch import Tensor, nn

import cka_hooks
from cka_hooks.hsic import Estimator, all_pairs, centre, pack
from cka_hooks.similarity import estimate as estimates
from cka_hooks.similarity.products.choose import linear_grams
from cka_hooks.similarity.state import moments_of

LAYERS = ("1", "10", "19", "28")
SIZES = (8, 16, 32, 64, 128, 256, 512)


def grams_of(model: nn.Module, images: Tensor) -> Tensor:
    """(L, N, N) linear Gram matrices of all samples."""
    (activations,) = cka_hooks.LayerRecorder(model, layers=LAYERS).stream([images])
    return torch.stack([linear_grams(activations[layer].flatten(1).unsqueeze(1)).values[0] for layer in LAYERS])


def estimate(grams: Tensor, size: int, estimator: Estimator) -> Tensor:
    """CKA of every pair of layers, (pairs,), from minibatches of `size` of the samples of (L, N, N)."""
    blocks = [grams[:, low : low + size, low : low + size] for low in range(0, grams.shape[-1], size)]
    hsic = all_pairs(pack(centre(torch.stack(blocks, 1), estimator), estimator))
    return off_diagonal(estimates.cka(moments_of(hsic)))


def off_diagonal(matrix: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*matrix.shape, -1)
    return matrix[rows, columns]


def main() -> None:
    parser = parser_of(__doc__, "figure")
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--samples", type=int, default=1024, help="of each repetition")
    parser.add_argument("--truth", type=int, default=32768, help="samples that the truth is made from")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    options = parsed(parser)
    started = time.perf_counter()
    print_machine()
    model = cached(0, options.steps)
    digits = Digits(3)
    many = (digits.draw(256, held_out=True)[0] for _ in range(options.truth // 256))
    whole = cka_hooks.compare(model, many, layers=LAYERS, progress=False)
    truth = off_diagonal(whole.matrix)
    print(
        f"truth from {whole.samples} samples, standard errors below {whole.stderr.max():.4f}; {len(truth)} pairs of"
    )
    print(f"layers, {options.repeats} repetitions of {options.samples} samples\n")

    kinds: dict[str, tuple[Estimator, bool]] = {
        "biased": ("biased", False),
        "unbiased, minibatches": ("unbiased", False),
        "unbiased, all samples at once": ("unbiased", True),
    }
    found: dict[str, list[list[Tensor]]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        grams = grams_of(model, digits.draw(options.samples, held_out=True)[0])
        for kind, (estimator, whole_sample) in kinds.items():
            sizes = (options.samples,) if whole_sample else SIZES
            found[kind].append([estimate(grams, size, estimator) for size in sizes])

    # (repeats, sizes, pairs) -> mean over pairs of the bias, and root mean square over pairs of the spread.
    values = {kind: torch.stack([torch.stack(some) for some in all_of_it]) for kind, all_of_it in found.items()}
    bias = {kind: (some.mean(0) - truth).mean(-1).expand(len(SIZES)) for kind, some in values.items()}
    spread = {kind: some.var(0).mean(-1).sqrt().expand(len(SIZES)) for kind, some in values.items()}
    print("| minibatch | " + " | ".join(f"{kind}: bias | spread" for kind in kinds) + " |")
    print("|---" * (1 + 2 * len(kinds)) + "|")
    for i, size in enumerate(SIZES):
        cells = [f"{bias[kind][i]:+.4f} | {spread[kind][i]:.4f}" for kind in kinds]
        print(f"| {size} | {' | '.join(cells)} |")
    print(f"\n{time.perf_counter() - started:.0f} s")
    if options.figure:
        draw_figure(options.figure, bias, spread)


def draw_figure(path: Path, bias: dict[str, Tensor], spread: dict[str, Tensor]) -> None:
    """Bias on the left, spread on the right, against the size of a minibatch."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for (kind, values), style in zip(bias.items(), ("o-", "s-", "k--"), strict=True):
        axes[0].plot(SIZES, values, style, ms=5, label=kind)
        axes[1].plot(SIZES, spread[kind], style, ms=5)
    for axis, name in zip(axes, ("bias (mean over pairs of layers)", "standard deviation between runs"), strict=True):
        axis.set(xscale="log", xlabel="samples in a minibatch", title=name)
        axis.set_xticks(SIZES, map(str, SIZES), minor=False)
        axis.set_xticks([], minor=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
