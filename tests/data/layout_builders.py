"""Folders of images for tests, from a few words."""

import colorsys
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas
import PIL.Image


KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF"}


def colour(name: str) -> tuple[int, int, int]:
    """Of the images of a class."""
    return tuple(int(255 * part) for part in colorsys.hsv_to_rgb(zlib.crc32(os.fsencode(str(name))) % 997 / 997, 1, 1))


def encoded(name: str, suffix: str = ".png") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour(name)).save(file, KINDS[suffix.lower()])
    return file.getvalue()


def tree(*paths: str) -> Callable[[Path], None]:
    """
    Files and folders: `train/cat:3` three images of the class `cat`; `train/cat/` an empty folder; `a -> b` a link to
    a file or folder below the root; any other path a file, an image by its suffix, else text.
    """

    def build(folder: Path) -> None:
        for path in paths:
            if " -> " in path:
                link, target = path.split(" -> ")
                (folder / link).parent.mkdir(parents=True, exist_ok=True)
                (folder / link).symlink_to(folder / target)
            elif path.endswith("/"):
                (folder / path).mkdir(parents=True)
            else:
                name, _, count = path.rpartition(":")
                for file in [folder / name / f"{n}.png" for n in range(int(count))] if name else [folder / path]:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    is_image = file.suffix.lower() in KINDS
                    file.write_bytes(encoded(file.parent.name, file.suffix) if is_image else b"not a picture")

    return build


def table(**files) -> Callable[[Path], None]:
    """
    Parquet files by name (`__` for `/`): lists of labels, or whole columns; an image of its label's colour each.
    """

    def build(folder: Path) -> None:
        for name, content in files.items():
            path = folder / f"{name.replace('__', '/')}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
                continue
            columns = content if isinstance(content, dict) else {"label": content}
            first = next(iter(columns.values()))
            features = {"image": datasets.Image()} if "image" not in columns else {}
            rows = {"image": [{"bytes": encoded(label), "path": None} for label in first]} if features else {}
            for column, values in columns.items():
                rows[column] = values.values if isinstance(values, Named) else values
                if isinstance(values, Named):
                    features[column] = values.feature
            whole = datasets.Dataset.from_dict(rows)
            datasets.Dataset.from_dict(rows, features=datasets.Features({**whole.features, **features})).to_parquet(
                path
            )

    return build


class Named(list):
    """Labels by name, in a column of the type `ClassLabel`."""

    def __init__(self, labels, names=None):
        super().__init__(labels)
        self.feature = datasets.ClassLabel(names=names or sorted(set(labels)))
        self.values = [label if isinstance(label, int) else self.feature.str2int(label) for label in labels]


class Images(Named):
    """A column of images."""

    def __init__(self, labels):
        list.__init__(self, labels)
        self.feature, self.values = datasets.Image(), [{"bytes": encoded(label), "path": None} for label in labels]


def from_pandas(folder: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        labels = ["cat", "dog"] * (count // 2)
        images = [{"bytes": encoded(label), "path": f"{n}.png"} for n, label in enumerate(labels)]
        pandas.DataFrame({"image": images, "label": labels}).to_parquet(folder / f"{split}.parquet")


def out_of_range(folder: Path) -> None:
    table(train=Named(["cat", "dog"] * 4))(folder)
    rows = {"image": [{"bytes": encoded("cat"), "path": None}] * 2, "label": [0, -1]}  # as ImageNet's test split
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")


def described(*splits: str, columns=("file_name", "label"), extra=(), left_out=(), kind="csv", inside="") -> Callable:
    """Images beside a metadata file, in each of the folders."""

    def build(folder: Path) -> None:
        for split in splits:
            rows = []
            for n, label in enumerate(["cat", "dog"] * 5):
                name = f"{inside}{n}.png"
                (folder / split / inside).mkdir(parents=True, exist_ok=True)
                (folder / split / name).write_bytes(encoded(label))
                rows.append((name, label))
            rows = [row for row in rows if row[0] not in left_out] + [(name, "cat") for name in extra]
            lines = [",".join(columns), *(",".join(row) for row in rows)]
            if kind == "jsonl":
                lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
            (folder / split / f"metadata.{kind}").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return build


def idx(folder: Path, *, cut: int = 0, gz: bool = True, both: bool = False, without: str = "") -> None:
    for prefix, labels in (("train", [0, 1, 1, 0]), ("t10k", [0, 1])):
        pixels = np.full((len(labels), 8, 8), 9)
        for kind, array in (("images", pixels), ("labels", np.array(labels))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
            content = (content + array.astype(np.uint8).tobytes())[: -cut or None]
            name = f"{prefix}-{kind}-idx{array.ndim}-ubyte"
            if without and without in name:
                continue
            if gz or both:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            if both or not gz:
                (folder / name).write_bytes(content)


def all_of(*builders: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [build(folder) for build in builders]
