"""`CKACallback` for Hugging Face's `Trainer`: CKA while a network trains, in the logs of the trainer.

pip install 'cka-hooks[transformers,plot]'
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from cka_hooks.errors import imported
from cka_hooks.integrations.training import TrainingCKA
from cka_hooks.run import checkpoint

_NEEDS = "cka_hooks.integrations.transformers needs transformers, which is not installed"
_TrainerCallback: Any = imported("transformers", _NEEDS, "'cka-hooks[transformers]'").TrainerCallback


class CKACallback(TrainingCKA, _TrainerCallback):  # type: ignore[misc]
    """CKA of a network with its initial weights, with the previous measurement, and with other networks.

    ``trainer.log`` and everything in `report_to` get a number for each layer. TensorBoard and Weights & Biases also
    get a picture of each matrix. Results are saved in ``output_dir``. Rank 0 measures alone, and the others wait for
    it in their next step. Each ``checkpoint-N`` holds what a resumed run needs.

    Args:
        trainer: the trainer whose log to write to. Add the callback to it afterwards.
        loader: see :class:`cka_hooks.integrations.TrainingCKA`, like all options.

    Raises:
        MissingExtraError: on import, transformers is not installed.
        ModelError: when training starts, the weights are spread over processes, as with FSDP.

    Example:
        >>> from cka_hooks.integrations.transformers import CKACallback
        >>> # trainer = Trainer(model, arguments, train_dataset=texts)
        >>> # trainer.add_callback(CKACallback(trainer, loader, layers=["bert.encoder.layer.*"]))
        >>> # trainer.train()
    """

    def __init__(self, trainer: Any, loader: Any, **options: Any) -> None:
        super().__init__(loader, **options)
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the initial weights, after those of a checkpoint were loaded."""
        if self.folder is None:
            self.folder = Path(args.output_dir) / self.name
        self.refuse_sharded(model)
        if state.is_world_process_zero:
            if state.global_step and (path := self._path(args, state)).exists():
                self.load_state_dict(checkpoint.read(path)["training"])
            self.start(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure after a step, with `every_n_steps`."""
        self._measure_if_due(state, control, model, None)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure after an epoch, without `every_n_steps`."""
        self._measure_if_due(state, control, model, round(state.epoch))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the state in the trainer's checkpoint."""
        if (path := self._path(args, state)).parent.is_dir() and state.is_world_process_zero:
            checkpoint.write(path, {"settings": {}, "training": self.state_dict()})

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"{self.name}.safetensors"

    def _measure_if_due(self, state: Any, control: Any, model: Any, epoch: int | None) -> None:
        step = state.global_step
        if not (state.is_world_process_zero and self.due(step, epoch)):
            return
        self.measure(model, step)
        # The trainer would otherwise take what it is about to log as already logged.
        should_log = control.should_log
        self._trainer.log(self.scalars())
        control.should_log = should_log
        for callback in self._trainer.callback_handler.callbacks:
            if (board := getattr(callback, "tb_writer", None)) is not None:
                self.log_pictures(partial(board.add_figure, global_step=step))
        wandb: Any = sys.modules.get("wandb")
        if getattr(wandb, "run", None) is not None:
            self.log_pictures(lambda name, figure: wandb.log({name: wandb.Image(figure), "train/global_step": step}))
