"""What computing shared prefixes once saves in the search for layers: the same search with and without it.

python -m benchmarks.search_speed --size small --num_layers 2
"""

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

import torch

from lambda_vit_hf.cli.benchmark import add_setup_arguments, read_setup, write_result
from lambda_vit_hf.cli.runner import run_program
from lambda_vit_hf.evaluation.throughput import describe_environment, markdown_table
from lambda_vit_hf.export.variants import BenchmarkSetup
from lambda_vit_hf.selection.search import AttentionSearch
from lambda_vit_hf.selection.select import select_attention_layers
from lambda_vit_hf.selection.strategies import STRATEGIES


LIMIT = 0.65


class TimedSearch:
    """NOSE as a strategy that times itself, without what [`select_attention_layers`] measures besides."""

    def __init__(self, reuse_prefixes: bool):
        self.reuse_prefixes = reuse_prefixes

    def __call__(self, search: AttentionSearch) -> list[int]:
        search.forward.reuse_prefixes = self.reuse_prefixes
        start = time.perf_counter()
        order = STRATEGIES["nose"](search)
        self.seconds = time.perf_counter() - start  # the search has read its figures: a GPU has nothing left to do
        return order


def measure_search(
    setup: BenchmarkSetup, num_layers: int = 2, num_images: int = 64, batch_size: int = 16, disable_tqdm: bool = False
) -> dict:
    """
    Run NOSE's greedy search twice: with shared prefixes computed once, and each candidate set from the image on.

    Args:
        setup ([`BenchmarkSetup`]): the shape and the device.
        num_layers (`int`, *optional*, defaults to 2): attention layers to choose.
        num_images (`int`, *optional*, defaults to 64): calibration images (noise: it takes the same time).
        batch_size (`int`, *optional*, defaults to 16): images per batch.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bars.

    Returns:
        `dict`: `rows` with seconds, block evaluations per calibration image and layers of both searches; `ratio` of
        the seconds; `block_ratio`; `environment`; JSON-serialisable.
    """
    model = setup.base_model.to(setup.device)
    size = model.config.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, model.config.num_channels, size, size, generator=generator)
    with torch.inference_mode():
        model(images[:batch_size].to(setup.device))  # warm-up
    rows = []
    for name, reuse in (("prefix reuse", True), ("naive", False)):
        search = TimedSearch(reuse)
        selection = select_attention_layers(
            model, images, num_layers, strategy=search, batch_size=batch_size, disable_tqdm=disable_tqdm
        )
        rows.append({"search": name, "seconds": search.seconds, "block_evaluations": selection.block_evaluations,
                     "order": selection.order})  # fmt: skip
    reused, naive = rows
    return {
        "rows": rows,
        "ratio": reused["seconds"] / naive["seconds"],
        "block_ratio": reused["block_evaluations"] / naive["block_evaluations"],
        "limit": LIMIT,
        "size": setup.size,
        "num_layers": num_layers,
        "environment": {**describe_environment(setup.device), "images": num_images, "batch": batch_size},
    }


def search_table(result: dict) -> str:
    """The rows of [`measure_search`] in Markdown."""
    rows = [
        [row["search"], f"{row['seconds']:.1f}", f"{row['block_evaluations']:,.0f}", " ".join(map(str, row["order"]))]
        for row in result["rows"]
    ]
    limit = f"at most {result['limit']:.2f} wanted"
    rows.append(["ratio", f"{result['ratio']:.3f}", f"{result['block_ratio']:.3f}", limit])
    return markdown_table(["search", "seconds", "block evaluations per image", "layers, in order"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_setup_arguments(parser, "small", ["fp32"])
    parser.add_argument("--num_layers", type=int, default=2, help="attention layers to choose")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    arguments = parser.parse_args(argv)
    setup = read_setup(arguments)
    result = measure_search(setup, arguments.num_layers, arguments.num_images, arguments.batch_size)
    write_result("search", result, search_table(result), arguments.output_dir)


if __name__ == "__main__":
    run_program("benchmark", main)
