"""Image datasets: what is read, and what is refused before training."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from lambda_vit_hf.data.decoding import UnreadableImageError, UnreadableImages
from lambda_vit_hf.data.folders import (
    as_stream,
    check_images,
    find_columns,
    load_digits,
    load_image_dataset,
    sizes_of_stream,
)
from tests.miniature_imagenet import CLASSES, write_class_folders, write_parquet


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it has read: no test may find the folder of another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev", "test"])
def test_a_folder_with_validation_is_read_as_it_is(tmp_path, validation):
    folder = image_folder(tmp_path / "pets", "train/cat", "train/dog")
    image_folder(folder / validation, "cat", "dog", images=2)
    dataset = load_image_dataset(directory=str(folder))
    assert {name: len(split) for name, split in dataset.items()} == {"train": 10, "validation": 4}
    assert all(seen == named for split in dataset.values() for seen, named in colour_names(split))


def test_validation_is_preferred_to_test(tmp_path):
    folder = image_folder(tmp_path / "pets", "train/cat", "train/dog", "test/cat", "test/dog")
    image_folder(folder / "validation", "cat", "dog", images=3)
    assert len(load_image_dataset(directory=folder)["validation"]) == 6


def test_a_folder_above_may_be_called_test(tmp_path):
    folder = image_folder(tmp_path / "test" / "pets", "cat", "dog")
    assert set(load_image_dataset(directory=folder)) == {"train", "validation"}


def test_a_class_may_begin_with_the_name_of_a_split(tmp_path):
    # Places365 has such classes. `datasets` takes `train_station` for the split `train`, and drops every other class.
    folder = image_folder(tmp_path / "places", "airport", "bus", "train_station", "train_track")
    dataset = load_image_dataset(directory=folder)
    assert dataset["train"].features["label"].names == ["airport", "bus", "train_station", "train_track"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_image_dataset(directory=tmp_path / "no-such-folder")


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "nothing-here").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="nothing-here"):
        load_image_dataset(directory=tmp_path / "nothing-here")


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev", "test"])
def test_a_class_only_in_validation_is_named(tmp_path, validation):
    # imagefolder merges the classes of both: `dog` would be label 2, in a model for cats and dogs.
    folder = image_folder(tmp_path / "pets", "train/cat", "train/dog")
    image_folder(folder / validation, "cat", "cow", "dog")
    with pytest.raises(ValueError, match="cow"):
        load_image_dataset(directory=folder)


def test_a_class_only_in_train_is_named(tmp_path):
    folder = image_folder(tmp_path / "pets", "train/cat", "train/cow", "train/dog", "validation/cat", "validation/dog")
    with pytest.raises(ValueError, match="cow"):
        load_image_dataset(directory=folder)


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


def test_a_parquet_file_without_validation_is_split(tmp_path, digits):
    digits["train"].select(range(200)).to_parquet(tmp_path / "train.parquet")
    assert {name: len(split) for name, split in load_image_dataset(directory=tmp_path).items()} == {
        "train": 160,
        "validation": 40,
    }


@pytest.mark.parametrize("folder", ["retrieval", "latest"])
def test_letters_inside_a_folder_name_do_not_make_a_split(tmp_path, digits, folder):
    # "retrieval" contains "val", and "latest" contains "test".
    (tmp_path / folder).mkdir()
    digits["train"].select(range(200)).to_parquet(tmp_path / folder / "train-00000-of-00001.parquet")
    assert len(load_image_dataset(directory=tmp_path)["train"]) == 160


def test_columns_are_found_by_type_and_renamed(tmp_path, digits):
    renamed = digits["train"].select(range(200)).rename_columns({"image": "img", "label": "fine_label"})
    renamed.add_column("note", ["x"] * 200).to_parquet(tmp_path / "train.parquet")
    assert sorted(load_image_dataset(directory=tmp_path)["train"].features) == ["image", "label"]


@pytest.mark.parametrize("other", [("cow", "dog"), ("dog", "cat")], ids=["other class", "other order"])
def test_splits_with_different_classes_are_refused(tmp_path, other):
    # `datasets` reads all splits with the features of the first: a cow would be counted as a cat.
    image = PIL.Image.new("L", (8, 8))
    labelled([image] * 4, [0, 1, 0, 1], names=("cat", "dog")).to_parquet(tmp_path / "train.parquet")
    labelled([image] * 4, [0, 1, 0, 1], names=other).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="classes of the splits differ"):
        load_image_dataset(directory=tmp_path)


@pytest.mark.parametrize("lacking", ["Image", "ClassLabel"])
def test_a_dataset_without_the_needed_column_lists_its_columns(lacking):
    features = {
        "picture": datasets.Image() if lacking != "Image" else datasets.Value("string"),
        "species": datasets.ClassLabel(names=["cat"]) if lacking != "ClassLabel" else datasets.Value("string"),
    }
    dataset = datasets.Dataset.from_dict({"picture": [], "species": []}, features=datasets.Features(features))
    with pytest.raises(ValueError, match=f"one {lacking} column.*picture.*species"):
        find_columns(dataset)


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
    dataset = labelled([good, {"bytes": b"not a picture", "path": None}, good, good])
    check_images(dataset, limit=2)  # looks at rows 0 and 2
    with pytest.raises(ValueError, match="row 1"):
        check_images(dataset, limit=4)


@pytest.mark.parametrize("label", [7, -1, None])
def test_a_label_outside_the_classes_is_named(label):
    # On a GPU it would be a device assert, far from its cause.
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [PIL.Image.new("L", (8, 8))] * 2, "label": [0, label]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    # `datasets` checks labels where it encodes them, but not those of a table it is given.
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    dataset = datasets.Dataset(dataset.data, info=datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match=rf"\[{label}\].*2 classes"):
        check_images(dataset)


def test_columns_can_be_named_where_there_are_several():
    labels = {"fine": datasets.ClassLabel(names=["a", "b"]), "coarse": datasets.ClassLabel(names=["c"])}
    features = datasets.Features({"img": datasets.Image(), **labels})
    empty = datasets.Dataset.from_dict({"img": [], "fine": [], "coarse": []}, features=features)
    assert find_columns(empty, label_column="fine") == ("img", "fine")
    with pytest.raises(ValueError, match="`label_column` names the one to use"):
        find_columns(empty)
    with pytest.raises(ValueError, match="'thin'"):
        find_columns(empty, label_column="thin")


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


def write_idx(folder: Path, prefix: str, pixels: np.ndarray, labels: np.ndarray, suffix: str = "") -> None:
    import gzip

    folder.mkdir(exist_ok=True)
    for kind, array in (("images", pixels), ("labels", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
        content = header + array.astype(np.uint8).tobytes()
        path = folder / f"{prefix}-{kind}-idx{array.ndim}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if suffix else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_files_of_mnist_are_read(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4))
    labels = np.array([0, 1, 2, 2, 1, 0])
    write_idx(tmp_path, "train", pixels, labels, suffix)
    write_idx(tmp_path, "t10k", pixels[::-1], labels[::-1], suffix)
    loaded = load_image_dataset(directory=tmp_path)
    assert loaded["train"]["label"] == labels.tolist()
    assert loaded["train"].features["label"].names == ["0", "1", "2"]
    for split, expected in (("train", pixels), ("validation", pixels[::-1])):
        assert np.array_equal(np.stack([np.asarray(image) for image in loaded[split]["image"]]), expected)


def test_a_file_of_mnist_that_is_cut_short_is_named(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path, prefix, np.zeros((3, 4, 4)), np.array([0, 1, 1]))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.*cut short"):
        load_image_dataset(directory=tmp_path)


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


def test_a_repository_is_streamed_with_the_number_of_images_on_its_page(parquet, tmp_path):
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
