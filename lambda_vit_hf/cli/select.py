"""Which attention layers can a ViT do without? Search, print the path, save the selection and its picture.

    lambda-vit select outputs/digits/base --dataset_name digits --num_removed_layers 6
    lambda-vit select facebook/deit-base-patch16-224 --dataset_dir path/to/images --removal_ratio 0.4 \\
        --output_dir outputs/selection
    accelerate launch -m lambda_vit_hf.cli.select ...  # several processes share the images

Needs no training. Leaves in OUTPUT_DIR: selection.json, with all raw figures; entropy.png, the entropy of attention
and MLP by depth; search.png, the transfer entropy of every candidate at every step; with --pairs also pairs.png.
What the figures mean: docs/nose.md.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from .images import add_dataset_options, dataset_options, dataset_place, dataset_words
from .runner import Renamed, program_parser, run_program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = program_parser("select", __doc__)
    parser.add_argument("model", help="Hub id or folder of any ViT checkpoint")
    amount = parser.add_mutually_exclusive_group(required=True)
    add = amount.add_argument
    add("--num_removed_layers", "--num_layers", action=Renamed, type=int, help="how many attention layers to choose")
    add("--removal_ratio", "--ratio", action=Renamed, type=float, help="which fraction of them, in [0, 1]")
    add = parser.add_argument
    add("--strategy", default="nose", help="nose, beam, exhaustive, cosine, last, ...")
    add("--output", help="class_head, class_token or token_mean")
    add("--mask", default="skip", help="skip or identity")
    add("--compare", default="magnitude", help="magnitude or value")
    add("--calibration_size", "--num_images", action=Renamed, type=int, default=512, help="images of the training set")
    add("--batch_size", type=int, default=64)
    add("--autocast", choices=["bfloat16", "float16"], help="to compute in; statistics stay in float64")
    add("--pairs", action="store_true", help="measure how each pair of layers acts together, too")
    add("--output_dir", type=Path, default=Path("outputs/selection"))
    add_dataset_options(parser)
    arguments = parser.parse_args(argv)
    if dataset_place(arguments) is None:
        parser.error("name images: --dataset_dir, --dataset_name or --train_dir")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)

    import torch
    from accelerate import PartialState
    from transformers import AutoImageProcessor

    from lambda_vit_hf import AutoLambdaModelForImageClassification, SelectionConfig, select_attention_layers

    from ..data.dataset import ProcessedImages
    from ..data.folders import load_image_dataset

    options = ("strategy", "output", "mask", "compare", "calibration_size", "batch_size")
    config = SelectionConfig(**{name: getattr(arguments, name) for name in options}, autocast_dtype=arguments.autocast)
    model = AutoLambdaModelForImageClassification.from_pretrained(arguments.model)
    state = PartialState(cpu=not torch.cuda.is_available())
    model.to(state.device)
    images = load_image_dataset(**dataset_options(arguments))["train"]
    selection = select_attention_layers(
        model,
        ProcessedImages(images, AutoImageProcessor.from_pretrained(arguments.model)),
        arguments.num_removed_layers,
        arguments.removal_ratio,
        selection=config,
        pairs=arguments.pairs,
    )
    if state.is_main_process:
        report(selection, arguments.output_dir)
        print(f"to go on: {next_command(arguments, selection.layers)}")
    state.destroy_process_group()


def next_command(arguments: argparse.Namespace, layers: list[int]) -> str:
    """The command that removes these layers from this model, with training on the same images."""
    words = ["lambda-vit", "train", "finetune", "--model_name_or_path", arguments.model, *dataset_words(arguments)]
    return shlex.join([*words, "--removed_layers", *map(str, layers)])


def report(selection, output_dir: Path) -> None:
    from ..evaluation.plotting import plot_layer_entropies, plot_pairs, plot_search

    output_dir.mkdir(parents=True, exist_ok=True)
    selection.save(output_dir / "selection.json")
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
    if selection.steps:
        share = selection.block_evaluations / selection.naive_block_evaluations
        print(f"{selection.block_evaluations:,.0f} blocks computed per image, {share:.2f} of the naive search")


if __name__ == "__main__":
    run_program("select", main)
