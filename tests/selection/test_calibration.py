"""Calibration images in every form users have them, even sampling, and random numbers that are put back."""

import io
import random

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import ViTImageProcessor

from lambda_vit_hf.data.decoding import decode_image
from lambda_vit_hf.data.sampling import balanced_folds
from lambda_vit_hf.selection.calibration import CalibrationBatches, SameImages


class WithoutLength:
    """As a streamed dataset behind a DataLoader: can be read again, but not counted."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


IMAGES = torch.arange(10 * 3 * 4 * 4, dtype=torch.float32).reshape(10, 3, 4, 4)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


class Flipping(Dataset):
    """Images under random augmentation."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index].flip(-1) if random.random() < 0.5 else IMAGES[index]


def as_dicts(images):
    return [{"pixel_values": image, "labels": 0} for image in images]


def hugging_face(images, image_format):
    return datasets.Dataset.from_dict({"pixel_values": images.tolist()}).with_format(image_format)


UNBATCHED = {
    "tensor": lambda: IMAGES,
    "list of images": lambda: list(IMAGES),
    "list of dicts": lambda: as_dicts(IMAGES),
    "list of dicts of arrays": lambda: as_dicts(IMAGES.numpy()),
    "torch dataset with labels": lambda: TensorDataset(IMAGES, torch.zeros(10)),
    "datasets.Dataset": lambda: hugging_face(IMAGES, None),
    "datasets.Dataset of tensors": lambda: hugging_face(IMAGES, "torch"),
    "datasets.Dataset of arrays": lambda: hugging_face(IMAGES, "numpy"),
    "stream": Stream,
    "datasets.IterableDataset": lambda: hugging_face(IMAGES, "torch").to_iterable_dataset(num_shards=2),
}
BATCHED = {
    "list of batches": lambda: list(IMAGES.split(4)),
    "list of dicts of batches": lambda: as_dicts(IMAGES.split(4)),
    "DataLoader": lambda: DataLoader(list(IMAGES), batch_size=4),
    "DataLoader of dicts": lambda: DataLoader(as_dicts(IMAGES), batch_size=4),
    "DataLoader with labels": lambda: DataLoader(TensorDataset(IMAGES, torch.zeros(10)), batch_size=4),
    "iterable without length": lambda: WithoutLength(IMAGES.split(4)),
}


@pytest.mark.parametrize("kind", [*UNBATCHED, *BATCHED])
def test_every_accepted_kind_gives_the_same_images(kind):
    images = {**UNBATCHED, **BATCHED}[kind]()
    # Where images are batched already, their own batch size must win.
    batches = CalibrationBatches(images, batch_size=4 if kind in UNBATCHED else 3)
    for reading in ("first", "second"):
        read = list(batches)
        assert [len(batch) for batch in read] == [4, 4, 2], f"sizes of the {reading} reading"
        assert torch.equal(torch.cat(read), IMAGES), f"images of the {reading} reading"
        assert batches.num_images == 10


@pytest.mark.parametrize(
    "one_shot",
    [
        lambda: iter([IMAGES]),
        lambda: (batch for batch in IMAGES.split(4)),
        lambda: iter(DataLoader(list(IMAGES), batch_size=4)),
    ],
    ids=["iterator", "generator", "DataLoader's iterator"],
)
def test_an_iterator_that_can_be_read_once_is_refused(one_shot):
    # NOSE reads the images once per layer: from the second reading on, it would see none.
    with pytest.raises(ValueError, match="read only once"):
        CalibrationBatches(one_shot())


@pytest.mark.parametrize(
    "nothing",
    [
        list,
        lambda: IMAGES[:0],
        lambda: TensorDataset(IMAGES[:0]),
        lambda: datasets.Dataset.from_dict({"pixel_values": []}),
        lambda: DataLoader([], batch_size=4),
        lambda: WithoutLength([]),
    ],
    ids=["list", "tensor", "torch dataset", "datasets.Dataset", "DataLoader", "iterable"],
)
def test_an_empty_calibration_set_is_refused(nothing):
    with pytest.raises(ValueError, match="empty"):
        list(CalibrationBatches(nothing()))


