"""The model a training starts from: a checkpoint, or a new one, with its image processor."""

import logging
from pathlib import Path

from transformers import AutoImageProcessor, ViTImageProcessor

from ..data.augmentation import output_size, with_evaluation_crop
from ..evaluation.classifier import load_encoder
from ..models.configuration_lambda_vit import LambdaViTConfig
from ..models.families import AutoLambdaModel, AutoLambdaModelForImageClassification
from ..models.modeling_lambda_vit import LambdaViTForImageClassification
from ..models.problem_type import SINGLE_LABEL, problem_type_of
from .arguments import ModelArguments
from .output_folder import OutputFolder


logger = logging.getLogger(__name__)

# Shape of a new model, where it is not given.
_SHAPE = {
    "patch_size": 16,
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "initializer_range": 0.02,
}
_OPTIONAL = (
    "drop_path_rate",
    "drop_path_schedule",
    "token_merging_r",
    "token_merging_start",
    "image_size",
    "attn_implementation",
)


def load_starting_model(
    model_args: ModelArguments,
    class_names: list[str] | None,
    folder: OutputFolder,
    overwrite: bool,
    evaluation_crop: float | None = None,
):
    """
    The model to train, its image processor, and whether model or classifier are new and have to be trained first.

    Args:
        model_args ([`ModelArguments`]): which.
        class_names (`list[str]`, *optional*): of the dataset; they go into the config. `None`: an encoder is loaded.
        folder ([`OutputFolder`]): a base model that an interrupted run trained is taken up from here.
        overwrite (`bool`): whether checkpoints in that folder are about to be deleted.
        evaluation_crop (`float`, *optional*): see [`with_evaluation_crop`].

    Raises:
        ValueError: if the checkpoint has another number of classes or another shape, or would be deleted.
        OSError: if the checkpoint has no image processor.
        FileNotFoundError: if the base model of the run to resume is gone.
    """
    auto_class = AutoLambdaModel if class_names is None else AutoLambdaModelForImageClassification
    labels = {
        "id2label": dict(enumerate(class_names or [])),
        "label2id": {name: index for index, name in enumerate(class_names or [])},
    }
    given = {name: getattr(model_args, name) for name in _OPTIONAL if getattr(model_args, name) is not None}
    shape = {name: getattr(model_args, name) for name in _SHAPE if getattr(model_args, name) is not None}
    source = model_args.model_name_or_path
    if folder.base.is_dir() and not overwrite:
        source = str(folder.base)
    elif folder.checkpoint is not None and source is None:
        raise FileNotFoundError(
            f"The run of {folder.checkpoint} trained a base model, but {folder.base} is gone: start anew."
        )
    if source is None:
        config = LambdaViTConfig(**{**_SHAPE, **shape}, **labels, **given)
        model, is_new = LambdaViTForImageClassification(config), True
        processor = ViTImageProcessor(size={"height": config.image_size, "width": config.image_size})
    else:
        if overwrite:
            _check_it_stays(Path(source), folder)
        stored = auto_class.class_for(source).config_class.from_pretrained(source)
        _check_shape(source, stored, shape)
        unknown = [name for name in given if name.startswith("drop_path") and not hasattr(stored, name)]
        if unknown:
            raise ValueError(f"{type(stored).__name__} has no {' and '.join(unknown)}: leave that out.")
        if class_names is None:
            model, is_new = load_encoder(source, **given), False
        else:
            model, is_new = _load(source, stored, model_args.ignore_mismatched_sizes, labels, given)
        processor = _load_processor(source, model_args.image_size)
    processor = processor if evaluation_crop is None else with_evaluation_crop(processor, evaluation_crop)
    logger.info(
        "Model: %s of %s; attention in %d of %d layers; images of %d x %d pixels; %s.",
        type(model).__name__, source or "random weights", len(model.config.kept_layers),
        model.config.num_hidden_layers, *output_size(processor), _say_head(class_names, is_new),
    )  # fmt: skip
    return model, processor, is_new


