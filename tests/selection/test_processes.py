"""Several processes: one answer, and an error in one ends all."""

import datetime

import pytest
import torch

from lambda_vit_hf import LambdaViTForImageClassification, select_attention_layers
from lambda_vit_hf.selection.select import AttentionSelection
from tests.conftest import in_two_processes


def select_in_one_of_two_processes(folder: str, images: str, rank: int) -> list[dict]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = LambdaViTForImageClassification.from_pretrained(folder).double()
    # A ragged share: 40 images in batches of 7 make 6 batches, the last of 5 images.
    return [
        select_attention_layers(model, torch.load(images), 3, strategy=strategy, batch_size=7).to_dict()
        for strategy in ("nose", "cosine")
    ]


def test_two_processes_select_what_one_does(model, images, tmp_path):
    images = images.double()
    model.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")
    both = in_two_processes(select_in_one_of_two_processes, str(tmp_path), str(tmp_path / "images.pt"))
    for strategy, *found in zip(("nose", "cosine"), *both, strict=True):
        alone = select_attention_layers(model.double(), images, num_removed_layers=3, strategy=strategy, batch_size=7)
        first, second = (AttentionSelection.from_dict(one) for one in found)
        assert first == second, "the processes disagree"
        assert first.order == alone.order
        assert first.attention_entropy == pytest.approx(alone.attention_entropy, rel=1e-9)
        assert first.transfer_entropy == pytest.approx(alone.transfer_entropy, rel=1e-9)
        assert first.num_images == alone.num_images == 40
        assert first.block_evaluations == alone.block_evaluations
        for ours, expected in zip(first.steps, alone.steps, strict=True):
            assert ours.transfer_entropy == pytest.approx(expected.transfer_entropy, rel=1e-9)


def my_strategy(search):
    search.transfer_entropy([[0]])
    if torch.distributed.get_rank() == 1:
        raise KeyError("no such layer")
    return [search.pick([])]


def wrong_at_the_very_end(search):
    return [0] if torch.distributed.get_rank() == 0 else [int("zero")]


def fail_in_the_second_process(folder: str, rank: int) -> list[str]:
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    model = LambdaViTForImageClassification.from_pretrained(folder)
    images = torch.zeros(8, 3, 16, 16)
    with_nan = images.clone()
    with_nan[5] = torch.nan  # every second image is the second process's
    calibration_set = images if rank == 0 else ["a.png"]
    errors = []
    for calibration, strategy in (
        (with_nan, "nose"),
        (calibration_set, "nose"),
        (images, my_strategy),
        (images, wrong_at_the_very_end),
    ):
        try:
            select_attention_layers(model, calibration, 1, strategy=strategy, disable_tqdm=True)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_an_error_in_one_process_is_one_in_all_wherever_it_happens(model, tmp_path):
    model.save_pretrained(tmp_path)
    first, second = in_two_processes(fail_in_the_second_process, str(tmp_path))
    expected = ["ValueError: Features are NaN or infinite", "TypeError", "KeyError", "ValueError: invalid literal"]
    for told, own, error in zip(first, second, expected, strict=True):
        assert own.startswith(error)
        assert told.startswith(f"OtherProcessError: Process 1 failed: {error}")
