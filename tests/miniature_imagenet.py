"""A miniature ImageNet: 20 classes of small photographs' sizes and oddities, as parquet files or as class folders."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image


CLASSES = (
    "ant bee cat cow deer dog duck eel emu fox frog goat hare hawk ibex lynx mole newt seal wolf".split()
)  # fmt: skip
KINDS = ("rgb", "rgb", "gray", "cmyk", "rotated", "palette", "sixteen_bit", "rgb")
ORIENTATION = 0x0112


def miniature_images(split: str, images_per_class: int, truncated: int = 0) -> Iterator[tuple[int, str, bytes]]:
    """
    Label, file name and content of each image, class after class.

    A class is a colour and a direction of stripes. The kinds take turns: RGB, gray and CMYK JPEGs, one turned by EXIF
    data, a palette PNG, a 16-bit gray PNG; sides of 160 to 288 pixels. The first `truncated` RGB images are cut off.
    """
    for label, name in enumerate(CLASSES):
        for index in range(images_per_class):
            kind = KINDS[(label + index) % len(KINDS)]
            generator = np.random.default_rng([label, index, split == "train"])
            height, width = (int(side) for side in generator.integers(160, 289, 2))
            content = _encode(_picture(label, height, width, generator), kind)
            if kind == "rgb" and truncated > 0:
                content, truncated = content[: len(content) // 2], truncated - 1
            suffix = "png" if kind in ("palette", "sixteen_bit") else "jpg"
            yield label, f"{name}_{index:03d}_{kind}.{suffix}", content


def _picture(label: int, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    angle = np.pi * label / len(CLASSES)
    stripes = 0.5 + 0.5 * np.sin((np.cos(angle) * x + np.sin(angle) * y) / 8 + generator.uniform(0, 6))
    colour = np.array([label % 3, label // 3 % 3, label // 9]) / 2
    picture = 0.5 * stripes[..., None] + 0.4 * colour + generator.uniform(0, 0.1, (height, width, 1))
    return (255 * picture).clip(0, 255).astype(np.uint8)


def _encode(pixels: np.ndarray, kind: str) -> bytes:
    image, options = PIL.Image.fromarray(pixels), {"format": "JPEG", "quality": 85}
    if kind == "gray":
        image = image.convert("L")
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "rotated":
        exif = PIL.Image.Exif()
        exif[ORIENTATION] = 6
        image, options["exif"] = image.transpose(PIL.Image.Transpose.ROTATE_90), exif
    elif kind == "palette":
        image, options = image.quantize(32, method=PIL.Image.Quantize.FASTOCTREE), {"format": "PNG"}
    elif kind == "sixteen_bit":
        image, options = PIL.Image.fromarray(pixels[..., 1].astype(np.uint16) * 257), {"format": "PNG"}
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def write_parquet(
    folder: Path, train_per_class: int = 10, validation_per_class: int = 4, num_shards: int = 4, truncated: int = 0
) -> Path:
    """`train-*.parquet` in `num_shards` files, in random order, and one `validation-*.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    plan = (("train", train_per_class, num_shards, truncated), ("validation", validation_per_class, 1, 0))
    for split, per_class, shards, cut_off in plan:
        rows = list(miniature_images(split, per_class, cut_off))
        random.Random(0).shuffle(rows)
        images = [{"bytes": content, "path": name} for _, name, content in rows]
        whole = datasets.Dataset.from_dict({"image": images, "label": [label for label, *_ in rows]}, features)
        for index in range(shards):
            whole.shard(shards, index).to_parquet(folder / f"{split}-{index:05d}-of-{shards:05d}.parquet")
    return folder


def write_class_folders(
    folder: Path, train_per_class: int = 10, validation_per_class: int = 4, truncated: int = 0
) -> Path:
    """`train/<class>/<file>` and `validation/<class>/<file>`."""
    for split, per_class, cut_off in (("train", train_per_class, truncated), ("validation", validation_per_class, 0)):
        for label, name, content in miniature_images(split, per_class, cut_off):
            path = folder / split / CLASSES[label] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder
