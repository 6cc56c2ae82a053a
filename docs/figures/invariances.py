"""What CKA ignores, and what it does not: features against changed copies of themselves."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

import cka_hooks

generator = torch.Generator().manual_seed(0)
x = torch.randn(1000, 20, generator=generator)
rotation = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
noise = torch.randn(1000, 20, generator=generator)
changed = {
    "rotated": x @ rotation,
    "channels permuted": x[:, torch.randperm(20, generator=generator)],
    "shifted": x + 7,
    "scaled": 100 * x,
    "each channel scaled by itself": x * torch.logspace(-1, 1, 20),
    "with as much noise": x + noise,
    "through a ReLU": x.relu(),
    "noise alone": noise,
    "samples shuffled": x[torch.randperm(1000, generator=generator)],
}
values = {name: cka_hooks.cka(x, other) for name, other in changed.items()}

figure = Figure(figsize=(7, 3), layout="constrained")
axes = figure.add_subplot()
colours = ["tab:blue" if value > 0.999 else "tab:orange" for value in values.values()]
axes.barh(list(values), list(values.values()), color=colours)
for place, value in enumerate(values.values()):
    axes.text(max(value, 0) + 0.01, place, f"{value:.3f}", va="center")
axes.invert_yaxis()
axes.set(xlim=(0, 1.12), xlabel="CKA of features with themselves, changed")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
