"""Loading, exactly or not at all: names of weights, what is left to remove, whether all arrived, and whole."""

import copy
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_removal import ONLY_REPLACED, RemovalConfigMixin, check_fade
from .finite import not_finite
from .folding import check_layer_indices


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WANTED_REMOVAL = ("attention_flags", "removed_layers", "fold_removed")
_WHOLE, _PARTS = "model.safetensors", "model.safetensors.index.json"
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")


def read_key_names_of(source_class: str, *class_names: str) -> None:
    """
    Let base models of these class names read checkpoints in the older key names that `source_class` reads.

    Files on the Hub carry names of transformers 4. The renaming on load is looked up by class name and skips
    subclasses: without this, every encoder weight of such a checkpoint would be left at its random start.
    """
    for class_name in class_names:
        mapping = get_checkpoint_conversion_mapping(source_class)
        register_checkpoint_conversion_mapping(class_name, mapping, overwrite=True)


def read_stored_config(
    config_class: type[PreTrainedConfig], source: str, config: RemovalConfigMixin | None, arguments: dict
) -> tuple[RemovalConfigMixin, RemovalConfigMixin, dict]:
    """
    Configuration of a checkpoint, before layers are removed from it.

    Args:
        config_class (`type`): Class of the configuration.
        source (`str`): Folder or repository of the checkpoint.
        config (of `config_class`, *optional*): The caller's; by default the checkpoint's, changed by `arguments`.
        arguments (`dict`): The caller's keyword arguments of `from_pretrained`.

    Returns:
        The checkpoint's configuration; the one to build the model with, whose layers are those of the checkpoint; and
        the arguments that are left for the model.
    """
    kept = {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
    if isinstance(config, config_class):
        # What the config already says about attention was the caller's choice: see `RemovalConfigMixin.from_dict`.
        attention = {"attn_implementation": arguments.get("attn_implementation") or config._attn_implementation}
        stored = config_class.from_pretrained(source, **attention, **kept)
        check_fade(vars(stored), config.fade_to)
        config = copy.deepcopy(config)
        for name in ("attention_flags", "fold_removed", "fold_exponent"):
            setattr(config, name, getattr(stored, name))
        return stored, config, arguments
    kept.update({name: arguments[name] for name in ("dtype", "torch_dtype") if name in arguments})
    stored, unused = config_class.from_pretrained(source, return_unused_kwargs=True, **arguments)
    return stored, copy.deepcopy(stored), {**unused, **kept}


def removal_to_do(
    stored: RemovalConfigMixin,
    attention_flags: list[bool] | None = None,
    removed_layers: list[int] | None = None,
    fold_removed: bool | None = None,
) -> dict:
    """
    What is left to do after a checkpoint was loaded as it is stored.

    Args:
        stored (`RemovalConfigMixin`): The checkpoint's configuration.
        attention_flags (`list[bool]`, *optional*): What is wanted, one flag per layer; by default what is stored.
        removed_layers (`list[int]`, *optional*): The same by 0-based indices; those removed already may be left out.
        fold_removed (`bool`, *optional*): Whether the result is wanted folded; by default as it is stored.

    Returns:
        `dict`: `"layers"`, the 0-based indices still to remove, and `"fold_removed"` as given.

    Raises:
        ValueError: if the flags do not fit, or ask for attention or for an unfolding that the checkpoint cannot give.
    """
    goal = copy.deepcopy(stored)
    if removed_layers is not None:
        if attention_flags is not None:
            raise ValueError("Give `attention_flags` or `removed_layers`, not both.")
        removed = {*check_layer_indices(removed_layers, stored.num_hidden_layers), *stored.removed_layers}
        attention_flags = [index not in removed for index in range(stored.num_hidden_layers)]
    goal.attention_flags = stored.attention_flags if attention_flags is None else attention_flags
    goal.validate()
    missing = sorted(set(stored.removed_layers) - set(goal.removed_layers))
    if missing:
        raise ValueError(f"`attention_flags` asks for attention in layers {missing}, which the checkpoint has not.")
    if goal.fade_to == "linear" and goal.removed_layers != stored.removed_layers:
        raise ValueError(ONLY_REPLACED)
    if stored.fold_removed and stored.removed_layers and fold_removed is False:
        raise ValueError("The checkpoint is folded; it cannot be loaded with `fold_removed=False`.")
    return {"layers": sorted(set(goal.removed_layers) - set(stored.removed_layers)), "fold_removed": fold_removed}


def check_finished(attention_lambdas: list[float | None]) -> None:
    """ValueError where lambda is not 1 in a layer that has attention: such a model is not to be published."""
    unfinished = {layer: value for layer, value in enumerate(attention_lambdas) if value not in (None, 1.0)}
    if unfinished:
        raise ValueError(f"Nothing was pushed: lambda is not 1 in layers {unfinished}. Train on, or remove them.")


def check_loaded_weights(model: nn.Module, info: dict, source: str) -> None:
    """
    Refuse a load that left an encoder weight random, or lost one, or brought values that are none.

    Args:
        model (`LambdaPreTrainedModel`): The loaded model.
        info (`dict`): What `from_pretrained(..., output_loading_info=True)` reports.
        source (`str`): Folder or repository, for the message.

    Raises:
        ValueError: if a weight of the encoder is missing, has another shape, or has no place in the model; if a weight
            is NaN or infinite, or a lambda outside [0, 1].
    """

    def of_encoder(keys):
        return sorted(key for key in keys if not model.is_head_key(key))

    problems = {
        "not in the checkpoint (they would stay random)": of_encoder(info["missing_keys"]),
        "in the checkpoint, but not in the model (they would be lost)": of_encoder(info["unexpected_keys"]),
        "of another shape": of_encoder(key for key, *_ in info["mismatched_keys"]),
    }
    lines = [f"- {len(keys)} {what}: {', '.join(keys[:4])}, ..." for what, keys in problems.items() if keys]
    if lines:
        raise ValueError(
            f"The weights of {source} do not fit its configuration (attention removed in layers"
            f" {model.config.removed_layers} of {model.config.num_hidden_layers}):\n" + "\n".join(lines) + "\nIf the"
            " file is whole, its config.json is another model's. To start from a full checkpoint with layers removed,"
            " pass `attention_flags=` to `from_pretrained`."
        )
    damaged = not_finite(model.state_dict())
    if damaged:
        raise ValueError(
            f"{len(damaged)} weights of {source} hold NaN or infinity: {', '.join(damaged[:4])}. Its training failed,"
            " or the file is damaged: take an earlier checkpoint, or download it again."
        )
    lambdas = {index: value for index, value in enumerate(model.attention_lambdas) if value is not None}
    wrong = {index: value for index, value in lambdas.items() if not 0.0 <= value <= 1.0}
    if wrong:
        raise ValueError(f"Lambda must lie in [0, 1], but {source} has, by layer: {wrong}. The file is damaged.")


def check_weight_files(folder: str | Path) -> None:
    """
    Refuse a folder whose weights are there twice, or are integers. (transformers would read the one file, old or not,
    and take integers as numbers.)

    Raises:
        ValueError: if weights are in one file and in parts; if a tensor holds integers and the model is not quantised.
    """
    folder = Path(folder)
    if all((folder / name).is_file() for name in (_WHOLE, _PARTS)):
        raise ValueError(
            f"{folder} holds weights twice: {_WHOLE}, and parts listed in {_PARTS}. One of them is old. Delete it, or"
            " save the model again."
        )
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in config.read_text(encoding="utf-8"):
        return
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            integers = [name for name in file.keys() if file.get_slice(name).get_dtype() in _INTEGERS]  # noqa: SIM118
        if integers:
            raise ValueError(
                f"{path} holds integers where weights are expected: {', '.join(integers[:4])}. It is damaged, or of a"
                " quantised model whose config.json is another's."
            )


def remove_other_form(folder: str | Path) -> None:
    """Delete weights of an earlier save in the other form: parts where one file was written last, or the reverse."""
    whole, index = Path(folder, _WHOLE), Path(folder, _PARTS)
    if not (whole.is_file() and index.is_file()):
        return
    if whole.stat().st_mtime_ns > index.stat().st_mtime_ns:
        index.unlink()
        for part in Path(folder).glob("model-*-of-*.safetensors"):
            part.unlink()
    else:
        whole.unlink()
