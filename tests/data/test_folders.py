"""Image datasets: what is read, and what is refused before training."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest

from lambda_vit_hf.data.dataset import check_images
from lambda_vit_hf.data.decoding import UnreadableImageError, UnreadableImages
from lambda_vit_hf.data.folders import (
    load_digits,
    load_image_dataset,
)
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.data.shards import as_stream, sizes_of_stream
from tests.miniature_imagenet import CLASSES, write_class_folders, write_parquet


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it has read: no test may find the folder of another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def digits():
    return load_digits()


COLOURS = {"cat": (200, 0, 0), "cow": (0, 200, 0), "dog": (0, 0, 200)}


def image_folder(root: Path, *class_folders: str, images: int = 5) -> Path:
    """One-coloured PNGs, the colour by the last word of the folder's name."""
    for name in class_folders:
        (root / name).mkdir(parents=True)
        colour = COLOURS.get(name.split("/")[-1], (90, 90, 90))
        for index in range(images):
            PIL.Image.new("RGB", (8, 8), colour).save(root / name / f"{index}.png")
    return root


def labelled(images: list, labels: list | None = None, names=("a", "b")) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    labels = [0] * len(images) if labels is None else labels
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def colour_names(dataset: datasets.Dataset) -> list[tuple[str, str]]:
    """For each row, the class its colour stands for and the class its label names."""
    by_colour = {colour: name for name, colour in COLOURS.items()}
    names = dataset.features["label"].names
    return [(by_colour[row["image"].getpixel((0, 0))], names[row["label"]]) for row in dataset]


# Digits


def test_digits_are_1797_labelled_images(digits):
    assert {name: len(split) for name, split in digits.items()} == {"train": 1437, "validation": 360}
    for split in digits.values():
        assert isinstance(split.features["image"], datasets.Image)
        assert split.features["label"] == datasets.ClassLabel(names=list("0123456789"))
    image = digits["train"][0]["image"]
    assert (image.size, image.mode) == ((8, 8), "L")


def test_digits_use_the_whole_gray_range(digits):
    # scikit-learn counts 0 to 16: unscaled, every picture would be nearly black.
    pixels = np.stack([np.asarray(image) for image in digits["validation"]["image"]])
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_digits_are_split_alike_in_every_class(digits):
    train, validation = (Counter(digits[split]["label"]) for split in ("train", "validation"))
    shares = {digit: validation[digit] / (train[digit] + validation[digit]) for digit in range(10)}
    assert all(abs(share - 0.2) < 0.01 for share in shares.values()), f"share of validation by class: {shares}"


def test_digits_are_the_same_on_every_call(digits):
    again = load_image_dataset("digits")
    for split in digits:
        assert again[split]["label"] == digits[split]["label"]
        first, second = (np.stack([np.asarray(image) for image in d[split]["image"]]) for d in (again, digits))
        assert np.array_equal(first, second), f"the images of {split} differ between two calls"


def test_another_seed_is_another_split(digits):
    assert load_digits(seed=1)["validation"]["label"] != digits["validation"]["label"]


# Folders of images


def test_a_folder_without_validation_gives_a_fifth_of_its_images_to_it(tmp_path):
    dataset = load_image_dataset(directory=image_folder(tmp_path / "pets", "cat", "dog", images=10))
    assert Counter(dataset["train"]["label"]) == {0: 8, 1: 8}
    assert Counter(dataset["validation"]["label"]) == {0: 2, 1: 2}
    for split in dataset.values():
        assert all(seen == named for seen, named in colour_names(split)), "an image has another class's label"


def test_a_folder_above_may_be_called_test(tmp_path):
    folder = image_folder(tmp_path / "test" / "pets", "cat", "dog")
    assert set(load_image_dataset(directory=folder)) == {"train", "validation"}


@pytest.mark.parametrize("given", [{}, {"name": "digits", "directory": "somewhere"}])
def test_a_name_and_a_folder_exclude_each_other(given):
    with pytest.raises(ValueError, match="exactly one"):
        load_image_dataset(**given)


# Parquet files