class Halves:
    """A processor that makes a tensor of a picture, its values halved."""

    def __call__(self, picture, return_tensors):
        return {"pixel_values": torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 2}


def test_pictures_are_processed():
    pictures = [PIL.Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in range(6)]
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": pictures}, features=features)
    for images in (pictures, dataset, dataset.to_iterable_dataset()):
        read = torch.cat(list(CalibrationBatches(images, 4, Halves())))
        assert read.shape == (6, 3, 4, 4)
        assert read[:, 2, 3, 3].tolist() == [0, 0.5, 1, 1.5, 2, 2.5], type(images)
    with pytest.raises(TypeError, match="image_processor"):
        CalibrationBatches(pictures)


def test_pictures_are_decoded_as_in_training():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(16, dtype=np.uint16).reshape(2, 8) * 4096).save(file, "PNG", exif=exif)
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    features = datasets.Features({"image": datasets.Image()})
    stored = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, features=features)
    (whole,), (streamed,) = (CalibrationBatches(one, 1, processor) for one in (stored, stored.to_iterable_dataset()))
    (read,) = CalibrationBatches([PIL.Image.open(file)], 1, processor)
    assert torch.equal(read, whole) and torch.equal(read, streamed)
    expected = np.asarray(decode_image(file.getvalue()), dtype=np.float32) / 255
    assert read.shape == (1, 3, 8, 2) and read.mean() < 0.5, "not upright, or 16 bits clipped to white"
    np.testing.assert_allclose(read[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "list of dicts", "list of batches", "stream", "DataLoader"])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_folds_are_read_apart_and_processes_share_them(kind, num_processes):
    batches = CalibrationBatches({**UNBATCHED, **BATCHED}[kind](), batch_size=2, num_folds=4)
    fold_of = balanced_folds(10, 4)
    for folds in ([0], [1, 3], [0, 1, 2, 3]):
        shares = [list(batches.read(folds, rank, num_processes)) for rank in range(num_processes)]
        read = [
            (fold, image) for share in shares for images, of in share for fold, image in zip(of, images, strict=True)
        ]
        expected = [n for n in range(10) if fold_of[n] in folds]
        assert sorted(image[0, 0, 0].item() for _, image in read) == IMAGES[expected, 0, 0, 0].tolist()
        assert all(image[0, 0, 0].item() in IMAGES[fold_of == fold, 0, 0, 0].tolist() for fold, image in read)
        assert batches.num_images == 10


def shuffled(own_generator: bool) -> DataLoader:
    generator = torch.Generator().manual_seed(0) if own_generator else None
    return DataLoader(list(IMAGES), batch_size=4, shuffle=True, generator=generator)


@pytest.mark.parametrize(
    "images",
    [lambda: shuffled(False), lambda: shuffled(True), lambda: DataLoader(Flipping(), batch_size=4)],
    ids=["shuffled", "shuffled by a generator of its own", "augmented"],
)
def test_random_loaders_give_the_same_images_at_every_reading(images):
    batches = CalibrationBatches(images())
    first, second = (torch.cat(list(batches)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, IMAGES), "nothing random happened"


def test_images_that_change_from_one_reading_to_the_next_are_noticed():
    same = SameImages(num_folds=2)
    folds = torch.arange(10) % 2

    def read(images):
        same.forget()
        for part in (slice(0, 3), slice(3, 10)):
            same.add(images[part], folds[part])
        same.check([0, 1])

    read(IMAGES)
    read(IMAGES)
    mirrored = IMAGES.clone()
    mirrored[3] = mirrored[3].flip(-1)
    for other in (IMAGES.flip(0), mirrored):
        with pytest.raises(ValueError, match="differ from one reading"):
            read(other)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([{"image": 1, "label": 0}], "image.*label"),
        (["a.png"], "str"),
        ([3], "int"),
        (IMAGES[0], r"\(3, 4, 4\)"),
    ],
    ids=["dict without pixel values", "file names", "numbers", "a single image"],
)
def test_items_that_are_no_batches_of_images_say_what_they_are(images, named):
    with pytest.raises(TypeError, match=named):
        list(CalibrationBatches(images))
