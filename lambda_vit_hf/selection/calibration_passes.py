"""Passes over the calibration images: this process's share of them, with progress, and what one pass measures."""

import contextlib
import math
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from .calibration import CalibrationBatches
from .entropy import GaussianEntropy, merge_across_processes


class CalibrationPasses:
    """
    Runs a model on the calibration images. With several processes each has its share, and all get the same results.

    Args:
        model ([`LambdaPreTrainedModel`]): in eval mode.
        batches ([`CalibrationBatches`]): the images.
        bar (`tqdm`): moved on by the images of each pass.
        autocast_dtype (`str`, *optional*): to compute in, under autocast.
    """

    def __init__(self, model, batches: CalibrationBatches, bar: tqdm, autocast_dtype: str | None = None):
        self.model, self.batches, self.bar = model, batches, bar
        self.autocast_dtype = autocast_dtype and getattr(torch, autocast_dtype)

    def for_each_batch(self, function: Callable[[torch.Tensor, torch.Tensor], None], description: str) -> None:
        """
        Hand `function` own batches `(batch, channels, height, width)` on the model's device and in its dtype, with the
        fold of each image, `(batch,)`. It runs under `autocast_dtype`.
        """
        self.bar.set_description(description)
        for pixel_values, folds in self.batches:
            with self._autocast():
                function(pixel_values.to(self.model.device, self.model.dtype), folds)
            self.bar.update(len(pixel_values))

    def _autocast(self):
        # float64 stays as it is.
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, self.autocast_dtype)

    def layer_entropies(self) -> tuple[list[float | None], list[float]]:
        """H, in nats, over images and tokens, of each layer's attention output (`None` without) and MLP output."""
        layers = self.model.encoder_layers
        attention = [GaussianEntropy() if layer.has_attention else None for layer in layers]
        mlp = [GaussianEntropy() for _ in layers]

        def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
            hidden_states, extra = self.model.embed(pixel_values)
            for layer, of_attention, of_mlp in zip(layers, attention, mlp, strict=True):
                if of_attention is not None:
                    of_attention.update(layer.attention_branch(hidden_states, **extra))
                hidden_states = layer.mix_tokens(hidden_states, **extra)
                branch = layer.mlp_branch(hidden_states)
                of_mlp.update(branch)
                hidden_states = hidden_states + branch

        self.for_each_batch(measure, "layer entropies")
        merge_across_processes([*(one for one in attention if one is not None), *mlp])
        shifts = self._shifts_of_folding()
        return (
            [None if one is None else one.value() + shift for one, shift in zip(attention, shifts, strict=True)],
            [one.value() + shift for one, shift in zip(mlp, shifts, strict=True)],
        )

    def _shifts_of_folding(self) -> list[float]:
        """What a folded layer's entropies lack, in nats: its stream is stored smaller, and so is what adds to it."""
        return [self.model.config.hidden_size * math.log(scale) for scale in self.model.stream_scales()[1:]]
