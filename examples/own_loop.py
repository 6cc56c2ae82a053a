"""
Your own loop, and TensorBoard
==============================


Put hooks and an accumulator around the forward passes that you already make. The picture is a matplotlib figure,
which TensorBoard and Weights & Biases take.

Run ``python examples/own_loop.py``. It needs ``pip install "cka-hooks[plot]"``.
"""

import os
import sys
import tempfile

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cka_hooks


def log(figure: Figure, step: int) -> str:
    """To TensorBoard where it is installed, to Weights & Biases where it is set up; else into a file."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        pass
    else:
        with SummaryWriter(tempfile.mkdtemp(prefix="cka-")) as writer:
            writer.add_figure("cka", figure, step)
            return f"TensorBoard, {writer.log_dir}"
    if "WANDB_API_KEY" in os.environ:
        import wandb

        with wandb.init(project="cka") as run:
            run.log({"cka": wandb.Image(figure)}, step=step)
            return "Weights & Biases"
    path = os.path.join(tempfile.mkdtemp(prefix="cka-"), "cka.png")
    figure.savefig(path)
    return path


def main(quick: bool = False) -> cka_hooks.CKAResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).eval()
    inputs = torch.randn(256 if quick else 4096, 20)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :1].square()), batch_size=32)

    cka = cka_hooks.CKAAccumulator()
    loss = 0.0
    with cka_hooks.LayerRecorder(model, layers=["*"], consumer=cka.observe), torch.no_grad():
        for x, y in loader:
            loss += nn.functional.mse_loss(model(x), y).item() * len(x)  # what the loop is there for
            cka.step()  # the minibatch is complete
    result = cka.compute()
    print(f"loss {loss / len(inputs):.3f}")
    print(result)

    figure = Figure(figsize=(5, 4), layout="constrained")
    result.plot(ax=figure.add_subplot())
    print(f"the picture is in {log(figure, step=0)}")
    if not quick:
        figure.savefig("own_loop.png", dpi=150)
        print("own_loop.png")
    return result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
