"""Two networks from two seeds, untrained and trained: which alikeness did training make?"""

from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.command.demo import BLOCKS, digits, trained

train, held_out = digits()
figure = Figure(figsize=(9, 4), layout="constrained")
panels = figure.subplots(1, 2)
for axes, epochs, title in zip(panels, (0, 4), ("untrained", "trained"), strict=True):
    networks = {f"seed {seed}": trained(train, seed, epochs=max(epochs, 1), progress=False) for seed in (0, 1)}
    if not epochs:
        for network in networks.values():
            for module in network.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            network.train()
            for images in held_out.tensors[0].split(64):
                network(images)  # statistics of BatchNorm
            network.eval()
    result = cka_hooks.compare(
        networks, DataLoader(held_out, 64, shuffle=True), layers=["conv1", BLOCKS], progress=False
    )
    across = result.between("seed 0", "seed 1")
    across.plot(ax=axes, title=title, values=True)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
