"""The models that a benchmark compares, each by a short name: a source, and the steps that make it faster.

transformers, transformers+onnx    transformers' model; in onnxruntime
timm, timm+removed                 timm's ViT; without the removed layers' attention, in the authors' form
lambda+removed+folded+prepared     this package's
lambda+mapped+prepared             with linear maps in the place of that attention
outputs/digits+prepared+bf16       a checkpoint, and what is done to it
lambda+removed+folded+onnx+int8    in onnxruntime
lambda+removed+folded+openvino     the ONNX graph in OpenVINO; with bf16, computed in it where the CPU can
outputs/digits_onnx/onnx/model.onnx  an ONNX file as it is
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..evaluation.accounting import count_macs, count_parameters
from ..evaluation.classifier import load_classifier
from ..models.configuration_lambda_vit import LambdaViTConfig
from ..models.families import AutoLambdaModelForImageClassification
from ..models.mapped_attention import LinearMap
from ..models.modeling_lambda_vit import LambdaViTForImageClassification
from .onnx import TensorsOnly, export_onnx, exported_program
from .openvino_ir import openvino_core, run_openvino
from .precision import quantize_onnx
from .reference_models import as_timm_vit, as_transformers_model, transformers_class


SOURCES = ("transformers", "timm", "lambda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# In the order in which they are taken, however a name spells them.
STEPS = ("removed", "mapped", "folded", "merged", *DTYPES, "stacked", "prepared", "onnx", "int8", "openvino",
         "exported", "compiled")  # fmt: skip
_ENGINES = {"onnx", "openvino", "exported", "compiled"}
_ONLY_HERE = {"mapped", "folded", "merged", "stacked", "prepared"}

SIZES = {
    "tiny": dict(hidden_size=192, num_attention_heads=3, intermediate_size=768),
    "small": dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "base": dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096),  # ViT-L, with 24 layers
}


@dataclass(frozen=True)
class BenchmarkSetup:
    """
    What all variants in a benchmark have in common. Small and picklable: a process of its own can rebuild any of
    them.

    Args:
        size (`str`, *optional*, defaults to `"base"`):
            DeiT's `"tiny"`, `"small"` or `"base"`, or ViT's `"large"`; random weights.
        model (`str`, *optional*): a ViT checkpoint to start from instead.
        removed_layers (`tuple[int, ...]`, *optional*): what the step `removed` removes. DeiT-B's 40 % in the paper.
        merging_r (`int`, *optional*, defaults to 24), merging_start (`int`, *optional*, defaults to 1):
            Of the step `merged`: tokens per block, and the first block that merges among those that keep attention.
            The paper's for DeiT-B without 5 layers.
        dtype (`str`, *optional*, defaults to `"fp32"`): of variants that name none.
        device (`str`, *optional*, defaults to `"cpu"`): where they run.
        image_size (`int`, *optional*, defaults to 224): of random weights.
        num_hidden_layers (`int`, *optional*, defaults to 12): of random weights.

    Raises:
        ValueError: if there is no such device.
    """

    size: str = "base"
    model: str | None = None
    removed_layers: tuple[int, ...] = (0, 1, 3, 4, 6)
    merging_r: int = 24
    merging_start: int = 1
    dtype: str = "fp32"
    device: str = "cpu"
    image_size: int = 224
    num_hidden_layers: int = 12

    def __post_init__(self):
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"`device` must be cpu or cuda, got {self.device!r}.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("There is no GPU that PyTorch can use on this machine: measure with `device='cpu'`.")

    @cached_property
    def base_model(self) -> LambdaViTForImageClassification:
        """The model that `transformers`, `timm` and `lambda` start from; in eval mode, float32, on the CPU."""
        if self.model:
            return load_classifier(self.model, model_class=AutoLambdaModelForImageClassification)
        shape = dict(image_size=self.image_size, num_hidden_layers=self.num_hidden_layers, **SIZES[self.size])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return LambdaViTForImageClassification(LambdaViTConfig(num_labels=1000, **shape)).eval()


@dataclass
class Variant:
    """
    A model, ready to be timed.

    Attributes:
        name: source and steps in order, without the precision.
        run: from pixel values (in `dtype`, on the setup's device) to logits.
        dtype: of the pixel values it takes.
        function: which function it computes: those with the same value should agree. `None`: its own.
        image_shape: `(channels, height, width)` of one image.
        parameters, macs: `None` for an ONNX file.
        weights_bytes: of its weights, or of its file.
        device: where it runs: onnxruntime sessions and OpenVINO stay on the CPU.
        file: the ONNX file it runs.
        precision: `fp32`, `bf16`, `fp16` or `int8`: what it computes in.
    """

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    function: str | None
    image_shape: tuple[int, int, int]
    parameters: int | None
    macs: int | None
    weights_bytes: int
    device: str
    file: Path | None = None
    folder: tempfile.TemporaryDirectory | None = field(default=None, repr=False)  # of a file of its own
    precision: str = ""

    def __post_init__(self):
        self.precision = self.precision or ("int8" if "int8" in self.name.split("+") else _SHORT[self.dtype])

    def images(self, batch_size: int) -> torch.Tensor:
        """Noise `(batch, channels, height, width)` that it takes: the same for every variant."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(batch_size, *self.image_shape, generator=generator)
        return noise.to(self.device, self.dtype)


_SHORT = {dtype: name for name, dtype in DTYPES.items()}


def parse_variant(name: str, dtype: str | None = None) -> tuple[str, list[str]]:
    """
    Source and steps of a variant's name, the steps in the order in which they are taken; `dtype` is that of names that
    give none.

    Raises:
        ValueError: on steps that are repeated or cannot be combined.
    """
    words = name.split("+")
    steps: list[str] = []
    while len(words) > 1 and words[-1] in STEPS:
        steps.append(words.pop())
    source = "+".join(words)
    if len(set(steps)) < len(steps):
        raise ValueError(f"{name!r} names a step twice.")
    if len(words) > 1 and not Path(source).exists():
        raise ValueError(f"{name!r}: unknown step {words[-1]!r}; the steps are {list(STEPS)}.")
    if dtype is not None and not set(steps) & set(DTYPES) and not source.endswith(".onnx"):
        steps.append(dtype)
    chosen = set(steps)
    for rule, group in (("one precision", set(DTYPES)), ("one engine", _ENGINES)):
        if len(chosen & group) > 1:
            raise ValueError(f"{name!r}: choose {rule} of {sorted(chosen & group)}.")
    if {"removed", "mapped"} <= chosen:
        raise ValueError(f"{name!r}: attention is removed, or mapped.")
    if "int8" in chosen and ("onnx" not in chosen or chosen & {"bf16", "fp16"}):
        raise ValueError(f"{name!r}: int8 is a step of an fp32 model in onnx.")
    if "openvino" in chosen and "fp16" in chosen:
        raise ValueError(f"{name!r}: OpenVINO computes in fp32 or bf16 on a CPU.")
    if "onnx" in chosen and "bf16" in chosen:
        raise ValueError(f"{name!r}: onnxruntime takes no bf16 from numpy.")
    if source == "transformers" and chosen & {"removed", *_ONLY_HERE}:
        raise ValueError(f"{name!r}: transformers' model has all its attention, as it is.")
    if source == "timm" and chosen & _ONLY_HERE:
        raise ValueError(f"{name!r}: {sorted(chosen & _ONLY_HERE)} are this package's.")
    if {"folded"} <= chosen and source == "lambda" and "removed" not in chosen:
        raise ValueError(f"{name!r}: without removed layers there is nothing to fold.")
    return source, [step for step in STEPS if step in chosen]


def like_for_like(name: str) -> str | None:
    """
    The variant that shows what this package adds, and not the engine: transformers' model with all its attention in
    the same engine and precision. `None` for an ONNX file, of which nobody knows.
    """
    source, steps = parse_variant(name)
    if source.endswith(".onnx"):
        return None
    return "+".join(["transformers", *(step for step in steps if step in {*DTYPES, *_ENGINES, "int8"})])


def with_partners(names: Sequence[str], setup: BenchmarkSetup) -> list[str]:
    """These variants and what they are to be compared with, if the setup's model exists in transformers."""
    base = setup.base_model
    if base.config.removed_layers or transformers_class(base) is None:
        return list(names)
    return list(dict.fromkeys([*names, *filter(None, map(like_for_like, names))]))


def build_variant(name: str, setup: BenchmarkSetup) -> Variant:
    """
    Build the model that a name stands for (see the top of this file).

    Raises:
        ValueError: if the name makes no sense, or not for this setup's model.
    """
    source, steps = parse_variant(name, setup.dtype)
    if source.endswith(".onnx"):
        return _onnx_file(Path(source))
    model, config, function = _build_model(source, steps, setup)
    precision = next(step for step in steps if step in DTYPES)
    dtype = torch.float32 if "openvino" in steps else DTYPES[precision]  # it rounds weights by itself
    model = model.to(setup.device, dtype)
    if "stacked" in steps or "prepared" in steps:
        model.prepare_for_inference(class_token_only="prepared" in steps)
    shown = [step for step in steps if step not in DTYPES]
    variant = Variant(
        name="+".join([source, *shown]),
        run=TensorsOnly(model).eval(),
        dtype=dtype,
        function=function,
        image_shape=image_shape(config),
        parameters=count_parameters(model),
        macs=count_macs(config),
        weights_bytes=sum(value.nbytes for value in model.state_dict().values()),
        device=setup.device,
        precision="int8" if "int8" in steps else precision,
    )
    _start_engine(variant, model, steps)
    return variant


def _build_model(
    source: str, steps: list[str], setup: BenchmarkSetup
) -> tuple[nn.Module, LambdaViTConfig, str | None]:
    if source == "transformers":
        base = setup.base_model
        return as_transformers_model(base), base.config, "all attention"
    if source in SOURCES:
        model, function = copy.deepcopy(setup.base_model), "all attention"
        if "removed" in steps:
            model.remove_attention(list(setup.removed_layers))
            function = "removed"
        if source == "timm":
            return as_timm_vit(model), model.config, function
    else:
        model, function = load_classifier(source, model_class=AutoLambdaModelForImageClassification), source
        if "removed" in steps:
            model.remove_attention(list(setup.removed_layers))
            function = f"{source} removed"
    if "mapped" in steps:
        width, generator = model.config.hidden_size, torch.Generator().manual_seed(0)  # for speed: maps of any values
        weights = 0.02 * torch.randn(2, width, width, generator=generator)
        model.replace_attention(dict.fromkeys(setup.removed_layers, LinearMap(*weights, torch.zeros(width))))
        function = None
    if "folded" in steps:
        model.fold_removed_attention()
    if "merged" in steps:
        model.set_token_merging(setup.merging_r, start=setup.merging_start)
        function = None
    return model, model.config, function


def _start_engine(variant: Variant, model: nn.Module, steps: list[str]) -> None:
    """Replaces `variant.run` by a compiled, exported or onnxruntime one."""
    if "compiled" in steps:
        # A limit of recompilations for each variant, static shapes, and an error instead of eager without a word.
        variant.run = torch.compile(variant.run, fullgraph=True, dynamic=False, isolate_recompiles=True)
    elif "exported" in steps:
        variant.run = exported_program(model, variant.images(2)).module()
    elif {"onnx", "openvino"} & set(steps):
        core = openvino_core(variant.precision) if "openvino" in steps else None
        variant.folder = tempfile.TemporaryDirectory()
        variant.file = path = Path(variant.folder.name) / "model.onnx"
        export_onnx(model, path, variant.images(2))
        if core is not None:
            variant.run, variant.device = run_openvino(core, path, variant.precision), "cpu"
            return
        if "int8" in steps:
            variant.file, variant.function = path.with_name("int8.onnx"), None
            quantize_onnx(path, variant.file)
        variant.weights_bytes = variant.file.stat().st_size
        variant.run, variant.device = run_session(variant.file), "cpu"


def _onnx_file(path: Path) -> Variant:
    if not path.is_file():
        raise ValueError(f"There is no ONNX file {path}.")
    (pixel_values,) = _session(path).get_inputs()
    return Variant(
        name=str(path),
        run=run_session(path),
        dtype=torch.float16 if pixel_values.type == "tensor(float16)" else torch.float32,
        function=None,
        image_shape=tuple(pixel_values.shape[1:]),
        parameters=None,
        macs=None,
        weights_bytes=path.stat().st_size,
        device="cpu",
        file=path,
    )


def _session(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning after their turn, at the cost of whoever comes next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from pixel values to the first output of an ONNX file, in onnxruntime on the CPU."""
    session = _session(path)

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.cpu().numpy()})[0])

    return run


def image_shape(config: LambdaViTConfig) -> tuple[int, int, int]:
    """`(channels, height, width)` of the images that a config names."""
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config.num_channels, height, width
