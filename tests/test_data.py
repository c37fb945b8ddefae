"""Image datasets: what is read, what is refused before training, and augmentation that can be repeated."""

import random
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from lambda_vit_hf.data import (
    ProcessedImages,
    RandomShift,
    check_images,
    collate,
    find_columns,
    load_digits,
    load_image_dataset,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it has read: no test may find the folder of another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture
def processor():
    """Leaves pixel values readable: 0 to 1, 8 x 8."""
    return ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)


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


# Processing


def random_colour(image: PIL.Image.Image) -> PIL.Image.Image:
    """An augmentation that draws from all three generators that augmentations use."""
    colour = (random.randrange(256), int(np.random.randint(256)), int(torch.randint(256, ())))
    return PIL.Image.new("RGB", image.size, colour)


@pytest.fixture
def augmented(processor):
    """Twelve images whose label is their index, drawn anew at each access."""
    dataset = labelled([PIL.Image.new("L", (8, 8))] * 12, list(range(12)), names=[f"{i}" for i in range(12)])
    return lambda seed=0: ProcessedImages(dataset, processor, random_colour, seed)


def test_augmentation_is_the_same_in_any_order_and_batch(augmented):
    images = augmented()
    one_by_one = [images[index]["pixel_values"] for index in range(len(images))]
    order = [7, 2, 11, 0, 5]
    for index, item in zip(order, augmented().__getitems__(order), strict=True):
        assert torch.equal(item["pixel_values"], one_by_one[index]), f"image {index} depends on order or batch"
    torch.manual_seed(99)
    for batch in DataLoader(augmented(), batch_size=5, shuffle=True, collate_fn=collate):
        for pixel_values, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            assert torch.equal(pixel_values, one_by_one[label]), f"image {label} depends on the shuffling"


def test_augmentation_differs_between_images_epochs_and_seeds(augmented):
    images, other_seed = augmented(), augmented(seed=1)
    first_epoch = torch.stack([item["pixel_values"] for item in images.__getitems__(list(range(12)))])
    assert len(first_epoch.flatten(1).unique(dim=0)) == 12, "two images were augmented alike"
    other_run = torch.stack([item["pixel_values"] for item in other_seed.__getitems__(list(range(12)))])
    images.set_epoch(1)
    second_epoch = torch.stack([item["pixel_values"] for item in images.__getitems__(list(range(12)))])
    for other in (second_epoch, other_run):
        same = (other == first_epoch).flatten(1).all(dim=1)
        assert not same.any(), f"images {same.nonzero().flatten().tolist()} are augmented as before"
    images.set_epoch(0)
    assert torch.equal(images[3]["pixel_values"], first_epoch[3]), "going back to an epoch gives other images"


def test_augmentation_leaves_the_global_random_numbers_alone(augmented):
    images = augmented()

    def draw(look_at_images: bool):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        if look_at_images:
            images.__getitems__([0, 1, 2])
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(look_at_images=True) == draw(look_at_images=False)


def test_without_augmentation_images_are_only_processed(processor):
    image = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    item = ProcessedImages(labelled([image], [1]), processor)[0]
    assert item["labels"] == 1
    expected = torch.arange(64).reshape(1, 8, 8).expand(3, 8, 8) / 255
    torch.testing.assert_close(item["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_become_three_channels(processor, mode):
    # Yellow is white where there are two tones, and has its own place in Pillow's palette.
    source = PIL.Image.new("RGB", (12, 10), (255, 255, 0)).convert(mode, dither=PIL.Image.Dither.NONE)
    expected = torch.tensor(source.convert("RGB").getpixel((0, 0))) / 255
    images = ProcessedImages(_Rows([source, PIL.Image.new("RGB", (8, 8))]), processor)
    item, _ = images.__getitems__([0, 1])
    assert item["pixel_values"].shape == (3, 8, 8)
    torch.testing.assert_close(item["pixel_values"], expected[:, None, None].expand(3, 8, 8), atol=1e-3, rtol=0)


class _Rows:
    """The part of `datasets.Dataset` that ProcessedImages uses, with images as given: PNG has no CMYK."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, indices):
        return {"image": [self.images[index] for index in indices], "label": [0] * len(indices)}


def test_sixteen_bit_images_are_scaled_not_clipped(processor):
    # Pillow's convert("RGB") clips: medical and depth images would come out all white.
    half = PIL.Image.fromarray(np.full((8, 8), 2**15, dtype=np.uint16))
    assert half.mode == "I;16"
    pixel_values = ProcessedImages(labelled([half]), processor)[0]["pixel_values"]
    torch.testing.assert_close(pixel_values, torch.full((3, 8, 8), 0.5), atol=0.01, rtol=0)


def test_random_shift_moves_the_picture_and_continues_its_edge():
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    padded = np.pad(np.asarray(image), 1, mode="edge")
    shifts = {padded[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    assert len(shifts) == 9
    torch.manual_seed(0)
    seen = {np.asarray(RandomShift(1)(image)).tobytes() for _ in range(100)}
    assert seen == shifts


def test_a_batch_has_the_shapes_and_types_the_model_takes():
    items = [{"pixel_values": torch.full((3, 8, 6), float(index)), "labels": index} for index in range(4)]
    batch = collate(items)
    assert sorted(batch) == ["labels", "pixel_values"]
    assert batch["pixel_values"].shape == (4, 3, 8, 6) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 1, 2, 3] and batch["labels"].dtype == torch.int64
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    for index in range(6):
        path = tmp_path / ("cat" if index % 2 else "dog") / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:400])  # a download that broke off: the header is fine
    whole = datasets.concatenate_datasets(list(load_image_dataset(directory=tmp_path).values()))
    images = ProcessedImages(whole, ViTImageProcessor(size={"height": 8, "width": 8}))
    with pytest.raises(OSError, match=r"5\.jpg cannot be decoded"):
        images.__getitems__(list(range(6)))


def test_a_shift_keeps_the_size_of_any_picture():
    assert RandomShift(4)(PIL.Image.new("RGB", (50, 37))).size == (50, 37)


def test_columns_can_be_named_where_there_are_several():
    labels = {"fine": datasets.ClassLabel(names=["a", "b"]), "coarse": datasets.ClassLabel(names=["c"])}
    features = datasets.Features({"img": datasets.Image(), **labels})
    empty = datasets.Dataset.from_dict({"img": [], "fine": [], "coarse": []}, features=features)
    assert find_columns(empty, label_column="fine") == ("img", "fine")
    with pytest.raises(ValueError, match="`label_column` names the one to use"):
        find_columns(empty)
    with pytest.raises(ValueError, match="'thin'"):
        find_columns(empty, label_column="thin")
