"""The files of MNIST, Fashion-MNIST and their kin."""

import gzip
from pathlib import Path

import datasets
import numpy as np
import PIL.Image


def load_idx(directory: Path) -> dict[str, datasets.Dataset]:
    """
    Splits `train` and `validation` of the MNIST family, in the format of http://yann.lecun.com/exdb/mnist: big-endian
    sizes, then bytes.

    Args:
        directory (`Path`): with `train-images-idx3-ubyte`, `train-labels-...`, `t10k-...`, each with `.gz` or without.

    Raises:
        ValueError: if a file is missing, of another format or cut short.
    """
    splits = {}
    for split, prefix in (("train", "train"), ("validation", "t10k")):
        pixels, labels = (
            _read_idx(directory, f"{prefix}-{kind}*-ubyte*", ndim) for kind, ndim in (("images", 3), ("labels", 1))
        )
        if len(pixels) != len(labels):
            raise ValueError(f"{directory} has {len(pixels)} {split} images, but {len(labels)} labels.")
        names = [str(number) for number in range(int(labels.max()) + 1)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        images = [PIL.Image.fromarray(image) for image in pixels]
        splits[split] = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    return splits


def _read_idx(directory: Path, pattern: str, ndim: int) -> np.ndarray:
    files = sorted(directory.glob(pattern))
    if len(files) != 1:
        raise ValueError(f"Expected one file {pattern} in {directory}, found {[path.name for path in files]}.")
    content = files[0].read_bytes()
    if files[0].suffix == ".gz":
        content = gzip.decompress(content)
    header = 4 + 4 * ndim
    shape = np.frombuffer(content[4:header], dtype=">u4")
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) != header + int(shape.prod()):
        raise ValueError(f"{files[0]} is no IDX file of unsigned bytes in {ndim} dimensions, or is cut short.")
    return np.frombuffer(content[header:], dtype=np.uint8).reshape(shape)
