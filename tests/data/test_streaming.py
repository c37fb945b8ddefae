"""Streams: who sees which image when, in every epoch, with any number of processes and workers, and after a resume."""

import itertools

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import skip_first_batches
from transformers import Trainer, TrainingArguments, ViTImageProcessor
from transformers.trainer_utils import has_length

from lambda_vit_hf.data.dataset import AugmentationEpoch
from lambda_vit_hf.data.decoding import UnreadableImageError, UnreadableImages
from lambda_vit_hf.data.folders import load_image_dataset
from lambda_vit_hf.data.shards import as_stream, sizes_of_stream
from lambda_vit_hf.data.streaming import StreamedImages, sample_of_stream
from tests.miniature_imagenet import write_parquet


SIZE = 101  # divides by nothing


def gray_images(size: int = SIZE, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    """Image and label tell the number of the row; the broken ones are no images."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=size)})
    images = [
        {"bytes": b"?", "path": None} if index in broken else PIL.Image.new("L", (4, 4), index)
        for index in range(size)
    ]
    return datasets.Dataset.from_dict({"image": images, "label": list(range(size))}, features=features)


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 4, "width": 4}, do_normalize=False)


@pytest.fixture(scope="module")
def stream():
    return as_stream(gray_images(), num_shards=6)


def noise(image):
    """An augmentation whose outcome tells whether the same random numbers were drawn."""
    return torch.rand(3, 4, 4)


def labels_of(loader) -> list[list[int]]:
    return [batch["labels"].tolist() for batch in loader]


def flat(batches: list[list]) -> list:
    return [item for batch in batches for item in batch]


# Who sees what


@pytest.mark.parametrize("num_shards", [1, 6])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_all_processes_and_workers_together_see_every_image_once(processor, num_shards, num_processes, num_readers):
    stream = as_stream(gray_images(), num_shards)
    seen = []
    for process_index in range(num_processes):
        images = StreamedImages(
            stream,
            processor,
            buffer_size=10,
            num_images=SIZE,
            process_index=process_index,
            num_processes=num_processes,
        )
        loader = images.loader(batch_size=4)
        loader.dataset.num_readers = num_readers  # what workers would read, without their processes
        mine = flat(labels_of(loader))
        assert len(mine) == len(images) == -(-SIZE // num_processes), "a process would wait for another for ever"
        seen += mine
    assert set(seen) == set(range(SIZE))
    assert len(seen) - SIZE < num_processes


def test_real_workers_yield_what_their_readers_would(stream, processor):
    images = StreamedImages(stream, processor, noise, buffer_size=10, num_images=SIZE)
    alone = images.loader(batch_size=8)
    alone.dataset.num_readers = 2
    for one, two in zip(alone, images.loader(batch_size=8, num_workers=2), strict=True):
        assert torch.equal(one["labels"], two["labels"]) and torch.equal(one["pixel_values"], two["pixel_values"])


def test_an_image_keeps_its_label(stream, processor):
    for batch in StreamedImages(stream, processor, num_images=SIZE).loader(batch_size=10):
        assert (batch["pixel_values"][:, 0, 0, 0] * 255).round().long().tolist() == batch["labels"].tolist()


def test_batches_are_full_but_for_the_last_and_the_length_is_true(stream, processor):
    loader = StreamedImages(stream, processor, num_images=SIZE).loader(batch_size=16, num_workers=2)
    assert [len(batch) for batch in labels_of(loader)] == [16] * 6 + [5]
    assert has_length(loader) and len(loader) == 7


def test_without_sizes_of_shards_processes_are_disjoint_and_cover_shards_of_one_size(processor):
    stream = gray_images(96).to_iterable_dataset(num_shards=6)
    assert sizes_of_stream(stream) == (None, None)
    for num_processes, num_readers in ((2, 1), (3, 2), (2, 4), (8, 2)):
        seen = []
        for process_index in range(num_processes):
            images = StreamedImages(
                stream, processor, num_images=96, process_index=process_index, num_processes=num_processes
            )
            loader = images.loader(batch_size=2)
            loader.dataset.num_readers = num_readers
            seen += flat(labels_of(loader))
        assert sorted(seen) == list(range(96)), f"{num_processes} processes with {num_readers} workers"


def test_workers_that_share_a_shard_see_all_of_its_classes_though_they_take_turns(processor):
    # Every fourth row would be of one class, in every batch of a worker.
    taking_turns = gray_images(96).map(lambda row, index: {"label": index % 4}, with_indices=True)
    images = StreamedImages(taking_turns.to_iterable_dataset(), processor, num_images=96)
    loader = images.loader(batch_size=12)
    loader.dataset.num_readers = 4
    assert all(len(set(batch)) > 1 for batch in labels_of(loader)), labels_of(loader)


def test_shards_of_unlike_unknown_sizes_yield_the_promised_number_all_the_same(processor):
    parts = [gray_images(96).select(range(*part)).to_iterable_dataset() for part in ((0, 80), (80, 96))]
    stream = datasets.concatenate_datasets(parts)
    for process_index in range(2):
        images = StreamedImages(stream, processor, num_images=96, process_index=process_index, num_processes=2)
        assert len(flat(labels_of(images.loader(batch_size=8)))) == 48


def test_a_stream_of_many_shards_is_read_whole(processor, monkeypatch):
    monkeypatch.setattr("lambda_vit_hf.data.streaming.MAX_SHARDS", 2)
    edges = (0, 10, 60, 65, SIZE)
    sizes = [end - start for start, end in itertools.pairwise(edges)]
    whole = gray_images()
    parts = [whole.select(range(*edge)).to_iterable_dataset() for edge in itertools.pairwise(edges)]
    stream = datasets.concatenate_datasets(parts)
    split = datasets.SplitInfo("train", num_examples=SIZE, original_shard_lengths=sizes)
    stream.info.splits = datasets.SplitDict({"train": split})
    images = StreamedImages(stream, processor, num_images=SIZE)
    assert images.num_shards == 2 and sum(images.shard_sizes) == SIZE
    loader = images.loader(batch_size=8)
    loader.dataset.num_readers = 2
    assert sorted(flat(labels_of(loader))) == list(range(SIZE))


def test_no_worker_begins_a_second_round_for_the_last_images_of_an_epoch(stream, processor, monkeypatch):
    rounds, piece = [], StreamedImages._piece
    monkeypatch.setattr(StreamedImages, "_piece", lambda self, *args: rounds.append(args[1]) or piece(self, *args))
    images = StreamedImages(stream, processor, num_images=SIZE, process_index=2, num_processes=3)
    assert len(images) * 3 > SIZE
    labels_of(images.loader(batch_size=8))
    assert len(rounds) == 1, "the whole shuffle buffer would be filled for one image"


def test_more_workers_than_shards_are_pointed_out(stream, processor, caplog):
    StreamedImages(stream, processor, num_images=SIZE).loader(batch_size=4, num_workers=6)
    assert not caplog.records
    StreamedImages(stream, processor, num_images=SIZE, num_processes=4).loader(batch_size=4, num_workers=2)
    assert "8 processes and workers share 6 shards" in caplog.text


def test_too_many_workers_for_a_small_stream_are_refused(processor):
    images = StreamedImages(gray_images(3).to_iterable_dataset(), processor, process_index=4, num_processes=5)
    with pytest.raises(ValueError, match="fewer processes and workers"):
        next(iter(images.loader(batch_size=1)))


# Order


def test_order_is_random_and_repeatable_and_another_in_each_epoch_and_seed(stream, processor):
    def epoch(number, seed=0):
        images = StreamedImages(stream, processor, seed=seed, buffer_size=20, num_images=SIZE)
        images.set_epoch(number)
        return flat(labels_of(images.loader(batch_size=8)))

    first = epoch(0)
    assert first != sorted(first)
    assert epoch(0) == first
    for other in (epoch(1), epoch(0, seed=1)):
        assert sorted(other) == sorted(first)
        agreeing = sum(one == two for one, two in zip(first, other, strict=True))
        assert agreeing < 10, f"{agreeing} of {SIZE} images are in the same place"


def test_readers_shuffle_their_pieces_in_different_orders(processor):
    # Two pieces of one shard each, within the buffer: with the same random numbers they would be in the same order.
    images = StreamedImages(as_stream(gray_images(24), num_shards=2), processor, buffer_size=12, num_images=24)
    assert images.shard_sizes == [12, 12]
    pieces = [itertools.islice(images.rows(start, start + 12, None, epoch=0), 12) for start in (0, 12)]
    orders = [[name.split(" of ")[0] for name, _ in piece] for piece in pieces]  # "row 3 of shard 1"
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(f"row {number}" for number in range(12))
    assert orders[0] != orders[1]


def test_processes_draw_different_random_numbers_for_their_images(stream, processor):
    draws = []
    for process_index in range(2):
        images = StreamedImages(
            stream, processor, num_images=SIZE, process_index=process_index, num_processes=2, with_draws=True
        )
        loader = images.loader(batch_size=10, collate_fn=lambda items: [item["draw"] for item in items])
        draws.append(set(flat(loader)))
    assert len(draws[0]) == len(draws[1]) == 51
    assert draws[0].isdisjoint(draws[1])


def test_processes_exchange_images_from_epoch_to_epoch(stream, processor):
    images = StreamedImages(stream, processor, num_images=SIZE, num_processes=2)
    seen = []
    for epoch in range(2):
        images.set_epoch(epoch)
        seen.append(set(flat(labels_of(images.loader(batch_size=8)))))
    assert seen[0] != seen[1]


def test_a_buffer_mixes_images_of_one_shard(processor):
    stream = gray_images().to_iterable_dataset()
    orders = {}
    for buffer_size in (1, 20, 200):
        images = StreamedImages(stream, processor, buffer_size=buffer_size, num_images=SIZE)
        orders[buffer_size] = flat(labels_of(images.loader(batch_size=SIZE)))
        assert sorted(orders[buffer_size]) == list(range(SIZE))
    moved = {size: np.abs(np.array(order) - np.arange(SIZE)).mean() for size, order in orders.items()}
    assert 0 == moved[1] < moved[20] < moved[200]


def test_workers_that_live_on_go_to_the_next_epoch(stream, processor):
    images = StreamedImages(stream, processor, noise, num_images=SIZE)
    lasting = images.loader(batch_size=16, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        images.set_epoch(epoch)
        for one, two in zip(lasting, images.loader(batch_size=16, num_workers=2), strict=True):
            assert torch.equal(one["pixel_values"], two["pixel_values"]), f"epoch {epoch}"


def test_global_random_numbers_are_neither_used_nor_moved(stream, processor):
    images = StreamedImages(stream, processor, noise, num_images=SIZE)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append([batch["pixel_values"] for batch in images.loader(batch_size=32)])
        after = torch.rand(())
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(()), after)
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))


def test_draws_are_given_when_asked_for(stream, processor):
    images = StreamedImages(stream, processor, num_images=SIZE, with_draws=True)
    draws = flat(images.loader(batch_size=8, collate_fn=lambda items: [item["draw"] for item in items]))
    assert len(set(draws)) == SIZE


# Going on in mid-epoch


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("skipped", [1, 4, 9])
def test_the_rest_of_an_epoch_is_the_same_to_the_bit(stream, processor, num_workers, skipped):
    images = StreamedImages(stream, processor, noise, buffer_size=10, num_images=SIZE, with_draws=False)
    images.set_epoch(3)
    loader = images.loader(batch_size=8, num_workers=num_workers)
    whole = list(loader)
    rest = list(skip_first_batches(loader, skipped))
    assert len(rest) == len(whole) - skipped
    for one, two in zip(rest, whole[skipped:], strict=True):
        assert torch.equal(one["labels"], two["labels"]) and torch.equal(one["pixel_values"], two["pixel_values"])


def test_what_is_skipped_is_not_decoded(stream, processor, monkeypatch):
    images = StreamedImages(stream, processor, num_images=SIZE)
    decoded = []
    monkeypatch.setattr(
        images.prepare, "decode", lambda item, name: decoded.append(name) or PIL.Image.new("RGB", (4, 4))
    )
    list(skip_first_batches(images.loader(batch_size=8), 12))
    assert len(decoded) == SIZE - 12 * 8


def test_going_back_in_an_epoch_gives_the_same_again(stream, processor):
    loader = StreamedImages(stream, processor, buffer_size=10, num_images=SIZE).loader(batch_size=8)
    first = loader.dataset.__getitems__([0, 1, 2])
    loader.dataset.__getitems__([40, 41])
    again = loader.dataset.__getitems__([0, 1, 2])
    assert [item["labels"] for item in first] == [item["labels"] for item in again]
    assert loader.dataset[1]["labels"] == first[1]["labels"]


# Streams without an end


def test_a_stream_without_a_number_of_images_never_ends_and_has_no_length(stream, processor):
    images = StreamedImages(stream, processor, num_images=None, buffer_size=10)
    loader = images.loader(batch_size=8, num_workers=2)
    assert not has_length(images) and not has_length(loader)
    batches = [labels for labels, _ in zip((batch["labels"].tolist() for batch in loader), range(40), strict=False)]
    assert len(flat(batches)) == 320 and set(flat(batches)) == set(range(SIZE))
    rest = skip_first_batches(images.loader(batch_size=8), 5)
    whole = iter(images.loader(batch_size=8))
    expected = [next(whole)["labels"].tolist() for _ in range(30)][5:]
    assert [batch["labels"].tolist() for batch, _ in zip(rest, range(25), strict=False)] == expected


def test_every_round_of_an_endless_stream_is_in_another_order(stream, processor):
    loader = iter(StreamedImages(stream, processor, buffer_size=10).loader(batch_size=SIZE))
    one, two = (next(loader)["labels"].tolist() for _ in range(2))
    assert sorted(one) == sorted(two) == list(range(SIZE)) and one != two


# What cannot be read


def test_a_broken_image_is_replaced_by_the_next_without_moving_the_others(processor):
    broken = (5, 50, 51, 52)
    whole, damaged = (as_stream(gray_images(broken=which), num_shards=6) for which in ((), broken))
    unreadable = UnreadableImages("skip")
    expected = StreamedImages(whole, processor, buffer_size=10, num_images=SIZE).loader(batch_size=8)
    images = StreamedImages(damaged, processor, buffer_size=10, num_images=SIZE, unreadable=unreadable)
    for one, two in zip(flat(labels_of(expected)), flat(labels_of(images.loader(batch_size=8))), strict=True):
        assert one == two or one in broken, f"image {one} has moved"
    assert unreadable.count == 4 and all("shard" in name for name in unreadable.names)
    loader = images.loader(batch_size=8)
    assert labels_of(skip_first_batches(loader, 6)) == labels_of(loader)[6:]


def test_a_broken_image_raises_by_default(processor):
    stream = as_stream(gray_images(broken=(7,)), num_shards=2)
    with pytest.raises(UnreadableImageError, match=r"row [0-9]+ of shard [01]"):
        labels_of(StreamedImages(stream, processor, num_images=SIZE).loader(batch_size=8))


def test_a_stream_of_broken_images_ends_with_an_error(processor):
    stream = as_stream(gray_images(broken=tuple(range(SIZE))), num_shards=2)
    images = StreamedImages(stream, processor, unreadable=UnreadableImages("skip"))
    with pytest.raises(UnreadableImageError, match="11 images could not be decoded"):
        labels_of(images.loader(batch_size=8))


def test_a_label_outside_the_classes_is_named(processor):
    plain = gray_images(4)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    wrong = datasets.Dataset(plain.data, info=datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match=r"Label 3 of row [0-3] of shard 0 lies outside the 3 classes"):
        labels_of(StreamedImages(wrong.to_iterable_dataset(), processor, num_images=4).loader(batch_size=4))


@pytest.mark.parametrize("wrong", [{"process_index": 2, "num_processes": 2}, {"buffer_size": 0}, {"num_images": 0}])
def test_wrong_arguments_are_refused(stream, processor, wrong):
    with pytest.raises(ValueError):
        StreamedImages(stream, processor, **wrong)


# With parquet files, and in the Trainer


def test_parquet_files_are_streamed_to_the_last_image(tmp_path):
    folder = write_parquet(tmp_path, train_per_class=3, validation_per_class=1, num_shards=3, truncated=1)
    loaded = load_image_dataset(directory=folder, streaming=True)
    num_images, _ = sizes_of_stream(loaded["train"])
    unreadable = UnreadableImages("skip")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    images = StreamedImages(loaded["train"], processor, num_images=num_images, unreadable=unreadable)
    seen = flat(labels_of(images.loader(batch_size=16, num_workers=2)))
    assert len(seen) == 60 and set(seen) == set(range(20)) and max(map(seen.count, seen)) <= 4
    assert unreadable.names == ["ant_000_rgb.jpg"]


def test_a_sample_of_a_stream_is_a_dataset(stream):
    sample = sample_of_stream(stream, 40)
    assert isinstance(sample, datasets.Dataset) and sample.features["label"] == stream.features["label"]
    assert len(set(sample["label"])) == 40
    assert all(row["image"].getpixel((0, 0)) == row["label"] for row in sample)
    assert sample["label"] == sample_of_stream(stream, 40)["label"] != sample_of_stream(stream, 40, seed=1)["label"]
    assert sorted(sample_of_stream(stream, 1000)["label"]) == list(range(SIZE))


class Watched(torch.nn.Module):
    """A model that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(48, SIZE), []

    def forward(self, pixel_values, labels):
        self.seen.append(labels.tolist())
        logits = self.layer(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class StreamTrainer(Trainer):
    def get_train_dataloader(self):
        return self.train_dataset.loader(self.args.train_batch_size, self.args.dataloader_num_workers)


def trained(folder, stream, processor, stop_at=None, resume=None, num_images=SIZE, **arguments) -> Watched:
    torch.manual_seed(0)
    images = StreamedImages(stream, processor, noise, buffer_size=10, num_images=num_images)
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="steps", save_steps=stop_at or 1000, learning_rate=0.1, dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    model = Watched()
    trainer = StreamTrainer(model, args, train_dataset=images, callbacks=[AugmentationEpoch(images)])
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_trainer_resumes_in_mid_epoch_exactly(tmp_path, stream, processor, num_workers):
    settings = {"num_train_epochs": 3, "dataloader_num_workers": num_workers}
    whole = trained(tmp_path / "whole", stream, processor, stop_at=18, **settings)
    assert len(whole.seen) == 3 * 13
    for epoch in range(3):
        assert sorted(flat(whole.seen[13 * epoch : 13 * epoch + 13])) == list(range(SIZE)), f"epoch {epoch}"
    resumed = trained(tmp_path / "x", stream, processor, resume=str(tmp_path / "whole" / "checkpoint-18"), **settings)
    assert resumed.seen == whole.seen[18:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_the_trainer_takes_a_stream_without_length(tmp_path, stream, processor):
    whole = trained(tmp_path / "whole", stream, processor, stop_at=18, num_images=None, max_steps=30)
    assert len(whole.seen) == 30
    checkpoint = str(tmp_path / "whole" / "checkpoint-18")
    resumed = trained(tmp_path / "x", stream, processor, resume=checkpoint, num_images=None, max_steps=30)
    assert resumed.seen == whole.seen[18:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
