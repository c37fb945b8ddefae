"""IDX files, the format of MNIST, Fashion-MNIST and similar datasets."""

import gzip
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import datasets
import PIL.Image
import torch
from torchvision.datasets.mnist import read_image_file, read_label_file


def load_idx(files: Sequence[str]) -> datasets.Dataset:
    """
    The images and labels of one split, in the format of http://yann.lecun.com/exdb/mnist.

    Args:
        files (`Sequence[str]`): one file of images (`...-idx3-ubyte`) and one of labels (`...-idx1-ubyte`), each with
            `.gz`, without, or both.

    Raises:
        ValueError: if a file is missing, of another format or cut short.
    """
    plain = {file.removesuffix(".gz"): file for file in sorted(files, reverse=True)}
    content = {}
    for kind, read in (("idx3", read_image_file), ("idx1", read_label_file)):
        found = [file for stem, file in plain.items() if kind in os.path.basename(stem)]
        if len(found) != 1:
            raise ValueError(f"Expected one {kind} file of a split, found {found} in {os.path.dirname(files[0])}.")
        content[kind] = _read(found[0], read)
    images, labels = content["idx3"], content["idx1"].tolist()
    if len(images) != len(labels):
        raise ValueError(f"{files[0]}: there are {len(images)} images, but {len(labels)} labels.")
    names = [str(number) for number in range(max(labels, default=-1) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [PIL.Image.fromarray(image) for image in images.numpy()]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def _read(file: str, read) -> torch.Tensor:
    try:
        if not file.endswith(".gz"):
            return read(file)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "idx")
            path.write_bytes(gzip.decompress(Path(file).read_bytes()))
            return read(str(path))
    # What torchvision asserts, and what follows where it does not look; and what gzip raises.
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is no IDX file of unsigned bytes, or is cut short.") from error
