"""Which images a program reads: the same options, with the same meaning, in every program."""

import argparse


# Each option, and the argument of `data.folders.load_image_dataset` that it is.
_OPTIONS = {
    "dataset_name": "name",
    "dataset_dir": "directory",
    "train_dir": "train_dir",
    "validation_dir": "validation_dir",
    "dataset_config": "config_name",
    "image_column": "image_column",
    "label_column": "label_column",
    "class_names": "class_names",
}


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images (docs/data.md says what a folder may look like)").add_argument
    add("--dataset_name", help="Hub id, or `digits` (of scikit-learn)")
    add("--dataset_dir", help="folder of images: one folder per class, parquet files, metadata.csv, IDX files")
    add("--train_dir", help="folder of training images, for --dataset_dir")
    add("--validation_dir", help="folder of validation images, for --dataset_dir")
    add("--dataset_config", help="configuration of a Hub dataset")
    add("--image_column", help="by default the only Image column")
    add("--label_column", help="by default the only ClassLabel column, or `label`")
    add("--class_names", nargs="+", help="other names for the classes, in their order")


def dataset_place(arguments: argparse.Namespace) -> str | None:
    """Name or folder of the images that a command line gives; `None` if it gives none."""
    places = (arguments.dataset_name, arguments.dataset_dir, arguments.validation_dir, arguments.train_dir)
    return next((place for place in places if place is not None), None)


def dataset_options(arguments: argparse.Namespace) -> dict:
    """The same, as arguments of [`~lambda_vit_hf.data.folders.load_image_dataset`]."""
    return {keyword: getattr(arguments, option) for option, keyword in _OPTIONS.items()}


def dataset_words(arguments: argparse.Namespace) -> list[str]:
    """The same, as words of another program's command line."""
    words = []
    for option in _OPTIONS:
        value = getattr(arguments, option)
        if value is not None:
            words += [f"--{option}", *(value if isinstance(value, list) else [value])]
    return words
