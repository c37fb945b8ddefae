"""The plain Trainer and one callback: a small ViT learns scikit-learn's digits, then loses half of its attention.

    python examples/plain_trainer.py                 # no download; a few minutes on a CPU
    python examples/plain_trainer.py --epochs 2

For a model of yours, replace `small_vit(...)` by `AutoLambdaModelForImageClassification.from_pretrained(...)`, and the
digits by a dataset with the columns `image` and `label`.
"""

import argparse

from transformers import Trainer, TrainingArguments, ViTImageProcessor, pipeline, set_seed

from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTConfig, LambdaViTForImageClassification, summarize
from lambda_vit_hf.data.folders import load_digits


def small_vit(classes: list[str]) -> LambdaViTForImageClassification:
    """12 layers of width 64 for digits of 8 x 8 pixels, not trained yet."""
    config = LambdaViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=12, num_attention_heads=4, intermediate_size=256,
        initializer_range=0.1, id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )  # fmt: skip
    return LambdaViTForImageClassification(config)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/plain_trainer")
    parser.add_argument("--epochs", type=float, default=10, help="of each of the two trainings (default: %(default)s)")
    options = parser.parse_args()
    set_seed(0)

    splits = load_digits()
    processor = ViTImageProcessor(size={"height": 8, "width": 8})

    def with_pixels(rows: dict) -> dict:
        images = [image.convert("RGB") for image in rows["image"]]
        return {**processor(images, return_tensors="pt"), "labels": rows["label"]}

    images = {name: split.with_transform(with_pixels) for name, split in splits.items()}
    model = small_vit(splits["train"].features["label"].names)

    def train(*callbacks) -> Trainer:
        arguments = TrainingArguments(
            output_dir=options.output_dir, num_train_epochs=options.epochs, learning_rate=1e-3, weight_decay=0.05,
            per_device_train_batch_size=32, lr_scheduler_type="cosine", remove_unused_columns=False,
            save_strategy="no", report_to="none", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=images["train"], eval_dataset=images["validation"],
            processing_class=processor, compute_metrics=accuracy, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train()
        return trainer

    before = train().evaluate()["eval_accuracy"]
    trainer = train(EntropyGuidedRemovalCallback(num_removed_layers=6))
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()

    print(summarize(trainer.model))
    print(f"top-1: {before:.2%} with all attention, {after:.2%} without layers {trainer.model.config.removed_layers}")
    classifier = pipeline("image-classification", model=options.output_dir)
    first = splits["validation"][0]
    answer = classifier(first["image"], top_k=1)[0]
    print(f"the pipeline says {answer['label']} (score {answer['score']:.3f}); it is a {first['label']}")


if __name__ == "__main__":
    main()
