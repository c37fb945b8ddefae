"""Which attention layers a ViT can do without: the choice, and everything measured on the way to it.

NOSE takes the combination of layers with the least transfer entropy, greedily, one layer at a time.
Source: Lin et al., CVPR 2024, section 3.2.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from .calibration import CalibrationBatches
from .modeling_lambda_vit import LambdaViTPreTrainedModel
from .search import COMPARISONS, MASKS, OUTPUTS, AttentionSearch, SelectionStep, rank_and_num_processes
from .strategies import STRATEGIES


@dataclass
class AttentionSelection:
    """
    A choice of attention layers and everything measured on the way. Entropies in nats, layers 0-based.

    Attributes:
        order: layers in the order they were picked; sorted in `layers`.
        steps: the search path, one entry per picked layer (empty for strategies that do not search).
        output_entropy: H(output) of the unmasked model.
        transfer_entropy: of the whole set chosen.
        attention_entropy: H of each layer's attention output, `None` where there is no attention.
        mlp_entropy: H of each layer's MLP output.
        dead_channels: output channels that never change over the calibration set.
        block_evaluations: blocks computed per calibration batch for the search.
    """

    order: list[int]
    strategy: str
    output: str
    mask: str
    compare: str
    num_images: int = 0
    output_entropy: float | None = None
    transfer_entropy: float | None = None
    attention_entropy: list[float | None] = field(default_factory=list)
    mlp_entropy: list[float] = field(default_factory=list)
    steps: list[SelectionStep] = field(default_factory=list)
    dead_channels: int = 0
    block_evaluations: int = 0

    @property
    def layers(self) -> list[int]:
        """The chosen layers, sorted."""
        return sorted(self.order)

    def to_dict(self) -> dict:
        """JSON-serialisable, with `layers` first."""
        return {"layers": self.layers, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "AttentionSelection":
        """Inverse of [`~AttentionSelection.to_dict`]."""
        values = {name: value for name, value in values.items() if name != "layers"}
        steps = [
            SelectionStep(step["selected"], {int(k): v for k, v in step["transfer_entropy"].items()}, step["picked"])
            for step in values.pop("steps")
        ]
        return cls(**values, steps=steps)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "AttentionSelection":
        """Read what [`~AttentionSelection.save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def count_layers(num_candidates: int, num_layers: int | None, ratio: float | None) -> int:
    """
    How many layers to remove, from exactly one of a count and a ratio (rounded to the nearest count, halves up).

    Raises:
        ValueError: if both or none are given, if the ratio is outside [0, 1], or if no attention would be left.
    """
    if (num_layers is None) == (ratio is None):
        raise ValueError("Give exactly one of the number of layers and the removal ratio.")
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
            raise ValueError(f"The removal ratio is a fraction of the attention layers, in [0, 1]; got {ratio!r}.")
        num_layers = int(ratio * num_candidates + 0.5)
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 0:
        raise ValueError(f"The number of layers to remove must be an integer of 0 or more, got {num_layers!r}.")
    if num_layers >= num_candidates:
        raise ValueError(f"Cannot remove {num_layers} of {num_candidates} attention layers: at least one must stay.")
    return num_layers


def check_options(model, strategy, output: str | None, mask: str, compare: str) -> None:
    """
    Check the options of [`select_attention_layers`]; without a model (`None`), as far as is possible without one.

    Raises:
        ValueError: on an unknown option, a class head that the model has not, or a model that is half-way diluted.
    """
    options = (("output", output, (None, *OUTPUTS)), ("mask", mask, MASKS), ("compare", compare, COMPARISONS))
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {[one for one in allowed if one]}, got {value!r}.")
    if not callable(strategy) and strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be a function or one of {sorted(STRATEGIES)}, got {strategy!r}.")
    if model is None:
        return
    if output == "class_head" and not hasattr(model, "classifier"):
        raise ValueError(f"{type(model).__name__} has no class head: use `output='class_token'` or `'token_mean'`.")
    diluting = {layer: value for layer, value in enumerate(model.attention_lambdas) if value not in (None, 1.0)}
    if diluting:
        raise ValueError(
            f"The model is half-way diluted: lambda is not 1 in layers {diluting}. Resume that run from a checkpoint,"
            " or set lambda back with `model.set_attention_lambda(1.0, layers)`."
        )


@torch.no_grad()
def select_attention_layers(
    model: LambdaViTPreTrainedModel,
    calibration,
    num_layers: int | None = None,
    ratio: float | None = None,
    strategy: str | Callable[[AttentionSearch], list[int]] = "nose",
    output: str | None = None,
    mask: str = "skip",
    compare: str = "magnitude",
    batch_size: int = 64,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> AttentionSelection:
    """
    Choose the attention layers to remove. The model is left as it was. In a distributed run every process must call
    it with the same images; all get the same answer.

    Args:
        model ([`LambdaViTModel`] or [`LambdaViTForImageClassification`]): the trained model.
        calibration: images, in any form that [`CalibrationBatches`] takes; a few hundred training images will do.
        num_layers (`int`, *optional*): how many layers to choose; or
        ratio (`float`, *optional*): the fraction of the attention layers that the model has.
        strategy (`str` or callable, *optional*, defaults to `"nose"`):
            `"nose"`; `"beam"`, `"exhaustive"`, `"lowest_entropy"`, `"cosine"`, `"first"`, `"last"` or `"random"`; or a
            function from an [`AttentionSearch`] to layers in order.
        output (`str`, *optional*):
            What is measured: `"class_head"` (logits; default where there is a head), `"class_token"` or
            `"token_mean"`, both after the final LayerNorm.
        mask (`str`, *optional*, defaults to `"skip"`):
            A masked layer passes its input on (`"skip"`, the authors'), or doubles it (`"identity"`, as it will be
            after dilution).
        compare (`str`, *optional*, defaults to `"magnitude"`): transfer entropy by `"magnitude"` or `"value"`.
        batch_size (`int`, *optional*, defaults to 64): images per batch where `calibration` is not batched.
        seed (`int`, *optional*, defaults to 0): for `"random"`.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.

    Returns:
        [`AttentionSelection`]

    Raises:
        ValueError: on an empty calibration set, an impossible number of layers, or an unknown option.
    """
    if not isinstance(model, LambdaViTPreTrainedModel):
        raise ValueError(f"Expected a LambdaViT model, got {type(model).__name__}: load it with LambdaViT's classes.")
    check_options(model, strategy, output, mask, compare)
    output = output or ("class_head" if hasattr(model, "classifier") else "class_token")
    choose = strategy if callable(strategy) else STRATEGIES[strategy]
    num_layers = count_layers(len(model.config.kept_layers), num_layers, ratio)

    batches = CalibrationBatches(calibration, batch_size)
    search = AttentionSearch(model, batches, num_layers, output, mask, compare, seed, disable_tqdm)
    was_training = model.training
    model.eval()
    try:
        search.measure_layers()
        order = _same_on_every_process(list(choose(search)))
        search_blocks = search.block_evaluations
        (transfer_entropy,) = search.transfer_entropy([order])
    finally:
        model.train(was_training)
    return AttentionSelection(
        order=order,
        strategy=strategy if isinstance(strategy, str) else strategy.__name__,
        output=output,
        mask=mask,
        compare=compare,
        num_images=batches.num_images,
        output_entropy=search.output_entropy,
        transfer_entropy=transfer_entropy,
        attention_entropy=search.attention_entropy,
        mlp_entropy=search.mlp_entropy,
        steps=search.steps,
        dead_channels=search.dead_channels,
        block_evaluations=search_blocks,
    )


def _same_on_every_process(order: list[int]) -> list[int]:
    # Rounding may differ between processes' hardware; a model must not.
    if rank_and_num_processes()[1] > 1:
        shared = [order]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
    return order
