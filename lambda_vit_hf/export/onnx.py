"""Export to ONNX for any batch size, and to `torch.export`; each compared with the model it came from."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..models.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, problem_type_of
from ..selection.output_change import FEATURES
from .preprocessing import processed_size


TOLERANCE = 1e-3


@dataclass
class ExportCheck:
    """
    How an exported model compares with the PyTorch model, on the same images.

    Attributes:
        file: name of the file.
        file_bytes: its size.
        num_images: images both were run on.
        max_difference: largest difference between two logits, or two features of an encoder.
        agreement: by `kind`: of classes the share of images that both give the same best one; of several labels the
            share of labels that are the same; of values 1 - their root mean square difference, relative to their own;
            of an encoder's features the cosine of a token in both, mean over tokens and images.
        kind: of the outputs, as of an [`OutputChange`].
    """

    file: str
    file_bytes: int
    num_images: int
    max_difference: float
    agreement: float
    kind: str

    @property
    def task(self) -> str:
        """What the Hub calls it."""
        return "image-feature-extraction" if self.kind == FEATURES else "image-classification"

    @property
    def has_softmax(self) -> bool:
        """Whether a pipeline that takes the softmax of logits is right about them, or there are none."""
        return self.kind not in (MULTI_LABEL, REGRESSION)

    def __str__(self) -> str:
        agreement = {
            SINGLE_LABEL: f"same top-1 in {100 * self.agreement:.1f} %",
            MULTI_LABEL: f"{100 * self.agreement:.1f} % of the labels the same",
            REGRESSION: f"root mean square difference {100 * (1 - self.agreement):.2g} %",
            FEATURES: f"mean cosine of tokens {self.agreement:.6f}",
        }[self.kind]
        value = {REGRESSION: "value", FEATURES: "feature"}.get(self.kind, "logit")
        return (
            f"{self.file}: {self.file_bytes / 1e6:.1f} MB; on {self.num_images} images, largest difference of a"
            f" {value} {self.max_difference:.2g}, {agreement}"
        )


def named_outputs(output) -> dict[str, torch.Tensor]:
    """
    What a file holds of a model's output: `logits` `(batch, classes)`; without them, of an encoder,
    `last_hidden_state` `(batch, tokens, hidden)` and, where there is one, `pooler_output` `(batch, hidden)`.

    Raises:
        ValueError: if it is the output of neither.
    """
    if isinstance(output, torch.Tensor):
        return {"logits": output}
    names = ("logits",) if "logits" in output else ("last_hidden_state", "pooler_output")
    found = {name: output[name] for name in names if name in output}
    if names[0] not in found:
        raise ValueError(
            f"Only classifiers and encoders are exported: {type(output).__name__} has neither `logits` nor"
            " `last_hidden_state`."
        )
    return found


class TensorsOnly(nn.Module):
    """A model whose output is a tensor, or a tuple of those of [`named_outputs`]: what a file can hold."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        tensors = tuple(named_outputs(self.model(pixel_values)).values())
        return tensors if len(tensors) > 1 else tensors[0]


def export_onnx(model: nn.Module, path: str | Path, images: torch.Tensor | None = None) -> ExportCheck:
    """
    Write an ONNX file (input `pixel_values`, outputs by [`named_outputs`], any batch size) and compare it with the
    model.

    Args:
        model ([`LambdaViTForImageClassification`], any image classifier or encoder): in eval mode; float32 or float16.
        path (`str` or `Path`): the file; large weights stay inside it (ONNX allows 2 GB).
        images (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
            What to compare on; by default three images of noise.

    Raises:
        ValueError: in training mode, in bfloat16 (numpy, and so onnxruntime's interface, has no such type), without
            logits or features, or if one of these differs by more than 1e-3 (float16: 3e-2). No file is left behind.
    """
    _check_exportable(model)
    if next(model.parameters()).dtype == torch.bfloat16:
        raise ValueError("An ONNX model in bfloat16 cannot be fed from numpy: export in float32 or float16.")
    images = images_for(model, images)
    names = _try(model, images)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        # The exporter's own housekeeping, on every call: https://github.com/pytorch/pytorch/issues/146830
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        unchecked = Path(folder) / path.name
        torch.onnx.export(
            TensorsOnly(model).eval(),
            (_example(images),),
            unchecked,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["pixel_values"],
            output_names=names,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        )
        _drop_stack_traces(unchecked)
        check = compare_onnx(model, unchecked, images)
        check_tolerance(check, model)
        unchecked.replace(path)
    return check