def test_parquet_files_are_read_by_split(tmp_path, digits):
    (tmp_path / "digits" / "data").mkdir(parents=True)
    shards = {"train-00000-of-00002": (0, 30), "train-00001-of-00002": (30, 70), "validation-00000-of-00001": (70, 90)}
    for name, (start, end) in shards.items():
        digits["train"].select(range(start, end)).to_parquet(tmp_path / "digits" / "data" / f"{name}.parquet")
    dataset = load_image_dataset(directory=tmp_path / "digits")
    assert dataset["train"]["label"] == digits["train"][:70]["label"]
    assert dataset["validation"]["label"] == digits["train"][70:90]["label"]
    assert np.array_equal(dataset["train"][69]["image"], digits["train"][69]["image"])


@pytest.mark.parametrize("folder", ["retrieval", "latest"])
def test_letters_inside_a_folder_name_do_not_make_a_split(tmp_path, digits, folder):
    # "retrieval" contains "val", and "latest" contains "test".
    (tmp_path / folder).mkdir()
    digits["train"].select(range(200)).to_parquet(tmp_path / folder / "train-00000-of-00001.parquet")
    assert len(load_image_dataset(directory=tmp_path)["train"]) == 160


# Files that are no images


def test_a_text_file_that_ends_in_jpg_is_named(tmp_path):
    folder = image_folder(tmp_path / "pets", "train/cat", "train/dog", "validation/cat", "validation/dog")
    (folder / "train" / "dog" / "readme.jpg").write_text("not a picture")
    dataset = load_image_dataset(directory=folder)
    check_images(dataset["validation"])
    with pytest.raises(ValueError, match=r"^1 .*readme\.jpg"):
        check_images(dataset["train"])


def test_an_unreadable_image_without_a_file_is_named_by_its_row():
    good = PIL.Image.new("L", (8, 8))
    for bad in ({"bytes": b"not a picture", "path": None}, None):
        with pytest.raises(ValueError, match="row 2"):
            check_images(labelled([good, good, bad]))


def test_a_decompression_bomb_is_refused(monkeypatch):
    dataset = labelled([PIL.Image.new("L", (8, 8))])
    # Pillow raises from twice the limit on.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 8 * 8 // 2 - 1)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        check_images(dataset)


def test_no_more_images_than_the_limit_are_looked_at():
    good = PIL.Image.new("L", (8, 8))
    rows = [good] * 6
    left_out = next(row for row in range(6) if row not in evenly_spaced(6, 2))
    rows[left_out] = {"bytes": b"not a picture", "path": None}
    check_images(labelled(rows), limit=2)
    with pytest.raises(ValueError, match=f"row {left_out}"):
        check_images(labelled(rows), limit=6)


def test_broken_files_can_be_noted_instead():
    good = PIL.Image.new("L", (8, 8))
    bad = {"bytes": b"not a picture", "path": None}
    unreadable = UnreadableImages("skip")
    check_images(labelled([good, bad] + [good] * 9), unreadable=unreadable)
    assert unreadable.names == ["row 1"]
    with pytest.raises(UnreadableImageError, match="11 images could not be decoded"):
        check_images(labelled([bad] * 20), unreadable=UnreadableImages("skip"))


def test_a_limit_of_pixels_can_be_given():
    with pytest.raises(ValueError, match="DecompressionBombError"):
        check_images(labelled([PIL.Image.new("L", (8, 8))]), max_pixels=63)


# The MNIST family


