"""A Space: a picture in, classes out; which layers keep attention; the time of two models side by side.

The environment variables WHOLE_MODEL and REMOVED_MODEL name two checkpoints, of the Hub or on disk.
"""

import os
import statistics

import gradio
import torch
from matplotlib.figure import Figure
from transformers import AutoImageProcessor

from lambda_vit_hf import AutoLambdaModelForImageClassification
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.evaluation.throughput import interleave


ROUNDS = 10
FOLDERS = {"whole": os.environ["WHOLE_MODEL"], "removed": os.environ["REMOVED_MODEL"]}
MODELS = {name: load_classifier(folder, model_class=AutoLambdaModelForImageClassification)
          for name, folder in FOLDERS.items()}  # fmt: skip
PROCESSORS = {name: AutoImageProcessor.from_pretrained(folder) for name, folder in FOLDERS.items()}


def draw_layers() -> Figure:
    """A square for each block: filled where it computes attention."""
    figure = Figure(figsize=(7, 1.6), layout="constrained")
    axis = figure.subplots()
    for row, model in enumerate(MODELS.values()):
        for layer in range(model.config.num_hidden_layers):
            removed = layer in model.config.removed_layers
            axis.scatter(layer, row, marker="s", s=180, color="white" if removed else "#3366aa", edgecolor="#3366aa")
    axis.set(
        yticks=range(len(MODELS)), yticklabels=list(MODELS), xlabel="layer (filled: has attention)", ylim=(1.6, -0.6)
    )
    axis.locator_params(axis="x", integer=True)
    return figure


@torch.inference_mode()
def classify(picture):
    """Each model's classes, and median ms per image; runs take turns, so that the machine's load hits both alike."""
    if picture is None:
        raise gradio.Error("Give a picture first.")
    inputs = {name: PROCESSORS[name](picture, return_tensors="pt")["pixel_values"] for name in MODELS}
    seconds = interleave({name: lambda name=name: MODELS[name](inputs[name]) for name in MODELS}, ROUNDS)
    answers = []
    for name, model in MODELS.items():
        scores = model(inputs[name]).logits.softmax(dim=1)[0].tolist()
        answers.append({model.config.id2label[index]: score for index, score in enumerate(scores)})
    times = [[name, f"{1000 * statistics.median(turns):.2f}"] for name, turns in seconds.items()]
    return *answers, times


def build_page() -> gradio.Blocks:
    with gradio.Blocks(title="A vision transformer with less attention") as page:
        gradio.Plot(draw_layers(), label="Layers")
        picture = gradio.Image(type="pil", label="Picture")
        button = gradio.Button("Classify")
        answers = [gradio.Label(label=name, num_top_classes=3) for name in MODELS]
        times = gradio.Dataframe(headers=["model", f"ms per picture, median of {ROUNDS}"], label="Speed")
        button.click(classify, picture, [*answers, times], api_name="classify")
    return page


if __name__ == "__main__":
    build_page().launch()