def _drop_stack_traces(path: Path) -> None:
    """The exporter writes into each node which lines of which files of this machine it came from."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.ClearField("metadata_props")
    onnx.save(model, path)


def export_program(model: nn.Module, path: str | Path, images: torch.Tensor | None = None) -> ExportCheck:
    """
    Write a `torch.export` program (`.pt2`, any batch size) and compare it with the model. Read it with
    `torch.export.load(path).module()`.

    Args:
        model ([`LambdaViTForImageClassification`], any image classifier or encoder): in eval mode.
        path (`str` or `Path`): the file.
        images (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): what to compare on.

    Raises:
        ValueError: in training mode, without logits or features, or if one of these differs by more than 1e-3
            (16 bits: 3e-2). No file is left behind.
    """
    _check_exportable(model)
    images, path = images_for(model, images), Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unchecked = Path(folder) / path.name
        torch.export.save(exported_program(model, images), unchecked)
        check = _compare_program(model, unchecked, images)
        check_tolerance(check, model)
        unchecked.replace(path)
    return check


def _compare_program(model: nn.Module, path: Path, images: torch.Tensor) -> ExportCheck:
    loaded = torch.export.load(path).module()

    def run(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = loaded(batch)
        return found if isinstance(found, tuple) else (found,)

    return compare_outputs(model, run, images, path)


def exported_program(model: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    """The model as a `torch.export` program from `pixel_values` to [`TensorsOnly`], for any batch size."""
    _try(model, images)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(TensorsOnly(model).eval(), (_example(images),), dynamic_shapes=shapes)


def compare_onnx(
    model: nn.Module, path: str | Path, images: torch.Tensor, num_threads: int = 0, batch_size: int = 32
) -> ExportCheck:
    """Outputs of an ONNX file and of the model it came from, on `images` `(images, channels, height, width)`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(one) for one in session.run(None, {"pixel_values": batch.cpu().numpy()})]

    return compare_outputs(model, run, images, Path(path), batch_size)


def _check_exportable(model: nn.Module) -> None:
    if model.training:
        raise ValueError("Export a model in eval mode: call `model.eval()` first.")
    if getattr(model, "newly_initialized_head", False):
        raise ValueError("The class head of this model is new: its logits would be random. Train it, then export.")
    if getattr(model, "class_token_only", False):
        raise ValueError("An encoder prepared within a classifier gives one token of all: load it anew, by itself.")


def _try(model: nn.Module, images: torch.Tensor) -> list[str]:
    """
    One plain call before the exporter's: images that do not fit are refused in plain words, and layers note a lambda
    that was changed in its buffer, which the exporter cannot read. The names of the outputs.
    """
    with torch.no_grad():
        return list(named_outputs(model(_example(images))))


def images_for(model: nn.Module, images: torch.Tensor | None, image_processor=None) -> torch.Tensor:
    """
    The images to compare on, where the model is and in its dtype; by default three of noise, of the model's size, or
    of that which the image processor makes of it: it may be another one, as of DINOv2.
    """
    parameter = next(model.parameters())
    if images is None:
        size = model.config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if image_processor is not None:
            height, width = processed_size(image_processor, height, width)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, model.config.num_channels, height, width, generator=generator)
    if not len(images):
        raise ValueError("There is no image to compare the exported model on: give at least one.")
    return images.to(parameter.device, parameter.dtype)


def _example(images: torch.Tensor) -> torch.Tensor:
    # Two images: with one, the batch size would be taken for a constant.
    return images[:1].repeat(2, 1, 1, 1)


@torch.inference_mode()
def compare_outputs(
    model: nn.Module,
    run: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    images: torch.Tensor,
    path: Path,
    batch_size: int = 32,
) -> ExportCheck:
    """Outputs of a model and of `run`, which computes a batch's outputs by the file `path`, on `images`."""
    rest = images[1:].split(batch_size) if len(images) > 1 else ()
    kind, differences, sums = "", [], torch.zeros(2, dtype=torch.float64)
    for batch in (images[:1], *rest):  # batch sizes that were not traced
        outputs = named_outputs(model(batch))
        expected, found = ([one.float().cpu() for one in values] for values in (outputs.values(), run(batch)))
        differences += [(one - other).abs().max() for one, other in zip(expected, found, strict=True)]
        kind = problem_type_of(model.config) if "logits" in outputs else FEATURES
        sums += _sums_of_agreement(expected[0], found[0], kind)
    share = (sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny)).item()
    agreement = 1 - share**0.5 if kind == REGRESSION else share
    return ExportCheck(
        path.name, path.stat().st_size, len(images), torch.stack(differences).max().item(), agreement, kind
    )


def _sums_of_agreement(expected: torch.Tensor, found: torch.Tensor, kind: str) -> torch.Tensor:
    """What the `agreement` of [`ExportCheck`] is a ratio of, for a batch; of values the squares."""
    expected, found = expected.double(), found.double()
    if kind == REGRESSION:
        return torch.stack([(found - expected).square().sum(), expected.square().sum()])
    if kind == FEATURES:
        agreeing = nn.functional.cosine_similarity(expected, found, dim=-1).mean(dim=1)
    else:
        answers = ((one > 0) if kind == MULTI_LABEL else one.argmax(dim=1, keepdim=True) for one in (expected, found))
        agreeing = torch.eq(*answers).double().mean(dim=1)
    return torch.stack([agreeing.sum(), torch.tensor(float(len(agreeing)), dtype=torch.float64)])


def check_tolerance(check: ExportCheck, model: nn.Module) -> None:
    """ValueError where outputs differ by more than `TOLERANCE`, 30 times as much in half precision."""
    tolerance = TOLERANCE if next(model.parameters()).dtype in (torch.float32, torch.float64) else 30 * TOLERANCE
    if not np.isfinite(check.max_difference) or check.max_difference > tolerance:
        raise ValueError(f"The exported model is another function (tolerance {tolerance}). {check}.")
