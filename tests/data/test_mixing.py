"""Mixup, cutmix and repeated augmentation, compared with timm's."""

import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from timm.data import Mixup
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import BatchSampler

from lambda_vit_hf.data.mixing import MixupCollator, RepeatedAugmentationSampler


def items(count: int, draws: bool = True, first: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": (first + index) % 5}
        | ({"draw": 1000 + first + index} if draws else {})
        for index in range(count)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        dict(mixup=0.8, cutmix=1.0),
        dict(mixup=0.8, cutmix=0.0),
        dict(mixup=0.0, cutmix=1.0),
        dict(prob=0.5, label_smoothing=0.0),
        dict(switch_prob=0.9),
    ],
    ids=str,
)
def test_mixed_batches_equal_timms(settings):
    collator = MixupCollator(5, **settings)
    arguments = dict(mixup=0.8, cutmix=1.0, switch_prob=0.5, prob=1.0, label_smoothing=0.1) | settings
    reference = Mixup(
        arguments["mixup"], arguments["cutmix"], prob=arguments["prob"], switch_prob=arguments["switch_prob"],
        label_smoothing=arguments["label_smoothing"], num_classes=5,
    )  # fmt: skip
    mixed = set()
    for first in range(8):
        batch = items(6, first=first)
        np.random.seed(collator.batch_seed(batch))
        images, targets = reference(
            torch.stack([item["pixel_values"] for item in batch]), torch.tensor([item["labels"] for item in batch])
        )
        result = collator(batch)
        assert torch.equal(result["pixel_values"], images) and torch.equal(result["labels"], targets)
        torch.testing.assert_close(result["labels"].sum(dim=1), torch.ones(6))
        assert set(result) == {"pixel_values", "labels"}
        mixed.add(round(result["labels"][1].max().item(), 4))
    assert len(mixed) > 3  # not the same mixture every time


@pytest.mark.parametrize("draws", [True, False])
def test_mixing_depends_on_the_batch_alone(draws):
    collator, later = MixupCollator(5), MixupCollator(5)
    for _ in range(3):
        later(items(4, first=7))
    torch.manual_seed(5), np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first, second = collator(items(6, draws)), later(items(6, draws))
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["labels"], second["labels"])
    assert (np.random.get_state()[1] == before).all()
    other = MixupCollator(5, seed=1)(items(6, draws))
    assert not torch.equal(first["labels"], other["labels"])


def test_another_epochs_draws_mix_otherwise():
    batch = items(6)
    next_epoch = [item | {"draw": item["draw"] + 99} for item in batch]
    assert not torch.equal(MixupCollator(5)(batch)["labels"], MixupCollator(5)(next_epoch)["labels"])


def test_the_last_image_of_an_odd_batch_stays_unmixed_and_none_is_dropped():
    for count in (1, 5):
        batch = items(count)
        result = MixupCollator(5, label_smoothing=0.1)(batch)
        assert result["pixel_values"].shape[0] == result["labels"].shape[0] == count
        assert torch.equal(result["pixel_values"][-1], batch[-1]["pixel_values"])
        expected = torch.full((5,), 0.02)
        expected[batch[-1]["labels"]] += 0.9
        torch.testing.assert_close(result["labels"][-1], expected)
    even = MixupCollator(5)(items(4))["pixel_values"]
    assert not torch.equal(even[-1], items(4)[-1]["pixel_values"])


def test_with_mixup_and_cutmix_off_labels_are_only_smoothed():
    batch = items(4)
    result = MixupCollator(5, mixup=0.0, cutmix=0.0)(batch)
    assert torch.equal(result["pixel_values"], torch.stack([item["pixel_values"] for item in batch]))
    assert (result["labels"].max(dim=1).values == 1 - 0.1 + 0.02).all()


def test_impossible_mixing_is_refused():
    with pytest.raises(ValueError, match="prob"):
        MixupCollator(5, prob=1.5)
    with pytest.raises(ValueError, match="negative"):
        MixupCollator(5, mixup=-1.0)
    with pytest.raises(ValueError, match=r"Labels \[3, 4\] lie outside the 3 classes"):
        MixupCollator(3)(items(5))


def batches_of_process(sampler, processes: int, process: int) -> list[list[int]]:
    """As accelerate deals out the batches of the Trainer's dataloader."""
    batches = BatchSampler(sampler, sampler.batch_size, drop_last=False)
    return list(BatchSamplerShard(batches, processes, process))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("num_images", [300, 1000])
def test_each_process_gets_the_images_that_timms_sampler_gives_it(num_images, processes):
    sampler = RepeatedAugmentationSampler(num_images, batch_size=8, num_processes=processes, seed=3)
    sampler.set_epoch(5)
    for process in range(processes):
        ours = batches_of_process(sampler, processes, process)
        theirs = RepeatAugSampler(range(num_images), processes, process, num_repeats=3)
        theirs.set_epoch(random.Random("3-5").getrandbits(32))
        expected = list(BatchSampler(theirs, 8, drop_last=True))
        assert [[number % num_images for number in batch] for batch in ours] == expected


def test_repeats_of_an_image_have_different_numbers_in_different_processes():
    sampler = RepeatedAugmentationSampler(1000, batch_size=10, repeats=3, num_processes=3)
    shares = [batches_of_process(sampler, 3, process) for process in range(3)]
    for together in zip(*shares, strict=True):
        sets = [{number % 1000 for number in batch} for batch in together]
        assert sets[0] == sets[1] == sets[2] and len(sets[0]) == 10
        assert len({number for batch in together for number in batch}) == 30
        assert max(number for batch in together for number in batch) < 3000


def test_an_epoch_is_about_as_long_as_without_repeats():
    sampler = RepeatedAugmentationSampler(1000, batch_size=16)
    numbers = list(sampler)
    assert len(numbers) == len(sampler) == 768
    assert len(set(numbers)) == 768
    assert len({number % 1000 for number in numbers}) == 256


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = RepeatedAugmentationSampler(300, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) != order(1, 2)
    sampler = RepeatedAugmentationSampler(300, batch_size=8)
    assert list(sampler) == list(sampler) == order(0, 0)


def test_impossible_repetition_is_refused():
    with pytest.raises(ValueError, match="do not fill one batch of 16 for each of 4"):
        RepeatedAugmentationSampler(60, batch_size=16, num_processes=4)
    with pytest.raises(ValueError, match="at least 1"):
        RepeatedAugmentationSampler(60, batch_size=16, repeats=0)
