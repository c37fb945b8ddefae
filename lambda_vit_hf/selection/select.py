"""Which attention layers a ViT can do without.

NOSE takes the combination of layers with the least transfer entropy, greedily, one layer at a time.
Source: Lin et al., CVPR 2024, section 3.2.
"""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from tqdm.auto import tqdm

from ..models.pretrained_model import LambdaPreTrainedModel
from .calibration import CalibrationBatches
from .calibration_passes import CalibrationPasses
from .checks import count_layers, fit_to_model
from .config import SelectionConfig
from .entropy import SMALLEST_SIGMA
from .processes import fail_together, gather, rank_and_num_processes
from .result import AttentionSelection, SelectionStep, UnknownStrategy
from .search import AttentionSearch
from .strategies import STRATEGIES


__all__ = ["AttentionSelection", "SelectionStep", "select_attention_layers"]

logger = logging.getLogger(__name__)

NUM_FOLDS = 32
# The standard error of H over D independent Gaussian channels and n images is sqrt(D / 2n): at most half a nat then.
IMAGES_PER_CHANNEL = 2


def select_attention_layers(
    model: LambdaPreTrainedModel,
    calibration,
    num_removed_layers: int | None = None,
    removal_ratio: float | None = None,
    strategy: str | Callable[[AttentionSearch], list[int]] | None = None,
    *,
    selection: SelectionConfig | None = None,
    image_processor=None,
    pairs: bool = False,
    disable_tqdm: bool = False,
    num_layers: int | None = None,
    ratio: float | None = None,
    **options,
) -> AttentionSelection:
    """
    Choose the attention layers to remove. The model is left as it was. In a distributed run every process must call
    it with the same images; all get the same answer.

    Args:
        model ([`LambdaPreTrainedModel`]): the trained model, such as a [`LambdaViTForImageClassification`].
        calibration: images, in any form that [`CalibrationBatches`] takes; a few hundred training images will do.
        num_removed_layers (`int`, *optional*): how many layers to choose; or
        removal_ratio (`float`, *optional*): the fraction of the attention layers that the model has.
        strategy (`str` or callable, *optional*): in place of that of `selection`.
        selection ([`SelectionConfig`], *optional*): the options. By default `SelectionConfig(calibration_size=None)`.
        image_processor (*optional*): of Hugging Face, where `calibration` holds pictures.
        pairs (`bool`, *optional*, defaults to `False`): measure every pair of layers too.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar; there is one on the first process.
        num_layers, ratio: former names of `num_removed_layers` and `removal_ratio`.
        options (*optional*): fields of [`SelectionConfig`], in place of those of `selection`.

    Returns:
        [`AttentionSelection`]

    Raises:
        ValueError: on an empty calibration set, an impossible number of layers, an option that is wrong or does not
            fit the model, or a model that is half-way diluted.
        TypeError: on an unknown option, or calibration items without pixel values.
        RuntimeError: if another process failed.
    """
    num_removed_layers = _renamed("num_layers", num_layers, "num_removed_layers", num_removed_layers)
    removal_ratio = _renamed("ratio", ratio, "removal_ratio", removal_ratio)
    config = SelectionConfig(calibration_size=None) if selection is None else selection
    config = dataclasses.replace(config, **options, **({} if strategy is None else {"strategy": strategy}))
    is_first = rank_and_num_processes()[0] == 0
    with (
        fail_together(),
        torch.no_grad(),
        tqdm(unit="image", desc="calibration images", leave=False, disable=disable_tqdm or not is_first) as bar,
    ):
        config = fit_to_model(config, model, warn=is_first)
        count = count_layers(len(model.config.kept_layers), num_removed_layers, removal_ratio)
        batches = CalibrationBatches(
            calibration, config.batch_size, image_processor, NUM_FOLDS, config.calibration_size, bar
        )
        # One pass for the entropies of the layers, those of the strategy (of a function nobody knows how many), and
        # one for what its layers change, which `divergence` has measured.
        passes_of = {"nose": count, "beam": count, "divergence": count - 1}
        passes_of |= dict.fromkeys(("first", "last", "random", "lowest_entropy", "weight_entropy"), 0)
        number = float("inf") if callable(config.strategy) else 2 + passes_of.get(config.strategy, 1) + pairs
        bar.reset(total=batches.num_own_images * number)
        with in_eval_mode(model):
            passes = CalibrationPasses(model, batches, bar, config.autocast_dtype)
            found = _search(AttentionSearch(passes, count, config), config, pairs)
    if is_first:
        _warn_of_weak_evidence(found)
    return found


def _search(search: AttentionSearch, config: SelectionConfig, pairs: bool) -> AttentionSelection:
    choose = STRATEGIES[config.strategy] if isinstance(config.strategy, str) else config.strategy
    order = gather([int(layer) for layer in choose(search)])[0]
    if len(order) != search.num_layers or len(set(order)) != len(order) or not set(order) <= set(search.candidates):
        raise ValueError(
            f"The strategy gave {order}; expected {search.num_layers} different layers of {search.candidates}."
        )
    blocks = search.block_evaluations
    naive_blocks = search.naive_block_evaluations if blocks else 0
    if not isinstance(config.strategy, str):
        config = dataclasses.replace(config, strategy=UnknownStrategy(config.strategy_name))
    changes = search.output_change([order[: number + 1] for number in range(len(order))])
    return AttentionSelection(
        order=order,
        config=config,
        changes=changes,
        num_images=search.passes.batches.num_images,
        transfer_entropy=search.transfer_entropy([order])[0],
        pair_transfer_entropy=search.measure_pairs() if pairs else [],
        output_entropy=search.unmasked.value(),
        attention_entropy=search.attention_entropy,
        mlp_entropy=search.mlp_entropy,
        steps=search.steps,
        dead_channels=search.unmasked.dead_channels(),
        num_channels=search.unmasked.means.shape[1],
        block_evaluations=blocks,
        naive_block_evaluations=naive_blocks,
    )


def _renamed(old_name: str, old, new_name: str, new):
    if old is None:
        return new
    warnings.warn(f"`{old_name}` is now `{new_name}`.", FutureWarning, stacklevel=3)
    if new is not None:
        raise ValueError(f"`{old_name}` is the former name of `{new_name}`: give one of them.")
    return old


@contextlib.contextmanager
def in_eval_mode(model) -> Iterator[None]:
    """Evaluation mode, module by module, for as long as it lasts."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def _warn_of_weak_evidence(selection: AttentionSelection) -> None:
    num_channels, num_images = selection.num_channels, selection.num_images
    if selection.dead_channels:
        logger.warning(
            "%d of %d output channels never change over the calibration images; they are left at sigma = %g.",
            selection.dead_channels, num_channels, SMALLEST_SIGMA,
        )  # fmt: skip
    needed = IMAGES_PER_CHANNEL * num_channels
    if num_images < needed:
        known = [step.stability for step in selection.steps if step.stability is not None]
        least = f" The least stable pick holds in {min(known):.0%} of the resamples." if known else ""
        logger.warning(
            "%d calibration images are few for an output of %d channels: %d are needed for an entropy that is known to"
            " half a nat.%s", num_images, num_channels, needed, least,
        )  # fmt: skip
