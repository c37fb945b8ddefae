"""Entropy-guided removal of attention layers inside the Hugging Face Trainer."""

import dataclasses
import logging
import math
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader, Subset
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from .calibration import evenly_spaced, fixed_randomness
from .dilution import DilutionSchedule
from .guards import OneModelInAllProcesses, check_model_is_whole
from .hub import keep_back_private_files
from .loading import check_finished
from .model_card import facts_of_training, model_size, push_with_card, write_model_card
from .modeling_lambda_vit import LambdaViTPreTrainedModel
from .removal import check_layer_indices
from .selection import AttentionSelection, check_options, count_layers, select_attention_layers


logger = logging.getLogger(__name__)

GRANULARITIES = ("step", "epoch")


class EntropyGuidedRemovalCallback(OneModelInAllProcesses, ExportableState):
    """
    Selects attention layers when training starts, lets them fade into the identity, and removes them when it ends.

    After `trainer.train()`, `trainer.model` is the removed and folded model, so `trainer.save_model()` and
    `trainer.push_to_hub()` ship the small one, with its model card in place of the Trainer's; a README.md of the user
    is added to. A `.gitignore` makes the Hub leave out `training_args.bin` (it may hold `hub_token`), optimizer state,
    `base/` and `runs/`. A push is refused while lambda is not 1 in a layer that has attention, but for the backups of
    `hub_strategy="every_save"`: their card and a tag say that training is in progress. While lambda is above 0 no
    checkpoint can become the best one: its metric is not that of the removed model. A resumed run takes selection and
    schedule from its checkpoint. Several processes make sure that they train one model ([`OneModelInAllProcesses`]).

    Args:
        removal_ratio (`float`, *optional*): fraction of the attention layers to remove, in [0, 1]; or
        num_layers (`int`, *optional*): how many; or
        layers (`list[int]`, *optional*): which, 0-based.
        calibration_dataset (*optional*):
            Images to select on, in any form [`CalibrationBatches`] takes, without random augmentation. Default: the
            training images as training sees them, at a fixed random state.
        calibration_size (`int`, *optional*, defaults to 512):
            Take this many images, evenly spaced, of a calibration dataset. `None`: all, as of tensors and DataLoaders.
        strategy, output, mask, compare: as in [`select_attention_layers`].
        schedule (`str`, *optional*, defaults to `"linear"`): `"linear"` or `"cosine"`.
        hold_share (`float`, *optional*, defaults to 0.25): share of training, at its end, with lambda = 0.
        granularity (`str`, *optional*, defaults to `"step"`): lambda changes every `"step"` or `"epoch"`.
        fold (`bool`, *optional*, defaults to `True`): fold the removed layers' identity into the weights.

    Raises:
        ValueError: on contradictory arguments, at once; on arguments that do not fit the model, and on FSDP and
            DeepSpeed, when the Trainer is built; where a resumed run's settings differ from its checkpoint's, before
            the first step; on such a push.
        RuntimeError: if training ends while lambda is above 0, or processes differ. Nothing is removed then.

    Source: Lin et al., CVPR 2024, section 3; https://github.com/huggingface/transformers/issues/48805 for resuming.

    Example:

    ```python
    >>> trainer = Trainer(model=model, callbacks=[EntropyGuidedRemovalCallback(removal_ratio=0.4)], ...)
    >>> trainer.train()
    >>> trainer.model.config.removed_layers
    [0, 1, 3, 4, 6]
    ```
    """

    def __init__(
        self,
        removal_ratio: float | None = None,
        num_layers: int | None = None,
        layers: list[int] | None = None,
        calibration_dataset=None,
        calibration_size: int | None = 512,
        strategy: str = "nose",
        output: str | None = None,
        mask: str = "skip",
        compare: str = "magnitude",
        schedule: str = "linear",
        hold_share: float = 0.25,
        granularity: str = "step",
        fold: bool = True,
    ):
        if sum(value is not None for value in (removal_ratio, num_layers, layers)) != 1:
            raise ValueError("Give exactly one of `removal_ratio`, `num_layers` and `layers`.")
        if granularity not in GRANULARITIES:
            raise ValueError(f"`granularity` must be one of {list(GRANULARITIES)}, got {granularity!r}.")
        if calibration_size is not None and calibration_size < 1:
            raise ValueError(f"`calibration_size` must be at least 1, got {calibration_size}.")
        if not isinstance(strategy, str):
            raise ValueError(
                "`strategy` must be a name, for a checkpoint keeps it. For a function of your own, call"
                " `select_attention_layers` first and pass its `layers`."
            )
        super().__init__()
        check_options(None, strategy, output, mask, compare)
        # Checks shape and hold_share, for a training of any length.
        DilutionSchedule(total_steps=1000, hold_share=hold_share, shape=schedule)
        self.removal_ratio, self.num_layers, self.layers = removal_ratio, num_layers, layers
        self.calibration_dataset, self.calibration_size = calibration_dataset, calibration_size
        self.strategy, self.output, self.mask, self.compare = strategy, output, mask, compare
        self.schedule, self.hold_share, self.granularity, self.fold = schedule, hold_share, granularity, fold
        self.selection: AttentionSelection | None = None
        self.dilution: DilutionSchedule | None = None
        self.current_lambda: float | None = None
        self.card_facts: dict = {}  # for the model card; `reporting.write_report` adds what it measured

    def state(self) -> dict:
        """What a checkpoint keeps of this callback (in `trainer_state.json`)."""
        names = ("removal_ratio", "num_layers", "layers", "calibration_size", "strategy", "output", "mask", "compare",
                 "schedule", "hold_share", "granularity", "fold")  # fmt: skip
        run = {
            "selection": self.selection and self.selection.to_dict(),
            "dilution": self.dilution and dataclasses.asdict(self.dilution),
        }
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"checkpointed_run": run}}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            self._check_model(model)
            check_model_is_whole(model, args, type(self).__name__)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        super().on_train_begin(args, state, control, model=model)
        self.card_facts = {}
        if self._is_done(model):
            logger.info("Attention layers %s were removed before; nothing to dilute.", self.selection.layers)
            return
        self._check_model(model)
        dilution = self._dilution_schedule(args, state, train_dataloader)
        if state.global_step > 0:
            self._continue_from_checkpoint(state, dilution, model)
        else:
            check_options(model, self.strategy, self.output, self.mask, self.compare)
            self.selection = self._select(model, train_dataloader, args.seed)
        self.dilution, self.current_lambda = dilution, None  # a checkpoint has put an older lambda into the model
        self._forget_best_while_diluting(model, state)
        layers, zero = self.selection.layers, dilution.first_zero_step
        logger.info("Attention of layers %s fades until step %d of %d.", layers, zero, dilution.total_steps)
        self._set_lambda(model, state.global_step)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self._is_done(model):
            self._forget_best_while_diluting(model, state)
            self._set_lambda(model, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        super().on_pre_optimizer_step(args, state, control, model=model)
        # DistributedDataParallel makes zeros of no gradient, and weight decay and momentum would act on them.
        for layer in model.encoder_layers:
            if layer.attention_state == "off":
                for parameter in layer.attention_parameters():
                    parameter.grad = None

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        # The Trainer compares this evaluation with the best one right after this event, and marks a checkpoint; the
        # mark is taken back in the next event. Where it would also save one, no metric may be better: but this ends
        # the patience of EarlyStoppingCallback, so not elsewhere.
        if self._is_diluting(model) and args.metric_for_best_model is not None:
            unbeatable = sys.float_info.max if args.greater_is_better else -sys.float_info.max
            state.best_metric = unbeatable if args.save_strategy == SaveStrategy.BEST else None
        if self._is_done(model):
            self._write_card(args, state, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._forget_best_while_diluting(model, state)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if self.selection is None or logs is None:
            return
        lambdas = model.attention_lambdas
        values = {
            "lambda": max((lambdas[layer] or 0.0 for layer in self.selection.layers), default=0.0),
            "kept_attention_layers": sum(bool(value) for value in lambdas),
        }
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        super().on_train_end(args, state, control, model=model)
        if self._is_diluting(model):
            raise RuntimeError(
                f"Training ended at step {state.global_step} of {state.max_steps}, but attention layers"
                f" {self.selection.layers} are only half gone (lambda = {max(self._selected_lambdas(model)):.3f}; it"
                f" reaches 0 at step {self.dilution.first_zero_step}). Nothing was removed. Resume from the last"
                " checkpoint to finish (if EarlyStoppingCallback ended it: without that), or call"
                " `model.remove_attention` yourself."
            )
        if not self._is_done(model):
            self.card_facts |= {"size_before": model_size(model), "dilution": self.dilution}
            model.remove_attention(self.selection.layers)
            if self.fold:
                model.fold_removed_attention()
        self._write_card(args, state, model)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # `should_save` is set until a checkpoint is saved, and with it pushed: that is a backup, and marked as one.
        if not control.should_save:
            check_finished(model.attention_lambdas)
        if state.is_world_process_zero:
            keep_back_private_files(args.output_dir)
            if self.selection is not None:
                push_with_card(partial(self._write_card, args, state, model))

    def _write_card(self, args, state, model, **known) -> None:
        if self.selection is not None and state.is_world_process_zero:
            facts = facts_of_training(args, state, model, self.selection, **{**self.card_facts, **known})
            write_model_card(args.output_dir, facts)

    def _check_model(self, model) -> None:
        if not isinstance(model, LambdaViTPreTrainedModel):
            raise ValueError(
                f"EntropyGuidedRemovalCallback needs a LambdaViT model, got {type(model).__name__}. Load it"
                " with `LambdaViTForImageClassification.from_pretrained`."
            )
        kept = model.config.kept_layers
        if self.layers is None:
            count_layers(len(kept), self.num_layers, self.removal_ratio)
        else:
            layers = check_layer_indices(self.layers, model.config.num_hidden_layers)
            gone = [layer for layer in layers if layer not in kept]
            if gone:
                raise ValueError(f"The attention of layers {gone} is removed already.")
            count_layers(len(kept), len(layers), None)

    def _dilution_schedule(self, args, state, train_dataloader) -> DilutionSchedule:
        steps_per_update = 1
        if self.granularity == "epoch":
            try:
                batches = len(train_dataloader)
            except TypeError as error:
                raise ValueError("A dataset without length has no epochs: use `granularity='step'`.") from error
            steps_per_update = math.ceil(batches / args.gradient_accumulation_steps)
        return DilutionSchedule(state.max_steps, self.hold_share, self.schedule, steps_per_update)

    def _continue_from_checkpoint(self, state, dilution: DilutionSchedule, model) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        run = saved.get("attributes", {}).get("checkpointed_run", {})
        if not run.get("selection"):
            raise ValueError("The checkpoint was written without EntropyGuidedRemovalCallback; start anew from it.")
        then = saved["args"]
        changed = {name: (then.get(name), now) for name, now in self.state()["args"].items() if then.get(name) != now}
        if changed:
            raise ValueError(f"This run's settings differ from the checkpoint's (checkpoint, now): {changed}.")
        if dataclasses.asdict(dilution) != run["dilution"]:
            raise ValueError(
                "This run's lambda schedule differs from the checkpoint's; lambda would jump."
                f" Now: {dataclasses.asdict(dilution)}; checkpoint: {run['dilution']}."
            )
        self.selection = AttentionSelection.from_dict(run["selection"])
        restored = self._selected_lambdas(model)
        buffers = [model.encoder_layers[layer].attention_lambda for layer in self.selection.layers]
        expected = [torch.tensor(dilution.at(state.global_step - 1), dtype=buffer.dtype).item() for buffer in buffers]
        if restored != expected:
            raise RuntimeError(
                f"The checkpoint was not restored: lambda should be {expected} in layers {self.selection.layers}, but"
                f" is {restored}. Its weights do not fit this model."
            )

    def _select(self, model, train_dataloader, seed: int) -> AttentionSelection:
        if self.layers is not None:
            return AttentionSelection(list(self.layers), "given", self.output or "none", self.mask, self.compare)
        with fixed_randomness(0):
            return select_attention_layers(
                model,
                self._calibration_images(train_dataloader),
                num_layers=self.num_layers,
                ratio=self.removal_ratio,
                strategy=self.strategy,
                output=self.output,
                mask=self.mask,
                compare=self.compare,
                seed=seed,
            )

    def _calibration_images(self, train_dataloader):
        images = self.calibration_dataset
        if images is None:
            dataset = train_dataloader.dataset
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise ValueError("A streamed training set cannot be sampled: pass `calibration_dataset`.")
            images = Subset(dataset, evenly_spaced(len(dataset), self.calibration_size))
            return _SameEveryPass(DataLoader(images, batch_size=64, collate_fn=train_dataloader.collate_fn))
        is_dataset = hasattr(images, "__getitem__") and hasattr(images, "__len__")
        if is_dataset and not isinstance(images, (list, torch.Tensor)):
            return Subset(images, evenly_spaced(len(images), self.calibration_size))
        return images

    def _set_lambda(self, model, step: int) -> None:
        value = self.dilution.at(step)
        if value != self.current_lambda:
            model.set_attention_lambda(value, self.selection.layers)
            self.current_lambda = value

    def _selected_lambdas(self, model) -> list[float]:
        lambdas = model.attention_lambdas
        return [lambdas[layer] for layer in self.selection.layers]

    def _is_done(self, model) -> bool:
        return self.selection is not None and set(self.selection.layers) <= set(model.config.removed_layers)

    def _is_diluting(self, model) -> bool:
        if self.selection is None or self._is_done(model):
            return False
        return any(model.encoder_layers[layer].attention_state != "off" for layer in self.selection.layers)

    def _forget_best_while_diluting(self, model, state) -> None:
        if self._is_diluting(model):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


class _SameEveryPass:
    """A DataLoader whose random augmentations come out the same on every pass."""

    def __init__(self, dataloader: DataLoader):
        self.dataloader = dataloader

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self):
        with fixed_randomness(0):
            yield from self.dataloader
