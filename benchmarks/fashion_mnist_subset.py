"""A part of Fashion-MNIST's images, drawn at random with a fixed seed, in the format of the whole.

    python -m benchmarks.fashion_mnist_subset SOURCE TARGET --num_train 4000 --num_test 500

SOURCE holds the four IDX files, packed or not. TARGET gets four IDX files of fewer images, in their order.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lambda_vit_hf.data.folders import load_image_dataset


def draw_subset(source: Path, target: Path, num_train: int, num_test: int, seed: int = 0) -> None:
    """Write IDX files of `num_train` and `num_test` images of `source` into the folder `target`, which is made."""
    generator, splits = np.random.default_rng(seed), load_image_dataset(directory=source)
    target.mkdir(parents=True)
    for split, name, size in (("train", "train", num_train), ("validation", "t10k", num_test)):
        images = splits[split].select(np.sort(generator.permutation(len(splits[split]))[:size]))
        pixels = np.stack([np.asarray(image) for image in images["image"]])
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.array(images["label"], np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (target / f"{name}-{kind}-ubyte").write_bytes(header + values.tobytes())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--num_train", type=int, default=4000)
    parser.add_argument("--num_test", type=int, default=500)
    arguments = parser.parse_args(argv)
    draw_subset(arguments.source, arguments.target, arguments.num_train, arguments.num_test)


if __name__ == "__main__":
    main()
