"""Linear maps in the place of attention, fitted in closed form: thinner without any training.

What a layer's attention adds to a token is predicted from that token and from the mean of all tokens of its image, by
least squares over the calibration images. TOAST (arXiv 2410.04941) puts linear maps in the place of whole blocks.
"""

import copy
import logging
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm

from ..models.mapped_attention import LinearMap, MappedAttention
from ..models.pretrained_model import LambdaPreTrainedModel
from .calibration import CalibrationBatches
from .calibration_passes import CalibrationPasses
from .checks import check_model
from .config import SelectionConfig
from .output_change import OutputChange, kind_of_output, sum_of_changes
from .processes import fail_together, gather, rank_and_num_processes
from .select import in_eval_mode


logger = logging.getLogger(__name__)

RIDGE = 1e-3  # of the mean square of the inputs: images are few, and neighbouring tokens alike


def fit_linear_maps(
    model: LambdaPreTrainedModel,
    calibration,
    layers: Iterable[int],
    *,
    image_processor=None,
    calibration_size: int | None = None,
    batch_size: int = 64,
    autocast_dtype: str | None = None,
    disable_tqdm: bool = False,
) -> dict[int, LinearMap]:
    """
    Find the linear maps that come nearest to what the attention of some layers adds, for
    [`~LambdaPreTrainedModel.replace_attention`]. They are fitted from the image on, each on the stream that the maps
    below it leave. No labels are needed. The model is left as it was. In a distributed run every process must call it
    with the same images; all get the same maps.

    Args:
        model ([`LambdaPreTrainedModel`]): the trained model.
        calibration: training images, in any form that [`CalibrationBatches`] takes: two for each channel of the
            model's width, or more; of fewer it warns.
        layers (`Iterable[int]`): 0-based layers that have attention.
        image_processor (*optional*): of Hugging Face, where `calibration` holds pictures.
        calibration_size, batch_size, autocast_dtype (*optional*): as in [`SelectionConfig`], but by default of a
            dataset all images; sums stay in float64.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.

    Returns:
        `dict[int, LinearMap]`: of each layer, in float64, on the CPU.

    Raises:
        ValueError: on an empty calibration set, a wrong option, a layer that is unknown, repeated or without
            attention, or a model whose attention fades already or was removed in another way.
        RuntimeError: if another process failed.

    Example:

    ```python
    model.replace_attention(fit_linear_maps(model, images, [2, 4, 10]))
    model.save_pretrained("thinner")
    ```
    """
    check_model(model)
    layers = list(layers)
    model.check_replacement(layers)
    config = SelectionConfig(calibration_size=calibration_size, batch_size=batch_size, autocast_dtype=autocast_dtype)
    thinner, maps = copy.deepcopy(model).eval(), {}
    is_first, needed = rank_and_num_processes()[0] == 0, 2 * model.config.hidden_size
    with (
        fail_together(),
        torch.no_grad(),
        tqdm(unit="image", leave=False, disable=disable_tqdm or not is_first) as bar,
    ):
        batches = CalibrationBatches(
            calibration, config.batch_size, image_processor, size=config.calibration_size, bar=bar
        )
        if is_first and batches.num_images < needed:
            logger.warning(
                "%d images are few for maps of a width of %d: they fit these images better than others. Take %d.",
                batches.num_images, model.config.hidden_size, needed,
            )  # fmt: skip
        bar.reset(total=batches.num_own_images * len(layers))
        passes = CalibrationPasses(thinner, batches, bar, config.autocast_dtype)
        for layer in sorted(layers):
            maps[layer] = _fit(passes, layer)
            thinner.replace_attention({layer: maps[layer]})
    return maps


