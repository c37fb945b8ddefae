"""Linear maps in the place of attention, fitted in closed form: thinner without any training.

What a layer's attention adds to a token is predicted from that token alone, by least squares over the calibration
images. TOAST (arXiv 2410.04941) does so with whole blocks.
"""

import copy
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm

from ..models.pretrained_model import LambdaPreTrainedModel
from .calibration import CalibrationBatches
from .calibration_passes import CalibrationPasses
from .checks import check_model
from .output_change import OutputChange, sum_of_changes
from .processes import fail_together, gather, rank_and_num_processes


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
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """
    Find the linear maps that come nearest to what the attention of some layers adds, for
    [`~LambdaPreTrainedModel.replace_attention`]. They are fitted from the image on, each on the stream that the maps
    below it leave. No labels are needed. The model is left as it was. In a distributed run every process must call it
    with the same images; all get the same maps.

    Args:
        model ([`LambdaPreTrainedModel`]): the trained model.
        calibration: images, in any form that [`CalibrationBatches`] takes; a few hundred training images will do.
        layers (`Iterable[int]`): 0-based layers that have attention.
        image_processor (*optional*): of Hugging Face, where `calibration` holds pictures.
        calibration_size (`int`, *optional*): take this many images, evenly spaced; by default all.
        batch_size (`int`, *optional*, defaults to 64): images per batch.
        autocast_dtype (`str`, *optional*): to compute in; sums stay in float64.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.

    Returns:
        `dict[int, tuple[torch.Tensor, torch.Tensor]]`: of each layer, weight `(hidden, hidden)` and bias `(hidden,)`,
        in float64, on the CPU.

    Raises:
        ValueError: on an empty calibration set, a layer that is unknown, repeated or without attention, or a model
            whose attention fades already or was removed in another way.
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
    thinner, maps = copy.deepcopy(model).eval(), {}
    is_first = rank_and_num_processes()[0] == 0
    with (
        fail_together(),
        torch.no_grad(),
        tqdm(unit="image", leave=False, disable=disable_tqdm or not is_first) as bar,
    ):
        batches = CalibrationBatches(calibration, batch_size, image_processor, size=calibration_size, bar=bar)
        bar.reset(total=batches.num_own_images * len(layers))
        passes = CalibrationPasses(thinner, batches, bar, autocast_dtype)
        for layer in sorted(layers):
            maps[layer] = _fit(passes, layer)
            thinner.replace_attention({layer: maps[layer]})
    return maps


def _fit(passes: CalibrationPasses, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one layer's map: ridge regression of centred values, its sums taken batch by batch."""
    model, width = passes.model, passes.model.config.hidden_size
    # Of inputs and outputs side by side, behind a column of ones: all sums and products that are needed.
    products = torch.zeros(2 * width + 1, 2 * width + 1, dtype=torch.float64)

    def add(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        hidden_states, extra = _stream(model, pixel_values, index)
        layer = model.encoder_layers[index]
        inputs, branch = layer.map_input(hidden_states), layer.attention_branch(hidden_states, **extra)
        both = torch.cat([torch.ones_like(inputs[..., :1]), inputs, branch], dim=-1).flatten(0, 1).double()
        products.add_((both.T @ both).cpu())

    passes.for_each_batch(add, f"linear map of layer {index}")
    total = sum(gather(products))
    means = total[0, 1:] / total[0, 0]
    centred = total[1:, 1:] / total[0, 0] - means.outer(means)
    square, cross = centred[:width, :width], centred[:width, width:]
    square = square + RIDGE * square.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    solution = gather(torch.linalg.solve(square, cross))[0]
    return solution.T.contiguous(), means[width:] - means[:width] @ solution


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
    features where there is no trained class head. The arguments are those of [`fit_linear_maps`].
    """
    of_classes = whole.has_class_head and not whole.newly_initialized_head
    output, sums = "class_head" if of_classes else "class_token", torch.zeros(2, dtype=torch.float64)
    with fail_together(), torch.no_grad():
        batches = CalibrationBatches(calibration, batch_size, image_processor, size=calibration_size)
        passes = CalibrationPasses(whole, batches, tqdm(disable=True), autocast_dtype)

        def compare(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
            one, other = (
                model.read_out(_stream(model, pixel_values, model.config.num_hidden_layers)[0], output)
                for model in (whole, thinner)
            )
            sums.add_(sum_of_changes(one, other, of_classes))

        passes.for_each_batch(compare, "what the maps change")
        divergence, same = (sum(gather(sums)) / batches.num_images).tolist()
    return OutputChange(divergence, same if of_classes else None)


def _stream(model: LambdaPreTrainedModel, pixel_values: torch.Tensor, index: int) -> tuple[torch.Tensor, dict]:
    """What enters a block, `(batch, tokens, hidden)`, and what each block is called with besides."""
    hidden_states, extra = model.embed(pixel_values)
    for below in model.encoder_layers[:index]:
        hidden_states = below.feed_forward(below.mix_tokens(hidden_states, **extra))
    return hidden_states, extra
