"""One image as DeiT sees it, augmented in training and cropped in evaluation, by timm's definitions."""

import dataclasses
import itertools
import math

import PIL.Image
import PIL.ImageOps
import torch


BICUBIC = PIL.Image.Resampling.BICUBIC.value


@dataclasses.dataclass(frozen=True)
class TrainAugmentation:
    """
    Random crop, flip, RandAugment, normalisation and random erasing: a PIL image becomes `(3, height, width)`.

    It draws from Python's, numpy's and torch's global random numbers and from nothing else: seed all three around a
    call ([`fixed_randomness`](calibration.py)) and the result is fixed.

    Args:
        size (`tuple[int, int]`): height and width of the result.
        mean, std (`tuple[float, ...]`): per channel, for pixels in [0, 1].
        auto_augment (`str`, *optional*): `timm`'s description, such as `"rand-m9-mstd0.5-inc1"`; `None` for none.
        color_jitter (`float`): brightness, contrast and saturation; `timm` leaves it out with RandAugment.
        random_erasing (`float`): probability, in [0, 1].
        random_erasing_mode (`str`): `"const"`, `"rand"` or `"pixel"` (noise in each pixel).
        interpolation (`str`): `"bilinear"`, `"bicubic"` or `"random"`.
        scale (`tuple[float, float]`): share of the image's area that the random crop takes.

    Source: `timm.data.create_transform`.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    auto_augment: str | None
    color_jitter: float
    random_erasing: float
    random_erasing_mode: str
    interpolation: str
    scale: tuple[float, float]

    def __post_init__(self):
        from timm.data import create_transform

        transform = create_transform(
            input_size=(3, *self.size),
            is_training=True,
            scale=self.scale,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            re_prob=self.random_erasing,
            re_mode=self.random_erasing_mode,
        )
        _allow_posterizing_to_black(transform)
        object.__setattr__(self, "_transform", transform)

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        """`image` in RGB; returns `(3, height, width)`, float32."""
        if image.mode != "RGB":
            raise ValueError(f"Augmentation needs an RGB image, got mode {image.mode!r}: convert it first.")
        return self._transform(image)


def _allow_posterizing_to_black(transform) -> None:
    # timm's policies may ask for 0 bits of each colour: black. Pillow gave that up to version 12; 13 refuses.
    from timm.data import auto_augment

    for stage in transform.transforms:
        groups = getattr(stage, "policy", [getattr(stage, "ops", [])])  # AutoAugment; RandAugment and AugMix
        for operation in itertools.chain.from_iterable(groups):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: PIL.Image.Image, bits_to_keep: int, **_) -> PIL.Image.Image:
    if bits_to_keep >= 8:
        return image
    return PIL.ImageOps.posterize(image, bits_to_keep) if bits_to_keep else PIL.Image.new(image.mode, image.size)


def deit_augmentation(
    image_processor,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.3,
    random_erasing: float = 0.25,
    random_erasing_mode: str = "pixel",
    interpolation: str = "bicubic",
    scale: tuple[float, float] = (0.08, 1.0),
) -> TrainAugmentation:
    """
    DeiT's augmentation with size, mean and std of an image processor. It takes the processor's place: the result is
    normalised already.

    Args:
        image_processor: a Hugging Face image processor with a fixed size (see [`output_size`]).
        auto_augment, color_jitter, random_erasing, random_erasing_mode, interpolation, scale:
            as in [`TrainAugmentation`]; defaults: DeiT's.

    Raises:
        ValueError: if the processor has no fixed size, or does not scale pixels to [0, 1].
    """
    factor = image_processor.rescale_factor if image_processor.do_rescale else None
    if factor is None or not math.isclose(factor, 1 / 255):
        raise ValueError(f"Pixels are scaled by 1/255 here, but the image processor scales by {factor}.")
    normalizes = image_processor.do_normalize
    return TrainAugmentation(
        size=output_size(image_processor),
        mean=tuple(image_processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
        std=tuple(image_processor.image_std) if normalizes else (1.0, 1.0, 1.0),
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        random_erasing=random_erasing,
        random_erasing_mode=random_erasing_mode,
        interpolation=interpolation,
        scale=tuple(scale),
    )


def output_size(image_processor) -> tuple[int, int]:
    """
    Height and width of what an image processor returns.

    Raises:
        ValueError: if it is not the same for every image (`{"shortest_edge": ...}` without a crop).
    """
    crops = getattr(image_processor, "do_center_crop", None)
    size = image_processor.crop_size if crops else image_processor.size
    if not (size and size.height and size.width):
        raise ValueError(
            f"The image processor returns images of no fixed size (size {image_processor.size}): give it"
            ' {"height": ..., "width": ...}, or a centre crop.'
        )
    return size.height, size.width


def with_evaluation_crop(image_processor, crop_pct: float = 0.875):
    """
    A copy of an image processor that evaluates as DeiT: the short side is resized to `size / crop_pct` (224: 256),
    bicubic, and the centre is cropped. Saved with a model, it makes `pipeline()` do the same.

    Torchvision resizes tensors here and Pillow images in `timm`: single pixels differ by one of 255 levels. Where the
    margin is 4n + 3 pixels, the crop lies one pixel further left or up than `timm`'s, which rounds half to even.

    Args:
        image_processor: a Hugging Face image processor for square images, with or without a crop.
        crop_pct (`float`, *optional*, defaults to 0.875): side of the crop by the resized short side, in (0, 1].

    Raises:
        ValueError: if `crop_pct` is out of range, or the images are not square.

    Source: `timm.data.create_transform(is_training=False)`.
    """
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"`crop_pct` must be in (0, 1], got {crop_pct}.")
    height, width = output_size(image_processor)
    if height != width:
        raise ValueError(f"The evaluation crop is for square images, got {height} x {width}.")
    settings = {
        **image_processor.to_dict(),
        "do_resize": True,
        "size": {"shortest_edge": math.floor(height / crop_pct)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    return type(image_processor).from_dict(settings)
