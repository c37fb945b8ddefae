"""Calibration images in every form users have them, even sampling, and random numbers that are put back."""

import io
import random
import tempfile

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset
from transformers import ViTImageProcessor

from lambda_vit_hf.data.decoding import decode_image
from lambda_vit_hf.data.sampling import balanced_folds, evenly_spaced
from lambda_vit_hf.selection import calibration
from lambda_vit_hf.selection.calibration import CalibrationBatches


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


class StreamWithLength(Stream):
    def __len__(self):
        return len(IMAGES)


class Flipping(Dataset):
    """Images under random augmentation."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index].flip(-1) if random.random() < 0.5 else IMAGES[index]


def read_all(batches: CalibrationBatches) -> torch.Tensor:
    return torch.cat([pixel_values for pixel_values, _ in batches])


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
    "stream with a length": StreamWithLength,
    "datasets.IterableDataset": lambda: hugging_face(IMAGES, "torch").to_iterable_dataset(num_shards=2),
}
BATCHED = {
    "list of batches": lambda: list(IMAGES.split(4)),
    "list of dicts of batches": lambda: as_dicts(IMAGES.split(4)),
    "DataLoader": lambda: DataLoader(list(IMAGES), batch_size=4),
    "DataLoader of dicts": lambda: DataLoader(as_dicts(IMAGES), batch_size=4),
    "DataLoader with labels": lambda: DataLoader(TensorDataset(IMAGES, torch.zeros(10)), batch_size=4),
    "iterable without length": lambda: WithoutLength(IMAGES.split(4)),
    "generator": lambda: (batch for batch in IMAGES.split(4)),
    "DataLoader of a stream": lambda: DataLoader(Stream(), batch_size=4),
}


@pytest.mark.parametrize("kind", [*UNBATCHED, *BATCHED])
def test_every_accepted_kind_gives_the_same_images(kind):
    images = {**UNBATCHED, **BATCHED}[kind]()
    # Where images are batched already, their own batch size must win.
    batches = CalibrationBatches(images, batch_size=4 if kind in UNBATCHED else 3)
    for reading in ("first", "second"):
        read = [pixel_values for pixel_values, _ in batches]
        assert [len(batch) for batch in read] == [4, 4, 2], f"sizes of the {reading} reading"
        assert torch.equal(torch.cat(read), IMAGES), f"images of the {reading} reading"
        assert batches.num_images == 10


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
        read = read_all(CalibrationBatches(images, 4, Halves()))
        assert read.shape == (6, 3, 4, 4)
        assert read[:, 2, 3, 3].tolist() == [0, 0.5, 1, 1.5, 2, 2.5], type(images)
    with pytest.raises(TypeError, match="image_processor"):
        CalibrationBatches(pictures)


def test_a_dataset_with_a_transform_of_its_own_is_read_through_it():
    pictures = [PIL.Image.new("L", (4, 4), value) for value in (10, 200)]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))

    def with_pixels(rows):
        return {"pixel_values": [torch.full((3, 2, 2), float(image.getpixel((0, 0)))) for image in rows["image"]]}

    ((images, _),) = CalibrationBatches(rows.with_transform(with_pixels))
    assert images[:, 0, 0, 0].tolist() == [10.0, 200.0]


def test_pictures_are_decoded_as_in_training():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(16, dtype=np.uint16).reshape(2, 8) * 4096).save(file, "PNG", exif=exif)
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    features = datasets.Features({"image": datasets.Image()})
    stored = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, features=features)
    given = ([PIL.Image.open(file)], stored, stored.to_iterable_dataset())
    read, whole, streamed = (next(iter(CalibrationBatches(one, 1, processor)))[0] for one in given)
    assert torch.equal(read, whole) and torch.equal(read, streamed)
    expected = np.asarray(decode_image(file.getvalue()), dtype=np.float32) / 255
    assert read.shape == (1, 3, 8, 2) and read.mean() < 0.5, "not upright, or 16 bits clipped to white"
    np.testing.assert_allclose(read[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "list of dicts", "list of batches", "stream", "DataLoader"])
@pytest.mark.parametrize("num_processes", [1, 3, 12])
def test_images_are_dealt_out_to_folds_and_processes_share_them(kind, num_processes, monkeypatch):
    read = []
    for rank in range(num_processes):
        monkeypatch.setattr(calibration, "rank_and_num_processes", lambda rank=rank: (rank, num_processes))
        batches = CalibrationBatches({**UNBATCHED, **BATCHED}[kind](), batch_size=2, num_folds=4)
        own = [(fold, image) for images, folds in batches for fold, image in zip(folds, images, strict=True)]
        assert len(own) == batches.num_own_images in (10 // num_processes, 10 // num_processes + 1)
        assert batches.num_images == 10
        read += own
    assert sorted(image[0, 0, 0].item() for _, image in read) == IMAGES[:, 0, 0, 0].tolist()
    fold_of = balanced_folds(10, 4)
    assert all(image[0, 0, 0].item() in IMAGES[fold_of == fold, 0, 0, 0].tolist() for fold, image in read)


def shuffled(own_generator: bool) -> DataLoader:
    generator = torch.Generator().manual_seed(0) if own_generator else None
    return DataLoader(list(IMAGES), batch_size=4, shuffle=True, generator=generator)


def shuffled_batches() -> DataLoader:
    sampler = RandomSampler(IMAGES, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(IMAGES), batch_sampler=BatchSampler(sampler, 4, drop_last=False))


@pytest.mark.parametrize(
    "images",
    [
        lambda: shuffled(False),
        lambda: shuffled(True),
        shuffled_batches,
        Flipping,
        lambda: DataLoader(Flipping(), batch_size=4),
        lambda: DataLoader(Flipping(), batch_size=4, num_workers=1, persistent_workers=True),
    ],
    ids=["shuffled", "generator", "batch sampler", "augmented dataset", "augmented", "persistent workers"],
)
def test_random_loaders_give_the_same_images_at_every_pass(images):
    batches = CalibrationBatches(images())
    first, second = read_all(batches), read_all(batches)
    assert torch.equal(first, second)
    assert not torch.equal(first, IMAGES), "nothing random happened"


@pytest.mark.parametrize("images", [Flipping, lambda: DataLoader(Flipping(), batch_size=4)], ids=["dataset", "loader"])
def test_augmented_images_do_not_depend_on_the_number_of_processes(images, monkeypatch):
    alone = read_all(CalibrationBatches(images()))
    for rank in range(3):
        monkeypatch.setattr(calibration, "rank_and_num_processes", lambda rank=rank: (rank, 3))
        assert torch.equal(read_all(CalibrationBatches(images())), alone[rank::3])


@pytest.mark.parametrize("images", [lambda: shuffled(False), Flipping], ids=["shuffled", "augmented"])
def test_images_do_not_depend_on_the_random_numbers_drawn_before(images):
    found = []
    for seed in (1, 2):
        random.seed(seed), torch.manual_seed(seed)
        found.append(read_all(CalibrationBatches(images())))
    assert torch.equal(*found)


def test_images_lie_in_a_file_that_is_gone_after_them(tmp_path, monkeypatch):
    mapped = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args, **how: mapped.append(memmap(*args, **how)) or mapped[0])
    batches = CalibrationBatches(list(IMAGES))
    ((pixel_values, _),) = batches
    assert pixel_values.data_ptr() == mapped[0].ctypes.data, "a copy in memory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
def test_images_keep_their_dtype(dtype):
    images = list(IMAGES.to(dtype))
    read = read_all(CalibrationBatches(images, batch_size=4))
    assert read.dtype == dtype and torch.equal(read, torch.stack(images))


@pytest.mark.parametrize(
    "other", [torch.zeros(3, 8, 8), torch.zeros(3, 4, 4, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_images_of_two_kinds_are_refused(other):
    with pytest.raises(ValueError, match="one shape and dtype"):
        CalibrationBatches([IMAGES[0], other], batch_size=1)


def test_a_size_is_taken_of_a_dataset_evenly_and_not_of_a_tensor():
    assert torch.equal(read_all(CalibrationBatches(TensorDataset(IMAGES), size=5)), IMAGES[evenly_spaced(10, 5)])
    assert CalibrationBatches(IMAGES, size=5).num_images == 10


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
