"""
A callback for Lightning
========================

Watch a network train: how far each layer has moved from its initial weights, in the log of Lightning's trainer.

Run ``python examples/lightning_callback.py``. It needs ``pip install "cka-hooks[lightning,demo]"``.

A small convolutional network learns scikit-learn's digits. After every epoch, the callback compares its layers with
what they were before the first step and after the previous epoch. A logger that takes figures, such as TensorBoard or
Weights & Biases, gets pictures as well. ``cka_hooks.integrations.transformers`` has the same callback for Hugging
Face's ``Trainer``, and ``cka_hooks.integrations.TrainingCKA`` is for your own loop.
"""

# sphinx_gallery_thumbnail_path = "pictures/lightning_callback.png"
from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.command.demo import digits
from cka_hooks.integrations.lightning import CKACallback


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten())
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.conv1(images)))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def draw(rows: list[dict[str, str]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [int(row["step"]) for row in rows]
    for layer in ("conv1", "conv2", "fc"):
        axes.plot(steps, [float(row[f"cka/initial/{layer}"]) for row in rows], "o-", label=layer)
    axes.set(xlabel="step", ylabel="CKA with the initial weights")
    axes.legend()
    figure.savefig("lightning_callback.png", dpi=150)
    print("lightning_callback.png")


def main(quick: bool = False) -> cka_hooks.CKAResult | None:
    lightning.seed_everything(0, verbose=False)
    training, held_out = digits()
    # The same batches each time, and a loader that the trainer does not use.
    callback = CKACallback(DataLoader(held_out, batch_size=128), layers=["conv1", "conv2", "fc"])
    logger = CSVLogger(tempfile.mkdtemp(prefix="cka-"))
    trainer = lightning.Trainer(
        max_epochs=2 if quick else 10,
        callbacks=[callback],
        logger=logger,
        accelerator="cpu",
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), DataLoader(training, batch_size=64, shuffle=True))

    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print("CKA of each layer with its initial weights")
    print("step".rjust(6) + "".join(layer.rjust(8) for layer in ("conv1", "conv2", "fc")))
    for row in rows:
        values = (float(row[f"cka/initial/{layer}"]) for layer in ("conv1", "conv2", "fc"))
        print(row["step"].rjust(6) + "".join(f"{value:8.3f}" for value in values))
    print(f"the whole matrices are in {callback.folder}")
    if not quick:
        draw(rows)
    return callback.result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
