"""Labelled images as the Trainer takes them: decoded, augmented, processed."""

import random
from collections.abc import Callable, Mapping

import datasets
import PIL.Image
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from .decoding import MAX_PIXELS, UnreadableImageError, UnreadableImages, image_name, open_image, undecoded
from .sampling import evenly_spaced, fixed_randomness


LEFT_OUT = -100  # the label that losses leave out (`ignore_index` of torch's cross entropy)


class ImagePreparation:
    """
    From decoded images to items for the model; what map-style and streamed images have in common.

    Args:
        image_processor: a Hugging Face image processor.
        augmentation (`Callable`, *optional*):
            From an RGB PIL image to a PIL image, which the image processor then takes; or to a tensor
            `(channels, height, width)`, which goes to the model as it is (timm's transforms normalise themselves).
        unreadable ([`UnreadableImages`], *optional*): what to do about files that are no images: by default, raise.
        with_draws (`bool`, *optional*, defaults to `False`):
            Items carry `"draw"`, 32 random bits of their own, for a collator that mixes images.
        max_pixels (`int`, *optional*): see [`~lambda_vit_hf.data.decoding.decode_image`].
    """

    def __init__(
        self,
        image_processor,
        augmentation: Callable | None = None,
        unreadable: UnreadableImages | None = None,
        with_draws: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        self.image_processor, self.augmentation = image_processor, augmentation
        self.unreadable = unreadable or UnreadableImages()
        self.with_draws, self.max_pixels = with_draws, max_pixels

    def decode(self, item, name: str) -> PIL.Image.Image | None:
        """The RGB image of an undecoded `datasets` item, or `None` if it is to be left out."""
        return self.unreadable.decode(item, name, self.max_pixels)

    def __call__(self, images: list[PIL.Image.Image], labels: list[int], keys: list[str]) -> list[dict]:
        """Items of one batch. All randomness of an image follows from its key."""
        draws = []
        if self.augmentation is not None or self.with_draws:
            draws = [random.Random(key).getrandbits(32) for key in keys]
        if self.augmentation is not None:
            images = [self._augment(image, draw) for image, draw in zip(images, draws, strict=True)]
        if not isinstance(images[0], torch.Tensor):
            images = self.image_processor(images, return_tensors="pt")["pixel_values"]
        items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
        if self.with_draws:
            for item, draw in zip(items, draws, strict=True):
                item["draw"] = draw
        return items

    def _augment(self, image: PIL.Image.Image, draw: int) -> PIL.Image.Image | torch.Tensor:
        with fixed_randomness(draw):
            return self.augmentation(image)


class ImagesOfEpochs(Dataset):
    """Images whose random numbers differ from epoch to epoch; what map-style and streamed images have in common."""

    def __init__(self):
        self._epoch = torch.tensor(0).share_memory_()  # workers that live through many epochs see it change, too

    @property
    def epoch(self) -> int:
        """Of order and augmentation, from 0; dataloader workers see it change."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Call it before the images of an epoch are asked for (see [`AugmentationEpoch`])."""
        self._epoch.fill_(epoch)


class ProcessedImages(ImagesOfEpochs):
    """
    Items `{"pixel_values": (channels, height, width), "labels": int}` from a dataset with `image` and `label`.

    The randomness of an augmentation depends on `seed`, epoch and index only. So a resumed run, another number of
    workers or of processes sees the same pictures. Whole batches are processed at once. Index `i + n * len(dataset)`
    is image `i` again with other random numbers, for samplers that repeat images.

    An image that cannot be decoded and need not be (see `unreadable`) is replaced by the next one of the dataset; in
    an evaluation set (`is_evaluation`), where no image may count twice, it becomes a black image with label -100.

    Args:
        dataset (`datasets.Dataset`): with columns `image` and `label`.
        image_processor, augmentation, unreadable, with_draws, max_pixels: see [`ImagePreparation`].
        seed (`int`, *optional*, defaults to 0): of the augmentation.
        is_evaluation (`bool`, *optional*, defaults to `False`): see above.

    Raises:
        UnreadableImageError: naming an image that cannot be decoded, unless `unreadable` lets it pass.
    """

    def __init__(
        self,
        dataset,
        image_processor,
        augmentation: Callable | None = None,
        seed: int = 0,
        unreadable: UnreadableImages | None = None,
        with_draws: bool = False,
        is_evaluation: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__()
        dataset = undecoded(dataset)
        self.dataset, self.seed, self.is_evaluation = dataset, seed, is_evaluation
        self.prepare = ImagePreparation(image_processor, augmentation, unreadable, with_draws, max_pixels)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        rows = self.dataset[[index % len(self) for index in indices]]
        images, labels = [], []
        for item, label, index in zip(rows["image"], rows["label"], indices, strict=True):
            image = self._decode(item, index)
            if image is None:
                image, label = self._instead_of(index)
            images.append(image)
            labels.append(label)
        return self.prepare(images, labels, [f"{self.seed}-{self.epoch}-{index}" for index in indices])

    def _decode(self, item, index: int) -> PIL.Image.Image | None:
        return self.prepare.decode(item, f"row {index % len(self)}")

    def _instead_of(self, index: int) -> tuple[PIL.Image.Image, int]:
        if self.is_evaluation:
            return PIL.Image.new("RGB", (1, 1)), LEFT_OUT
        for other in range(index + 1, index + len(self)):
            row = self.dataset[other % len(self)]
            image = self._decode(row["image"], other)
            if image is not None:
                return image, row["label"]
        raise OSError(f"No image of the dataset can be decoded. {self.prepare.unreadable.summary()}")


class RandomShift:
    """Augmentation: shift a picture by up to `padding` pixels in each direction; the edge colour fills the gap."""

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        from torchvision.transforms import RandomCrop

        return RandomCrop((image.height, image.width), padding=self.padding, padding_mode="edge")(image)


class AugmentationEpoch(TrainerCallback):
    """
    Tells images the epoch ([`ProcessedImages`], or any with `set_epoch`). The Trainer's dataloader does so in one
    process, but not in several.
    """

    def __init__(self, images):
        self.images = images

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.images.set_epoch(int((state.epoch or 0) + 1e-6))


def collate(items: list[Mapping]) -> dict[str, torch.Tensor]:
    """Batch of items: `pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def check_images(
    dataset: datasets.Dataset,
    limit: int = 50_000,
    unreadable: UnreadableImages | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """
    Read the header of every image (of `limit` evenly spaced ones, if there are more), without decoding pixels.

    Args:
        dataset (`datasets.Dataset`): with columns `image` and `label`.
        limit (`int`, *optional*, defaults to 50,000): images to look at.
        unreadable ([`~lambda_vit_hf.data.decoding.UnreadableImages`], *optional*):
            Notes files that are no images, and raises if they are too many; by default the first raises.
        max_pixels (`int`, *optional*): see [`~lambda_vit_hf.data.decoding.decode_image`].

    Raises:
        ValueError: naming the first files that are no images.
        UnreadableImageError: if `unreadable` says so.
    """
    dataset = undecoded(dataset)
    broken = []
    for index in evenly_spaced(len(dataset), limit):
        item, name = dataset[index]["image"], f"row {index}"
        if unreadable is not None and unreadable.on_error == "skip":
            unreadable.check(item, name, max_pixels)
            continue
        try:
            with open_image(item, max_pixels, name):
                pass
        except UnreadableImageError as error:
            broken.append(f"{image_name(item, name)} ({type(error.__cause__).__name__})")
    if broken:
        shown = ", ".join(broken[:5])
        raise ValueError(
            f"{len(broken)} files of the dataset are no readable images: {shown}. Remove or replace them."
        )
