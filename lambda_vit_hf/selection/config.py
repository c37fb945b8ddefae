"""Options of a selection of attention layers, checked when they are made, and how many layers to select."""

import dataclasses
import enum
import numbers
from collections.abc import Callable
from dataclasses import dataclass

from .masked_forward import MASKS, OUTPUTS
from .search import COMPARISONS
from .strategies import STRATEGIES


AUTOCAST_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class SelectionConfig:
    """
    How attention layers are selected. Immutable; numpy scalars, string enums and `torch.dtype` become plain values.

    Args:
        strategy (`str` or callable, *optional*, defaults to `"nose"`):
            A name of `STRATEGIES` (docs/nose.md lists them): `"nose"`, `"divergence"`, `"cosine"`, `"last"`, ...; or a
            function from an [`AttentionSearch`] to layers in order.
        output (`str`, *optional*):
            Where entropy is measured: `"class_head"` (logits; the default where there is a trained head),
            `"class_token"` or `"token_mean"`, both after the final LayerNorm.
        mask (`str`, *optional*):
            A masked attention layer adds nothing (`"skip"`), or adds its input (`"identity"`). By default what the
            model's attention fades to, so that what is measured is what will be. (The authors let it fade to the
            identity, and measured `"skip"`.)
        compare (`str`, *optional*, defaults to `"magnitude"`):
            The least transfer entropy is that of least `"magnitude"`, or of least `"value"`.
        calibration_size (`int`, *optional*, defaults to 512):
            Use this many images of a calibration dataset, evenly spaced. `None`: all of them, as of tensors, lists,
            streams and `DataLoader`s.
        seed (`int`, *optional*, defaults to 0): of the strategy `"random"`.
        batch_size (`int`, *optional*, defaults to 64): images per batch, where the calibration set is not batched.
        autocast_dtype (`str` or `torch.dtype`, *optional*):
            Run the model under autocast in `"bfloat16"` or `"float16"`. Statistics stay in float64.

    Raises:
        ValueError: on a value that is none of these.

    Example:

    ```python
    >>> from lambda_vit_hf.selection.config import SelectionConfig
    >>> SelectionConfig(mask="identity").to_dict()["mask"]
    'identity'
    ```
    """

    strategy: str | Callable = "nose"
    output: str | None = None
    mask: str | None = None
    compare: str = "magnitude"
    calibration_size: int | None = 512
    seed: int = 0
    batch_size: int = 64
    autocast_dtype: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        names = sorted(STRATEGIES)
        if not callable(self.strategy) and self.strategy not in names:
            raise ValueError(f"`strategy` must be a function or one of {names}, got {self.strategy!r}.")
        allowed = {"output": (None, *OUTPUTS), "mask": (None, *MASKS), "compare": COMPARISONS,
                   "autocast_dtype": (None, *AUTOCAST_DTYPES)}  # fmt: skip
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"`{name}` must be one of {[one for one in values if one]}, got {value!r}.")
        for name, least in (("calibration_size", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "calibration_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of {least} or more, got {value!r}.")

    @property
    def strategy_name(self) -> str:
        """Name of the strategy, also where it is a function."""
        return self.strategy if isinstance(self.strategy, str) else _name(self.strategy)

    def to_dict(self) -> dict:
        """JSON-serialisable; of a strategy that is a function, its name."""
        return {**vars(self), "strategy": self.strategy_name}

    @classmethod
    def from_dict(cls, values: dict) -> "SelectionConfig":
        """
        Inverse of [`~SelectionConfig.to_dict`], where the strategy is not a function.

        Raises:
            ValueError: on an unknown option, or a value that is not allowed.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"Unknown options of a selection: {unknown}.")
        return cls(**values)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _plain(value):
    if isinstance(value, enum.Enum):
        value = value.value
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return value
