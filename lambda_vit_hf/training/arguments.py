"""Arguments of the training program: dataclasses, read from a YAML recipe first, then from the command line."""

import argparse
import dataclasses
import logging
import math
import os
import typing
import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser, TrainingArguments

from .dilution import DilutionConfig
from .recipes import find_recipe, read_recipe, take_recipe


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model to start from: a checkpoint, or a new ViT of the given shape, trained first; and what for."""

    task: str = field(
        default="image_classification",
        metadata={"help": "image_classification; or feature_distillation: an encoder, on images without labels."},
    )
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
    token_merging_r: int | None = field(
        default=None, metadata={"help": "Train with this many tokens merged per block that keeps attention."}
    )
    token_merging_start: int | None = field(
        default=None, metadata={"help": "The first of these blocks that merges (0)."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels; a checkpoint's positions are interpolated."}
    )
    patch_size: int | None = field(default=None, metadata={"help": "New model: pixels per patch side (16)."})
    hidden_size: int | None = field(default=None, metadata={"help": "New model: width (192)."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "New model: layers (12)."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "New model: attention heads (3)."})
    intermediate_size: int | None = field(default=None, metadata={"help": "New model: width of the MLP (768)."})
    initializer_range: float | None = field(
        default=None, metadata={"help": "New model: spread of the initial weights (0.02)."}
    )
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
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images only, evenly spaced: to try things out."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})
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
    num_removed_layers: int | None = field(default=None, metadata={"help": "Number of attention layers to remove."})
    removed_layers: list[int] | None = field(default=None, metadata={"help": "The layers to remove, 0-based."})
    strategy: str = field(default="nose", metadata={"help": "How layers are chosen: nose, beam, cosine, last, ..."})
    calibration_size: int = field(default=512, metadata={"help": "Training images to select on."})
    output: str | None = field(default=None, metadata={"help": "Measured: class_head, class_token or token_mean."})
    mask: str | None = field(default=None, metadata={"help": "Masked layers: skip or identity (default: fade_to)."})
    compare: str = field(default="magnitude", metadata={"help": "Compare transfer entropy by magnitude or value."})
    schedule: str = field(default="linear", metadata={"help": "Lambda falls linear or cosine."})
    hold_share: float = field(default=0.25, metadata={"help": "Share of training, at its end, with lambda = 0."})
    granularity: str = field(default="step", metadata={"help": "Lambda changes every step or every epoch."})
    fold: bool = field(default=True, metadata={"help": "Fold the removed identity into the weights."})
    fade_to: str | None = field(
        default=None, metadata={"help": "Attention fades to the identity (default; the paper's), or to nothing: skip."}
    )

    def amount(self) -> dict:
        """How many layers, or which."""
        return {
            "removal_ratio": self.removal_ratio,
            "num_removed_layers": self.num_removed_layers,
            "removed_layers": self.removed_layers,
        }

    def selection_config(self, seed: int = 0):
        """How layers are chosen, as [`SelectionConfig`]."""
        from ..selection.config import SelectionConfig  # here, for --help need not wait for it

        return SelectionConfig(self.strategy, self.output, self.mask, self.compare, self.calibration_size, seed)

    def dilution_config(self) -> DilutionConfig:
        """How attention fades."""
        return DilutionConfig(self.schedule, self.hold_share, self.granularity, self.fold, self.fade_to)


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
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Distil from this classifier of the same classes and images instead."}
    )
    distillation_alpha: float = field(default=0.5, metadata={"help": "Weight of distillation in the loss."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Softens both distributions."})
    distillation_hidden_weight: float = field(
        default=0.0, metadata={"help": "With distillation: of what leaves each block (1 - cosine); 0: off."}
    )

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
_EXCLUSIVE = (
    ("removal_ratio", "num_removed_layers", "removed_layers"),
    ("dataset_name", "dataset_dir", "train_dir"),
    ("dataset_name", "dataset_dir", "validation_dir"),
)
# What a recipe says of the model it makes; a checkpoint named on the command line has its own.
_SHAPE = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
          "initializer_range")  # fmt: skip
_ALSO_SWITCHES = ("resume_from_checkpoint",)  # texts that may be true or false
# What a field's type must name to take a value of YAML's kinds, and what such a value is called.
_KINDS = {type(None): ("None", "no value"), bool: ("bool", ""), dict: ("dict", "a mapping"), list: ("list", "a list")}
_RENAMED = {"num_layers": "num_removed_layers", "layers": "removed_layers"}  # accepted for one release


class _HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The description's commands line by line, and the default of every field."""


