"""Shared by all tests: offline, deterministic, small models whose weights are far from their initial values."""

import copy
import gc
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace


os.environ["HF_HUB_OFFLINE"] = "1"
# Sums come out differently with another number of threads; subprocesses must compute what this process computes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lambda_vit_hf import LambdaViTForImageClassification


# Whole trainings, exports, servers, and processes of their own: `make test-fast` leaves them out. The longest first:
# a worker of pytest-xdist takes a whole file, whose tests share what was trained, and none should be left for the end.
SLOW_FILES = """
end_to_end/test_training.py end_to_end/test_distributed.py end_to_end/test_resuming.py end_to_end/test_families.py
end_to_end/test_recipes.py end_to_end/test_golden.py hub/test_push.py export/test_onnx.py faults/test_kills.py
faults/test_bit_flips.py tests/test_examples.py benchmarks/test_compare_selections.py export/test_inference_speed.py
models/test_remote_code.py models/test_loading_and_saving.py export/test_serving_folder.py export/test_variants.py
cli/test_export.py end_to_end/test_core_install.py tests/test_wheel.py training/test_resumed_removal.py
cli/test_select.py benchmarks/test_quantization.py benchmarks/test_families.py training/test_finishing.py
training/test_background_checksums.py benchmarks/test_gpu.py faults/test_not_finite.py
""".split()


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = f"{item.path.parent.name}/{item.path.name}"
        return SLOW_FILES.index(name) if name in SLOW_FILES else len(SLOW_FILES)

    for item in items:
        if place(item) < len(SLOW_FILES) or "in_two_processes" in item.function.__code__.co_names:
            item.add_marker(pytest.mark.slow)
    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def imports_set_aside():
    """Each training ends with full collections, which walk through what was imported unless it is set aside."""
    gc.collect()
    gc.freeze()


TINY = dict(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=64,
    num_labels=5,
)
REMOVED = [0, 2, 5]


def checkpoint_activations(model: torch.nn.Module, **options) -> None:
    """Activation checkpointing, by the name that this version of transformers has for it (since 5.23 the first)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def perturb(model: torch.nn.Module, seed: int = 0, size: float = 0.1) -> torch.nn.Module:
    """Moves every parameter, so that biases and LayerNorms count too: at their initial 0 and 1 an error would hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# New processes are forked from one that has imported this and has done nothing else: an import takes 8 seconds.
multiprocessing.set_forkserver_preload(
    ["tests.end_to_end.test_training", "tests.small_training", "timm.data", "matplotlib.pyplot", "sklearn.datasets"]
)


def in_a_new_process(function: Callable, *arguments) -> int:
    """The exit code of a process that has run `function(*arguments)`, a function of a module; below 0: of a signal."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_with_frozen_imports, args=(function, *arguments)
    )
    process.start()
    process.join()
    return process.exitcode


def _with_frozen_imports(function: Callable, *arguments):
    gc.freeze()  # as above: a full collection takes a quarter of a second, and copies the memory of the server
    return function(*arguments)


def in_two_processes(function: Callable, *arguments) -> list:
    """
    What `function(*arguments, rank)` returns in each of two processes, set up as a launcher does (gloo, CPU).

    It must be a function of a module, and return what JSON can hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        two = (_one_of_two, (function, arguments, folder, port), 2)
        torch.multiprocessing.start_processes(*two, start_method="forkserver")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in (0, 1)]


def _one_of_two(rank: int, function: Callable, arguments: tuple, folder: str, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    Path(folder, str(rank)).write_text(json.dumps(_with_frozen_imports(function, *arguments, rank)))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """What the next three fixtures copy, for making it takes longer; and the random state after it was made."""
    torch.manual_seed(0)
    vit, folder = perturb(ViTForImageClassification(ViTConfig(**TINY))), tmp_path_factory.mktemp("made_once")
    random_state = torch.get_rng_state()
    vit.save_pretrained(folder)
    return SimpleNamespace(
        vit=vit,
        random_state=random_state,
        folder=folder,
        model=LambdaViTForImageClassification.from_pretrained(folder),
    )


@pytest.fixture
def vit(made_once) -> ViTForImageClassification:
    """A tiny ViT of transformers with random weights."""
    torch.set_rng_state(made_once.random_state)
    return copy.deepcopy(made_once.vit)


@pytest.fixture
def vit_folder(vit, made_once, tmp_path):
    """That ViT, saved as transformers saves it by default (key names of transformers 4)."""
    return shutil.copytree(made_once.folder, tmp_path / "vit")


@pytest.fixture
def model(vit_folder, made_once) -> LambdaViTForImageClassification:
    """That ViT as a LambdaViT loaded from its folder, with all its attention."""
    model = copy.deepcopy(made_once.model)
    model.name_or_path = model.config.name_or_path = str(vit_folder)
    return model


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Three images `(3, 3, 16, 16)`."""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def removed(model):
    """The model without attention in `REMOVED`, folded."""
    model.remove_attention(REMOVED)
    model.fold_removed_attention()
    return model


@pytest.fixture
def folder(removed, tmp_path):
    """That model's folder, with its image processor beside it."""
    removed.save_pretrained(tmp_path / "removed")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "removed")
    return tmp_path / "removed"
