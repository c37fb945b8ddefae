"""Every layout of docs/data.md has one meaning: stored or streamed, and whichever program asks."""

import logging
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

from lambda_vit_hf.data.decoding import decode_image
from lambda_vit_hf.data.folders import load_image_dataset
from lambda_vit_hf.evaluation import evaluate
from lambda_vit_hf.training import training_images
from lambda_vit_hf.training.arguments import DataArguments
from tests.data.layout_builders import colour, tree
from tests.data.layouts import LAYOUTS


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def options_of(layout, folder: Path) -> dict:
    options = layout.options or {"directory": "{folder}"}
    return {name: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
            for name, value in options.items()}  # fmt: skip


def counts(split) -> dict[str, int]:
    """Images of each class, in the order of the classes; every image must have the colour of its class."""
    names = split.features["label"].names
    found = Counter()
    for row in (
        split
        if isinstance(split, datasets.IterableDataset)
        else split.cast_column("image", datasets.Image(decode=False))
    ):
        pixel = np.array(decode_image(row["image"]).getpixel((4, 4)), dtype=int)
        if pixel.tolist() != [9, 9, 9]:  # IDX files are gray
            nearest = min(names, key=lambda name: np.abs(pixel - colour(name)).sum())
            assert nearest == names[row["label"]], "an image has another class's label"
        found[names[row["label"]]] += 1
    return {name: found[name] for name in names}


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_meaning_of_the_table(name, streaming, tmp_path, caplog):
    layout = LAYOUTS[name]
    layout.build(tmp_path)
    caplog.set_level(logging.INFO, "lambda_vit_hf")
    refused = layout.refused or (layout.refused_as_stream if streaming else None)
    if refused:
        with pytest.raises((ValueError, OSError), match=f"(?s){refused}"):
            load_image_dataset(**options_of(layout, tmp_path), streaming=streaming)
        return
    loaded = load_image_dataset(**options_of(layout, tmp_path), streaming=streaming)
    assert isinstance(loaded["train"], datasets.IterableDataset) == streaming
    found = {split: counts(part) for split, part in loaded.items()}
    assert found == {"train": layout.train, "validation": layout.validation}
    assert [list(found["train"]), list(found["validation"])] == [list(layout.train)] * 2, (
        "another order of the classes"
    )
    said = [record.getMessage() for record in caplog.records if "Ignored" in record.getMessage()]
    assert len(said) == bool(layout.ignored), said
    assert all(re.search(pattern, said[0]) for pattern in layout.ignored), said


def test_the_table_of_the_docs_is_the_table_of_the_tests():
    rows = re.findall(r"^\| (.+?) \|.*\| (accepted|ignored|refused) \|", (ROOT / "docs/data.md").read_text(), re.M)
    assert dict(rows) == {name: layout.outcome for name, layout in LAYOUTS.items()}
    assert len(rows) == len(LAYOUTS)


def test_what_was_understood_is_said_once(tmp_path, caplog):
    tree("Training/10:5", "Training/2:5", "Testing/10:2", "Testing/2:2", ".DS_Store")(tmp_path)
    caplog.set_level(logging.INFO, "lambda_vit_hf")
    load_image_dataset(directory=tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"train: 10 images ({tmp_path}/Training)",
        f"validation: 4 images ({tmp_path}/Testing, a test split, as there is no validation split)",
        "2 classes, in this order: 10, 2; labels from the class folders",
        "Ignored: .DS_Store",
    ]


def test_only_the_first_process_says_what_was_understood(tmp_path, caplog, monkeypatch):
    tree("cat:5", "dog:5")(tmp_path)
    caplog.set_level(logging.INFO, "lambda_vit_hf")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    load_image_dataset(directory=tmp_path)
    assert not caplog.records


def test_a_test_split_alone_can_be_evaluated_on(tmp_path):
    tree("test/cat:2", "test/dog:3")(tmp_path)
    assert counts(evaluate.load_split(directory=str(tmp_path))) == {"cat": 2, "dog": 3}
    assert counts(evaluate.load_split(validation_dir=str(tmp_path / "test"))) == {"cat": 2, "dog": 3}
    with pytest.raises(ValueError, match="`train` split is needed"):
        evaluate.load_split(directory=str(tmp_path), split="train")


def test_a_folder_passed_as_a_name_is_that_folder(tmp_path):
    tree("Training/cat:5", "Training/dog:5", "Testing/cat:2", "Testing/dog:2")(tmp_path)
    assert {split: len(part) for split, part in load_image_dataset(str(tmp_path)).items()} == {
        "train": 10, "validation": 4,
    }  # fmt: skip


def test_every_program_asks_the_one_loader(tmp_path, monkeypatch):
    tree("Training/cat:5", "Training/dog:5", "Testing/cat:2", "Testing/dog:2")(tmp_path)
    train = training_images.load_splits(DataArguments(dataset_dir=str(tmp_path)))
    assert {split: len(part) for split, part in train.items()} == {"train": 10, "validation": 4}
    assert len(evaluate.load_split(directory=str(tmp_path))) == 4
    both = training_images.load_splits(
        DataArguments(train_dir=str(tmp_path / "Training"), validation_dir=str(tmp_path / "Testing"))
    )
    assert {split: len(part) for split, part in both.items()} == {"train": 10, "validation": 4}
    # Nothing else reads images from a folder or the Hub.
    readers = re.compile(r"datasets\.load_dataset|load_dataset_builder|ImageFolder|imagefolder|from_parquet")
    files = [*ROOT.glob("lambda_vit_hf/**/*.py"), *ROOT.glob("trainer_scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
    found = {path.name for path in files if readers.search(path.read_text(encoding="utf-8"))}
    assert found == {"folders.py"}
