"""Every family: exact at its base size, and through the whole program on the digits; one table.

    python -m benchmarks.families --output results/families.json

For each family a random encoder of the size that transformers' configuration has by default (mostly "base"), with
LayerScale from 1e-5 to 7, goes through `benchmarks.exactness`. Then a small one is trained on the digits by
`lambda-vit train`: its head first, then while NOSE's layers fade; the result is saved, folded, exported to ONNX, and
compared.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from transformers import AutoModelForImageClassification, ViTImageProcessor

from benchmarks import exactness
from lambda_vit_hf.evaluation.throughput import describe_environment, environment_line, markdown_table
from lambda_vit_hf.export.serving_folder import export_for_serving
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.run import run_training


# What the names of transformers' classes begin with.
FAMILIES = {
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT",
    "siglip_vision_model": "SiglipVision",
    "clip_vision_model": "CLIPVision",
}
SMALL = {"image_size": 8, "patch_size": 2, "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 3}
TRAINING = """--use_cpu true --dataset_name digits --base_num_train_epochs 8 --base_learning_rate 2e-3
--num_train_epochs 8 --learning_rate 1e-3 --per_device_train_batch_size 64 --warmup_steps 20 --num_removed_layers 2
--calibration_size 256 --hold_share 0.4 --save_strategy no --eval_strategy no --report_to none --disable_tqdm true
""".split()
_EXACT = {True: "yes", False: "NO", None: "not tried"}
HEADER = ("family", "exact at base size", "top-1 before (%)", "after (%)", "layers removed", "ONNX differs by")


def random_encoder(name: str, **shape):
    """transformers' encoder with random weights, and LayerScale as a trained DINOv2 has it."""
    config = getattr(transformers, f"{name}Config")(**shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("lambda1"):
                parameter.copy_(10 ** (6 * torch.rand(parameter.shape) - 5) * 0.7)
    return model


def is_exact(name: str, folder: Path, sets: int) -> bool:
    """Whether `benchmarks.exactness` finds the encoder of base size exact; images of 14 patches a side."""
    random_encoder(name).save_pretrained(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            exactness.main([str(folder), "--sets", str(sets)])
        except SystemExit:
            return False
    return True


def train(family: str, name: str, folder: Path, options: Sequence[str] = ()) -> dict:
    """Top-1 before and after, the layers, and how far the exported logits are from PyTorch's."""
    shape = SMALL if "dinov2" in family else {**SMALL, "intermediate_size": 96}
    model, processor = random_encoder(name, **shape), ViTImageProcessor(size={"height": 8, "width": 8})
    for key, parameter in model.named_parameters():
        if key.endswith("lambda1"):
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder / "encoder")
    processor.save_pretrained(folder / "encoder")
    argv = [*TRAINING, "--model_name_or_path", str(folder / "encoder"), "--output_dir", str(folder / "run"), *options]
    metrics = run_training(*parse_arguments(argv, PROGRAM_ARGUMENTS))
    removed = AutoModelForImageClassification.from_pretrained(folder / "run").eval()
    export_for_serving(removed, processor, folder / "onnx")
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(folder / "onnx" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": images.numpy()})
    with torch.no_grad():
        difference = float(np.abs(found - removed(images).logits.numpy()).max())
    before, after = metrics["before"]["top1"], metrics["after"]["top1"]
    return {"before": before, "after": after, "layers": metrics["layers"], "onnx_difference": difference}


def as_table(rows: Sequence[dict]) -> str:
    cells = [
        (row["family"], _EXACT[row["exact"]], f"{100 * row['before']:.1f}", f"{100 * row['after']:.1f}",
         " ".join(map(str, row["layers"])), f"{row['onnx_difference']:.0e}")
        for row in rows
    ]  # fmt: skip
    return markdown_table(HEADER, cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--sets", type=int, default=2, help="random sets of layers at base size")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments, options = parser.parse_known_args(argv)
    rows = []
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            exact = is_exact(FAMILIES[family], Path(folder, "base"), arguments.sets) if arguments.sets else None
            rows.append({"family": family, "exact": exact, **train(family, FAMILIES[family], Path(folder), options)})
    environment = describe_environment()
    print(as_table(rows))
    print(environment_line(environment))
    if arguments.output:
        text = json.dumps({"environment": environment, "rows": rows}, indent=2)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
