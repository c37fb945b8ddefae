"""Arguments of the training program: dataclasses, read from a YAML recipe first, then from the command line."""

import argparse
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments


@dataclass
class ModelArguments:
    """Which model to start from: a checkpoint, or a new ViT of the given shape, trained first."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of any ViT checkpoint. Without it a new ViT is trained."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the classifier of a checkpoint with another number of classes."}
    )
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth, in [0, 1)."})
    drop_path_schedule: str | None = field(
        default=None, metadata={"help": "constant (default) or linear (grows with depth)."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels; of a checkpoint, positions are interpolated."}
    )
    patch_size: int = field(default=16, metadata={"help": "New model: pixels per patch side."})
    hidden_size: int = field(default=192, metadata={"help": "New model: width."})
    num_hidden_layers: int = field(default=12, metadata={"help": "New model: layers."})
    num_attention_heads: int = field(default=3, metadata={"help": "New model: attention heads."})
    intermediate_size: int = field(default=768, metadata={"help": "New model: width of the MLP."})
    initializer_range: float = field(default=0.02, metadata={"help": "New model: spread of the initial weights."})
    base_num_train_epochs: float = field(
        default=10.0, metadata={"help": "New model or classifier: epochs before removal begins."}
    )
    base_learning_rate: float = field(default=1e-3, metadata={"help": "New model or classifier: peak learning rate."})


@dataclass
class DataArguments:
    """Which images, and how they are read."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, or `digits` (of scikit-learn)."})
    dataset_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of images: one folder per class, parquet files, metadata.csv, IDX (docs/data.md)."},
    )
    train_dir: str | None = field(default=None, metadata={"help": "Folder of training images, for --dataset_dir."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of validation images beside it."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    image_column: str | None = field(default=None, metadata={"help": "By default the only Image column."})
    label_column: str | None = field(
        default=None, metadata={"help": "By default the only ClassLabel column, or `label`."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Other names for the classes, in their order."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training images one after another instead of storing them first."}
    )
    shuffle_buffer_size: int = field(default=10_000, metadata={"help": "Streaming: images to draw the next one from."})
    unreadable_images: str = field(
        default="skip", metadata={"help": "skip (and count) images that cannot be decoded, or raise."}
    )
    max_unreadable_share: float = field(default=0.01, metadata={"help": "Stop above this share of such images."})
    evaluation_crop: float | None = field(
        default=None,
        metadata={"help": "Evaluate on the centre: of an image resized to image_size / this (0.875: 256 for 224)."},
    )


@dataclass
class AugmentationArguments:
    """What happens to training images. timm's names and definitions, with the defaults of no augmentation."""

    random_shift: int = field(default=0, metadata={"help": "Shift by up to this many pixels; for small pictures."})
    random_resized_crop: bool = field(
        default=False, metadata={"help": "Random crops and flips; the three options below need it."}
    )
    auto_augment: str | None = field(default=None, metadata={"help": "timm's policy: rand-m9-mstd0.5-inc1."})
    color_jitter: float = field(default=0.0, metadata={"help": "Strength; timm leaves it out under auto_augment."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."})
    random_erasing_mode: str = field(default="pixel", metadata={"help": "pixel, const or rand."})
    repeated_augmentation: int = field(default=1, metadata={"help": "Draw each image this often, others not at all."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0: off."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of cutmix; 0: off."})
    mixup_switch_prob: float = field(default=0.5, metadata={"help": "Share of batches with cutmix, if both are on."})


@dataclass
class RemovalArguments:
    """Which attention layers go, and how."""

    removal_ratio: float | None = field(default=None, metadata={"help": "Fraction of attention layers, in [0, 1]."})
    num_layers: int | None = field(default=None, metadata={"help": "Number of attention layers to remove."})
    layers: list[int] | None = field(default=None, metadata={"help": "The layers to remove, 0-based."})
    strategy: str = field(default="nose", metadata={"help": "How layers are chosen: nose, beam, cosine, last, ..."})
    calibration_size: int = field(default=512, metadata={"help": "Training images to select on."})
    output: str | None = field(default=None, metadata={"help": "Measured: class_head, class_token or token_mean."})
    mask: str = field(default="skip", metadata={"help": "Masked layers: skip or identity."})
    compare: str = field(default="magnitude", metadata={"help": "Compare transfer entropy by magnitude or value."})
    schedule: str = field(default="linear", metadata={"help": "Lambda falls linear or cosine."})
    hold_share: float = field(default=0.25, metadata={"help": "Share of training, at its end, with lambda = 0."})
    granularity: str = field(default="step", metadata={"help": "Lambda changes every step or every epoch."})
    fold: bool = field(default=True, metadata={"help": "Fold the removed identity into the weights."})


@dataclass
class LambdaTrainingArguments(TrainingArguments):
    """Hugging Face's TrainingArguments, and what the DeiT recipe needs beyond them."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in a folder that is not empty; its old checkpoints are deleted."}
    )
    learning_rate_batch_size: int | None = field(
        default=None, metadata={"help": "Learning rates are meant for this global batch, and scaled with ours (512)."}
    )
    min_learning_rate: float | None = field(
        default=None, metadata={"help": "Floor of timm's cosine, unscaled. Turns that schedule on."}
    )
    warmup_learning_rate: float = field(default=1e-6, metadata={"help": "Where timm's cosine starts its warm-up."})
    warmup_epochs: float = field(default=0.0, metadata={"help": "Warm-up of timm's cosine, in epochs."})
    learning_rate_granularity: str = field(
        default="step", metadata={"help": "timm's cosine changes every step, or every epoch as in DeiT."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the weights; the average is evaluated and shipped."}
    )
    distillation: str = field(
        default="none", metadata={"help": "From the model before removal: none, soft or hard (DeiT's)."}
    )
    distillation_alpha: float = field(default=0.5, metadata={"help": "Weight of distillation in the loss."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Softens both distributions."})

    def __post_init__(self):
        # Before TrainingArguments does: it looks for the library first.
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            raise ValueError(
                "This program does not work with DeepSpeed, which splits up the model that is removed from: leave"
                " --deepspeed (or accelerate's --use_deepspeed) out, and use several processes with"
                " DistributedDataParallel."
            )
        super().__post_init__()


# What train.py reads, in the order in which `training.run_training` takes it.
PROGRAM_ARGUMENTS = [
    ModelArguments,
    DataArguments,
    AugmentationArguments,
    RemovalArguments,
    LambdaTrainingArguments,
]

# Of each group, what the command line names replaces what the recipe says.
_EXCLUSIVE = (("removal_ratio", "num_layers", "layers"), ("dataset_name", "dataset_dir", "train_dir"),
              ("dataset_name", "dataset_dir", "validation_dir"))  # fmt: skip


def parse_arguments(argv: list[str], argument_types: list[type]) -> tuple:
    """
    Dataclasses from `[recipe.yaml] [--field value ...]`.

    Args:
        argv (`list[str]`): command line without the program's name.
        argument_types (`list[type]`): dataclasses whose fields are the options.

    Returns:
        One instance of each of `argument_types`.

    Raises:
        FileNotFoundError: if the recipe does not exist.
        ValueError: if the recipe is not a mapping, or names an unknown field.
    """
    parser = HfArgumentParser(argument_types)
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = _read_recipe(Path(argv[0]))
        argv = argv[1:]
        known = {field.name for kind in argument_types for field in dataclasses.fields(kind)}
        unknown = sorted(set(recipe) - known)
        if unknown:
            raise ValueError(f"The recipe sets unknown fields: {unknown}. `--help` lists the known ones.")
        given = _given_fields(argv, argument_types)
        for group in _EXCLUSIVE:
            if given & set(group):
                recipe = {name: value for name, value in recipe.items() if name not in group}
        for action in parser._actions:
            action.required = action.required and action.dest not in recipe
        # As text, so that argparse converts and checks a recipe's values as it does the command line's.
        parser.set_defaults(**{name: value if isinstance(value, (bool, list, dict)) or value is None else str(value)
                               for name, value in recipe.items()})  # fmt: skip
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _given_fields(argv: list[str], argument_types: list[type]) -> set[str]:
    """Fields that a command line sets, however it spells them."""
    parser = HfArgumentParser(argument_types)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return set(vars(parser.parse_known_args(argv)[0]))


def _read_recipe(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"The recipe {path} does not exist.")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must map fields to values, got {type(recipe).__name__}.")
    return recipe
