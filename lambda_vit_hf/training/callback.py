"""Entropy-guided removal of attention layers inside the Hugging Face Trainer."""

import logging
import sys
import warnings
from pathlib import Path

from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from ..evaluation.plotting import plot_layer_entropies
from ..hub.facts import facts_of_training, final_evaluation, last_evaluation, model_size
from ..hub.model_card import write_model_card
from ..hub.push import keep_back_private_files
from ..models.loading import check_finished
from ..selection.config import SelectionConfig
from ..selection.select import AttentionSelection
from .background_checksums import BackgroundChecksums
from .calibration_images import images_of_training
from .checkpoints import damage_named
from .dilution import DilutionConfig, DilutionSchedule, steps_per_epoch
from .finishing import tell_how_to_finish
from .guards import OneModelInAllProcesses, check_model_is_whole
from .hub_token import keep_token_unwritten
from .removal import AttentionRemoval


logger = logging.getLogger(__name__)

_OLD_NAMES = {"layers": "removed_layers", "num_layers": "num_removed_layers"}
_SELECTION_OPTIONS = ("calibration_size", "strategy", "output", "mask", "compare")
_DILUTION_OPTIONS = ("schedule", "hold_share", "granularity", "fold", "fade_to")


class EntropyGuidedRemovalCallback(OneModelInAllProcesses, ExportableState):
    """
    Selects attention layers when training starts, lets them fade, and removes them when it ends.

    It forwards the Trainer's events to an [`AttentionRemoval`], which any other training loop can use by itself.
    After `trainer.train()`, `trainer.model` is the removed and folded model, so `trainer.save_model()` and
    `trainer.push_to_hub()` ship the small one. While lambda is above 0 no checkpoint can become the best one: its
    metric is not that of the removed model. A resumed run takes selection and schedule from its checkpoint. Several
    processes make sure that they train one model ([`OneModelInAllProcesses`]).

    The model card is written by a Trainer with [`LambdaViTTrainerMixin`], such as [`LambdaViTTrainer`]. The plain
    `Trainer` pushes its generic card; a push is refused where that would show figures of other weights. A push is
    refused, too, while lambda is not 1 in a layer that has attention, but for the backups of
    `hub_strategy="every_save"`: their card and a tag say that training is in progress.

    Args:
        removal_ratio (`float`, *optional*): fraction of the attention layers to remove, in [0, 1]; or
        num_removed_layers (`int`, *optional*): how many; or
        removed_layers (`list[int]`, *optional*): which, 0-based.
        calibration_dataset (*optional*):
            Images to select on, in any form [`CalibrationBatches`] takes, not augmented; pictures go through the
            `processing_class`. Default: the training images as training sees them, at a fixed random state.
        selection ([`SelectionConfig`], *optional*): how layers are chosen. Its default takes the Trainer's seed.
        dilution ([`DilutionConfig`], *optional*): how lambda falls, and whether the result is folded.
        options: fields of the two, by themselves: `calibration_size`, `strategy`, `output`, `mask`, `compare`;
            `schedule`, `hold_share`, `granularity`, `fold`, `fade_to`.

    Raises:
        ValueError: on contradictory arguments, at once; on what could not be removed or folded at the end, and on FSDP
            and DeepSpeed, when the Trainer is built; where a resumed run's settings differ from its checkpoint's,
            before the first step.
        RuntimeError: if training ends while lambda is above 0, or processes differ. Nothing is removed then.

    Source: Lin et al., CVPR 2024, section 3; https://github.com/huggingface/transformers/issues/48805 for resuming.

    Example:

    ```python
    removal = EntropyGuidedRemovalCallback(removal_ratio=0.4)
    trainer = Trainer(model=model, args=args, train_dataset=images, callbacks=[removal])
    trainer.train()
    trainer.model.config.removed_layers  # such as [0, 1, 3, 4, 6]
    ```
    """

    def __init__(
        self,
        removal_ratio: float | None = None,
        num_removed_layers: int | None = None,
        removed_layers: list[int] | None = None,
        calibration_dataset=None,
        selection: SelectionConfig | dict | None = None,
        dilution: DilutionConfig | dict | None = None,
        **options,
    ):
        amount = {"removal_ratio": removal_ratio, "num_removed_layers": num_removed_layers,
                  "removed_layers": removed_layers}  # fmt: skip
        for old, new in _OLD_NAMES.items():
            if options.get(old) is not None:
                warnings.warn(f"`{old}` is now called `{new}`.", FutureWarning, stacklevel=2)
                if amount[new] is not None:
                    raise ValueError(f"`{old}` is the old name of `{new}`: give one of them.")
                amount[new] = options[old]
            options.pop(old, None)
        self._takes_seed_of_trainer = selection is None
        selection = _config(SelectionConfig, selection, options, _SELECTION_OPTIONS)
        dilution = _config(DilutionConfig, dilution, options, _DILUTION_OPTIONS)
        if options:
            raise TypeError(f"EntropyGuidedRemovalCallback has no arguments {sorted(options)}.")
        super().__init__()
        self.removal = AttentionRemoval(**amount, selection=selection, dilution=dilution)
        self.calibration_dataset = calibration_dataset
        self.facts: dict = {}  # for the model card, besides what the Trainer's state tells
        self.checksums = BackgroundChecksums()
        self.trainer_writes_card = False  # set by `LambdaViTTrainerMixin`

    @property
    def selection(self) -> AttentionSelection | None:
        """The layers, once chosen."""
        return self.removal.selection

    @property
    def dilution(self) -> DilutionSchedule | None:
        """Lambda of each step, once training has begun."""
        return self.removal.schedule

    def state(self) -> dict:
        """What a checkpoint keeps of this callback (in `trainer_state.json`)."""
        self.checksums.wait()  # the Trainer deletes old checkpoints next
        run = self.removal.state_dict()
        return {"args": run.pop("settings"), "attributes": {"checkpointed_run": run}}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._check_alone(state)
        keep_token_unwritten(args)
        if model is not None:
            self.removal.rehearse(model)
            check_model_is_whole(model, args, type(self).__name__)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, processing_class=None, **kwargs):
        super().on_train_begin(args, state, control, model=model)
        keep_token_unwritten(args)
        self.facts = {}
        self._check_alone(state)
        removal = self.removal
        if state.global_step > 0:
            checkpointed = self._checkpointed(state)
            if removal.is_of_another(model) or not removal.is_done(model):
                removal.load_state_dict(checkpointed)
            removal.check_same_layers(model, checkpointed)
        if removal.is_done(model) and (state.global_step > 0 or not removal.is_of_another(model)):
            if state.global_step == 0 and removal.selection.layers:
                logger.warning(
                    "This callback has removed the attention of layers %s of this model in an earlier training;"
                    " nothing more is removed. Give another callback to remove more.", removal.selection.layers,
                )  # fmt: skip
            return
        removal.plan(state.max_steps, steps_per_epoch(train_dataloader, args.gradient_accumulation_steps))
        if state.global_step > 0:
            removal.check_restored(model, state.global_step)
        else:
            self._choose(args, state, model, train_dataloader, processing_class)
        self._forget_best_while_diluting(model, state)
        removal.set_lambda(model, state.global_step)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not (removal := self.removal).is_done(model):
            # By the plan, for a look at the model would wait for the GPU in each step.
            if removal.schedule.at(max(0, state.global_step - 1)) > 0:
                _forget_best(state)
            removal.set_lambda(model, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        super().on_pre_optimizer_step(args, state, control, model=model)
        self.removal.let_attention_rest(model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        # The Trainer compares this evaluation with the best one right after this event, and marks a checkpoint; the
        # mark is taken back in the next event. Where it would also save one, no metric may be better: but this ends
        # the patience of EarlyStoppingCallback, so not elsewhere.
        if self.removal.is_diluting(model) and args.metric_for_best_model is not None:
            unbeatable = sys.float_info.max if args.greater_is_better else -sys.float_info.max
            state.best_metric = unbeatable if args.save_strategy == SaveStrategy.BEST else None
        if self.removal.is_done(model):
            self.write_card(args, state, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._forget_best_while_diluting(model, state)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            if self.selection is not None and not self.removal.is_done(model):
                tell_how_to_finish(checkpoint, self.removal, model)
            self.checksums.start(checkpoint)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if self.selection is None or logs is None:
            return
        values = {
            "lambda": max((value or 0.0 for value in self.removal.lambdas(model)), default=0.0),
            "kept_attention_layers": sum(bool(value) for value in model.attention_lambdas),
        }
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.checksums.wait()
        super().on_train_end(args, state, control, model=model)
        if not self.removal.is_done(model):
            if not self.removal.is_diluting(model):
                self.facts |= {"size_before": model_size(model), "lambda_schedule": str(self.dilution)}
            self.removal.finish(model, optimizer, state.global_step)
        self.write_card(args, state, model)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # `should_save` is set until a checkpoint is saved, and with it pushed: that is a backup, and marked as one.
        is_backup = control.should_save
        if not is_backup:
            check_finished(model.attention_lambdas)
        if not state.is_world_process_zero or self.selection is None:
            return
        keep_back_private_files(args.output_dir)
        self.write_card(args, state, model)
        if not is_backup and not self.trainer_writes_card:
            self._check_generic_card(args, state)

    def write_card(self, args, state, model, **known) -> None:
        """
        Write the model card into the output folder, on the main process, once layers are chosen.

        Args:
            known: facts of [`ModelCardFacts`]; later cards have them too, and they go before what the Trainer tells.
        """
        self.facts |= known
        if self.selection is not None and state.is_world_process_zero:
            write_model_card(args.output_dir, facts_of_training(args, state, model, self.selection, **self.facts))

    def _check_alone(self, state) -> None:
        name = type(self).__name__
        if isinstance(state.stateful_callbacks.get(name), list):
            raise ValueError(
                f"The Trainer has more than one {name}. Give one all the layers; to remove in several goes, train with"
                " one after the other."
            )

    def _checkpointed(self, state) -> dict:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not saved:
            raise ValueError("The checkpoint was written without EntropyGuidedRemovalCallback; start anew from it.")
        with damage_named("trainer_state.json of the checkpoint"), warnings.catch_warnings():
            run = saved["attributes"]["checkpointed_run"]
            warnings.simplefilter("ignore", FutureWarning)  # a checkpoint may have the old names
            return {**run, "settings": type(self)(**saved["args"]).removal.settings()}

    def _check_generic_card(self, args, state) -> None:
        logger.warning(
            "This Trainer pushes its generic model card, which does not say what was removed. Use LambdaViTTrainer, or"
            " LambdaViTTrainerMixin, for the card of lambda-vit-hf."
        )
        last = last_evaluation(state)
        if last and last != final_evaluation(args, state):
            raise ValueError(
                "Nothing was pushed: the Trainer's generic card would show the last evaluation in its log, which is"
                " not of the final weights. Call `trainer.evaluate()` first, or use LambdaViTTrainer."
            )

    def _choose(self, args, state, model, train_dataloader, image_processor) -> None:
        removal, images = self.removal, self.calibration_dataset
        if images is None and removal.amount.removed_layers is None:
            size = removal.selection_config.calibration_size
            images = images_of_training(train_dataloader, size, args.remove_unused_columns)
        removal.choose(model, images, args.seed if self._takes_seed_of_trainer else None, image_processor)
        if state.is_world_process_zero:
            self._report_choice(Path(args.output_dir))

    def _report_choice(self, folder: Path) -> None:
        selection, how_sure, picture = self.selection, "", ""
        known = [step.stability for step in selection.steps if step.stability is not None]
        if known:
            how_sure = f"; the least stable pick holds in {min(known):.0%} of the resamples"
        if selection.mlp_entropy:
            folder.mkdir(parents=True, exist_ok=True)
            plot_layer_entropies(selection, folder / "entropy.png")
            self.facts["pictures"] = {"entropy": "entropy.png"}
            picture = f". Picture: {folder / 'entropy.png'}"
        # A warning, for the Trainer shows no more than these by default.
        if not selection.layers:
            logger.warning("No attention is removed in this training.")
            return
        logger.warning(
            "Removing the attention of layers %s (%s%s); lambda reaches 0 at step %d of %d%s.",
            selection.layers, selection.strategy, how_sure, self.dilution.first_zero_step, self.dilution.total_steps,
            picture,
        )  # fmt: skip

    def _forget_best_while_diluting(self, model, state) -> None:
        if self.removal.is_diluting(model):
            _forget_best(state)


def _forget_best(state) -> None:
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _config(kind, given, options: dict, names: tuple[str, ...]):
    """A configuration, from itself, from a checkpoint's dict, or from its fields among the options."""
    fields = {name: options.pop(name) for name in names if name in options}
    if given is None:
        return kind(**fields)
    if fields:
        raise ValueError(f"Give {sorted(fields)} in the {kind.__name__}, not beside it.")
    return kind(**given) if isinstance(given, dict) else given
