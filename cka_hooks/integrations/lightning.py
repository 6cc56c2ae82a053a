"""`CKACallback` for Lightning: CKA while a network trains, in the logger of the trainer.

pip install 'cka-hooks[lightning,plot]'
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from cka_hooks.errors import imported
from cka_hooks.integrations.training import TrainingCKA

_LIGHTNING = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
_NEEDS = "cka_hooks.integrations.lightning needs Lightning, which is not installed"
_Callback: Any = imported(f"{_LIGHTNING}.callbacks", _NEEDS, "'cka-hooks[lightning]'").Callback


class CKACallback(TrainingCKA, _Callback):  # type: ignore[misc]
    """CKA of a LightningModule with its initial weights, with the previous measurement, and with other networks.

    The trainer's loggers get a number for each layer. Those that take figures (TensorBoard, Weights & Biases) also
    get a picture of each matrix. Results are saved in the folder of the log. Rank 0 measures alone, and the others
    wait for it in their next step. The trainer's checkpoints hold what a resumed run needs.

    Args:
        loader: see :class:`cka_hooks.integrations.TrainingCKA`, like all options.

    Raises:
        MissingExtraError: on import, Lightning is not installed.
        ModelError: when training starts, the weights are spread over processes, as with FSDP.

    Example:
        >>> import torch
        >>> from cka_hooks.integrations.lightning import CKACallback
        >>> callback = CKACallback(torch.randn(4, 64, 8), layers=["encoder.*"], every_n_epochs=5)
        >>> # Trainer(callbacks=[callback]).fit(module, train_loader)
    """

    @property
    def state_key(self) -> str:
        """The name of the callback's state in a checkpoint."""
        return f"cka_hooks.{self.name}"

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Measure the initial weights, after those of a checkpoint were loaded."""
        # All ranks have to check this.
        logs = trainer.log_dir
        if self.folder is None and not trainer.fast_dev_run:
            self.folder = Path(logs or trainer.default_root_dir) / self.name
        self.refuse_sharded(pl_module)
        if trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                self.start(pl_module, trainer.global_step, trainer.precision_plugin.convert_input)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        """Measure after a step, with `every_n_steps`."""
        self._measure_if_due(trainer, pl_module, None)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Measure after an epoch, without `every_n_steps`."""
        self._measure_if_due(trainer, pl_module, trainer.current_epoch + 1)

    def _measure_if_due(self, trainer: Any, module: nn.Module, epoch: int | None) -> None:
        step = trainer.global_step
        if not (trainer.is_global_zero and self.due(step, epoch)):
            return
        with trainer.precision_plugin.forward_context():
            self.measure(module, step, trainer.precision_plugin.convert_input)
        for logger in trainer.loggers:
            logger.log_metrics(self.scalars(), step)
            if hasattr(logger, "log_image"):
                self.log_pictures(partial(_log_image, logger, step))
            elif hasattr(logger.experiment, "add_figure"):
                self.log_pictures(partial(logger.experiment.add_figure, global_step=step))


def _log_image(logger: Any, step: int, name: str, figure: Any) -> None:
    logger.log_image(name, [figure], step=step)
