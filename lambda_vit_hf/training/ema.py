"""Moving average of the weights, inside the Hugging Face Trainer."""

import copy
import logging
import numbers
import os
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback, ExportableState

from ..models.finite import not_finite
from .checkpoints import EMA_FILE
from .guards import check_model_is_whole, check_weights_agree


logger = logging.getLogger(__name__)


class EmaCallback(TrainerCallback, ExportableState):
    """
    Keeps an exponential moving average of the weights: `average = decay * average + (1 - decay) * weights` after each
    optimizer step. Buffers, lambda among them, are copied, never averaged.

    Which weights are where:

    - training goes on with the raw weights; a checkpoint's `model.safetensors` holds these, and `ema.safetensors`
      beside it the average. A resumed run reads both, and continues to the bit. With the plain `Trainer` resume from
      what [`find_resumable_checkpoint`] finds;
    - evaluation during training runs on the average (on the raw weights with `use_for_evaluation=False`);
    - `trainer.train()` leaves the average in the model, of the best checkpoint with `load_best_model_at_end`. So what
      is evaluated, saved and pushed afterwards is the average.

    Put it before [`EntropyGuidedRemovalCallback`] in the list of callbacks: the average has to be in the model when
    that one removes and folds layers. All processes hold the same average; those that save checkpoints write it.

    Args:
        decay (`float`, *optional*, defaults to 0.99996): in [0, 1); DeiT's value, for 1,250 steps an epoch.
        use_for_evaluation (`bool`, *optional*, defaults to `True`): evaluate the average during training.

    Attributes:
        average (`timm.utils.ModelEmaV3` or `None`): during training; `average.module` is the averaged model.
        resume_from (`str`, `Path` or `None`):
            The checkpoint that training is resumed from, to be set by whoever knows it. Without it, it is
            `args.resume_from_checkpoint` if that is a folder, else `checkpoint-{global_step}` of the output folder.

    Raises:
        ValueError: on a `decay` out of range; when training begins, if it stands after the callback named above, on
            FSDP or DeepSpeed, or if a resumed run's settings differ from its checkpoint's.
        OSError: if the average of a checkpoint to continue from is missing, damaged, or of another model or step.
        RuntimeError: if an evaluation did not run on the average (a dict of evaluation sets: the Trainer gives no
            sign before the second; use `use_for_evaluation=False`, or one set), or training saves while it still does.

    Source: `timm.utils.ModelEmaV3`, called as DeiT's training loop does (no warm-up of the decay).

    Example:

    ```python
    callbacks = [EmaCallback(decay=0.9999), EntropyGuidedRemovalCallback(removal_ratio=0.4)]
    trainer = Trainer(model=model, args=args, train_dataset=images, callbacks=callbacks)
    trainer.train()  # trainer.model: averaged, removed and folded
    ```
    """

    def __init__(self, decay: float = 0.99996, use_for_evaluation: bool = True):
        if not isinstance(decay, numbers.Real) or not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        # Plain values: a checkpoint keeps them as JSON, which knows none of numpy's.
        self.decay, self.use_for_evaluation = float(decay), bool(use_for_evaluation)
        self.average = None
        self.resume_from: str | Path | None = None
        self._raw_weights: list[torch.Tensor] | None = None  # of the model, while it holds the average
        self._saved: Path | None = None  # the checkpoint that the average was written to last

    def state(self) -> dict:
        """
        What a checkpoint keeps of this callback in `trainer_state.json`. The average stands in a file beside it.

        Raises:
            RuntimeError: while the model holds the average, which must not be saved as the weights to train on.
        """
        self._check_raw()
        return {"args": {"decay": self.decay, "use_for_evaluation": self.use_for_evaluation}, "attributes": {}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        from timm.utils import ModelEmaV3

        check_model_is_whole(model, args, self._name)
        self._check_order(state)
        is_half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
        self.average = ModelEmaV3(
            model, self.decay, exclude_buffers=True, dtype=torch.float32 if is_half else None
        ).requires_grad_(False)
        self._raw_weights = self._saved = None
        if state.global_step > 0:
            self._check_settings(state)
            self._read_average(self._resumed_checkpoint(args, state), state.global_step)
        evaluated = "averaged" if self.use_for_evaluation else "raw"
        logger.info("Averaging weights with decay %s; evaluations during training: %s weights.", self.decay, evaluated)
        if args.eval_on_start and self.use_for_evaluation:
            self._put_average_into(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.average.update(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._prepare_evaluation(args, state, control, model, DefaultFlowCallback().on_step_end)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self._prepare_evaluation(args, state, control, model, DefaultFlowCallback().on_epoch_end)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if self.average is None or not self.use_for_evaluation:
            return
        if self._raw_weights is None:
            raise RuntimeError(
                f"An evaluation at step {state.global_step} measured the raw weights, not the average. With a dict of"
                " evaluation sets, with `trainer.evaluate()` during or after an interrupted training, and where"
                " another callback asks for an evaluation, use EmaCallback(use_for_evaluation=False)."
            )
        self._put_raw_weights_into(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._check_raw()

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and self._saved != checkpoint and checkpoint.is_dir():
            self.write_average(checkpoint, state.global_step)

    def write_average(self, checkpoint: Path, step: int) -> None:
        """
        Write the average of a step into a checkpoint's folder.

        [`LambdaViTTrainerMixin`] calls it before the checkpoint is whole. Under the plain `Trainer` it comes last, and
        a run killed in between leaves a checkpoint that [`find_resumable_checkpoint`] passes over.
        """
        self._check_raw()
        path = checkpoint / EMA_FILE
        tensors = {name: tensor.contiguous() for name, tensor in self.average.module.state_dict().items()}
        temporary = path.with_name(f"{EMA_FILE}.part")
        save_file(tensors, temporary, metadata={"format": "pt", "global_step": str(step)})
        os.replace(temporary, path)
        self._saved = checkpoint

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._check_raw()
        now, averaged = (
            [(name, parameter.shape) for name, parameter in one.named_parameters()]
            for one in (model, self.average.module)
        )
        if now != averaged:
            raise RuntimeError(
                "The model changed its layers before the average could be put into it: EmaCallback must stand before"
                " EntropyGuidedRemovalCallback in the list of callbacks. The checkpoints hold the average"
                f" ({EMA_FILE})."
            )
        check_weights_agree(self.average.module, args, "the averaged weights at the end of training")
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            PartialState().wait_for_everyone()  # the main process may still be writing it
            self._read_average(Path(state.best_model_checkpoint), state.best_global_step)
        self._put_average_into(model)
        self.average = self._raw_weights = None
        logger.info("The model now holds the averaged weights.")

    @property
    def _name(self) -> str:
        return type(self).__name__  # under which the Trainer keeps a callback's state

    def _check_order(self, state) -> None:
        # In the order of the callbacks; in a resumed run, alphabetical.
        names = list(state.stateful_callbacks)
        removal = "EntropyGuidedRemovalCallback"
        if self._name in names and removal in names[: names.index(self._name)]:
            raise ValueError(f"EmaCallback must stand before {removal} in the list of callbacks.")

    def _check_settings(self, state) -> None:
        saved = state.stateful_callbacks.get(self._name)
        if saved is None:
            raise ValueError(
                "The checkpoint was written without EmaCallback. Resume without it, or start anew from its weights."
            )
        now, then = self.state()["args"], saved["args"]
        if now != then:
            raise ValueError(f"EmaCallback's settings differ from the checkpoint's: now {now}, checkpoint {then}.")

    def _resumed_checkpoint(self, args, state) -> Path:
        if self.resume_from is not None:
            return Path(self.resume_from)
        given = args.resume_from_checkpoint
        if isinstance(given, (str, Path)) and Path(given).is_dir():
            return Path(given)
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _read_average(self, checkpoint: Path, step: int) -> None:
        path = checkpoint / EMA_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the averaged weights of step {step}. Set EmaCallback.resume_from to the folder of"
                " the checkpoint if it is elsewhere; else resume from another one."
            )
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("global_step")
            if found != str(step):
                raise OSError(f"{path} holds the average of step {found}, expected step {step}.")
            average = load_file(path)
            damaged = not_finite(average)
            if damaged:
                raise OSError(f"{path} holds NaN or infinity in {damaged[0]}. Resume from another checkpoint.")
            self.average.module.load_state_dict(average)
        except (SafetensorError, RuntimeError) as error:
            raise OSError(f"{path} is damaged or of another model ({error}). Resume from another one.") from error

    def _prepare_evaluation(self, args, state, control, model, default_flow) -> None:
        # The callback that decides on evaluations may come after this one: ask it now, on a copy of `control`.
        if control.should_training_stop and state.global_step < state.max_steps and not control.should_evaluate:
            return  # called off by one that ends the run early, and stands before this one
        will_evaluate = default_flow(args, state, copy.copy(control)).should_evaluate
        if will_evaluate and self.use_for_evaluation and self._raw_weights is None:
            self._put_average_into(model)

    @torch.no_grad()
    def _put_average_into(self, model: nn.Module) -> None:
        # In place: optimizers, DistributedDataParallel and compiled graphs hold on to the tensors.
        self._raw_weights = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter, averaged in zip(model.parameters(), self.average.module.parameters(), strict=True):
            parameter.copy_(averaged)

    @torch.no_grad()
    def _put_raw_weights_into(self, model: nn.Module) -> None:
        for parameter, raw in zip(model.parameters(), self._raw_weights, strict=True):
            parameter.copy_(raw)
        self._raw_weights = None

    def _check_raw(self) -> None:
        if self._raw_weights is not None:
            raise RuntimeError(
                "The model still holds the averaged weights: an evaluation was due, but did not take place. Was it"
                " called off by another callback? Resume from the last checkpoint with"
                " EmaCallback(use_for_evaluation=False)."
            )
