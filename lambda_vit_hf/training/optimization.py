"""Optimizer groups and learning rate of the DeiT recipe, as timm defines them.

Weight decay for weight matrices only; a learning rate that grows with the global batch; half a cosine down to a floor,
after a linear warm-up.
"""

import dataclasses
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


# By the last part of a parameter's name; biases and one-dimensional weights (LayerNorm) are left out by their shape.
UNDECAYED = ("cls_token", "distillation_token", "mask_token", "position_embeddings")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    Parameters for an optimizer: no weight decay for biases, LayerNorms, class token, mask token and position
    embeddings. (The `Trainer` itself would decay the tokens and the position embeddings.)

    Args:
        model (`nn.Module`): the model; frozen parameters are left out.
        weight_decay (`float`): of all other parameters.

    Returns:
        Groups `{"params": ..., "weight_decay": ...}`, the undecayed first, as `timm` orders them; just one group, all
        undecayed, if `weight_decay` is 0.

    Source: `timm.optim.param_groups_weight_decay`.
    """
    from timm.optim import param_groups_weight_decay

    patterns = [pattern for name in UNDECAYED for pattern in (name, f"*.{name}")]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=patterns)


def decay_parameter_names(model: nn.Module) -> list[str]:
    """
    Names of the parameters with weight decay (see [`parameter_groups`]), in the model's order. It can take the place
    of `Trainer.get_decay_parameter_names`.
    """
    decayed = {id(one) for group in parameter_groups(model, 1.0) if group["weight_decay"] for one in group["params"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]


def scaled_learning_rate(learning_rate: float, global_batch_size: int, base: int = 512) -> float:
    """
    `learning_rate * global_batch_size / base`: the linear scaling of DeiT, whose rate of 5e-4 holds for 512 images.

    Args:
        learning_rate (`float`): for a batch of `base` images.
        global_batch_size (`int`): images per optimizer step: batch x processes x accumulation steps.
        base (`int`, *optional*, defaults to 512): images that `learning_rate` is meant for.

    Raises:
        ValueError: if a batch size is below 1.
    """
    if global_batch_size < 1 or base < 1:
        raise ValueError(f"Batch sizes must be at least 1, got {global_batch_size} and base {base}.")
    return learning_rate * global_batch_size / base


def timm_cosine(
    step: int,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_learning_rate: float = 1e-5,
    warmup_learning_rate: float = 1e-6,
    steps_per_update: int = 1,
    warmup_prefix: bool = False,
) -> float:
    """
    Learning rate of an optimizer step, as a factor of `learning_rate`.

    The warm-up covers the beginning of the cosine (it does not shift it): after `warmup_steps` the rate is the
    cosine's at that step, a little below `learning_rate`. With `warmup_prefix` the cosine begins there, and is cut
    short at `total_steps`.

    Args:
        step (`int`): optimizer step, from 0.
        total_steps (`int`): steps at which the floor is reached.
        warmup_steps (`int`): steps of linear warm-up.
        learning_rate (`float`): the peak.
        min_learning_rate (`float`, *optional*, defaults to 1e-5): the floor.
        warmup_learning_rate (`float`, *optional*, defaults to 1e-6): where the warm-up begins.
        steps_per_update (`int`, *optional*, defaults to 1):
            Hold the rate for this many steps. With the steps of an epoch: `timm`'s `t_in_epochs=True`, where epoch
            `e` has the rate of step `e * steps_per_update`. (DeiT's and the authors' main.py pass the finished epoch
            to the scheduler, so their rates come one epoch later.)
        warmup_prefix (`bool`, *optional*, defaults to `False`): see above.

    Source: `timm.scheduler.CosineLRScheduler`, one cycle.
    """
    now, total, warmup = (count / steps_per_update for count in (step, total_steps, warmup_steps))
    now = math.floor(now)
    if now < warmup:
        rate = warmup_learning_rate + now * (learning_rate - warmup_learning_rate) / warmup
        return rate / learning_rate
    now = now - warmup if warmup_prefix else now
    if now >= total:
        return min_learning_rate / learning_rate
    rate = min_learning_rate + 0.5 * (learning_rate - min_learning_rate) * (1 + math.cos(math.pi * now / total))
    return rate / learning_rate


@dataclasses.dataclass(frozen=True)
class _CosineFactor:
    """[`timm_cosine`] with its settings; an object, for a checkpoint keeps an object's attributes, not a function."""

    total_steps: int
    warmup_steps: int
    learning_rate: float
    min_learning_rate: float
    warmup_learning_rate: float
    steps_per_update: int
    warmup_prefix: bool

    def __call__(self, step: int) -> float:
        return timm_cosine(step, **vars(self))


class CosineSchedule(LambdaLR):
    """A `LambdaLR` over [`timm_cosine`] that refuses to go on from the state of another schedule."""

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Raises:
            ValueError: if the state is of a schedule with other settings: the learning rate would jump.
        """
        now, then = vars(self.lr_lambdas[0]), state_dict["lr_lambdas"][0] or {}
        changed = {name: (then.get(name), now[name]) for name in now if then.get(name) != now[name]}
        if changed:
            raise ValueError(
                f"This run's learning rate schedule differs from the checkpoint's (checkpoint, now): {changed}."
                " Resume with the settings of the checkpoint."
            )
        super().load_state_dict(state_dict)


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_steps: int,
    min_learning_rate: float = 1e-5,
    warmup_learning_rate: float = 1e-6,
    steps_per_update: int = 1,
    warmup_prefix: bool = False,
) -> CosineSchedule:
    """
    Schedule to hand to the `Trainer` beside its optimizer. The peak is the optimizer's own learning rate.

    Args:
        optimizer (`torch.optim.Optimizer`): all its groups with the same learning rate.
        total_steps, warmup_steps, min_learning_rate, warmup_learning_rate, steps_per_update, warmup_prefix:
            as in [`timm_cosine`].

    Raises:
        ValueError: if the groups' learning rates differ, or if counts or rates contradict each other.
    """
    rates = {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise ValueError(f"All parameter groups need one learning rate, got {sorted(rates)}.")
    learning_rate = rates.pop()
    if total_steps < 1 or steps_per_update < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            "`total_steps` and `steps_per_update` must be at least 1, `warmup_steps` between 0 and `total_steps`; got"
            f" {total_steps}, {steps_per_update} and {warmup_steps}."
        )
    if not 0 <= min_learning_rate <= learning_rate or not 0 <= warmup_learning_rate <= learning_rate:
        raise ValueError(
            f"The floor {min_learning_rate} and the warm-up's start {warmup_learning_rate} must be between 0 and the"
            f" learning rate {learning_rate}. A small batch scales the learning rate down: lower them too."
        )
    settings = (min_learning_rate, warmup_learning_rate, steps_per_update, warmup_prefix)
    return CosineSchedule(optimizer, _CosineFactor(total_steps, warmup_steps, learning_rate, *settings))
