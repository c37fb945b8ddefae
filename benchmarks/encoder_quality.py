"""What an encoder is worth after its attention was removed without labels: linear probe, k-NN, and its own features.

    python -m benchmarks.encoder_quality facebook/dinov2-small outputs/dinov2_small_feature_distillation \\
        --dataset_dir FASHION_MNIST --photographs outputs/crops --output results/mine.json
    python -m benchmarks.encoder_quality --show results/mine.json

Four encoders in one table: the whole one; it without the attention layers that the smaller one lacks and without any
training, once as removal leaves it (x becomes 2x) and once with their attention just left out (x stays x); and the
smaller one. Linear probe: logistic regression on the image's vector and the mean of its patches', standardised. k-NN:
20 nearest training images by the cosine of the image's vector. Cosines are those to the whole encoder's features,
means over the validation images of `--photographs`, labels unread.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm
from transformers import AutoImageProcessor

from lambda_vit_hf import AutoLambdaModel
from lambda_vit_hf.data.dataset import ProcessedImages
from lambda_vit_hf.data.folders import load_image_dataset
from lambda_vit_hf.evaluation.throughput import describe_environment, environment_line, markdown_table
from lambda_vit_hf.hub.facts import model_size
from lambda_vit_hf.training.feature_distillation import FeatureDistillationLoss


HEADER = ("encoder", "linear probe (%)", "k-NN (%)", "image cosine", "patch cosine", "parameters", "MACs")
NUM_NEIGHBORS = 20


def encoders(whole, smaller) -> dict[str, torch.nn.Module]:
    """The four of the table, by name."""
    layers = sorted(set(smaller.config.removed_layers) - set(whole.config.removed_layers))
    removed, left_out = copy.deepcopy(whole), copy.deepcopy(whole)
    removed.remove_attention(layers)
    removed.fold_removed_attention()
    with torch.no_grad():
        for layer in layers:
            for parameter in left_out.encoder_layers[layer].attention_parameters():
                parameter.zero_()  # so that attention adds nothing
    count = f"{len(layers)} of {whole.config.num_hidden_layers}"
    return {
        "whole": whole,
        f"{count} removed, nothing trained": removed,
        f"{count} left out, nothing trained": left_out,
        f"{count} removed, trained without labels": smaller,
    }


@torch.no_grad()
def features(model, images: torch.Tensor, dtype: torch.dtype, batch_size: int) -> np.ndarray:
    """`(images, 2, hidden)`: of each image its vector, and the mean of its patches'."""
    found = []
    for batch in tqdm(images.split(batch_size), leave=False):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            image, patches = model.image_and_patch_features(model(batch).last_hidden_state)
        found.append(torch.stack([image.float(), patches.float().mean(dim=1)], dim=1))
    return torch.cat(found).numpy()


@torch.no_grad()
def cosines(whole, model, images: torch.Tensor, dtype: torch.dtype, batch_size: int) -> list[float]:
    """To the whole encoder's features: of images, and of patches."""
    loss = FeatureDistillationLoss(whole)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = [loss.cosines(model, model(batch), batch) for batch in images.split(batch_size)]
    return torch.cat(found).double().mean(dim=0).tolist()


def probe(train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray) -> dict[str, float]:
    """Accuracy of a linear probe and of k-NN, in [0, 1]."""
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    neighbors = KNeighborsClassifier(NUM_NEIGHBORS, metric="cosine", weights="distance")
    flat_train, flat_test = train.reshape(len(train), -1), test.reshape(len(test), -1)
    return {
        "linear_probe": linear.fit(flat_train, train_labels).score(flat_test, test_labels),
        "knn": neighbors.fit(train[:, 0], train_labels).score(test[:, 0], test_labels),
    }


def some_images(dataset, processor, count: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """`count` images, drawn with a fixed seed, `(images, channels, height, width)`; and their labels."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count])
    items = ProcessedImages(dataset.select(chosen), processor).__getitems__(list(range(len(chosen))))
    return torch.stack([item["pixel_values"] for item in items]), np.array([item["labels"] for item in items])


def measure(arguments: argparse.Namespace) -> dict:
    dtype, batch_size = getattr(torch, arguments.dtype), arguments.batch_size
    processor = AutoImageProcessor.from_pretrained(arguments.smaller)
    smaller = AutoLambdaModel.from_pretrained(arguments.smaller).eval()
    whole = AutoLambdaModel.from_pretrained(arguments.whole, image_size=smaller.config.image_size).eval()
    labelled = load_image_dataset(directory=arguments.dataset_dir)
    (train, train_labels), (test, test_labels) = (
        some_images(labelled[split], processor, count)
        for split, count in (("train", arguments.num_train), ("validation", arguments.num_test))
    )
    photographs = load_image_dataset(directory=arguments.photographs, labelled=False)["validation"]
    photographs, _ = some_images(photographs, processor, len(photographs))
    rows = []
    for name, model in encoders(whole, smaller).items():
        found = [features(model, images, dtype, batch_size) for images in (train, test)]
        image, patch = cosines(whole, model, photographs, dtype, batch_size)
        figures = {**probe(*found, train_labels, test_labels), "image_cosine": image, "patch_cosine": patch}
        rows.append({"encoder": name, **figures, **model_size(model)})
        print(rows[-1])
    return {
        "environment": {**describe_environment(), "dtype": arguments.dtype},
        "num_train": len(train),
        "num_test": len(test),
        "num_photographs": len(photographs),
        "removed_layers": smaller.config.removed_layers,
        "rows": rows,
    }


def as_table(rows: Sequence[dict]) -> str:
    cells = [
        (
            row["encoder"],
            f"{100 * row['linear_probe']:.1f}",
            f"{100 * row['knn']:.1f}",
            f"{row['image_cosine']:.3f}",
            f"{row['patch_cosine']:.3f}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['macs'] / 1e6:,.0f} M",
        )
        for row in rows
    ]
    return markdown_table(HEADER, cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.encoder_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("whole", nargs="?", help="folder or Hub id of the encoder as it was")
    parser.add_argument("smaller", nargs="?", help="folder of the encoder after removal")
    parser.add_argument("--dataset_dir", help="labelled images for linear probe and k-NN")
    parser.add_argument("--photographs", help="images whose validation split the cosines are taken on")
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--show", type=Path, help="print the table of such a file, and measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.show:
        values = json.loads(arguments.show.read_text(encoding="utf-8"))
    elif not all((arguments.whole, arguments.smaller, arguments.dataset_dir, arguments.photographs)):
        parser.error("give two encoders, --dataset_dir and --photographs; or --show")
    else:
        values = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(as_table(values["rows"]))
    print(environment_line(values["environment"]))


if __name__ == "__main__":
    main()
