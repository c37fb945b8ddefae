"""Which attention layers can a ViT do without, and how many? Search, print, save the selection and its picture.

    lambda-vit select outputs/digits/base --dataset_name digits  # how many?
    lambda-vit select outputs/digits/base --dataset_name digits --max_kl 0.1
    lambda-vit select outputs/digits/base --dataset_name digits --num_removed_layers 6
    lambda-vit select outputs/digits/base --dataset_name digits --num_removed_layers 6 --linear_maps
    lambda-vit select facebook/deit-base-patch16-224 --dataset_dir path/to/images --removal_ratio 0.4 \\
        --output_dir outputs/selection
    accelerate launch -m lambda_vit_hf.cli.select ...  # several processes share the images

Needs no training and no labels. Without a number it prints what each number of layers changes (KL divergence from the
whole model, images that keep their class) and saves; --max_kl or --min_agreement then picks one. Leaves in OUTPUT_DIR:
selection.json, with all raw figures; entropy.png, the entropy of attention and MLP by depth; search.png, the transfer
entropy of every candidate at every step; with --pairs also pairs.png; without a number curve.json and curve.png. With
--linear_maps, which needs a number or a bound, also model/ (must not be there, or be empty): the model with linear
maps, fitted on the same images, in the place of the attention chosen; it can be used without any training, or
fine-tuned like any other.
What the figures mean: docs/nose.md.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from .images import add_dataset_options, dataset_options, dataset_place, dataset_words
from .runner import Renamed, check_output_dir, program_parser, run_program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = program_parser("select", __doc__)
    parser.add_argument("model", help="Hub id or folder of any ViT checkpoint")
    amount = parser.add_mutually_exclusive_group()
    add = amount.add_argument
    add("--num_removed_layers", "--num_layers", action=Renamed, type=int, help="how many attention layers to choose")
    add("--removal_ratio", "--ratio", action=Renamed, type=float, help="which fraction of them, in [0, 1]")
    add = parser.add_argument
    add(
        "--max_kl",
        "--max_divergence",
        type=float,
        metavar="NATS",
        dest="max_divergence",
        help="as many layers as keep the KL divergence within this; of values half the squared change, without a class"
        " head 1 - cosine of the features",
    )
    add("--min_agreement", type=float, help="as many as leave this share of images their class, in [0, 1]")
    add("--strategy", help="nose (default; with --linear_maps divergence), beam, exhaustive, cosine, last, ...")
    add("--output", help="class_head, class_token or token_mean")
    add("--mask", help="skip or identity (default: what attention fades to; with --linear_maps skip)")
    add("--compare", default="magnitude", help="magnitude or value")
    add("--calibration_size", "--num_images", action=Renamed, type=int, default=512, help="images of the training set")
    add("--batch_size", type=int, default=64)
    add("--autocast", choices=["bfloat16", "float16"], help="to compute in; statistics stay in float64")
    add("--pairs", action="store_true", help="measure how each pair of layers acts together, too")
    add("--linear_maps", action="store_true", help="save the model with linear maps in the place of what is chosen")
    add("--output_dir", type=Path, default=Path("outputs/selection"))
    add_dataset_options(parser)
    arguments = parser.parse_args(argv)
    if dataset_place(arguments) is None:
        parser.error("name images: --dataset_dir, --dataset_name or --train_dir")
    if _is_bounded(arguments) and not _asks_how_many(arguments):
        parser.error("--max_kl and --min_agreement find the number of layers: give no other")
    if arguments.pairs and _asks_how_many(arguments):
        parser.error("--pairs needs a number of layers: --num_removed_layers or --removal_ratio")
    if arguments.linear_maps and _asks_how_many(arguments) and not _is_bounded(arguments):
        parser.error("--linear_maps needs a number of layers, --max_kl or --min_agreement")
    # What kept most on the models measured: docs/selection_tables.md.
    arguments.strategy = arguments.strategy or ("divergence" if arguments.linear_maps else "nose")
    if arguments.linear_maps and arguments.mask is None:
        arguments.mask = "skip"
    return arguments


def _asks_how_many(arguments: argparse.Namespace) -> bool:
    return arguments.num_removed_layers is None and arguments.removal_ratio is None


def _is_bounded(arguments: argparse.Namespace) -> bool:
    return arguments.max_divergence is not None or arguments.min_agreement is not None


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)

    import torch
    from accelerate import PartialState
    from transformers import AutoImageProcessor

    from lambda_vit_hf import AutoLambdaModelForImageClassification, SelectionConfig, select_attention_layers

    from ..data.dataset import ProcessedImages
    from ..data.folders import load_image_dataset
    from ..evaluation.classifier import is_encoder, load_encoder

    options = ("strategy", "output", "mask", "compare", "calibration_size", "batch_size")
    config = SelectionConfig(**{name: getattr(arguments, name) for name in options}, autocast_dtype=arguments.autocast)
    load = load_encoder if is_encoder(arguments.model) else AutoLambdaModelForImageClassification.from_pretrained
    model, processor = load(arguments.model), AutoImageProcessor.from_pretrained(arguments.model)
    _check(arguments, config, model)
    state = PartialState(cpu=not torch.cuda.is_available())
    model.to(state.device)
    images = load_image_dataset(**dataset_options(arguments), labelled=False)["train"]
    images = ProcessedImages(images, processor)
    if _asks_how_many(arguments):
        selection = find_out_how_many(model, images, config, arguments, state.is_main_process)
    else:
        selection = select_attention_layers(
            model, images, arguments.num_removed_layers, arguments.removal_ratio,
            selection=config, pairs=arguments.pairs,
        )  # fmt: skip
    if state.is_main_process and selection is not None:
        report(selection, arguments.output_dir)
    if selection is not None and arguments.linear_maps:
        put_linear_maps(model, processor, images, selection, arguments, state.is_main_process)
    if state.is_main_process and selection is not None and selection.layers:
        what = "to fine-tune it" if arguments.linear_maps else "to go on"
        print(f"{what}: {next_step(arguments, selection, model)}")
    state.destroy_process_group()


def _check(arguments: argparse.Namespace, config, model) -> None:
    """Before images are loaded and anything is measured: what would be refused in the end, or could not be written."""
    from ..selection.checks import count_layers, fit_to_model

    output = fit_to_model(config, model).output
    kept, count = model.config.kept_layers, 1
    if _asks_how_many(arguments):
        _check_bounds(arguments, output, model)
    else:
        count = count_layers(len(kept), arguments.num_removed_layers, arguments.removal_ratio)
    if arguments.linear_maps:
        if not count:
            raise ValueError("--linear_maps needs a layer to replace: --num_removed_layers must be 1 or more.")
        check_output_dir(arguments.output_dir / "model")
        model.check_replacement(kept[:count])
    elif model.config.fade_to == "linear":
        raise ValueError("Linear maps took the place of attention in this model: add --linear_maps to go on so.")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)


def find_out_how_many(model, images, config, arguments: argparse.Namespace, is_main_process: bool):
    """Measure the curve, print and save it. Returns the selection within the bounds; `None` where there are none."""
    import torch

    from ..evaluation.plotting import plot_removal_curve
    from ..evaluation.removal_curve import removal_curve

    batch = torch.stack([images[index]["pixel_values"] for index in range(min(len(images), arguments.batch_size))])
    curve = removal_curve(model, images, config, pixel_values=batch)
    number = None
    if _is_bounded(arguments):
        number = curve.choose(arguments.max_divergence, arguments.min_agreement)
    if is_main_process:
        curve.save(arguments.output_dir / "curve.json")
        plot_removal_curve(curve, arguments.output_dir / "curve.png", number)
        print_curve(curve, number)
        print(f"curve.json and curve.png are in {arguments.output_dir}")
        if number is None:
            print("to go on: the same with --num_removed_layers NUMBER, --max_kl NATS or --min_agreement SHARE")
        if number == 0:
            print("not one layer can go within these bounds")
    return curve.selection_of(number) if number else None


def _check_bounds(arguments: argparse.Namespace, output: str, model) -> None:
    from ..selection.output_change import AGREEMENTS, kind_of_output

    share, most = arguments.min_agreement, arguments.max_divergence
    if share is not None and kind_of_output(model, output) not in AGREEMENTS:
        raise ValueError("--min_agreement needs a trained head of classes: use --max_divergence.")
    if (share is not None and not 0 <= share <= 1) or (most is not None and not most >= 0):
        raise ValueError("--min_agreement must lie in [0, 1], and --max_kl must be 0 or more.")


def print_curve(curve, number: int | None) -> None:
    """The table: a row for each number of layers; then what other strategies take, at the number that was chosen."""
    from ..evaluation.throughput import environment_line, markdown_table

    whole = curve.points[0]
    header = ["removed", "last removed", "transfer entropy (nats)", *_change_names(whole), "parameters", "MACs"]
    rows = [
        [removed, point.layers[-1] if point.layers else "", f"{point.transfer_entropy:+.4f}",
         *_change_cells(point), f"{point.parameters:,}", f"{point.macs:,}",
         f"{point.images_per_second:,.0f}", f"{point.images_per_second / whole.images_per_second:.2f}x"]
        for removed, point in enumerate(curve.points)
    ]  # fmt: skip
    print(markdown_table([*header, "images/s", "speed"], rows))
    print(environment_line(curve.environment))
    if number:
        rows = [
            [name, " ".join(map(str, sorted(points[number].layers))), *_change_cells(points[number])]
            for name, points in {curve.selection.strategy: curve.points, **curve.compared}.items()
        ]
        print(f"\n{number} layers, by strategy:\n")
        print(markdown_table(["strategy", "layers", *_change_names(whole)], rows))


def _change_names(change) -> list[str]:
    from ..selection.output_change import AGREEMENTS, DIVERGENCES

    return [DIVERGENCES[change.kind], *([f"{AGREEMENTS[change.kind]} (%)"] if change.kind in AGREEMENTS else [])]


def _change_cells(change) -> list[str]:
    return [f"{change.divergence:.4f}", *([] if change.agreement is None else [f"{100 * change.agreement:.1f}"])]


def _change_text(change) -> str:
    cells = zip(_change_names(change), _change_cells(change), strict=True)
    return ", ".join(f"{name} {value}" for name, value in cells)


def put_linear_maps(model, processor, images, selection, arguments: argparse.Namespace, is_main_process: bool) -> None:
    """Save a copy of the model that has linear maps in the place of the attention chosen; say what they change, on
    images that they were not fitted on, where there are more."""
    import copy

    from torch.utils.data import Subset

    from ..data.sampling import evenly_spaced
    from ..models.checksums import write_checksums
    from ..selection.linear_maps import change_by_replacement, fit_linear_maps

    fitted = evenly_spaced(len(images), arguments.calibration_size)
    others = sorted(set(range(len(images))) - set(fitted)) or fitted
    options = {"batch_size": arguments.batch_size, "autocast_dtype": arguments.autocast}
    thinner = copy.deepcopy(model).eval()
    thinner.replace_attention(fit_linear_maps(model, Subset(images, fitted), selection.layers, **options))
    compared = Subset(images, others)
    change = change_by_replacement(model, thinner, compared, calibration_size=arguments.calibration_size, **options)
    if is_main_process:
        folder = arguments.output_dir / "model"
        thinner.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_checksums(folder)
        which = "the same" if others is fitted else "other"
        print(f"with linear maps, before any training, on {which} images: {_change_text(change)}")
        use = "its class head is new: train it" if model.newly_initialized_head else "it can be used as it is"
        print(f"the model is in {folder}; {use}")


def next_step(arguments: argparse.Namespace, selection, model) -> str:
    """The command that removes these layers from this model, faded to what they were masked by, on the same images; or
    fine-tunes the model with linear maps. Of a model that `train` has no loss for, what does it."""
    from ..models.problem_type import SINGLE_LABEL, problem_type_of

    if model.has_class_head and not model.newly_initialized_head and problem_type_of(model.config) != SINGLE_LABEL:
        callback = f"EntropyGuidedRemovalCallback(removed_layers={selection.layers}, fade_to={selection.mask!r})"
        return "train it in a LambdaViTTrainer" + ("" if arguments.linear_maps else f", with {callback}")
    model = str(arguments.output_dir / "model") if arguments.linear_maps else arguments.model
    words = ["lambda-vit", "train", "finetune", "--model_name_or_path", model, *dataset_words(arguments)]
    if arguments.linear_maps:
        # The recipe distils, and the model with its maps would be its own teacher. Taught by the whole one, maps
        # ended no better (docs/nose.md).
        return shlex.join([*words, "--removal_ratio", "0", "--distillation", "none"])
    return shlex.join([*words, "--removed_layers", *map(str, selection.layers), "--fade_to", selection.mask])


def report(selection, output_dir: Path) -> None:
    from ..evaluation.plotting import plot_layer_entropies, plot_pairs, plot_search

    selection.save(output_dir / "selection.json")
    for name in ("search.png", "pairs.png"):  # of an earlier selection
        (output_dir / name).unlink(missing_ok=True)
    plot_layer_entropies(selection, output_dir / "entropy.png")
    if selection.steps:
        plot_search(selection, output_dir / "search.png")
    if selection.pair_transfer_entropy:
        plot_pairs(selection, output_dir / "pairs.png")
    print_selection(selection)
    print(f"selection.json and pictures are in {output_dir}")


def print_selection(selection) -> None:
    for step in selection.steps:
        line = f"+ layer {step.picked:>2}   transfer entropy {step.transfer_entropy[step.picked]:+.4f}"
        if step.stability is not None:
            line += f" ± {step.standard_error:.4f} nats   picked in {step.stability:.0%} of resamples"
        print(line)
    print(f"layers {selection.layers}, transfer entropy of the set {selection.transfer_entropy:+.4f} nats")
    if selection.changes:
        print(f"without them, before any training: {_change_text(selection.changes[-1])}")
    if selection.steps:
        share = selection.block_evaluations / selection.naive_block_evaluations
        print(f"{selection.block_evaluations:,.0f} blocks computed per image, {share:.2f} of the naive search")


if __name__ == "__main__":
    run_program("select", main)