def test_the_pixels_of_mnist_files_are_kept(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4)).astype(np.uint8)
    for prefix in ("train", "t10k"):
        for kind, array in (("images", pixels), ("labels", np.array([0, 1, 2, 2, 1, 0], dtype=np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
            (tmp_path / f"{prefix}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())
    train = load_image_dataset(directory=tmp_path)["train"]
    assert train["label"] == [0, 1, 2, 2, 1, 0]
    assert np.array_equal(np.stack([np.asarray(image) for image in train["image"]]), pixels)


# Streams


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), train_per_class=3, validation_per_class=1, truncated=1)


def rows_of(stream) -> list[tuple]:
    return sorted((row["image"]["path"] or row["image"]["bytes"], row["label"]) for row in stream)


def undecoded_rows(dataset) -> list[tuple]:
    return rows_of(dataset.cast_column("image", datasets.Image(decode=False)))


def test_parquet_files_are_streamed_undecoded(parquet):
    whole, loaded = load_image_dataset(directory=parquet), load_image_dataset(directory=parquet, streaming=True)
    assert isinstance(loaded["train"], datasets.IterableDataset) and isinstance(loaded["validation"], datasets.Dataset)
    assert loaded["train"].features["label"].names == loaded["validation"].features["label"].names == list(CLASSES)
    # One image of them is cut off: decoding anywhere would raise.
    assert rows_of(loaded["train"]) == undecoded_rows(whole["train"])
    assert sizes_of_stream(loaded["train"]) == (60, [15, 15, 15, 15])


def test_renaming_the_columns_of_a_stream_decodes_nothing(parquet, tmp_path):
    for split in ("train", "validation"):
        files = {split: [str(path) for path in sorted(parquet.glob(f"{split}*"))]}
        part = datasets.load_dataset("parquet", data_files=files)[split]
        part = part.rename_columns({"image": "img", "label": "fine"}).add_column("note", ["x"] * len(part))
        part.to_parquet(tmp_path / f"{split}.parquet")
    stream = load_image_dataset(directory=tmp_path, streaming=True)["train"]
    assert rows_of(stream) == undecoded_rows(load_image_dataset(directory=parquet)["train"])


def test_a_folder_is_streamed_in_mixed_order(tmp_path):
    folder = write_class_folders(tmp_path / "images", train_per_class=4, validation_per_class=1)
    whole, loaded = load_image_dataset(directory=folder), load_image_dataset(directory=folder, streaming=True)
    assert rows_of(loaded["train"]) == undecoded_rows(whole["train"])
    labels = [row["label"] for row in loaded["train"]]
    assert len(set(labels[:16])) > 8, f"classes come one after the other: {labels[:16]}"
    assert labels == [row["label"] for row in load_image_dataset(directory=folder, streaming=True)["train"]]
    num_images, sizes = sizes_of_stream(loaded["train"])
    assert num_images == sum(sizes) == 80 and len(sizes) == loaded["train"].num_shards > 1


def test_sizes_of_shards_are_those_found_by_reading(digits):
    stream = as_stream(digits["validation"], num_shards=7)
    counted = [len(list(stream.shard(7, index))) for index in range(7)]
    assert sizes_of_stream(stream) == (360, counted)


def test_a_repository_is_streamed_with_the_number_of_images_on_its_page(parquet, tmp_path, monkeypatch):
    # A folder in the place of the Hub.
    monkeypatch.setattr("lambda_vit_hf.data.folders.os", SimpleNamespace(path=SimpleNamespace(isdir=lambda _: False)))
    repository = tmp_path / "repository"
    repository.mkdir()
    for path in parquet.iterdir():
        (repository / path.name).write_bytes(path.read_bytes())
    page = "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 60\n    num_bytes: 1\n---\n"
    (repository / "README.md").write_text(page)
    for _ in range(2):  # the second time from the cache
        loaded = load_image_dataset(name=str(repository), streaming=True)
        assert sizes_of_stream(loaded["train"]) == (60, None)
        assert isinstance(loaded["validation"], datasets.Dataset)
        assert sorted(loaded["validation"]["label"]) == list(range(20))
        assert loaded["validation"][0]["image"].size[0] >= 160


def test_a_repository_whose_splits_datasets_does_not_know_is_refused(tmp_path, monkeypatch):
    image_folder(tmp_path / "pets", "Training/cat", "Training/dog", "Testing/cat", "Testing/dog")
    monkeypatch.setattr("lambda_vit_hf.data.folders.os", SimpleNamespace(path=SimpleNamespace(isdir=lambda _: False)))
    with pytest.raises(ValueError, match=r"Testing/cat/0.png in its split train.*`dataset_dir`"):
        load_image_dataset(name=str(tmp_path / "pets"))


def test_a_stream_without_validation_is_refused(parquet, tmp_path):
    for path in parquet.glob("train*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="stream needs a `validation` split"):
        load_image_dataset(directory=tmp_path, streaming=True)
    folder = write_class_folders(tmp_path / "folders", train_per_class=5, validation_per_class=1)
    assert set(load_image_dataset(directory=folder / "train", streaming=True)) == {"train", "validation"}


def test_a_stream_of_unknown_size_says_so(digits):
    stream = digits["validation"].to_iterable_dataset(num_shards=2)
    assert sizes_of_stream(stream) == (None, None)