def parse_arguments(argv: Sequence[str], argument_types: Sequence[type], **parser_options) -> tuple:
    """
    Dataclasses from a recipe and `--field value ...`, in any order; the command line wins.

    Args:
        argv (`Sequence[str]`): command line without the program's name.
        argument_types (`Sequence[type]`): dataclasses whose fields are the options.
        parser_options: of `argparse.ArgumentParser`, such as `prog` and `description`.

    Returns:
        One instance of each of `argument_types`.

    Raises:
        FileNotFoundError: if the recipe does not exist.
        ValueError: if the recipe is not a mapping, or an unknown field is named, or one twice, or without a value that
            it can have.
    """
    parser = _new_parser(argument_types, **parser_options)
    recipe, argv = take_recipe(argv, parser)
    used = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")]
    if recipe is not None:
        values = read_recipe(find_recipe(recipe))
        used += values
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        unknown = sorted(set(values) - {field.name for kind in argument_types for field in dataclasses.fields(kind)})
        if unknown:
            raise ValueError(f"The recipe {recipe} sets unknown fields: {unknown}. `--help` lists the known ones.")
        _check_values(recipe, values, argument_types)
        _set_defaults(parser, values, _given_fields(argv, argument_types, parser_options))
    for name in _RENAMED.keys() & set(used):
        message = f"`{name}` is called `{_RENAMED[name]}` now; the old name goes with the next release."
        warnings.warn(message, FutureWarning, stacklevel=2)
    parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, value in {name: value for one in parsed for name, value in vars(one).items()}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}.")
    return parsed


def _check_values(recipe: str, values: dict, argument_types: Sequence[type]) -> None:
    """YAML spells true, false and nothing in many ways (`no` is one), and Python takes true for the number 1."""
    # Not the fields' types: HfArgumentParser changes these.
    takes = {name: str(hint) for kind in argument_types for name, hint in typing.get_type_hints(kind).items()}
    takes |= dict.fromkeys(_ALSO_SWITCHES, "bool | None")
    for name, value in values.items():
        needed, got = _KINDS.get(type(value), ("", ""))
        odd = [one for one in value if type(one) not in (str, int, float)] if isinstance(value, list) else []
        if needed not in takes[name] or odd:
            got = f"a list with {odd[0]}" if needed in takes[name] else got or str(value).lower()
            raise ValueError(
                f"The recipe {recipe} gives {got} to {name}, which is {takes[name]}. Give a value, in quotes if it is"
                " a word like no or on; or leave it out."
            )


def _new_parser(argument_types: Sequence[type], **options) -> HfArgumentParser:
    parser = HfArgumentParser(argument_types, formatter_class=_HelpFormatter, **options)
    actions = {action.dest: action for action in parser._actions}
    for old, new in _RENAMED.items():
        if new in actions:
            parser._option_string_actions |= {f"--{old}": actions[new], f"--{old.replace('_', '-')}": actions[new]}
    return parser


def _set_defaults(parser: HfArgumentParser, values: dict, given: set[str]) -> None:
    for group in _EXCLUSIVE:
        if given & set(group):
            values = {name: value for name, value in values.items() if name not in group}
    if "model_name_or_path" in given:
        of_another = [name for name in _SHAPE if name in values and name not in given]
        if of_another == ["image_size"]:  # the recipe has no model of its own: it means the checkpoint
            of_another = []
        values = {name: value for name, value in values.items() if name not in of_another}
        if of_another:
            logger.warning(
                "Left out, for they are of the recipe's own model: %s. The checkpoint keeps its shape; --image_size"
                " interpolates its positions.",
                ", ".join(of_another),
            )
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    # As text, so that argparse converts and checks a recipe's values as it does the command line's.
    parser.set_defaults(**{name: value if isinstance(value, (bool, list, dict)) or value is None else str(value)
                           for name, value in values.items()})  # fmt: skip


def _given_fields(argv: Sequence[str], argument_types: Sequence[type], parser_options: dict) -> set[str]:
    """Fields that a command line sets, however it spells them."""
    parser = _new_parser(argument_types, **parser_options)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return set(vars(parser.parse_known_args(argv)[0]))
