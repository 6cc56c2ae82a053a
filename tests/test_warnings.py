"""Every warning points at the line of the user's file that led to it, from each public entry."""

from __future__ import annotations

import inspect
import linecache
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.integrations import TrainingCKA

X = torch.randn(18, 5, 4, generator=torch.Generator().manual_seed(0))
PADDED = {"x": X, "attention_mask": torch.ones(18, 5).tril(3)}


class Net(nn.Module):
    """Takes padded text, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.fc(x)


def ignored(layer: str, activation: Tensor) -> None:
    pass


def with_compare() -> None:
    cka_hooks.compare(Net(), [PADDED], minibatch=16, progress=False)  # here


def with_models_built_in_turn() -> None:
    cka_hooks.compare({"a": lambda: Net(), "b": lambda: Net()}, [X], minibatch=16, progress=False)  # here


def with_update() -> None:
    with cka_hooks.Comparison(Net()) as comparison:
        comparison.update(PADDED)  # here


def with_compute_of_a_comparison() -> None:
    with cka_hooks.Comparison(Net(), minibatch=16) as comparison:
        comparison.update(X)
    comparison.compute()  # here


def with_a_recorder() -> None:
    model = Net()
    with cka_hooks.LayerRecorder(model, consumer=ignored):
        model(**PADDED)  # here


def with_a_stream() -> None:
    for _ in cka_hooks.LayerRecorder(Net()).stream([PADDED]):  # here
        pass


def with_a_description() -> None:
    cka_hooks.LayerRecorder(Net()).describe(PADDED)  # here


def with_an_accumulator() -> None:
    cka = cka_hooks.CKAAccumulator(minibatch=16)
    cka.update({"x": X})
    cka.compute()  # here


def with_tensors() -> None:
    def kernel(x: Tensor) -> Tensor:
        cka_hooks.CKAResult.example().pvalue()
        return x @ x.mT

    cka_hooks.cka(X, X, kernel=kernel)  # here
    cka_hooks.cka_matrix([X, X], kernel=kernel)  # here
    cka_hooks.cka_loss(X, X, kernel=kernel)  # here


def with_pvalues() -> None:
    cka_hooks.CKAResult.example().pvalue()  # here


def with_a_plot() -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(0.5, 0.5)).add_subplot()
    cka_hooks.CKAResult.example().plot(ax=axes, values=True)  # here


def with_a_training() -> None:
    cka = TrainingCKA([X])
    cka.start(Net())
    cka.measure(nn.Linear(9, 9), 1)  # here


def with_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    from cka_hooks.integrations.lightning import CKACallback

    class Trained(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e30)

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options |= {"enable_progress_bar": False, "max_epochs": 1}
    trainer = lightning.Trainer(**options, callbacks=[CKACallback([X], every_n_steps=1)])
    trainer.fit(Trained(), DataLoader(X, batch_size=6))  # here


def with_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from cka_hooks.integrations.transformers import CKACallback

    class Trained(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return {"loss": self.fc(x).square().mean(), "logits": self.fc(x)}

    words = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(folder), save_strategy="no", **words)
    data = [{"x": x, "labels": x.sum()} for x in X]
    trainer = transformers.Trainer(Trained(), arguments, train_dataset=data)
    trainer.add_callback(CKACallback(trainer, [X], every_n_steps=1, minibatch=16))
    trainer.train()  # here


@pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch", "ignore:::transformers")
@pytest.mark.parametrize("entry", [it for name, it in list(globals().items()) if name.startswith("with_")])
def test_a_warning_points_at_the_users_line(
    entry: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning's callback writes into the folder of the script.
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cka_hooks.CKAWarning)
        entry(*[tmp_path][: len(inspect.signature(entry).parameters)])
    ours = [it for it in caught if issubclass(it.category, cka_hooks.CKAWarning)]
    assert ours
    for warning in ours:
        assert warning.filename == __file__
        assert linecache.getline(warning.filename, warning.lineno).endswith("# here\n")
