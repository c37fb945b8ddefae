"""Crops of photographs, for trainings without labels: a small set of natural images from a few large ones.

    python -m benchmarks.photograph_crops /usr/share/backgrounds outputs/crops

The photographs (Debian's `mate-backgrounds` and `ukui-wallpapers` have three dozen) are shuffled and dealt out whole:
no photograph has crops in both `train/` and `validation/`, not in another resolution either. A crop is a square at a
random place, a quarter to the whole of the shorter side, resized to `--size` pixels. The same seed writes the same
files.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from lambda_vit_hf.data.folders import load_image_dataset


def write_crops(
    source: Path, target: Path, train: int, validation: int, size: int = 160, held_out: float = 0.2, seed: int = 0
) -> dict[str, int]:
    """How many photographs each split is of. `train` and `validation` are numbers of crops."""
    generator = np.random.default_rng(seed)
    photographs = load_image_dataset(train_dir=source, seed=seed, labelled=False)
    photographs = without_copies(row["image"].convert("RGB") for split in photographs.values() for row in split)
    photographs = [photographs[index] for index in generator.permutation(len(photographs))]
    num_held_out = max(1, round(held_out * len(photographs)))
    parts = {"train": (photographs[num_held_out:], train), "validation": (photographs[:num_held_out], validation)}
    for split, (images, count) in parts.items():
        (target / split).mkdir(parents=True)
        for number in range(count):
            crop = random_crop(images[number % len(images)], size, generator)
            crop.save(target / split / f"{number:05}.jpg", quality=95)
    return {split: len(images) for split, (images, _) in parts.items()}


def without_copies(images: Iterable[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """One of each picture that is there in several resolutions: their 8 x 8 pixels differ by less than 4 of 255."""
    kept: dict[bytes, PIL.Image.Image] = {}
    for image in images:
        small = np.asarray(image.resize((8, 8), PIL.Image.Resampling.BOX), dtype=np.int16)
        if all(np.abs(small - np.frombuffer(other, np.int16).reshape(8, 8, 3)).mean() >= 4 for other in kept):
            kept[small.tobytes()] = image
    return list(kept.values())


def random_crop(image: PIL.Image.Image, size: int, generator: np.random.Generator) -> PIL.Image.Image:
    side = int(min(image.size) * generator.uniform(0.25, 1.0))
    left, top = (int(generator.integers(0, length - side + 1)) for length in image.size)
    return image.resize((size, size), PIL.Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photograph_crops", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", type=Path, help="folder of photographs, in folders of any depth")
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument("--train", type=int, default=8000, help="crops to train on (8000)")
    parser.add_argument("--validation", type=int, default=500, help="crops of other photographs (500)")
    parser.add_argument("--size", type=int, default=160, help="height and width in pixels (160)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    counts = write_crops(**vars(arguments))
    print(", ".join(f"{split}: {count} photographs" for split, count in counts.items()))


if __name__ == "__main__":
    main()
