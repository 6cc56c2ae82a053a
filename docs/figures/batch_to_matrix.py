"""How a batch becomes a matrix: the picture of the page on design."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import cka_hooks

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Tanh()) for _ in range(4)))
classes = torch.arange(24).div(6, rounding_mode="floor")
batch = torch.nn.functional.one_hot(classes, 24) * 3 + torch.randn(24, 24) / 2
(kept,) = cka_hooks.LayerRecorder(model, layers="[0123]").stream([batch])
centred = [features - features.mean(0) for features in kept.values()]

figure = Figure(figsize=(10, 4.4))
canvas = figure.add_axes((0, 0, 1, 1))
canvas.set(xlim=(0, 10), ylim=(0, 4.4))
canvas.axis("off")


def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
    canvas.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="0.4", lw=1.2))


def picture(matrix: torch.Tensor, left: float, below: float, size: float, cmap: str = "viridis") -> None:
    axes = figure.add_axes((left / 10, below / 4.4, size / 10, size / 4.4))
    axes.imshow(matrix, cmap=cmap, origin="lower" if cmap == "viridis" else "upper")
    axes.set(xticks=[], yticks=[])


for column, text in (
    (0.85, "model and batch"),
    (2.75, "inside each hook:\na Gram matrix"),
    (5.2, "centred, flattened,\nstacked"),
):
    canvas.text(column, 4.15, text, ha="center", va="center", fontsize=10)
canvas.text(7.0, 4.15, "one product:\nHSIC of all pairs", ha="center", va="center", fontsize=10)
canvas.text(9.0, 4.15, "sums over minibatches:\nCKA, standard errors", ha="center", va="center", fontsize=10)
canvas.text(0.85, 0.12, "batch: n samples", ha="center", va="center", fontsize=9, color="0.3")
arrow((0.85, 0.25), (0.85, 0.55))
for number, features in enumerate(centred):
    below = 0.55 + 0.85 * number
    canvas.add_patch(FancyBboxPatch((0.3, below), 1.1, 0.55, boxstyle="round,pad=0.03", fc="#e8eef7", ec="0.5"))
    canvas.text(0.85, below + 0.27, f"layer {number}", ha="center", va="center", fontsize=9)
    if number < 3:
        arrow((0.85, below + 0.58), (0.85, below + 0.83))
    arrow((1.5, below + 0.27), (2.4, below + 0.27))
    picture(features @ features.T, 2.45, below - 0.08, 0.7, "magma")
    arrow((3.2, below + 0.27), (4.1, 1.35 + 0.4 * number + 0.1))
    strip = figure.add_axes((4.2 / 10, (1.3 + 0.4 * number) / 4.4, 2.0 / 10, 0.3 / 4.4))
    strip.imshow((features @ features.T).flatten()[None, :140], cmap="magma", aspect="auto")
    strip.set(xticks=[], yticks=[])
canvas.text(2.8, 0.12, "n x n, activation not kept", ha="center", va="center", fontsize=9, color="0.3")
canvas.text(5.2, 0.95, "layers x n²", ha="center", va="center", fontsize=9, color="0.3")
cka = cka_hooks.cka_matrix(centred)
arrow((6.25, 2.05), (6.5, 2.05))
picture(cka * torch.linspace(1, 0.5, 4).outer(torch.linspace(1, 0.5, 4)), 6.55, 1.6, 0.95, "magma")
arrow((7.6, 2.05), (8.3, 2.05))
canvas.text(7.95, 2.25, "+", ha="center", va="center", fontsize=14, color="0.4")
picture(cka, 8.35, 1.4, 1.3)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
