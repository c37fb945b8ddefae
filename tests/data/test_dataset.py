"""Labelled images for the model: processing, and augmentation that can be repeated."""

import io
import random

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from lambda_vit_hf.data.dataset import LEFT_OUT, AugmentationEpoch, ProcessedImages, RandomShift, collate
from lambda_vit_hf.data.decoding import UnreadableImageError, UnreadableImages
from tests.data.test_folders import labelled


@pytest.fixture
def processor():
    """Leaves pixel values readable: 0 to 1, 8 x 8."""
    return ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)


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

    def __len__(self):
        return len(self.images)

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


# Images that cannot be decoded


def picture_bytes(gray: int) -> dict:
    file = io.BytesIO()
    PIL.Image.new("L", (8, 8), gray).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


BROKEN = {"bytes": b"not a picture", "path": None}


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, processor):
    paths = [str(tmp_path / f"{index}.jpg") for index in range(3)]
    for path in paths:
        PIL.Image.effect_noise((64, 64), 50).save(path)
    with open(paths[2], "r+b") as file:
        file.truncate(400)  # a download that broke off: the header is fine
    images = ProcessedImages(labelled(paths), processor)
    with pytest.raises(UnreadableImageError, match=r"2\.jpg cannot be decoded"):
        images.__getitems__([0, 1, 2])


def gray_of(item: dict) -> int:
    return round(float(item["pixel_values"].mean()) * 255)


def test_a_broken_training_image_is_replaced_by_the_next_readable_one(processor):
    rows = [picture_bytes(10), BROKEN, BROKEN, picture_bytes(40)]
    unreadable = UnreadableImages("skip")
    images = ProcessedImages(labelled(rows, [0, 1, 1, 0]), processor, unreadable=unreadable)
    assert [gray_of(item) for item in images.__getitems__([0, 1, 2, 3])] == [10, 40, 40, 40]
    assert [item["labels"] for item in images.__getitems__([0, 1, 2, 3])] == [0, 0, 0, 0]
    assert unreadable.names == ["row 1", "row 2"]
    last = ProcessedImages(labelled([*rows, BROKEN], [0, 1, 1, 0, 1]), processor, unreadable=unreadable)
    assert gray_of(last[4]) == 10, "after the last image comes the first"


def test_a_broken_evaluation_image_has_no_label(processor):
    rows = labelled([picture_bytes(10), BROKEN], [0, 1])
    unreadable = UnreadableImages("skip")
    images = ProcessedImages(rows, processor, unreadable=unreadable, is_evaluation=True)
    good, broken = images.__getitems__([0, 1])
    assert (good["labels"], broken["labels"]) == (0, LEFT_OUT)
    assert broken["pixel_values"].shape == (3, 8, 8) and not broken["pixel_values"].any()
    assert unreadable.count == 1
    assert torch.nn.CrossEntropyLoss().ignore_index == LEFT_OUT


def test_a_dataset_without_one_readable_image_raises(processor):
    images = ProcessedImages(labelled([BROKEN] * 3), processor, unreadable=UnreadableImages("skip"))
    with pytest.raises(OSError, match=r"No image of the dataset can be decoded.*3 images"):
        images[0]


def test_the_main_process_knows_what_dataloader_workers_could_not_read(processor):
    rows = [BROKEN if index in (1, 4) else picture_bytes(index) for index in range(6)]
    unreadable = UnreadableImages("skip")
    images = ProcessedImages(labelled(rows), processor, unreadable=unreadable)
    for _ in range(2):
        list(DataLoader(images, batch_size=1, num_workers=2, collate_fn=collate))
    assert (unreadable.count, sorted(unreadable.names)) == (2, ["row 1", "row 4"])


# Tensors, draws, repeats, epochs


def test_an_augmentation_may_give_the_tensor_for_the_model(processor):
    def to_tensor(image):
        assert image.mode == "RGB"
        return torch.full((3, 5, 5), float(image.getpixel((0, 0))[0]))

    images = ProcessedImages(labelled([picture_bytes(10), picture_bytes(20)]), processor, to_tensor)
    items = images.__getitems__([0, 1])
    assert [item["pixel_values"].shape for item in items] == [(3, 5, 5)] * 2
    assert [float(item["pixel_values"].mean()) for item in items] == [10, 20], "the image processor was applied too"


def test_draws_come_only_when_asked_for_and_differ_by_image_epoch_seed_and_repeat(processor):
    rows = labelled([picture_bytes(index) for index in range(3)])
    assert sorted(ProcessedImages(rows, processor)[0]) == ["labels", "pixel_values"]
    draws = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        images = ProcessedImages(rows, processor, seed=seed, with_draws=True)
        images.set_epoch(epoch)
        draws |= {item["draw"] for item in images.__getitems__([0, 1, 2, 3, 4, 5])}
    assert len(draws) == 18 and all(0 <= draw < 2**32 for draw in draws)


def test_an_index_beyond_the_end_is_the_same_image_drawn_anew(processor, augmented):
    rows = labelled([picture_bytes(index) for index in range(3)], [0, 1, 0])
    plain = ProcessedImages(rows, processor)
    assert [gray_of(item) for item in plain.__getitems__([4, 8])] == [1, 2]
    assert [item["labels"] for item in plain.__getitems__([4, 8])] == [1, 0]
    assert not torch.equal(augmented()[3]["pixel_values"], augmented()[15]["pixel_values"])


def test_workers_that_live_on_see_the_epoch_change(augmented):
    images = augmented()
    loader = DataLoader(images, batch_size=12, num_workers=1, persistent_workers=True, collate_fn=collate)
    seen = []
    for epoch in (0, 1):
        images.set_epoch(epoch)
        (batch,) = loader
        expected = torch.stack([item["pixel_values"] for item in images.__getitems__(list(range(12)))])
        assert torch.equal(batch["pixel_values"], expected), f"workers are not in epoch {epoch}"
        seen.append(batch["pixel_values"])
    assert not torch.equal(*seen)


def test_the_callback_tells_the_epoch_that_begins(augmented):
    class State:
        epoch = 2.9999999  # a sum of steps

    images = augmented()
    AugmentationEpoch(images).on_epoch_begin(None, State, None)
    assert images.epoch == 3


def test_a_shift_keeps_the_size_of_any_picture():
    assert RandomShift(4)(PIL.Image.new("RGB", (50, 37))).size == (50, 37)
