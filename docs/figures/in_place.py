"""The in-place trap: activations of a ResNet kept without a copy, beside the right matrix."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.command.demo import digits, trained

train, held_out = digits()
model = trained(train, seed=0, epochs=2, progress=False)
# Many of them are followed by a ReLU in place.
layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
images = held_out.tensors[0][:512]

kept = {}
hooks = [
    model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
    for name in layers
]
cka = cka_hooks.CKAAccumulator()
with torch.no_grad():
    for batch in images.split(128):
        model(batch)
        cka.update(kept)  # after the forward pass: ReLU(inplace=True) has been there
for hook in hooks:
    hook.remove()
wrong = cka.compute()
right = cka_hooks.compare(model, DataLoader(images, batch_size=128), layers=layers, progress=False)
order = list(right.layers)
wrong = wrong.select(order)
at = [wrong.layers.index(layer) for layer in order]
off = (wrong.matrix[at][:, at] - right.matrix).abs()
share = (off > 0.01).double().mean().item()
print(f"{share:.1%} of the entries are off by more than 0.01, the largest by {off.max():.2f}")

figure = Figure(figsize=(10, 3.6), layout="constrained")
panels = figure.subplots(1, 3)
for axes, title, matrix, top in zip(
    panels,
    ("kept without a copy: wrong", "cka_hooks: right", f"difference, up to {off.max():.2f}"),
    (wrong.matrix[at][:, at], right.matrix, off),
    (1, 1, None),
    strict=True,
):
    drawn = axes.imshow(matrix, origin="lower", vmin=0, vmax=top, cmap="magma")
    axes.set(title=title, xlabel="layer", xticks=range(0, len(order), 8), yticks=range(0, len(order), 8))
    figure.colorbar(drawn, ax=axes, shrink=0.8)
panels[0].set_ylabel("layer")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
