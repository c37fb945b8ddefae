"""Removal of attention layers in training, for any training loop: choose, dilute, remove and fold.

[`EntropyGuidedRemovalCallback`] does the same inside the Hugging Face Trainer.
Source: Lin et al., CVPR 2024, section 3.
"""

import dataclasses
import logging
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from ..data.sampling import fixed_randomness
from ..models.finite import check_finite
from ..models.pretrained_model import LambdaPreTrainedModel
from ..selection.checks import fit_to_model
from ..selection.config import SelectionConfig
from ..selection.select import AttentionSelection, select_attention_layers
from .amount import RemovalAmount, rehearse_removal
from .checkpoints import damage_named
from .dilution import DilutionConfig, DilutionSchedule


logger = logging.getLogger(__name__)


class AttentionRemoval:
    """
    Chooses the attention layers that a training removes, fades them out, removes and folds them.

    Args:
        removal_ratio (`float`, *optional*): fraction of the attention layers to remove, in [0, 1]; or
        num_removed_layers (`int`, *optional*): how many; or
        removed_layers (`Iterable[int]`, *optional*): which, 0-based.
        selection ([`SelectionConfig`], *optional*): how layers are chosen, where they are not given.
        dilution ([`DilutionConfig`], *optional*): how lambda falls, and whether the result is folded.

    Attributes:
        selection ([`AttentionSelection`] or `None`): the layers, once chosen.
        schedule ([`DilutionSchedule`] or `None`): lambda of each step, once planned.

    Raises:
        ValueError: on contradictory arguments.

    Example, a loop with `accelerate`:

    ```python
    removal = AttentionRemoval(removal_ratio=0.4)
    removal.choose(model, images)  # refuses what could not be removed at the end
    removal.plan(total_steps=len(loader) * num_epochs)
    accelerator.register_for_checkpointing(removal)
    for step, batch in enumerate(batch for _ in range(num_epochs) for batch in loader):
        removal.set_lambda(accelerator.unwrap_model(model), step)
        accelerator.backward(model(**batch).loss)
        removal.let_attention_rest(accelerator.unwrap_model(model))
        optimizer.step()
        optimizer.zero_grad()
    removal.finish(accelerator.unwrap_model(model), optimizer)
    ```
    """

    def __init__(
        self,
        removal_ratio: float | None = None,
        num_removed_layers: int | None = None,
        removed_layers: Iterable[int] | None = None,
        selection: SelectionConfig | None = None,
        dilution: DilutionConfig | None = None,
    ):
        self.amount = RemovalAmount(removal_ratio, num_removed_layers, removed_layers)
        self.selection_config = SelectionConfig() if selection is None else selection
        self.dilution_config = DilutionConfig() if dilution is None else dilution
        for value, kind in ((self.selection_config, SelectionConfig), (self.dilution_config, DilutionConfig)):
            if not isinstance(value, kind):
                raise ValueError(f"Expected a {kind.__name__}, got {value!r}.")
        if not isinstance(self.selection_config.strategy, str):
            raise ValueError(
                "`strategy` must be a name, for a checkpoint keeps it. For a function of your own, call"
                " `select_attention_layers` first and pass its `layers` as `removed_layers`."
            )
        self.selection: AttentionSelection | None = None
        self.schedule: DilutionSchedule | None = None
        self._lambda: float | None = None  # set last
        self._is_restored = False  # from a checkpoint, whose schedule is then the only one
        self._is_removed = False
        self._removed_before: list[int] | None = None  # of the model as it was given
        self._model: weakref.ref | None = None  # that the layers were chosen for

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": None}  # weak references cannot be pickled

    def settings(self) -> dict:
        """The arguments as plain values, JSON-serialisable."""
        configs = {"selection": self.selection_config.to_dict(), "dilution": self.dilution_config.to_dict()}
        return {**dataclasses.asdict(self.amount), **configs}

    def rehearse(self, model: LambdaPreTrainedModel) -> None:
        """ValueError where removal or folding would fail at the end of training; see [`rehearse_removal`]."""
        rehearse_removal(model, self.amount, self.dilution_config.fold, self.dilution_config.fade_to)

    def choose(
        self, model: LambdaPreTrainedModel, images=None, seed: int | None = None, image_processor=None
    ) -> AttentionSelection:
        """
        Choose the layers, by the present weights. In a distributed run every process must call it.

        Args:
            model ([`LambdaPreTrainedModel`]): the model to train.
            images (*optional*): to measure on, as [`select_attention_layers`] takes them; not read if the layers are
                given.
            seed (`int`, *optional*): in place of the one of the selection's configuration.
            image_processor (*optional*): of Hugging Face, where `images` are pictures.

        Raises:
            ValueError: if removal cannot work (see `rehearse`), or the model is being diluted already.
        """
        if self.is_of_another(model):
            self.selection = None
        elif self.selection is not None and not self.is_done(model):
            # An earlier attempt was broken off, as by `auto_find_batch_size`.
            model.set_attention_lambda(1.0, self.selection.layers)
        self.rehearse(model)
        config = self.selection_config
        if seed is not None:
            config = dataclasses.replace(config, seed=seed)
        if self.dilution_config.fade_to is not None and self.amount.count(model):
            model.set_fade_to(self.dilution_config.fade_to)
        fit_to_model(config, model)
        self._lambda, self._is_removed = None, False
        self._removed_before, self._model = list(model.config.removed_layers), weakref.ref(model)
        if self.amount.removed_layers is not None:
            self.selection = AttentionSelection(list(self.amount.removed_layers))
            return self.selection
        with fixed_randomness(0):
            self.selection = select_attention_layers(
                model,
                images,
                num_removed_layers=self.amount.num_removed_layers,
                removal_ratio=self.amount.removal_ratio,
                selection=config,
                image_processor=image_processor,
            )
        return self.selection

    def plan(self, total_steps: int, steps_per_epoch: int | None = None) -> DilutionSchedule:
        """Lambda for a training of this many optimizer steps; see [`DilutionConfig.schedule_for`]."""
        schedule = self.dilution_config.schedule_for(total_steps, steps_per_epoch)
        if self._is_restored:
            self._check_schedule(now=schedule, checkpoint=self.schedule)
        if schedule.first_zero_step == schedule.steps_per_update:
            remedy = "Train longer"
            if schedule.steps_per_update > 1:
                remedy = (
                    f"It changes only every {schedule.steps_per_update} steps: let it change per step, or train longer"
                )
            logger.warning(
                "Lambda goes from 1 to 0 in one jump at step %d of %d. %s.",
                schedule.first_zero_step,
                total_steps,
                remedy,
            )
        self.schedule, self._lambda, self._is_restored = schedule, None, False
        return schedule

    def set_lambda(self, model: LambdaPreTrainedModel, step: int) -> None:
        """Before optimizer step `step` (0 is the first): set lambda of the chosen layers to what is planned."""
        value = self.schedule.at(step)
        fade_to = self.dilution_config.fade_to or model.config.fade_to
        if fade_to != model.config.fade_to and self.selection.layers:  # resumed with a model that was loaded anew
            model.set_attention_lambda(1.0, self.selection.layers)
            model.set_fade_to(fade_to)
        if value != self._lambda:
            model.set_attention_lambda(value, self.selection.layers)
            self._lambda = value

    def let_attention_rest(self, model: LambdaPreTrainedModel) -> None:
        """
        Before an optimizer's step, in a model that is wrapped in DistributedDataParallel: it makes zeros of no
        gradient, and weight decay and momentum would act on attention that is off.
        """
        for layer in model.encoder_layers:
            if layer.attention_state == "off":
                for parameter in layer.attention_parameters():
                    parameter.grad = None

    def lambdas(self, model: LambdaPreTrainedModel) -> list[float | None]:
        """Lambda of each chosen layer; `None` where its attention is removed."""
        everywhere = model.attention_lambdas
        return [everywhere[layer] for layer in self.selection.layers]

    def is_done(self, model: LambdaPreTrainedModel) -> bool:
        """Whether the layers are chosen and their attention is removed."""
        return self.selection is not None and set(self.selection.layers) <= set(model.config.removed_layers)

    def is_of_another(self, model: LambdaPreTrainedModel) -> bool:
        """Whether the layers were chosen for another model: then they are to be chosen anew."""
        return self._model is not None and self._model() is not model

    def is_diluting(self, model: LambdaPreTrainedModel) -> bool:
        """Whether a chosen layer still has attention with lambda above 0."""
        return self.selection is not None and any(self.lambdas(model))

    def finish(self, model: LambdaPreTrainedModel, optimizer=None, step: int | None = None) -> None:
        """
        Remove the chosen layers' attention, and fold. Does nothing where this was done before.

        Args:
            model ([`LambdaPreTrainedModel`]): unwrapped.
            optimizer (`torch.optim.Optimizer`, *optional*): forgets removed parameters, and the moments of all: they
                are in the scale before folding. So the model can be trained on.
            step (`int`, *optional*): steps trained, for the message.

        Raises:
            RuntimeError: while lambda is above 0. Nothing is removed then.
            FloatingPointError: if the result has NaN or infinity in its weights, or in its answers.
        """
        if self.is_diluting(model):
            at = "" if step is None else f" at step {step} of {self.schedule.total_steps}"
            raise RuntimeError(
                f"Training ended{at}, but attention layers {self.selection.layers} are only half gone (lambda ="
                f" {max(value or 0.0 for value in self.lambdas(model)):.3f}; it reaches 0 at step"
                f" {self.schedule.first_zero_step}). Nothing was removed. Resume from the last checkpoint to finish"
                " (if EarlyStoppingCallback ended it: without that), or call `model.remove_attention` yourself."
            )
        if self.is_done(model):
            return
        model.remove_attention(self.selection.layers)
        if self.dilution_config.fold:
            model.fold_removed_attention()
        self._is_removed = True
        if optimizer is not None:
            forget_removed_parameters(optimizer, model)
        check_finite(model, "the trained model")

    def state_dict(self) -> dict:
        """What a checkpoint needs besides the weights: JSON-serialisable."""
        return {
            "settings": self.settings(),
            "selection": self.selection and self.selection.to_dict(),
            "dilution": self.schedule and dataclasses.asdict(self.schedule),
            "is_removed": self._is_removed,
            "removed_before": self._removed_before,
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Go on where a checkpoint was written. The schedule that is planned, before or after, must be the checkpoint's.

        Raises:
            ValueError: if settings or schedule differ from the checkpoint's, or it holds no selection.
            OSError: if schedule or selection are damaged.
        """
        if not state.get("selection"):
            raise ValueError("The checkpoint was written before attention layers were chosen: start anew from it.")
        now, then = _flat(self.settings()), _flat(state["settings"])
        if now["mask"] is None:  # as attention fades; checkpoints of before there was a choice name their default
            then["mask"] = None
        changed = {name: (then.get(name), now[name]) for name in now if then.get(name) != now[name]}
        if changed:
            raise ValueError(f"This run's settings differ from the checkpoint's (checkpoint, now): {changed}.")
        with damage_named("trainer_state.json of the checkpoint"):
            schedule = DilutionSchedule(**state["dilution"])
            selection = AttentionSelection.from_dict(state["selection"])
        if self.schedule is not None:
            self._check_schedule(now=self.schedule, checkpoint=schedule)
        self.schedule, self._is_restored = schedule, True
        self.selection = selection
        self._lambda, self._is_removed = None, state.get("is_removed", False)
        self._removed_before = state.get("removed_before")

    def _check_schedule(self, now: DilutionSchedule, checkpoint: DilutionSchedule) -> None:
        if now != checkpoint:
            raise ValueError(
                "This run's lambda schedule differs from the checkpoint's; lambda would jump."
                f" Now: {dataclasses.asdict(now)}; checkpoint: {dataclasses.asdict(checkpoint)}."
            )

    def check_same_layers(self, model: LambdaPreTrainedModel, state: dict) -> None:
        """
        The chosen layers must be removed in the model if, and only if, they were in the checkpoint with this state:
        the Trainer loads what fits, and a folded model would go on with weights that are not folded.

        Raises:
            ValueError: if they are not.
        """
        self._model = weakref.ref(model)
        if self.selection.layers and state.get("is_removed", self.is_done(model)) != self.is_done(model):
            when, has = ("after", "has it still") if state["is_removed"] else ("before", "has none there")
            raise ValueError(
                f"The checkpoint was written {when} the attention of layers {self.selection.layers} was removed, but"
                f" this model {has}: load the model from the checkpoint, then resume with it in a new Trainer."
            )
        expected, now = state.get("removed_before"), model.config.removed_layers
        if expected is not None and state["is_removed"]:
            expected = sorted([*expected, *self.selection.layers])
        if expected not in (None, now):
            raise ValueError(
                f"The checkpoint is of a model that has no attention in layers {expected}, this one has none in {now}:"
                " load the model from the checkpoint, then resume with it in a new Trainer."
            )

    def check_restored(self, model: LambdaPreTrainedModel, step: int) -> None:
        """
        After a checkpoint was loaded into a model: lambda must be that of its step.

        Raises:
            RuntimeError: if it is not; then the weights were not restored.
        """
        if self.is_done(model):
            return
        restored = self.lambdas(model)
        buffers = [model.encoder_layers[layer].attention_lambda for layer in self.selection.layers]
        value = self.schedule.at(step - 1)
        expected = [torch.tensor(value, dtype=buffer.dtype).item() for buffer in buffers]
        if restored != expected:
            raise RuntimeError(
                f"The checkpoint was not restored: lambda should be {expected} in layers {self.selection.layers}, but"
                f" is {restored}. Its weights do not fit this model."
            )


def forget_removed_parameters(optimizer, model: nn.Module) -> None:
    """Leave in an optimizer only what the model still has, and start its moments and learning rates anew."""
    present = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in present]
        group["lr"] = group.get("initial_lr", group["lr"])
    optimizer.state.clear()


def _flat(settings: dict) -> dict:
    inner = {name: value for part in ("selection", "dilution") for name, value in settings[part].items()}
    return {**{name: value for name, value in settings.items() if not isinstance(value, dict)}, **inner}
