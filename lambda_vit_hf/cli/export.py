"""Export a trained model: ONNX in the Hub's layout, OpenVINO, or a `torch.export` program; outputs are compared.

    lambda-vit export outputs/digits --output_dir outputs/digits_onnx --dataset_name digits
    lambda-vit export outputs/digits --output_dir outputs/digits_int8 --dataset_name digits --int8
    lambda-vit export outputs/digits --output_dir outputs/fast --dataset_name digits --int8 --int8_scales static
    lambda-vit export outputs/digits --output_dir outputs/digits_openvino --dataset_name digits --openvino
    lambda-vit export outputs/digits --output_dir outputs/digits_pt2 --format torch_export
    python outputs/digits_onnx/serve.py picture.png
    lambda-vit push outputs/digits_int8 me/digits-ONNX

The folder of ONNX files is what transformers.js and optimum read; its `serve.py` needs onnxruntime alone. `--openvino`
puts OpenVINO's files beside them, named as on the Hub (pip install 'lambda-vit-hf[openvino]').
Takes any ViT checkpoint with a trained class head, or an encoder without one (saved from a class `...Model`), of the
Hub or on disk, removed layers or not. With a dataset, the comparison runs on images of its validation split, else on
noise. `--token_merging_r 8` exports the model with that token merging.
Needs onnx, onnxruntime and onnxscript: pip install 'lambda-vit-hf[export]'.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from .images import add_dataset_options, dataset_options, dataset_place
from .runner import check_output_dir, program_parser, run_program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = program_parser("export", __doc__)
    add = parser.add_argument
    add("model", help="Hub id or folder of any ViT checkpoint")
    add("--output_dir", type=Path, required=True, help="must not exist, or be empty")
    add("--format", choices=["onnx", "torch_export"], default="onnx")
    add("--int8", action="store_true", help="also with 8-bit linear layers (onnx)")
    add(
        "--int8_scales",
        choices=["dynamic", "static"],
        help="of int8's activations: each image's own (default), or fixed, from training images of the dataset",
    )
    add("--num_calibration_images", type=int, default=128, help="for --int8_scales static")
    add("--fp16", action="store_true", help="also in float16 (onnx)")
    add("--openvino", action="store_true", help="also OpenVINO's files (onnx)")
    add("--token_merging_r", type=int, help="tokens merged per block that keeps attention")
    add("--token_merging_start", type=int, default=0, help="first of these blocks that merges")
    add("--num_images", type=int, default=256, help="to compare on, of the validation split, evenly spaced")
    add_dataset_options(parser)
    arguments = parser.parse_args(argv)
    if (arguments.int8 or arguments.fp16 or arguments.openvino) and arguments.format != "onnx":
        parser.error("--int8, --fp16 and --openvino are for --format onnx")
    if arguments.int8_scales and not arguments.int8:
        parser.error("--int8_scales goes with --int8")
    if arguments.int8_scales == "static" and dataset_place(arguments) is None:
        parser.error("--int8_scales static needs training images: name a dataset")
    if min(arguments.num_images, arguments.num_calibration_images) < 1:
        parser.error("--num_images and --num_calibration_images must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)

    from transformers import AutoImageProcessor

    from ..evaluation.classifier import load_classifier_or_encoder
    from ..export.onnx import export_program, images_for
    from ..export.serving_folder import NO_SOFTMAX, export_for_serving
    from ..models.checksums import write_checksums

    check_output_dir(arguments.output_dir)
    if arguments.format == "onnx":
        engines = ["openvino"] if arguments.openvino else []
        for library in ("onnx", "onnxruntime", "onnxscript", *engines):  # before the work, not after it
            importlib.import_module(library)
    model = load_classifier_or_encoder(arguments.model)
    if arguments.token_merging_r is not None:
        model.set_token_merging(arguments.token_merging_r, start=arguments.token_merging_start)
    model.prepare_for_inference()
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    images = calibration = None
    if dataset_place(arguments) is not None:
        from ..evaluation.evaluate import processed_images  # needs the extra `train`

        options = dataset_options(arguments)
        images = processed_images(image_processor=processor, num_images=arguments.num_images, **options)
        if arguments.int8_scales == "static":
            number = arguments.num_calibration_images
            calibration = processed_images(
                image_processor=processor, num_images=number, **{**options, "split": "train"}
            )
    if arguments.format == "onnx":
        checks = export_for_serving(
            model, processor, arguments.output_dir, images,
            int8=arguments.int8, fp16=arguments.fp16, openvino=arguments.openvino, calibration=calibration,
        )  # fmt: skip
    else:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        images = images_for(model, images, processor)
        checks = [export_program(model, arguments.output_dir / "model.pt2", images)]
        processor.save_pretrained(arguments.output_dir)
        write_checksums(arguments.output_dir)
    print(*checks, sep="\n")
    if arguments.format == "onnx" and not checks[0].has_softmax:
        print(NO_SOFTMAX)
    if arguments.int8 and arguments.int8_scales is None:
        print("int8 scales the activations of each image; --int8_scales static takes training images, and is faster.")
    print(f"Written to {arguments.output_dir}.")


if __name__ == "__main__":
    run_program("export", main)