def _fit(passes: CalibrationPasses, index: int) -> LinearMap:
    """
    One layer's map, by ridge regression of centred values, its sums taken batch by batch.

    With a token's input `n`, the mean `m` of its image's `T` inputs, and what attention adds, `y`, the sums over all
    tokens of `n m'` and of `m m'` are both that of `T m m'` over the images: so products of pairs `(n, m)` cost no
    more than those of `n` alone.
    """
    model, width = passes.model, passes.model.config.hidden_size
    probe = MappedAttention(width, model.config.layer_norm_eps)
    of_tokens, of_means = torch.zeros(2, width, 2 * width, dtype=torch.float64)
    totals, count = torch.zeros(2 * width, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        hidden_states, extra = _stream(model, pixel_values, index)
        inputs = probe.normalize(hidden_states)
        both = torch.cat([inputs, model.encoder_layers[index].attention_branch(hidden_states, **extra)], dim=-1)
        both = both.double()
        means, tokens = both.mean(dim=1), both.flatten(0, 1)
        of_tokens.add_((tokens[:, :width].T @ tokens).cpu())
        of_means.add_((both.shape[1] * means[:, :width].T @ means).cpu())
        totals.add_(tokens.sum(dim=0).cpu())
        count.add_(len(tokens))

    passes.for_each_batch(add, f"linear map of layer {index}")
    of_tokens, of_means, totals, count = (sum(gather(part)) for part in (of_tokens, of_means, totals, count))
    center = totals / count
    of_tokens, of_means = (products / count - center[:width].outer(center) for products in (of_tokens, of_means))
    square = torch.cat([torch.cat([of_tokens, of_means], dim=0)[:, :width], of_means[:, :width].repeat(2, 1)], dim=1)
    square.diagonal().add_(RIDGE * of_tokens.diagonal().mean())
    solution = torch.linalg.solve(square, torch.cat([of_tokens, of_means])[:, width:])
    token_weight, mean_weight = (part.T.contiguous() for part in gather(solution)[0].split(width))
    bias = center[width:] - (token_weight + mean_weight) @ center[:width]
    return LinearMap(token_weight, mean_weight, bias)


def change_by_replacement(
    whole: LambdaPreTrainedModel,
    thinner: LambdaPreTrainedModel,
    calibration,
    *,
    image_processor=None,
    calibration_size: int | None = None,
    batch_size: int = 64,
    autocast_dtype: str | None = None,
) -> OutputChange:
    """
    How far the output of a model with linear maps is from that of the whole one: of the class probabilities, or of the
    features where there is no trained class head. As in [`fit_linear_maps`], all tokens are computed, also where a
    model merges some. Both models are left as they were. In a distributed run every process must call it with the same
    images; all get the same answer.

    Args:
        whole, thinner ([`LambdaPreTrainedModel`]): the models to compare, on one device.
        calibration: images, in any form that [`CalibrationBatches`] takes; others than the maps were fitted on.
        image_processor, calibration_size, batch_size, autocast_dtype: as in [`fit_linear_maps`].

    Returns:
        [`OutputChange`], of the class head where it is trained, else of the features.

    Raises:
        ValueError: on an empty calibration set, or a wrong option.
        RuntimeError: if another process failed.
    """
    config = SelectionConfig(calibration_size=calibration_size, batch_size=batch_size, autocast_dtype=autocast_dtype)
    has_trained_head = whole.has_class_head and not whole.newly_initialized_head
    output = "class_head" if has_trained_head else "class_token"
    kind, sums = kind_of_output(whole, output), torch.zeros(2, dtype=torch.float64)
    with fail_together(), torch.no_grad(), in_eval_mode(whole), in_eval_mode(thinner):
        batches = CalibrationBatches(calibration, config.batch_size, image_processor, size=config.calibration_size)
        passes = CalibrationPasses(whole, batches, tqdm(disable=True), config.autocast_dtype)

        def compare(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
            one, other = (
                model.read_out(_stream(model, pixel_values, model.config.num_hidden_layers)[0], output)
                for model in (whole, thinner)
            )
            sums.add_(sum_of_changes(one, other, kind))

        passes.for_each_batch(compare, "what the maps change")
        means = (sum(gather(sums)) / batches.num_images).tolist()
    return OutputChange.of_means(*means, kind)


def _stream(model: LambdaPreTrainedModel, pixel_values: torch.Tensor, index: int) -> tuple[torch.Tensor, dict]:
    """What enters a block, `(batch, tokens, hidden)`, and what each block is called with besides."""
    hidden_states, extra = model.embed(pixel_values)
    for below in model.encoder_layers[:index]:
        hidden_states = below(hidden_states, **extra)
    return hidden_states, extra
