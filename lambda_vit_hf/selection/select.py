"""Which attention layers a ViT can do without: the choice, and everything measured on the way to it.

NOSE takes the combination of layers with the least transfer entropy, greedily, one layer at a time.
Source: Lin et al., CVPR 2024, section 3.2.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..models.modeling_lambda_vit import LambdaViTPreTrainedModel
from .calibration import CalibrationBatches
from .entropy import SMALLEST_SIGMA
from .masked_forward import MASKS, OUTPUTS
from .search import COMPARISONS, NUM_FOLDS, AttentionSearch, SelectionStep
from .statistics import CalibrationPasses, rank_and_num_processes, same_on_every_process
from .strategies import STRATEGIES


logger = logging.getLogger(__name__)

# The standard error of H over D independent Gaussian channels and n images is sqrt(D / 2n): at most half a nat then.
IMAGES_PER_CHANNEL = 2


@dataclass
class AttentionSelection:
    """
    A choice of attention layers and everything measured on the way. Entropies in nats, layers 0-based.

    Attributes:
        order: layers in the order they were picked; sorted in `layers`.
        steps: the search path, one entry per picked layer, with the transfer entropy of every candidate and the
            stability of the pick (empty for strategies that do not search).
        output_entropy: H(output) of the unmasked model.
        transfer_entropy: of the whole set chosen.
        attention_entropy: H of each layer's attention output, `None` where there is no attention.
        mlp_entropy: H of each layer's MLP output.
        dead_channels: output channels that never change over the calibration set.
        num_channels: width of the measured output.
        block_evaluations: blocks computed per calibration image for the search.
        naive_block_evaluations: the same if every set that is compared were computed from the image on.
        pair_transfer_entropy: of each pair of layers, `[layer][layer]`; of single layers on the diagonal; `None` where
            there is no attention. Empty if it was not asked for.
        autocast_dtype: what the model computed in, where not in its weights' dtype.
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
    num_channels: int = 0
    block_evaluations: float = 0
    naive_block_evaluations: float = 0
    pair_transfer_entropy: list[list[float | None]] = field(default_factory=list)
    autocast_dtype: str | None = None

    @property
    def layers(self) -> list[int]:
        """The chosen layers, sorted."""
        return sorted(self.order)

    @property
    def interactions(self) -> list[list[float | None]]:
        """
        TE(ij) - TE(i) - TE(j) of each pair of layers, in nats: 0 if masking the one does not change what masking the
        other does; `None` on the diagonal and where there is no attention.
        """
        pairs = self.pair_transfer_entropy
        return [
            [None if i == j or pair is None else pair - pairs[i][i] - pairs[j][j] for j, pair in enumerate(row)]
            for i, row in enumerate(pairs)
        ]

    def to_dict(self) -> dict:
        """JSON-serialisable, with `layers` first."""
        return {"layers": self.layers, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "AttentionSelection":
        """Inverse of [`~AttentionSelection.to_dict`]."""
        values = {name: value for name, value in values.items() if name != "layers"}
        steps = [
            SelectionStep(**{**step, "transfer_entropy": {int(k): v for k, v in step["transfer_entropy"].items()}})
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
    image_processor=None,
    autocast_dtype: torch.dtype | None = None,
    pairs: bool = False,
    reuse_prefixes: bool = True,
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
        image_processor (*optional*): of Hugging Face, where `calibration` holds pictures.
        autocast_dtype (`torch.dtype`, *optional*):
            Run the model under autocast, in `torch.bfloat16` or `torch.float16`. Statistics stay in float64.
        pairs (`bool`, *optional*, defaults to `False`): measure every pair of layers too.
        reuse_prefixes (`bool`, *optional*, defaults to `True`):
            `False`: every set is computed from the image on, to compare; the choice is the same.

    Returns:
        [`AttentionSelection`]

    Raises:
        ValueError: on an empty calibration set, an impossible number of layers, or an unknown option.
        RuntimeError: if a pass over the images failed in another process.
    """
    if not isinstance(model, LambdaViTPreTrainedModel):
        raise ValueError(f"Expected a LambdaViT model, got {type(model).__name__}: load it with LambdaViT's classes.")
    check_options(model, strategy, output, mask, compare)
    output = output or ("class_head" if hasattr(model, "classifier") else "class_token")
    choose = strategy if callable(strategy) else STRATEGIES[strategy]
    num_layers = count_layers(len(model.config.kept_layers), num_layers, ratio)

    batches = CalibrationBatches(calibration, batch_size, image_processor, NUM_FOLDS)
    passes = CalibrationPasses(model, batches, disable_tqdm, autocast_dtype)
    search = AttentionSearch(passes, num_layers, output, mask, compare, seed, reuse_prefixes)
    was_training = model.training
    model.eval()
    try:
        search.measure_layers()
        order = same_on_every_process([int(layer) for layer in choose(search)])
        _check_order(order, num_layers, search.candidates)
        blocks = search.block_evaluations
        naive_blocks = search.naive_block_evaluations if blocks else 0
        (transfer_entropy,) = search.transfer_entropy([order])
        pair_transfer_entropy = search.measure_pairs() if pairs else []
        output_entropy = search.output_entropy  # measured here, if the strategy has not
    finally:
        model.train(was_training)
    _warn_of_weak_evidence(search, batches.num_images)
    return AttentionSelection(
        order=order,
        strategy=strategy if isinstance(strategy, str) else getattr(strategy, "__name__", type(strategy).__name__),
        output=output,
        mask=mask,
        compare=compare,
        num_images=batches.num_images,
        output_entropy=output_entropy,
        transfer_entropy=transfer_entropy,
        attention_entropy=search.attention_entropy,
        mlp_entropy=search.mlp_entropy,
        steps=search.steps,
        dead_channels=search.dead_channels,
        num_channels=search.num_channels,
        block_evaluations=blocks,
        naive_block_evaluations=naive_blocks,
        pair_transfer_entropy=pair_transfer_entropy,
        autocast_dtype=autocast_dtype and str(autocast_dtype).removeprefix("torch."),
    )


def _warn_of_weak_evidence(search: AttentionSearch, num_images: int) -> None:
    num_channels, steps = search.num_channels, search.steps
    needed = IMAGES_PER_CHANNEL * num_channels
    if search.dead_channels and rank_and_num_processes()[0] == 0:
        logger.warning(
            "%d of %d output channels never change over the calibration images; they are left at sigma = %g.",
            search.dead_channels, num_channels, SMALLEST_SIGMA,
        )  # fmt: skip
    if num_images < needed and rank_and_num_processes()[0] == 0:
        known = [step.stability for step in steps if step.stability is not None]
        least = f" The least stable pick holds in {min(known):.0%} of the resamples." if known else ""
        logger.warning(
            "%d calibration images are few for an output of %d channels: %d are needed for an entropy that is known to"
            " half a nat.%s", num_images, num_channels, needed, least,
        )  # fmt: skip


def _check_order(order: list[int], num_layers: int, candidates: list[int]) -> None:
    if len(order) != num_layers or len(set(order)) != num_layers or not set(order) <= set(candidates):
        raise ValueError(f"The strategy gave {order}; expected {num_layers} different layers of {candidates}.")