def _say_head(class_names: list[str] | None, is_new: bool) -> str:
    if class_names is None:
        return "no classifier"
    whose = "a new" if is_new else "the checkpoint's"
    return f"{whose} classifier of {len(class_names)} classes"


def _check_it_stays(source: Path, folder: OutputFolder) -> None:
    doomed = [folder.base, *folder.path.glob("checkpoint-*")]
    if source.resolve() in [path.resolve() for path in doomed]:
        raise ValueError(f"--overwrite_output_dir would delete {source}, the model to start from.")


def _check_shape(source: str, stored, shape: dict) -> None:
    found = {name: getattr(stored, name, None) for name in shape}
    other = {name: (found[name], value) for name, value in shape.items() if found[name] != value}
    other.pop("initializer_range", None)  # of weights that are loaded
    if other:
        raise ValueError(
            f"{source} has a shape of its own, another one was given (checkpoint, given): {other}. Leave these out, or"
            " leave --model_name_or_path out to train a new model. Only --image_size can be changed."
        )


def _load(source: str, stored, ignore_mismatched_sizes: bool, labels: dict, given: dict):
    # What a new classifier is for; transformers' own loss notes the same in the config of a model that it trains.
    model, info = AutoLambdaModelForImageClassification.from_pretrained(
        source, ignore_mismatched_sizes=True, output_loading_info=True, problem_type=SINGLE_LABEL, **labels, **given
    )
    if any("classifier." in key for key in info["missing_keys"]):
        logger.warning("%s has no classifier: a new one is trained first.", source)
        return model, True
    if any("classifier." in key for key, *_ in info["mismatched_keys"]):
        if not ignore_mismatched_sizes:
            raise ValueError(
                f"{source} has {stored.num_labels} classes, the dataset has {len(labels['id2label'])}. Pass"
                " --ignore_mismatched_sizes to replace the classifier."
            )
        # A new classifier knows nothing yet: neither entropy nor the accuracy before removal would mean anything.
        return model, True
    if model.newly_initialized_head:
        logger.warning("The classifier of %s was never trained: this is done first.", source)
        return model, True
    if problem_type_of(stored) != SINGLE_LABEL:
        raise ValueError(
            f"The classifier of {source} was trained for {problem_type_of(stored).replace('_', ' ')}, and each of"
            " these images has one class: start from a checkpoint of its encoder, whose classifier is made anew."
        )
    _compare_names(source, stored.id2label, labels["id2label"])
    return model, False


def _compare_names(source: str, stored: dict[int, str], wanted: dict[int, str]) -> None:
    if stored == wanted or stored == {index: f"LABEL_{index}" for index in stored}:
        return
    differing = [(stored[index], wanted[index]) for index in sorted(wanted) if stored[index] != wanted[index]]
    if sorted(stored.values()) == sorted(wanted.values()):
        raise ValueError(
            f"{source} has the dataset's classes in another order (model, dataset): {differing[:3]}. Its classifier"
            " would name every image wrongly: put the dataset's classes in the model's order."
        )
    logger.warning(
        "%s names %d of its classes otherwise than the dataset (model, dataset): %s. The dataset's names are taken; if"
        " these are other classes, start from a checkpoint without them.", source, len(differing), differing[:3],
    )  # fmt: skip


def _load_processor(source: str, image_size: int | None):
    processor = AutoImageProcessor.from_pretrained(source)
    if image_size is None or output_size(processor) == (image_size, image_size):
        return processor
    square = {"height": image_size, "width": image_size}
    resized = AutoImageProcessor.from_pretrained(source, size=square, do_center_crop=False)
    if not getattr(processor, "do_center_crop", None):
        return resized
    short_side = processor.size.shortest_edge or min(processor.size.height, processor.size.width)
    return with_evaluation_crop(resized, min(output_size(processor)) / short_side)
