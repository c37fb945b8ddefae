"""What folders of images may look like, and what becomes of each: the table of docs/data.md."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.data.layout_builders import Images, Named, all_of, described, from_pandas, idx, out_of_range, table, tree


@dataclass
class Layout:
    """
    Attributes:
        build: writes the layout into an empty folder.
        train, validation: number of images of each class, in the order of the classes; `None`: refused.
        refused: pattern in the error.
        ignored: patterns in the log.
        options: of the loader; `{folder}` in a value is the folder. By default it is the `directory`.
        refused_as_stream: pattern in the error with `streaming=True`, if only that is refused.
    """

    build: Callable[[Path], None]
    train: dict | None = None
    validation: dict | None = None
    refused: str | None = None
    ignored: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    refused_as_stream: str | None = None

    @property
    def outcome(self) -> str:
        return "refused" if self.refused else "ignored" if self.ignored else "accepted"


def two(count: int) -> dict[str, int]:
    return {"cat": count, "dog": count}


def splits(train: str, validation: str, **more) -> Layout:
    paths = [f"{train}/cat:5", f"{train}/dog:5", f"{validation}/cat:2", f"{validation}/dog:2"]
    return Layout(tree(*paths), two(5), two(2), **more)


PAIR = ["train/cat:5", "train/dog:5", "validation/cat:2", "validation/dog:2"]
NO_VALIDATION = "stream needs a `validation` split"
LABELS = ["cat", "dog"]

# fmt: off
LAYOUTS = {
    # Which split
    "class folders alone": Layout(tree("cat:10", "dog:10"), two(8), two(2)),
    "train, validation": splits("train", "validation"),
    "Train, Validation": splits("Train", "Validation"),
    "Training, Testing": splits("Training", "Testing"),
    "TRAIN, TEST": splits("TRAIN", "TEST"),
    "train, val": splits("train", "val"),
    "train, valid": splits("train", "valid"),
    "train, dev": splits("train", "dev"),
    "train, eval": splits("train", "eval"),
    "train, evaluation": splits("train", "evaluation"),
    "training_set, test_set": splits("training_set", "test_set"),
    "train2017, val2017": splits("train2017", "val2017"),
    "train, validation, test": Layout(
        tree(*PAIR, "test/cat:9", "test/dog:9"), two(5), two(2), ignored=("Ignored: test$",)
    ),
    "train, validation, test without labels": Layout(
        tree(*PAIR, "test/0.png"), two(5), two(2), ignored=("Ignored: test$",)
    ),
    "train alone": Layout(tree("train/cat:10", "train/dog:10"), two(8), two(2)),
    "test alone": Layout(tree("test/cat:2", "test/dog:2"), refused="`train` split is needed, found .'test'. in"),
    "train, holdout": Layout(tree("train/cat:5", "train/dog:5", "holdout/cat:5"), refused="holdout looks like no"),
    "train, training": Layout(tree(*PAIR, "training/cat:1", "training/dog:1"), refused="train.*training"),
    "val, dev": Layout(tree(*PAIR, "dev/cat:1", "dev/dog:1"), refused="dev.*validation"),
    "train_val": Layout(tree("train_val/cat:5", "train_val/dog:5", "test/cat:1", "test/dog:1"), refused="not clear"),
    "a split name among classes": Layout(tree("bus:5", "car:5", "train:5"), refused="bus looks.*train_dir"),
    "a class that begins as a split": Layout(
        tree("airport:5", "train_station:5", "test_tube:5"), {"airport": 4, "test_tube": 4, "train_station": 4},
        {"airport": 1, "test_tube": 1, "train_station": 1},
    ),
    "test_images among classes": Layout(tree("cat:5", "dog:5", "test_images:9"), refused="cat looks like no split"),
    "TrainSet, TestSet": splits("TrainSet", "TestSet"),
    "class folders with splits in them": Layout(tree("cat/train:5", "cat/test:5", "dog/train:5"), refused="cat/test"),
    "a folder around the splits": Layout(tree("pets/train/cat:5", "pets/test/cat:5"), refused="pass that folder"),
    "train_dir, validation_dir": Layout(
        tree("a/cat:5", "a/dog:5", "b/cat:2", "b/dog:2"), two(5), two(2),
        options={"train_dir": "{folder}/a", "validation_dir": "{folder}/b"},
    ),
    "train_dir with a class train": Layout(
        tree("bus:5", "car:5", "train:5"), {"bus": 4, "car": 4, "train": 4}, {"bus": 1, "car": 1, "train": 1},
        options={"train_dir": "{folder}"},
    ),
    "train_dir of several splits": Layout(
        table(train=LABELS * 5, validation=LABELS), refused="one split.*train.*validation",
        options={"train_dir": "{folder}"},
    ),
    "train_dir as validation_dir": Layout(
        tree("cat:5", "dog:5"), refused="the same files",
        options={"train_dir": "{folder}", "validation_dir": "{folder}/"},
    ),
    "no such folder": Layout(lambda folder: None, refused="not exist", options={"directory": "{folder}/gone"}),
    "a file": Layout(tree("data.zip"), refused="is a file", options={"directory": "{folder}/data.zip"}),
    "an empty folder": Layout(lambda folder: None, refused="is empty"),
    # Classes
    "one class": Layout(tree("cat:5"), refused="At least two classes.*cat"),
    "a class with one image": Layout(tree("cat:5", "dog:1"), refused="one image: dog"),
    "a class with one image, validation": Layout(
        tree("train/cat:5", "train/dog:1", "val/cat:1", "val/dog:1"), {"cat": 5, "dog": 1}, two(1)
    ),
    "two images a class": Layout(tree("cat:2", "dog:2", "cow:2"), {"cat": 1, "cow": 1, "dog": 1},
                                 {"cat": 1, "cow": 1, "dog": 1}),
    "a class only in validation": Layout(tree(*PAIR, "validation/cow:1"), refused="only validation has cow"),
    "a class only in train": Layout(tree(*PAIR, "train/cow:1"), refused="only train has cow"),
    "an empty class in validation": Layout(
        tree(*PAIR, "train/cow:1", "validation/cow/"), {"cat": 5, "cow": 1, "dog": 5}, {"cat": 2, "cow": 0, "dog": 2}
    ),
    "an empty class in train": Layout(tree(*PAIR, "train/cow/"), refused="cow holds no image"),
    "a class without images": Layout(tree("cat:5", "dog:5", "notes/a.txt"), refused="notes holds no image"),
    "class folders 1, 2, 10": Layout(
        tree("10:5", "1:5", "2:5"), {"1": 4, "10": 4, "2": 4}, {"1": 1, "10": 1, "2": 1}
    ),
    "folders in class folders": Layout(tree("cat:5", "dog/small:5"), refused="dog/small.*first level"),
    "images without class folders": Layout(tree("a.png", "b.png"), refused="a.png .and 1 more. has no place"),
    "an image beside class folders": Layout(tree(*PAIR, "train/stray.png"), refused=r"train/stray.png has no place"),
    "an image beside splits": Layout(tree(*PAIR, "stray.png"), refused="stray.png has no place"),
    "a text file beside class folders": Layout(tree("cat:5", "dog:5", "classes.txt"), refused="txt has no place"),
    "an archive beside class folders": Layout(tree("cat:5", "dog:5", "old.zip"), refused="old.zip.*unpack"),
    "README.md": Layout(tree(*PAIR, "README.md"), two(5), two(2), ignored=("README.md",)),
    "hidden files and folders": Layout(
        tree(*PAIR, "train/.ipynb_checkpoints/a.png", ".git/x", "train/cat/._0.png", ".DS_Store"), two(5), two(2),
        ignored=("train/.ipynb_checkpoints", r"\.DS_Store", r"cat/\._0.png"),
    ),
    "debris of operating systems": Layout(
        tree(*PAIR, "__MACOSX/train/cat/0.png", "train/cat/Thumbs.db", "train/desktop.ini"), two(5), two(2),
        ignored=("__MACOSX", "Thumbs.db", "desktop.ini"),
    ),
    "a text file in a class folder": Layout(tree(*PAIR, "train/cat/0.txt"), two(5), two(2), ignored=("cat/0.txt",)),
    "an archive in a class folder": Layout(tree(*PAIR, "train/cat/more.zip"), refused="more.zip would be left out"),
    "an image format that is not read": Layout(tree(*PAIR, "train/cat/0.heic"), refused="0.heic would be left out"),
    "suffixes in capitals": Layout(
        tree(*PAIR, "train/cat/A.JPG", "train/cat/B.PNG", "train/dog/C.JPEG", "train/dog/D.TIF"), two(7), two(2)
    ),
    "webp, bmp, tif, gif": Layout(
        tree(*PAIR, "train/cat/a.webp", "train/cat/b.bmp", "train/dog/a.tif", "train/dog/a.gif"), two(7), two(2)
    ),
    "special characters": Layout(
        tree("[a] *b? {c}/train/cat #1 50%:5", "[a] *b? {c}/train/Köter 犬:5", "[a] *b? {c}/val/cat #1 50%:1",
             "[a] *b? {c}/val/Köter 犬:1"),
        {"Köter 犬": 5, "cat #1 50%": 5}, {"Köter 犬": 1, "cat #1 50%": 1},
        options={"directory": "{folder}/[a] *b? {c}"},
    ),
    "a name that is not UTF-8": Layout(tree("cat:5", "dog\udcff:5"), refused="not UTF-8"),
    "links to folders": Layout(
        tree("store/a:5", "store/b:5", "train/a -> store/a", "train/b -> store/b"), {"a": 4, "b": 4}, {"a": 1, "b": 1},
        options={"directory": "{folder}/train"},
    ),
    "two splits that are one folder": Layout(
        tree("train/cat:5", "train/dog:5", "val -> train"), refused="the same files"
    ),
    "a link to a folder above": Layout(tree(*PAIR, "train/cat/loop -> train"), refused="loop is a link"),
    # Parquet files
    "train-*.parquet, validation-*.parquet": Layout(
        table(**{"data__train-00000-of-00001": Named(LABELS * 3),
                                                 "data__validation-00000-of-00001": Named(LABELS)}),
        two(3), two(1),
    ),
    "train.parquet, eval-*.parquet": Layout(table(**{"train": LABELS * 3, "eval-0": LABELS}), two(3), two(1)),
    "Train.parquet, Testing.parquet": Layout(table(Train=LABELS * 3, Testing=LABELS), two(3), two(1)),
    "train/*.parquet, dev/*.parquet": Layout(table(train__0=LABELS * 3, dev__0=LABELS), two(3), two(1)),
    "train.parquet, val.parquet, test.parquet": Layout(
        table(train=LABELS * 3, val=LABELS, test=[-1, -1]), two(3), two(1), ignored=("Ignored: test.parquet$",)
    ),
    "one parquet file": Layout(table(data=LABELS * 5), two(4), two(1), refused_as_stream=NO_VALIDATION),
    "train.parquet, other.parquet": Layout(
        table(train=LABELS * 3, other=LABELS), refused="other.parquet looks like no split"
    ),
    "train_test.parquet": Layout(table(train_test=LABELS), refused="several splits"),
    "a damaged parquet file": Layout(table(train=b"", validation=LABELS), refused="train.parquet is no parquet file"),
    "a parquet file without rows": Layout(table(train=LABELS * 3, validation=Named([], LABELS)),
                                          refused="validation.parquet has no rows"),
    "parquet files and images": Layout(all_of(table(train=LABELS * 5), tree("cat:2")), refused="0.png lies beside"),
    "parquet files and a text file": Layout(
        all_of(table(train=LABELS * 3, test=LABELS), tree("LICENSE.txt")), two(3), two(1), ignored=("LICENSE.txt",)
    ),
    "parquet files of pandas": Layout(from_pandas, two(2), two(1)),
    # Columns and labels
    "integers as labels": Layout(
        table(train=[10, 9, 2] * 3, test=[2, 9, 10]), {"2": 3, "9": 3, "10": 3}, {"2": 1, "9": 1, "10": 1}
    ),
    "strings as labels": Layout(table(train=["dog", "cat"] * 3, test=LABELS), two(3), two(1)),
    "integers with class_names": Layout(
        table(train={"label": [0, 1] * 3, "image": Images(["cat", "dog"] * 3)},
              test={"label": [1, 0], "image": Images(["dog", "cat"])}),
        two(3), two(1), options={"directory": "{folder}", "class_names": LABELS},
    ),
    "floats as labels": Layout(table(train=[0.0, 1.0] * 3, test=[0.0, 1.0]), refused="'label' holds float"),
    "missing labels": Layout(table(train=["cat", "dog", None], test=LABELS), refused="'label' has rows without"),
    "missing integers": Layout(table(train=[0, 1, None], test=[0, 1]), refused="'label' has rows without"),
    "negative labels": Layout(table(train=[0, 1, -1], test=[0, 1]), refused="-1. of the column 'label' are negative"),
    "labels outside the classes": Layout(out_of_range, refused="-1. of the column 'label' lie outside the 2 classes"),
    "lists as labels": Layout(table(train=[[0], [1]], test=[[0], [1]]), refused="'label' holds List"),
    "strings that differ between splits": Layout(
        table(train=["cat", "dog"] * 2, test=["cat", "cow"]), refused="train has dog .*only validation has cow"
    ),
    "ClassLabels in another order": Layout(
        table(train=Named(LABELS * 2, ["cat", "dog"]), test=Named(LABELS, ["dog", "cat"])), refused="in their order"
    ),
    "an image column called img": Layout(
        table(train={"fine": Named(LABELS * 3), "img": Images(LABELS * 3), "image": ["x"] * 6},
              test={"fine": Named(LABELS), "img": Images(LABELS), "image": ["x"] * 2}), two(3), two(1),
    ),
    "two image columns": Layout(
        table(train={"label": LABELS, "image": Images(LABELS), "mask": Images(LABELS)}),
        refused="one image column.*image.*mask.*`image_column`",
    ),
    "two ClassLabel columns": Layout(
        table(train={"fine": Named(LABELS), "coarse": Named(LABELS)}), refused="fine.*coarse.*`label_column`"
    ),
    "label_column": Layout(
        table(train={"fine": Named(LABELS * 3), "coarse": Named(["x", "y", "z"] * 2)},
              test={"fine": Named(LABELS), "coarse": Named(["x", "y"])}), two(3), two(1),
        options={"directory": "{folder}", "label_column": "fine"},
    ),
    "no label column": Layout(table(train={"name": LABELS}), refused="one label column.*name.*`label_column`"),
    "a label column in train alone": Layout(
        table(train=LABELS, test={"species": LABELS}), refused="label column 'label' in .*test split"
    ),
    # Metadata files
    "metadata.csv": Layout(described("."), two(4), two(1)),
    "metadata.jsonl": Layout(described(".", kind="jsonl"), two(4), two(1)),
    "metadata.csv in each split": Layout(described("Train", "Test"), two(5), two(5)),
    "metadata.csv beside a folder of images": Layout(described(".", inside="images/"), two(4), two(1)),
    "metadata.csv beside class folders": Layout(
        all_of(tree("cat:2", "dog:2"), tree("metadata.csv")), refused="metadata.csv and .*cat"
    ),
    "metadata.csv without file_name": Layout(
        described(".", columns=("file", "label")), refused="metadata.csv.*cannot be read, .*file_name"
    ),
    "metadata.csv without rows": Layout(
        described(".", left_out=[f"{n}.png" for n in range(10)]), refused="metadata.csv.*is empty"
    ),
    "metadata.csv names a file that is not there": Layout(
        described(".", extra=("77.png",)), refused="metadata.csv names images that do not exist.*77.png"
    ),
    "metadata.csv leaves images out": Layout(
        described(".", left_out=("3.png",)), refused="metadata.csv does not name.*3.png"
    ),
    # The MNIST family
    "IDX files": Layout(idx, {"0": 2, "1": 2}, {"0": 1, "1": 1}),
    "IDX files, packed and unpacked": Layout(lambda path: idx(path, both=True), {"0": 2, "1": 2}, {"0": 1, "1": 1}),
    "a damaged IDX file": Layout(lambda folder: idx(folder, cut=1), refused="idx3-ubyte.gz is no IDX file"),
    "IDX files without labels": Layout(lambda folder: idx(folder, without="t10k-labels"), refused="one idx1 file"),
}
# fmt: on
