"""The images of a training, as its arguments ask for them."""

import pytest
import torch
from transformers import ViTImageProcessor

from lambda_vit_hf.data.dataset import ProcessedImages, collate
from lambda_vit_hf.data.mixing import MixupCollator
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.data.streaming import StreamedImages
from lambda_vit_hf.training.arguments import AugmentationArguments, DataArguments, LambdaTrainingArguments
from lambda_vit_hf.training.training_images import TrainingImages, check_augmentation, load_splits


def images_of(tmp_path, augmentation=None, **data) -> TrainingImages:
    data_args = DataArguments(dataset_name="digits", **data)
    return TrainingImages(
        load_splits(data_args),
        ViTImageProcessor(size={"height": 8, "width": 8}),
        data_args,
        AugmentationArguments(**(augmentation or {})),
        LambdaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1),
    )


def test_by_default_nothing_is_augmented(tmp_path):
    images = images_of(tmp_path)
    assert isinstance(images.train, ProcessedImages) and images.collator is collate
    assert torch.equal(images.train[3]["pixel_values"], images.calibration(10)[3]["pixel_values"])
    assert len(images.evaluation) == 360


def test_training_images_are_augmented_and_the_others_are_not(tmp_path):
    crops = dict(random_resized_crop=True, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    images = images_of(tmp_path, crops)
    plain = images_of(tmp_path)
    assert not torch.equal(images.train[3]["pixel_values"], plain.train[3]["pixel_values"])
    assert torch.equal(images.calibration(10)[3]["pixel_values"], plain.train[3]["pixel_values"])
    assert torch.equal(images.evaluation[3]["pixel_values"], plain.evaluation[3]["pixel_values"])


def test_mixing_takes_soft_labels_with_the_smoothing_of_the_training(tmp_path):
    images = images_of(tmp_path, dict(mixup=0.8, cutmix=1.0))
    assert isinstance(images.collator, MixupCollator)
    labels = images.collator([images.train[index] for index in range(6)])["labels"]
    assert labels.shape == (6, 10)
    assert labels.min().item() == pytest.approx(0.01)


def test_a_stream_gives_augmented_images_and_the_same_calibration_everywhere(tmp_path):
    images = images_of(tmp_path, dict(random_shift=1), streaming=True, shuffle_buffer_size=20)
    assert isinstance(images.train, StreamedImages)
    assert len(images.train) == 1437
    first, second = (images.calibration(12) for _ in range(2))
    assert len(first) == 12
    assert all(torch.equal(first[index]["pixel_values"], second[index]["pixel_values"]) for index in range(12))


def test_classes_can_be_named(tmp_path):
    names = "zero one two three four five six seven eight nine".split()
    for streaming in (False, True):
        splits = load_splits(DataArguments(dataset_name="digits", class_names=names, streaming=streaming))
        assert {tuple(part.features["label"].names) for part in splits.values()} == {tuple(names)}
        images = images_of(tmp_path, class_names=names, streaming=streaming)
        assert len(images.train) == 1437, "the size of the stream was lost"
    with pytest.raises(ValueError, match="10 different names"):
        load_splits(DataArguments(dataset_name="digits", class_names=names[:9]))


@pytest.mark.parametrize(
    ("options", "streaming", "said"),
    [
        (dict(auto_augment="rand-m9"), False, "random_resized_crop"),
        (dict(random_erasing=0.1), False, "random_resized_crop"),
        (dict(random_shift=2, random_resized_crop=True), False, "choose one"),
        (dict(repeated_augmentation=3), True, "stream"),
        (dict(repeated_augmentation=0), False, "1 \\(off\\) or more"),
    ],
    ids=str,
)
def test_augmentations_that_exclude_each_other_are_refused(options, streaming, said):
    with pytest.raises(ValueError, match=said):
        check_augmentation(AugmentationArguments(**options), streaming)


def test_fewer_images_evenly_spaced():
    whole = load_splits(DataArguments(dataset_name="digits"))
    part = load_splits(DataArguments(dataset_name="digits", max_train_samples=3, max_eval_samples=10_000))
    assert len(part["train"]) == 3 and len(part["validation"]) == len(whole["validation"])
    positions = evenly_spaced(len(whole["train"]), 3)
    assert list(part["train"]["label"]) == list(whole["train"].select(positions)["label"])
    assert part["train"].features == whole["train"].features


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_train_samples": 0}, "1 or more, not 0"), ({"max_eval_samples": 5, "streaming": True}, "a stream")],
)
def test_a_number_of_images_that_cannot_be_met_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        load_splits(DataArguments(dataset_name="digits", **options))
