"""A default device that is not the CPU, as notebooks set it: runs, recorders and training give what they always give.

"meta" holds no numbers at all, so that whatever lands there by mistake is missed. Results and tensors in hand are
tested where they are at home.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_off import Stop, model, run, tensors
from torch import nn

import cka_hooks
from cka_hooks.integrations import TrainingCKA

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:.* left out")


class Normed(nn.Module):
    """Layers whose samples a probe has to find, buffers, and a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(x)).relu()
        return self.head((hidden * attention_mask.unsqueeze(-1)).mean(1))


NET, MASKED, TEACHER = model(), Normed(), model(1, width=5)
BATCHES = list(tensors(160).split(16))
PADDED = [
    {
        "x": torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(i)),
        "attention_mask": torch.ones(16, 5, dtype=torch.long).tril(i),
    }
    for i in range(4)
]


def with_checkpoint(folder: Path) -> Any:
    path = folder / "run.ckpt"
    path.unlink(missing_ok=True)
    with pytest.raises(Stop):
        run(path, BATCHES, net=NET, stop_at=4)
    return run(path, BATCHES, net=NET)[0]


def by_hand(folder: Path) -> Any:
    cka = cka_hooks.CKAAccumulator()
    with cka_hooks.LayerRecorder(NET, consumer=cka.observe), torch.no_grad():
        for batch in BATCHES:
            NET.eval()(batch)
            cka.step()
    other = cka_hooks.CKAAccumulator()
    other.load_state_dict(cka.state_dict())
    other.merge_state(cka)
    return other.compute()


def streamed(folder: Path) -> Any:
    recorder = cka_hooks.LayerRecorder(NET)
    cka = cka_hooks.CKAAccumulator()
    for activations in recorder.stream(BATCHES):
        cka.update(activations)
    assert recorder.describe(BATCHES[0])
    return cka.compute()


def training(folder: Path) -> Any:
    net = copy.deepcopy(NET)
    cka = TrainingCKA(BATCHES, layers=["0", "2"], network=TEACHER, folder=folder)
    cka.start(net)
    other = TrainingCKA(BATCHES, layers=["0", "2"], network=TEACHER)
    other.load_state_dict(cka.state_dict())
    other.start(net, step=1)
    with torch.no_grad():
        net[0].weight.mul_(torch.linspace(0.1, 2, 12, device="cpu"))
    result = cka.measure(net, step=2)
    assert result == other.measure(net, step=2)
    return result


def losses(folder: Path) -> Any:
    x, y = BATCHES[0].clone().requires_grad_(), BATCHES[1]
    loss = cka_hooks.cka_loss(x, y)
    loss.backward()
    return torch.cat([loss.detach().reshape(1), x.grad.flatten()])


def compared(models: Any, loader: Any, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: cka_hooks.compare(models, loader, progress=False, **options)


class Sliced:
    """As an h5py dataset: rows come as slices, and as NumPy arrays."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows.numpy()
        self.shape, self.dtype = self.rows.shape, self.rows.dtype

    def __getitem__(self, rows: slice) -> Any:
        return self.rows[rows]


IDENTIFIED = [(batch, range(16 * i, 16 * i + 16)) for i, batch in enumerate(BATCHES)]
IDENTIFIED = [(batch, [f"image {i}" for i in reversed(names)]) for batch, names in IDENTIFIED]
BROUGHT = cka_hooks.Precomputed(Sliced(torch.cat(BATCHES)), sample_ids=[f"image {i}" for i in range(160)])


def masks(batch: dict[str, torch.Tensor]) -> Any:
    return batch["attention_mask"].numpy()


USES: dict[str, Callable[[Path], Any]] = {
    "one model": compared(NET, BATCHES),
    "several": compared({"net": NET, "teacher": TEACHER}, BATCHES, minibatch=5, keep_minibatches=True, epochs=2),
    "one after another": compared({"net": lambda: NET, "teacher": lambda: TEACHER}, BATCHES),
    "padding": compared(MASKED, PADDED, features="mean"),
    "padding as arrays": compared(MASKED, PADDED, features="mean", mask=masks),
    "arrays": compared(NET, [batch.numpy() for batch in BATCHES]),
    "identifiers": compared({"net": NET, "V4": BROUGHT}, IDENTIFIED, sample_ids=lambda batch: batch[1]),
    "tolerance": compared(NET, BATCHES * 4, tolerance=1.0, kernel="rbf"),
    "biased": compared(NET, BATCHES, estimator="biased", max_samples=40),
    "features of others": compared({"net": NET, "V4": torch.cat(BATCHES)}, BATCHES),
    "checkpoint": with_checkpoint,
    "by hand": by_hand,
    "streamed": streamed,
    "training": training,
    "loss": losses,
}


@pytest.mark.filterwarnings("ignore:a batch came twice")
@pytest.mark.parametrize("use", USES)
def test_the_default_device_does_not_matter(use: str, tmp_path: Path) -> None:
    wanted = USES[use](tmp_path)
    torch.set_default_device("meta")
    try:
        found = USES[use](tmp_path)
    finally:
        torch.set_default_device(None)
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found.matrix.device.type == "cpu"
        assert found == wanted
