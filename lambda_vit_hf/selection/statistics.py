"""Passes over the calibration images: this process's share of them, with progress, and what one pass measures."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from ..models.folding import residual_scales
from .calibration import CalibrationBatches, SameImages
from .entropy import GaussianEntropy, merge_across_processes


class CalibrationPasses:
    """
    Reads calibration images for a model. With several processes each gets its share, and all get the same results.

    Args:
        model ([`LambdaViTPreTrainedModel`]): in eval mode.
        batches ([`CalibrationBatches`]): the images.
        disable_tqdm (`bool`): no progress bar; there is one on the first process only.
        autocast_dtype (`torch.dtype`, *optional*): to compute in, under autocast.
    """

    def __init__(
        self, model, batches: CalibrationBatches, disable_tqdm: bool, autocast_dtype: torch.dtype | None = None
    ):
        self.model, self.batches = model, batches
        self.disable_tqdm, self.autocast_dtype = disable_tqdm, autocast_dtype
        self._same_images = SameImages(batches.num_folds)

    def for_each_batch(
        self,
        function: Callable[[torch.Tensor, torch.Tensor], None],
        description: str,
        folds: Sequence[int] | None = None,
    ) -> None:
        """
        Hand `function` own batches `(batch, channels, height, width)` of some folds, or of all images, on the model's
        device and in its dtype, with the fold of each image, `(batch,)`. It runs under `autocast_dtype`.

        Raises:
            ValueError: after the last batch, if the images were not the same as at an earlier reading.
            RuntimeError: if it failed in another process.
        """
        rank, num_processes = rank_and_num_processes()
        folds = range(self.batches.num_folds) if folds is None else folds
        share = len(folds) / self.batches.num_folds / num_processes
        expected = round(self.batches.num_images * share) or None
        hidden = self.disable_tqdm or rank > 0
        self._same_images.forget()
        with (
            fail_together(description),
            tqdm(desc=description, total=expected, unit="image", leave=False, disable=hidden) as bar,
        ):
            for pixel_values, of_images in self.batches.read(folds, rank, num_processes):
                self._same_images.add(pixel_values, of_images)
                with self._autocast():
                    function(pixel_values.to(self.model.device, self.model.dtype), of_images)
                bar.update(len(pixel_values))
        self._same_images.sums = sum_over_processes(self._same_images.sums)
        self._same_images.check(folds)

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

        def measure(pixel_values: torch.Tensor, of_images: torch.Tensor) -> None:
            hidden_states = self.model.base_model.embeddings(pixel_values)
            for layer, of_attention, of_mlp in zip(layers, attention, mlp, strict=True):
                if of_attention is not None:
                    of_attention.update(layer.attention_branch(hidden_states))
                hidden_states = layer.mix_tokens(hidden_states)
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
        config = self.model.config
        if not config.fold_removed:
            return [0.0] * config.num_hidden_layers
        scales = residual_scales(config.attention_flags, config.fold_exponent)
        return [config.hidden_size * math.log(scale) for scale in scales]

    def attention_influence(self) -> list[float | None]:
        """
        How much each layer's attention turns the stream: 1 - cos(x, x + Attention(LayerNorm(x))), the mean over images
        and tokens; `None` without attention. The block influence of ShortGPT (arXiv 2403.03853) and LLM-Drop (arXiv
        2406.15786).
        """
        layers = self.model.encoder_layers
        sums = torch.zeros(len(layers) + 1, dtype=torch.float64)

        def measure(pixel_values: torch.Tensor, of_images: torch.Tensor) -> None:
            hidden_states = self.model.base_model.embeddings(pixel_values)
            sums[-1] += hidden_states.shape[0] * hidden_states.shape[1]
            for index, layer in enumerate(layers):
                mixed = layer.mix_tokens(hidden_states)
                cosine = torch.cosine_similarity(hidden_states.double(), mixed.double(), dim=-1)
                sums[index] += (1 - cosine).sum().cpu()
                hidden_states = layer.feed_forward(mixed)

        self.for_each_batch(measure, "attention influence")
        sums = sum_over_processes(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        return [mean if layer.has_attention else None for layer, mean in zip(layers, means, strict=True)]


@contextlib.contextmanager
def fail_together(description: str) -> Iterator[None]:
    """
    An error in one process of torch's default group is one in all of them; the others would wait for it forever.

    Raises:
        RuntimeError: if only another process failed; it names that process and its error.
    """
    own_error = None
    try:
        yield
    except Exception as error:
        own_error = error
    num_processes = rank_and_num_processes()[1]
    messages = [None] * num_processes
    if num_processes > 1:
        dist.all_gather_object(messages, own_error and f"{type(own_error).__name__}: {own_error}")
    if own_error is not None:
        raise own_error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"Process {rank} failed during {description}: {message}")


def same_on_every_process(value):
    """That of the first process: rounding may differ between processes' hardware, what they do next must not."""
    if rank_and_num_processes()[1] == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def sum_over_processes(numbers: torch.Tensor) -> torch.Tensor:
    """Sum over torch's default process group, in rank order: the same on each process."""
    num_processes = rank_and_num_processes()[1]
    if num_processes == 1:
        return numbers
    parts = [None] * num_processes
    dist.all_gather_object(parts, numbers)
    return torch.stack(parts).sum(dim=0)


def rank_and_num_processes() -> tuple[int, int]:
    """Of torch's default process group; `(0, 1)` without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
