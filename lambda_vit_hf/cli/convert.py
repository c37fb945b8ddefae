"""Turn a timm, DeiT or Lambda-ViT checkpoint file into a Hugging Face folder: weights, config and image processor.

    lambda-vit convert base_01346.pth --output_dir outputs/lambda-deit-base-40
    lambda-vit convert deit_small.pth --output_dir outputs/lambda-deit-small --removed_layers 0 2 4
    lambda-vit convert small_024.pth --output_dir outputs/unfolded --no_fold
    lambda-vit convert model.safetensors --output_dir outputs/large --image_size 384
    lambda-vit convert huge.safetensors --output_dir outputs/huge --num_attention_heads 16
    lambda-vit convert augreg.safetensors --output_dir outputs/augreg \
        --image_mean 0.5 0.5 0.5 --image_std 0.5 0.5 0.5 --crop_pct 0.9
    lambda-vit convert vit_small_patch14_dinov2.safetensors --family dinov2 --output_dir outputs/dinov2-small

The folder loads with `AutoModelForImageClassification.from_pretrained` once `lambda_vit_hf` is imported; that of an
encoder without head, which families other than ViT and DeiT become, with `AutoModel.from_pretrained`. Pickled files
(.pth, .pt, .bin, .tar) are read without running anything in them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .runner import Renamed, check_output_dir, program_parser, run_program


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# As timm gives them; other families: ImageNet's.
MEAN_AND_STD = {
    "siglip_vision": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "clip_vision": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    output_dir = arguments.output_dir
    check_output_dir(output_dir)

    # Imported late: --help and a mistyped option answer at once.
    from ..evaluation.accounting import summarize
    from ..models.checksums import write_checksums
    from ..models.conversion import convert_checkpoint

    model = convert_checkpoint(
        arguments.source,
        arguments.removed_layers,
        fold=not arguments.no_fold,
        num_attention_heads=arguments.num_attention_heads,
        image_size=arguments.image_size,
        drop_head=arguments.drop_head,
        weights_key=arguments.weights_key,
        family=arguments.family,
        hidden_act=arguments.hidden_act,
    )
    usual = MEAN_AND_STD.get(arguments.family, (IMAGENET_MEAN, IMAGENET_STD))
    for name, value in zip(("image_mean", "image_std"), usual, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
        if len(getattr(arguments, name)) != model.config.num_channels:
            raise ValueError(f"--{name} needs one number for each of the {model.config.num_channels} channels.")
    processor = build_image_processor(
        model.config.image_size, arguments.image_mean, arguments.image_std, arguments.crop_pct
    )
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    write_checksums(output_dir)
    print(summarize(model))
    print(f"Written to {output_dir}.")


def build_parser() -> argparse.ArgumentParser:
    parser = program_parser("convert", __doc__)
    add = parser.add_argument
    add("source", help="The checkpoint: .safetensors, .pth, .pt, .bin or .tar, with timm's names.")
    add("--family", default="vit", help="Whose names the file has: vit (DeiT too), deit (distilled), dinov2,"
        " dinov2_with_registers, dinov3_vit, siglip_vision, clip_vision. Default: vit.")  # fmt: skip
    add("--hidden_act", help="Activation of the MLPs, which files of SigLIP and CLIP do not say.")
    add("--output_dir", type=Path, required=True, help="Folder to write; must not exist, or be empty.")
    add("--removed_layers", "--layers", action=Renamed, type=int, nargs="*",
        help="Attention layers to remove, 0-based; without a value, none. Default: what the name of an authors' file"
        " says, else none.")  # fmt: skip
    add("--no_fold", action="store_true", help="Keep the doubling of removed layers, as in the paper.")
    add("--num_attention_heads", type=int, help="Default: width / 64, for widths up to 1024.")
    add("--image_size", type=int, help="Resize the position embeddings to this many pixels per side.")
    add("--drop_head", action="store_true", help="Leave the class head out; required where the file has none.")
    add("--weights_key", help="Which top key to read, e.g. model_ema, where the file has several.")
    add("--image_mean", type=float, nargs="+", help="Default: the family's; ImageNet's, as DeiT.")
    add("--image_std", type=float, nargs="+", help="Default: the family's; ImageNet's, as DeiT.")
    add("--crop_pct", type=float, default=1.0, help="Below 1, the image processor resizes the shorter side to"
        " image size / crop_pct and crops the centre. DeiT was evaluated with 0.875. Default: 1.")  # fmt: skip
    return parser


def build_image_processor(image_size: int, mean: list[float], std: list[float], crop_pct: float = 1.0):
    """
    Bicubic resizing to a square of `image_size` pixels, or a centre crop of that size, then normalization.

    Raises:
        ValueError: if `crop_pct` is not in (0, 1].
    """
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"`crop_pct` must lie in (0, 1], got {crop_pct}.")
    from transformers import ViTImageProcessor
    from transformers.image_utils import PILImageResampling

    square = {"height": image_size, "width": image_size}
    sizes = {"size": square}
    if crop_pct < 1.0:
        sizes = {"size": {"shortest_edge": int(image_size / crop_pct)}, "do_center_crop": True, "crop_size": square}
    return ViTImageProcessor(**sizes, resample=PILImageResampling.BICUBIC, image_mean=mean, image_std=std)


if __name__ == "__main__":
    run_program("convert", main)
