"""Images whose labels are not read: a folder of pictures is enough."""

import logging

import datasets
import pytest

from lambda_vit_hf.data.folders import load_image_dataset
from tests.data.layout_builders import Images, described, idx, table, tree


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


LAYOUTS = {
    "pictures": (tree(*(f"{n}.png" for n in range(10))), (8, 2)),
    "pictures in folders of any depth": (tree("sea:4", "land/hills/high:4", "land/1.jpg", "a.png"), (8, 2)),
    "splits": (tree("train/a:3", "train/b.png", "validation/c.jpg"), (4, 1)),
    "class folders": (tree("train/cat:3", "train/dog:3", "val/cat:1", "val/dog:1"), (6, 2)),
    "one class": (tree("cat:10"), (8, 2)),
    "beside a metadata file": (described(""), (8, 2)),
    "a table without labels": (table(train={"image": Images(["a"] * 6)}, test={"image": Images(["a"])}), (6, 1)),
    "a table with labels": (table(train=["cat", "dog"] * 3, test=["cow"]), (6, 1)),
    "IDX files": (idx, (4, 2)),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_image_is_there_and_of_one_class(name, streaming, tmp_path, caplog):
    build, sizes = LAYOUTS[name]
    build(tmp_path)
    caplog.set_level(logging.INFO, "lambda_vit_hf")
    loaded = load_image_dataset(directory=tmp_path, streaming=streaming, labelled=False)
    assert isinstance(loaded["train"], datasets.IterableDataset) == streaming
    rows = {split: list(part) for split, part in loaded.items()}
    assert tuple(len(rows[split]) for split in ("train", "validation")) == sizes
    for split, part in loaded.items():
        assert part.features["label"].names == ["image"]
        assert {row["label"] for row in rows[split]} == {0} and all(row["image"] for row in rows[split])
    assert "labels are not read" in caplog.text and "classes, in this order" not in caplog.text


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["a.png", "more.zip"], r"more\.zip would be left out"),
        (["notes.txt"], "holds no image"),
        (["a.png", "train/b.png"], r"a\.png has no place"),
        (["1.png"], "a fifth of each class"),
    ],
)
def test_what_has_no_clear_meaning_is_refused(paths, said, tmp_path):
    tree(*paths)(tmp_path)
    with pytest.raises(ValueError, match=f"(?i){said}"):
        load_image_dataset(directory=tmp_path, labelled=False)


def test_with_labels_a_folder_of_pictures_stays_refused(tmp_path):
    tree("a.png", "b.png")(tmp_path)
    with pytest.raises(ValueError, match="one folder per class"):
        load_image_dataset(directory=tmp_path)
