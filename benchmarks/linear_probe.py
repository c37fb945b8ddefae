"""A frozen encoder with a linear probe as its class head: a base model that no fine-tuning has changed.

    python -m benchmarks.linear_probe trainer_scripts/recipes/dinov2_small_fashion_mnist.yaml \\
        --model_name_or_path facebook/dinov2-small --dataset_dir DIR --output_dir outputs/probe

Logistic regression on what the family's class head reads (DINOv2: class token and mean of the patches), standardised,
of the training images; its weights become the head (any family but DeiT with two heads). Prints top-1 on the
validation images. The folder is a classifier like any other: the other benchmarks take it as `--base_model`. Other
options override fields of the recipe.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from benchmarks.experiment import Experiment
from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.evaluation.evaluate import evaluate_model


STRENGTH = 0.01  # sklearn's C


@torch.no_grad()
def head_inputs(model, images: Dataset, dtype: torch.dtype, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the class head reads of each image, `(images, features)`, and the labels, `(images,)`."""
    features, labels = [], []
    for batch in tqdm(DataLoader(images, batch_size, collate_fn=collate), desc="features", leave=False):
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            tokens = model.base_model(batch["pixel_values"].to(model.device)).last_hidden_state
        features.append(model.head_input(tokens).float().cpu())
        labels.append(batch["labels"])
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


@torch.no_grad()
def set_probe(model, features: np.ndarray, labels: np.ndarray) -> None:
    """
    Fit the probe and make it the class head; what standardises the features goes into its weights.

    Raises:
        ValueError: if some class has no image.
    """
    missing = sorted(set(range(model.config.num_labels)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"No training image has one of the classes {missing}.")
    scaler = StandardScaler().fit(features)
    probe = LogisticRegression(C=STRENGTH, max_iter=2000).fit(scaler.transform(features), labels)
    weight, bias = probe.coef_, probe.intercept_
    if len(weight) == 1:  # of two classes it has the difference of the logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    model.classifier.weight.copy_(torch.from_numpy(weight))
    model.classifier.bias.copy_(torch.from_numpy(bias))
    model.newly_initialized_head = False


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train_images", type=int, help="evenly spaced; all by default")
    parser.add_argument("--num_images", type=int, help="validation images, evenly spaced; all by default")
    options, overrides = parser.parse_known_args(argv)

    experiment = Experiment(options.recipe, overrides, options.output_dir, options.num_train_images)
    args = experiment.training_args
    dtype, batch_size = torch.bfloat16 if args.bf16 else torch.float32, args.per_device_eval_batch_size
    model, processor = experiment.untrained_model()
    model.to(args.device).eval()
    set_probe(model, *head_inputs(model, experiment.images(None, "clean"), dtype, batch_size))
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    validation = experiment.images(None, "validation")
    validation = Subset(validation, evenly_spaced(len(validation), options.num_images))
    figures = evaluate_model(model, validation, Accelerator(cpu=args.use_cpu), batch_size=batch_size)
    print(
        f"top-1 {100 * figures['accuracy']:.2f} % of {figures['num_images']} images; written to {options.output_dir}"
    )


if __name__ == "__main__":
    main()
