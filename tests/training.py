"""What the tests of callbacks train: a small Lightning module, and a check that several ranks run under torchrun."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import lightning
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cka_hooks
from cka_hooks.integrations.lightning import CKACallback

LAYERS = ["net.0", "net.4"]


class Module(lightning.LightningModule):
    """Batch norm and dropout, and a metric that adds up over the steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        scores = self(x)
        self.accuracy.update(scores, y)
        self.log("train/accuracy", self.accuracy, on_epoch=True, on_step=False)
        return nn.functional.cross_entropy(scores, y)

    def validation_step(self, batch, _):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.seen.append(float(self.accuracy.compute()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def data(samples: int = 192) -> TensorDataset:
    x = torch.randn(samples, 12, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, x[:, :3].argmax(1))


def fixed() -> DataLoader:
    return DataLoader(data(128), batch_size=32)


def fit(folder: Path, *callbacks: object, epochs: int = 3, ckpt: str | None = None, **options: object) -> Module:
    """A trained module; the same one each time."""
    module = Module()
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=2,
        **options,
    )
    torch.manual_seed(0)
    trainer.fit(
        module, DataLoader(data(), batch_size=32, shuffle=True), DataLoader(data(64), batch_size=32), ckpt_path=ckpt
    )
    return module


def quiet() -> None:
    """Lightning's advice about workers and devices."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "one sample decides", cka_hooks.CKAWarning)


def main() -> None:
    warnings.simplefilter("error", cka_hooks.CKAWarning)
    quiet()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    options = {"strategy": "ddp", "devices": 2}
    without = fit(folder, **options)
    callback = CKACallback(fixed(), layers=LAYERS, folder=folder / "cka")
    module = fit(folder, callback, **options)
    rank = int(os.environ["RANK"])
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, without.state_dict()[name]), name
    assert module.seen == without.seen
    assert (callback.result is not None) == (rank == 0)
    if rank == 0:
        assert callback.result.models == ("now", "initial", "previous")
        with_initial = cka_hooks.compare(
            {"now": module, "initial": Module()}, fixed(), layers=LAYERS, progress=False, distributed=False
        )
        found = callback.result.select(list(with_initial.layers))
        torch.testing.assert_close(found.matrix, with_initial.matrix, rtol=0, atol=1e-12)
        assert len(list((folder / "cka").iterdir())) == 3
    print(f"rank {rank} passed")


if __name__ == "__main__":
    main()
