"""Is a Lambda model of a checkpoint transformers' own, to the bit, and removal and folding the same function?

    python -m benchmarks.exactness facebook/dinov2-small
    python -m benchmarks.exactness path/to/checkpoint --sets 20 --image_size 224

Takes a checkpoint of transformers of any supported family. Compares all hidden states on noise: with all attention, to
transformers' model; for random sets of layers, lambda = 0 to removed, and removed to folded, in float32 and bfloat16.
"""

import argparse
import copy
import random
from collections.abc import Sequence

import torch
import transformers
from transformers import AutoModel

from lambda_vit_hf import AutoLambdaModel


DTYPES = (torch.float32, torch.bfloat16)


def hidden_states(model, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All of them and the last one, behind its LayerNorm."""
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
    return (*outputs.hidden_states, outputs.last_hidden_state)


def are_equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def is_one_function(model, layers: list[int], pixel_values: torch.Tensor) -> bool:
    """Whether a model at lambda = 0, removed, and folded gives the same hidden states, to the bit."""
    model = copy.deepcopy(model)
    model.set_attention_lambda(0.0, layers)
    off = hidden_states(model, pixel_values)
    model.remove_attention(layers)
    removed = hidden_states(model, pixel_values)
    model.fold_removed_attention()
    return are_equal(off, removed) and are_equal(removed, hidden_states(model, pixel_values))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hub id or folder of a checkpoint of transformers")
    parser.add_argument("--sets", type=int, default=12, help="random sets of layers (default: %(default)s)")
    parser.add_argument("--image_size", type=int, help="height and width; by default the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    whole, model = AutoModel.from_pretrained(arguments.model), AutoLambdaModel.from_pretrained(arguments.model)
    whole = getattr(whole, "vision_model", whole)  # of a model of images and texts
    size = arguments.image_size or model.config.image_size
    pixel_values = torch.randn(2, model.config.num_channels, size, size)
    depth = model.config.num_hidden_layers
    sets = [sorted(draw.sample(range(depth), draw.randint(1, depth // 2))) for _ in range(arguments.sets)]
    equal = are_equal(hidden_states(model.eval(), pixel_values), hidden_states(whole.eval(), pixel_values))
    print(f"all attention on, equal to {type(whole).__name__} to the bit: {equal}")
    different = 0
    for layers in sets:
        found = {str(dtype): is_one_function(model.to(dtype), layers, pixel_values.to(dtype)) for dtype in DTYPES}
        different += not all(found.values())
        print(f"layers {layers} off, removed and folded equal to the bit: {found}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if different or not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
