"""Evaluation: what is counted, under which label, and that processes share the work without counting twice."""

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from transformers import EvalPrediction, ViTConfig, ViTForImageClassification, ViTImageProcessor

from lambda_vit_hf.cli import evaluate
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.evaluation.evaluate import (
    class_indices,
    evaluate_model,
    labelled_images,
    load_split,
    read_images,
    shortlist,
)
from lambda_vit_hf.evaluation.metrics import classification_metrics
from tests.conftest import in_two_processes, perturb


NAMES = [str(digit) for digit in range(10)]


@pytest.fixture
def digits_model(tmp_path) -> str:
    """A ViT for digits with random weights, whose classes are counted backwards."""
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        id2label=dict(enumerate(reversed(NAMES))), label2id={name: 9 - i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    torch.manual_seed(0)
    perturb(ViTForImageClassification(config), size=0.3).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_labels_are_matched_by_name():
    assert class_indices(["dog", "cat"], {0: "Cat", 1: "dog", 2: "cow"}) == [1, 0]
    assert class_indices(["sea_lion"], {0: "dog", 1: "Sea lion "}) == [1]
    assert class_indices(["a", "b"], {0: "LABEL_0", 1: "LABEL_1"}) == [0, 1], "a model without names of its own"
    assert class_indices(["crane", "crane"], {0: "crane", 1: "crane"}) == [0, 1], "the same list, as it is"
    assert class_indices(["x", "y"], {0: "a", 1: "b", 2: "c"}, by_index=True) == [0, 1]


@pytest.mark.parametrize(
    ("names", "known", "by_index", "reason"),
    [
        (["dog", "bird"], ["cat", "dog"], False, "1 of the dataset's 2 classes .*'bird'.*--labels_by_index"),
        (["dog"], ["dog", "Dog"], False, "no unique"),
        (["dog", "Dog"], ["cat", "dog"], False, "no unique"),
        (["a", "b", "c"], ["LABEL_0", "LABEL_1"], False, "no \\(or"),
        (["a", "b", "c"], ["x", "y"], True, "has 3 classes, the model only 2"),
    ],
)
def test_labels_that_do_not_match_are_an_error(names, known, by_index, reason):
    with pytest.raises(ValueError, match=reason):
        class_indices(names, dict(enumerate(known)), by_index)


class Echo(torch.nn.Module):
    """Says the class that is written in an image's first pixel; the next classes are its second to fifth guess."""

    dtype = torch.float32

    def forward(self, pixel_values):
        classes = torch.arange(8)
        scores = -((classes - pixel_values[:, 0, 0, :1].long()) % 8).float()
        return type("Output", (), {"logits": scores})


def written(number: int, label: int) -> dict:
    return {"pixel_values": torch.full((3, 2, 2), float(number)), "labels": label}


def test_top1_top5_and_counts():
    # Right; right at the third guess; wrong at all five; unreadable.
    items = [written(0, 0), written(3, 3), written(4, 6), written(5, 4), written(0, -100)]
    figures = evaluate_model(Echo(), items, Accelerator(cpu=True), batch_size=2)
    assert (figures["num_images"], figures["unreadable"]) == (4, 1)
    assert (figures["accuracy"], figures["top5_accuracy"]) == (0.5, 0.75)
    assert figures["images_per_second"] > 0 and figures["model_images_per_second"] > 0


@pytest.mark.parametrize("num_classes", [3, 6, 7, 40])
def test_a_shortlist_of_scores_gives_the_same_figures(num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    scores = torch.randint(0, 20, (500, num_classes), generator=generator).float()  # many ties
    labels = torch.randint(0, num_classes, (500,), generator=generator)
    labels[::50] = -100
    short_scores, short_labels = shortlist(scores, labels)
    assert short_scores.shape == (500, min(num_classes, 6))
    whole, short = (
        classification_metrics(EvalPrediction(one.numpy(), other.numpy()))
        for one, other in ((scores, labels), (short_scores, short_labels))
    )
    assert short == whole


def test_labels_are_renumbered_but_not_those_of_unreadable_images():
    items = [written(7, 0), written(6, 1), written(5, 0), written(1, -100)]
    figures = evaluate_model(Echo(), items, Accelerator(cpu=True), classes=[7, 6])
    assert (figures["num_images"], figures["unreadable"], figures["accuracy"]) == (3, 1, pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="None of the 2 images could be read"):
        evaluate_model(Echo(), [written(0, -100)] * 2, Accelerator(cpu=True))


def test_an_unreadable_file_is_left_out_and_counted(tmp_path, digits_model):
    for label in ("0", "1"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(5):
            pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    (tmp_path / "images" / "1" / "4.png").write_bytes(b"no picture")
    dataset = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"))["train"]
    images = read_images(dataset, ViTImageProcessor.from_pretrained(digits_model))
    figures = evaluate_model(load_classifier(digits_model), images, Accelerator(cpu=True), [9, 8], batch_size=4)
    assert (figures["num_images"], figures["unreadable"]) == (9, 1)


def test_a_checkpoint_with_random_weights_is_refused(digits_model):
    config = Path(digits_model) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="16 weights, which would be random"):
        load_classifier(digits_model)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"No split 'test'; there are \['train', 'validation'\]"):
        load_split("digits", split="test")


def test_labelled_images_count_classes_as_the_model_does(digits_model):
    images, labels = labelled_images(digits_model, "digits", None, 20)
    assert images.shape == (20, 3, 8, 8)
    in_order = load_split("digits")["label"]
    assert labels.tolist() == [9 - in_order[index] for index in evenly_spaced(360, 20)]


# The program.


def evaluate_digits(model: str, output: str, rank: int = 0) -> None:
    # 360 images in batches of 50: the last round has 10 images for two processes, which accelerate fills up.
    common = ["--dataset_name", "digits", "--device", "cpu", "--batch_size", "50"]
    evaluate.main([model, *common, "--output", output])


def test_figures_that_could_not_be_written_are_not_measured(digits_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lambda_vit_hf.evaluation.evaluate.evaluate_model", lambda *_: 1 / 0)
    (tmp_path / "taken").write_text("mine")
    command = [digits_model, "--dataset_name", "digits", "--output"]
    with pytest.raises(FileExistsError, match="taken"):
        evaluate.main([*command, str(tmp_path / "taken" / "figures.json")])
    with pytest.raises(SystemExit):
        evaluate.main([*command, str(tmp_path)])
    assert "is a folder" in capsys.readouterr().err


def test_two_processes_count_each_image_once(digits_model, tmp_path, capsys):
    evaluate_digits(digits_model, str(tmp_path / "one.json"))
    printed = capsys.readouterr().out
    in_two_processes(evaluate_digits, digits_model, str(tmp_path / "two.json"))
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for name in ("num_images", "unreadable", "accuracy", "top5_accuracy"):
        assert two[name] == one[name], name
    assert (one["num_images"], one["environment"]["processes"], two["environment"]["processes"]) == (360, 1, 2)
    assert f"top-1 {100 * one['accuracy']:.2f} %" in printed and "on 360 images;" in printed
    assert {"hardware", "date", "torch", "transformers", "dtype", "batch"} <= set(one["environment"])


def test_figures_in_one_line():
    figures = {"accuracy": 0.5, "num_images": 8, "unreadable": 2, "images_per_second": 1234.0,
               "model_images_per_second": 5678.0}  # fmt: skip
    assert evaluate.describe("m", figures) == (
        "m: top-1 50.00 % on 8 images (2 unreadable left out); 1,234 images/s with decoding, 5,678 without"
    )


def test_values_have_no_top1(digits_model, tmp_path):
    config = ViTConfig.from_pretrained(digits_model)
    config.problem_type = "regression"
    config.save_pretrained(digits_model)
    for measure in (
        lambda: evaluate.main([str(digits_model), "--dataset_name", "digits"]),
        lambda: labelled_images(str(digits_model), "digits"),
    ):
        with pytest.raises(ValueError, match="gives values"):
            measure()
