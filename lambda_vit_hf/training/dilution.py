"""Lambda schedules: how attention fades, as pure functions of training progress.

A schedule maps progress in [0, 1], the share of the dilution phase that has passed, to lambda: 1 at 0, exactly 0 at 1,
never rising. The phase covers the first part of training; the pruned network trains on for the rest.
Source: Lin et al., CVPR 2024, section 3.3; the authors' code: lambda(epoch) = max(0, 1 - epoch / 299), 400 epochs.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

from ..models.configuration_removal import FADES


def linear(progress: float) -> float:
    """The authors' schedule: a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Half a cosine: slow at both ends."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine}
GRANULARITIES = ("step", "epoch")


@dataclass(frozen=True)
class DilutionConfig:
    """
    How attention fades during training, and what is left of it. Immutable; holds plain values.

    Args:
        schedule (`str`, *optional*, defaults to `"linear"`): lambda falls `"linear"` or `"cosine"`.
        hold_share (`float`, *optional*, defaults to 0.25): share of training, at its end, with lambda = 0; in [0, 1).
        granularity (`str`, *optional*, defaults to `"step"`): lambda changes every `"step"` or every `"epoch"`.
        fold (`bool`, *optional*, defaults to `True`): fold the removed layers' identity into the weights.
        fade_to (`str`, *optional*):
            Attention fades to the `"identity"` (the paper's), or to nothing (`"skip"`). By default what the model's
            configuration says.

    Raises:
        ValueError: on a value that is none of these.
    """

    schedule: str = "linear"
    hold_share: float = 0.25
    granularity: str = "step"
    fold: bool = True
    fade_to: str | None = None

    def __post_init__(self):
        if self.fold not in (True, False):  # bool("false") is True
            raise ValueError(f"`fold` must be True or False, got {self.fold!r}.")
        if not isinstance(self.hold_share, numbers.Real):
            raise ValueError(f"`hold_share` must be a number in [0, 1), got {self.hold_share!r}.")
        for name, kind in (("schedule", str), ("hold_share", float), ("granularity", str), ("fold", bool)):
            object.__setattr__(self, name, kind(getattr(self, name)))  # a numpy value would not go into JSON
        if self.fade_to is not None:
            object.__setattr__(self, "fade_to", str(self.fade_to))
        if self.fade_to == "linear":
            raise ValueError(
                "Attention does not fade to a linear map: `fit_linear_maps` and `replace_attention`, or `lambda-vit"
                " select --linear_maps`, put it there before training."
            )
        for name, allowed in (
            ("schedule", sorted(SCHEDULES)),
            ("granularity", list(GRANULARITIES)),
            ("fade_to", [None, *FADES]),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        if not 0.0 <= self.hold_share < 1.0:
            raise ValueError(f"`hold_share` must lie in [0, 1), got {self.hold_share}.")

    def to_dict(self) -> dict:
        """JSON-serialisable."""
        return dataclasses.asdict(self)

    def schedule_for(self, total_steps: int, steps_per_epoch: int | None = None) -> "DilutionSchedule":
        """
        Lambda for each step of a training.

        Args:
            total_steps (`int`): optimizer steps of the whole training.
            steps_per_epoch (`int`, *optional*): optimizer steps of an epoch, for `granularity="epoch"`.

        Raises:
            ValueError: if lambda cannot reach 0 within `total_steps`, or an epoch has no known length.
        """
        if self.granularity == "epoch" and steps_per_epoch is None:
            raise ValueError("A dataset without length has no epochs: use `granularity='step'`.")
        per_update = steps_per_epoch if self.granularity == "epoch" else 1
        return DilutionSchedule(total_steps, self.hold_share, self.schedule, per_update)


@dataclass(frozen=True)
class DilutionSchedule:
    """
    Lambda as a function of the global optimizer step, and of nothing else: a resumed run continues where it was.

    Args:
        total_steps (`int`): optimizer steps of the whole training.
        hold_share (`float`, *optional*, defaults to 0.25):
            Share of training at the end, in [0, 1), for which lambda stays 0 (100 of 400 epochs in the paper).
        shape (`str`, *optional*, defaults to `"linear"`): `"linear"` or `"cosine"`.
        steps_per_update (`int`, *optional*, defaults to 1):
            Lambda changes only at multiples of this: 1 is per step, the steps of an epoch is per epoch.

    Raises:
        ValueError: if an argument is out of range, or lambda could not reach 0 within `total_steps`.
    """

    total_steps: int
    hold_share: float = 0.25
    shape: str = "linear"
    steps_per_update: int = 1

    def __post_init__(self):
        if self.total_steps < 2:
            raise ValueError(f"Dilution needs at least 2 training steps, got {self.total_steps}.")
        if not 0.0 <= self.hold_share < 1.0:
            raise ValueError(f"`hold_share` must lie in [0, 1), got {self.hold_share}.")
        if self.shape not in SCHEDULES:
            raise ValueError(f"`shape` must be one of {sorted(SCHEDULES)}, got {self.shape!r}.")
        if self.steps_per_update < 1:
            raise ValueError(f"`steps_per_update` must be at least 1, got {self.steps_per_update}.")
        if self.first_zero_step >= self.total_steps:
            raise ValueError(
                f"In {self.total_steps} steps lambda cannot fall from 1 to 0 if it changes only every"
                f" {self.steps_per_update} steps. Train longer, or let it change per step."
            )

    def __str__(self) -> str:
        return f"{self.shape}, 0 from step {self.first_zero_step} on"

    @property
    def first_zero_step(self) -> int:
        """The first step, counted from 0, that runs at lambda = 0."""
        updates = math.ceil(self.total_steps / self.steps_per_update)
        # 1 and 0 are both among the values of the phase: 300 of 400 epochs give 1 - e / 299, as in the paper.
        return max(1, round(updates * (1.0 - self.hold_share)) - 1) * self.steps_per_update

    def at(self, step: int) -> float:
        """Lambda during optimizer step `step` (0 is the first)."""
        step = step - step % self.steps_per_update
        if step >= self.first_zero_step:
            return 0.0
        return min(1.0, max(0.0, SCHEDULES[self.shape](step / self.first_zero_step)))


def steps_per_epoch(train_dataloader, accumulation_steps: int) -> int | None:
    """Optimizer steps of an epoch; `None` for a stream of unknown length."""
    try:
        return math.ceil(len(train_dataloader) / accumulation_steps)
    except TypeError:
        return None
