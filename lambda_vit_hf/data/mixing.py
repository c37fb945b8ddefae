"""Images of a batch mixed with each other, and images of an epoch repeated, as DeiT does it, by timm's definitions."""

import random
import zlib
from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import Sampler

from .sampling import fixed_randomness


class MixupCollator:
    """
    Batches of mixed images with soft labels: `pixel_values` `(batch, channels, height, width)` and `labels`
    `(batch, classes)`, each row adding up to 1. For training; evaluation takes plain batches.

    Image `i` is mixed with image `-1 - i`: by mixup (a weighted sum) or cutmix (a rectangle of the other one), one of
    them for the whole batch. With an odd number of images, as at the end of an epoch, the last one stays unmixed.

    How a batch is mixed depends on the batch alone, not on the batches made before: its random numbers start from the
    items' `draw` (integers that differ from epoch to epoch; not passed on), else from the pixels. So a resumed run
    mixes alike. The Trainer drops `draw` before this collator sees it, unless `remove_unused_columns=False`.

    Args:
        num_classes (`int`): classes.
        mixup (`float`, *optional*, defaults to 0.8): alpha of the Beta distribution of the weights; 0: no mixup.
        cutmix (`float`, *optional*, defaults to 1.0): alpha for the rectangle's area; 0: no cutmix.
        switch_prob (`float`, *optional*, defaults to 0.5): share of cutmix, if both are on.
        prob (`float`, *optional*, defaults to 1.0): share of batches that are mixed at all.
        label_smoothing (`float`, *optional*, defaults to 0.1): share of each label spread over all classes.
        seed (`int`, *optional*, defaults to 0): of the run.

    Raises:
        ValueError: if an argument is out of its range; when called, on a label that is no class.

    Source: `timm.data.Mixup`, mode `"batch"`.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch_prob: float = 0.5,
        prob: float = 1.0,
        label_smoothing: float = 0.1,
        seed: int = 0,
    ):
        shares = {"switch_prob": switch_prob, "prob": prob, "label_smoothing": label_smoothing}
        for name, value in shares.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
        if mixup < 0 or cutmix < 0:
            raise ValueError(f"`mixup` and `cutmix` must not be negative, got {mixup} and {cutmix}.")
        from timm.data import Mixup

        self.num_classes, self.label_smoothing, self.seed = num_classes, label_smoothing, seed
        self.mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        self.mixup.mixup_enabled = mixup > 0 or cutmix > 0

    def __call__(self, items: list[Mapping]) -> dict[str, torch.Tensor]:
        from timm.data.mixup import mixup_target

        pixel_values = torch.stack([item["pixel_values"] for item in items])
        labels = torch.tensor([item["labels"] for item in items])
        wrong = [label for label in labels.tolist() if not 0 <= label < self.num_classes]
        if wrong:
            raise ValueError(f"Labels {wrong[:5]} lie outside the {self.num_classes} classes.")
        targets = mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)  # for what stays unmixed
        paired = len(items) // 2 * 2
        if paired:
            with fixed_randomness(self.batch_seed(items)):
                pixel_values[:paired], targets[:paired] = self.mixup(pixel_values[:paired], labels[:paired])
        return {"pixel_values": pixel_values, "labels": targets}

    def batch_seed(self, items: list[Mapping]) -> int:
        """Seed of a batch, 32 bits: from `seed` and the items' `draw`, or their pixels where there are none."""
        if all("draw" in item for item in items):
            content = ",".join(str(int(item["draw"])) for item in items).encode()
        else:
            content = b"".join(item["pixel_values"].contiguous().numpy().tobytes() for item in items)
        return random.Random(f"{self.seed}-{zlib.crc32(content)}").getrandbits(32)


class RepeatedAugmentationSampler(Sampler[int]):
    """
    Repeated augmentation: each image several times in a row, so that an epoch of usual length has fewer images, each
    augmented in several ways. Successive repeats go to different processes, as in DeiT.

    Yields `index + repeat * num_images`: the dataset takes the image `number % num_images` and augments by the whole
    number, for the repeats of an image must not come out alike. For all processes together: accelerate deals out the
    batches of one sampler in turn, and the order is made so that process `r` of `n` gets every `n`-th draw, from the
    `r`-th on, which is what `timm`'s sampler gives it. Deterministic by seed and epoch. An epoch is `num_images`
    draws, cut to whole batches for every process (`timm` drops the rest too).

    Args:
        num_images (`int`): images of the dataset.
        batch_size (`int`): images per batch and process.
        repeats (`int`, *optional*, defaults to 3): times that an image is repeated.
        seed (`int`, *optional*, defaults to 0): of the order.
        num_processes (`int`, *optional*, defaults to 1): processes that share the batches.

    Raises:
        ValueError: if an argument is below 1, or if there is not one batch for every process.

    Source: Hoffer et al. (arXiv 1901.09335); `timm.data.RepeatAugSampler`, which has no seed and does not tell the
    repeats apart.
    """

    def __init__(self, num_images: int, batch_size: int, repeats: int = 3, seed: int = 0, num_processes: int = 1):
        if min(batch_size, repeats, num_processes) < 1:
            raise ValueError(
                "`batch_size`, `repeats` and `num_processes` must be at least 1, got"
                f" {batch_size}, {repeats} and {num_processes}."
            )
        from timm.data.distributed_sampler import RepeatAugSampler

        self.num_images, self.repeats, self.seed, self.epoch = num_images, repeats, seed, 0
        self.batch_size, self.num_processes = batch_size, num_processes
        # The order of all processes' draws together: as if there were one.
        self._draws = RepeatAugSampler(range(num_images), num_replicas=1, rank=0, num_repeats=repeats)
        self._num_rounds = len(self._draws) // (batch_size * num_processes)
        if not self._num_rounds:
            raise ValueError(
                f"{num_images} images do not fill one batch of {batch_size} for each of {num_processes} processes:"
                " use a smaller batch."
            )

    def set_epoch(self, epoch: int) -> None:
        """Another order in each epoch. Call it before the epoch begins, in a resumed run too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_rounds * self.batch_size * self.num_processes

    def __iter__(self) -> Iterator[int]:
        self._draws.set_epoch(random.Random(f"{self.seed}-{self.epoch}").getrandbits(32))
        images = torch.tensor(list(self._draws))[: len(self)]
        numbers = images + torch.arange(len(self)) % self.repeats * self.num_images
        # Each round of draws, one batch per process, is dealt out like cards.
        rounds = numbers.view(self._num_rounds, self.batch_size, self.num_processes).transpose(1, 2)
        return iter(rounds.flatten().tolist())
