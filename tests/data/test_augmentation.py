import math
import pickle
import random

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_transform
from transformers import AutoImageProcessor, DeiTImageProcessor, ViTImageProcessor, pipeline

from lambda_vit_hf.data.augmentation import deit_augmentation, output_size, with_evaluation_crop
from lambda_vit_hf.data.sampling import fixed_randomness


@pytest.fixture(scope="module")
def photograph() -> PIL.Image.Image:
    """427 x 640."""
    from sklearn.datasets import load_sample_images

    return PIL.Image.fromarray(load_sample_images().images[0])


IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (ViTImageProcessor(size={"height": 64, "width": 64}, **IMAGENET), (64, 64)),
        (ViTImageProcessor(size={"height": 48, "width": 80}, **IMAGENET), (48, 80)),
        (with_evaluation_crop(ViTImageProcessor(size={"height": 64, "width": 64}, **IMAGENET)), (64, 64)),
        (DeiTImageProcessor(crop_size={"height": 64, "width": 64}), (64, 64)),
    ],
    ids=["vit", "not square", "with crop", "deit"],
)
def test_augmentation_equals_timms_to_the_bit(photograph, processor, size):
    ours = deit_augmentation(processor)
    theirs = create_transform(
        (3, *size), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3, re_prob=0.25,
        re_mode="pixel", interpolation="bicubic", scale=(0.08, 1.0), mean=processor.image_mean,
        std=processor.image_std,
    )  # fmt: skip
    images = []
    for seed in range(6):
        with fixed_randomness(seed):
            images.append(ours(photograph))
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        assert torch.equal(images[-1], theirs(photograph)), seed
    assert images[0].shape == (3, *size)
    assert not torch.equal(images[0], images[1])


def test_posterizing_to_black_works_with_any_pillow(photograph):
    # Magnitude 10 keeps 0 bits of each colour; Pillow 13 refuses what older ones made black.
    augment = deit_augmentation(ViTImageProcessor(), auto_augment="rand-m10-inc1", random_erasing=0.0)
    (stage,) = [stage for stage in augment._transform.transforms if hasattr(stage, "ops")]
    (posterize,) = [operation for operation in stage.ops if operation.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    assert not np.asarray(posterize(photograph)).any()
    posterize.magnitude = 5
    with fixed_randomness(0):
        levels = np.unique(np.asarray(posterize(photograph)))
    assert set(levels) <= {0, 64, 128, 192}


def test_random_erasing_fills_in_noise_after_normalisation(photograph):
    processor = ViTImageProcessor(size={"height": 64, "width": 64}, **IMAGENET)
    results = []
    for probability in (0.0, 1.0):
        with fixed_randomness(2):
            augment = deit_augmentation(processor, random_erasing=probability, auto_augment=None, color_jitter=0.0)
            results.append(augment(photograph))
    erased = (results[0] != results[1]).any(dim=0)
    assert 0.01 < erased.float().mean() < 0.5
    assert results[1][:, erased].std() == pytest.approx(1.0, abs=0.1)


def test_augmentation_can_be_sent_to_worker_processes(photograph):
    augment = deit_augmentation(ViTImageProcessor(size={"height": 32, "width": 32}))
    copied = pickle.loads(pickle.dumps(augment))
    results = []
    for one in (augment, copied):
        with fixed_randomness(1):
            results.append(one(photograph))
    assert torch.equal(*results)
    assert copied == augment


def test_augmentation_that_would_not_fit_the_processor_is_refused(photograph):
    with pytest.raises(ValueError, match="no fixed size"):
        deit_augmentation(ViTImageProcessor(size={"shortest_edge": 224}))
    with pytest.raises(ValueError, match="scales by None"):
        deit_augmentation(ViTImageProcessor(do_rescale=False))
    with pytest.raises(ValueError, match="mode 'L'"):
        deit_augmentation(ViTImageProcessor())(photograph.convert("L"))
    plain = deit_augmentation(ViTImageProcessor(do_normalize=False), auto_augment=None, random_erasing=0.0)
    with fixed_randomness(0):
        assert plain(photograph).min() >= 0.0 and plain(photograph).max() <= 1.0


def evaluation_images(photograph, crop_pct=0.875):
    """One image through timm's evaluation transform and through the image processor."""
    processor = with_evaluation_crop(ViTImageProcessor(**IMAGENET), crop_pct)
    reference = create_transform(
        (3, 224, 224), crop_pct=crop_pct, interpolation="bicubic", mean=IMAGENET["image_mean"],
        std=IMAGENET["image_std"],
    )  # fmt: skip
    return reference(photograph), processor(photograph, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(427, 427), (320, 427), (512, 427)], ids=str)
def test_the_evaluation_crop_is_timms_but_for_rounding(photograph, size, crop_pct):
    theirs, ours = evaluation_images(photograph.crop((0, 0, *size)), crop_pct)
    assert ours.shape == theirs.shape == (3, 224, 224)
    # Pillow and torchvision round differently: single pixels by one of 255 levels (seen: 0.6 % of them).
    difference = (ours - theirs).abs() * torch.tensor(IMAGENET["image_std"]).view(3, 1, 1) * 255
    assert difference.mean() < 0.02
    assert difference.max() < 1.01


def test_with_some_odd_margins_the_evaluation_crop_lies_one_pixel_beside_timms(photograph):
    theirs, ours = evaluation_images(photograph)  # 383 pixels wide after resizing: a margin of 159
    difference = (ours[:, :, 1:] - theirs[:, :, :-1]).abs() * 0.225 * 255
    assert difference.mean() < 0.02
    assert (ours - theirs).abs().mean() * 0.225 * 255 > 1


def test_the_evaluation_crop_is_saved_with_the_model(photograph, removed, tmp_path):
    original = ViTImageProcessor(size={"height": 16, "width": 16})
    processor = with_evaluation_crop(original)
    assert processor.to_dict() | {"size": 0, "crop_size": 0, "do_center_crop": 0, "resample": 0} == (
        original.to_dict() | {"size": 0, "crop_size": 0, "do_center_crop": 0, "resample": 0}
    )
    assert (processor.size.shortest_edge, processor.crop_size.height, processor.resample) == (18, 16, 3)
    assert original.size.height == 16 and not original.do_center_crop
    processor.save_pretrained(tmp_path)
    removed.save_pretrained(tmp_path)
    pixel_values = processor(photograph, return_tensors="pt")["pixel_values"]
    restored = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(restored(photograph, return_tensors="pt")["pixel_values"], pixel_values)
    answer = pipeline("image-classification", model=str(tmp_path))(photograph)
    expected = removed(pixel_values).logits.softmax(-1).max().item()
    assert answer[0]["score"] == pytest.approx(expected, rel=1e-5)


def test_the_evaluation_crop_keeps_the_output_size(photograph):
    once = with_evaluation_crop(DeiTImageProcessor())
    assert output_size(once) == (224, 224)
    assert with_evaluation_crop(once, crop_pct=1.0).size.shortest_edge == 224
    with pytest.raises(ValueError, match="square"):
        with_evaluation_crop(ViTImageProcessor(size={"height": 32, "width": 64}))
    with pytest.raises(ValueError, match="crop_pct"):
        with_evaluation_crop(ViTImageProcessor(), 1.5)


def test_the_resized_side_is_rounded_down_as_in_timm():
    processor = with_evaluation_crop(ViTImageProcessor(size={"height": 16, "width": 16}))
    assert processor.size.shortest_edge == math.floor(16 / 0.875) == 18
