"""A training that is killed again and again ends in the weights of one that never was: all of the recipe turned on."""

import os
import random
import signal

import pytest
import torch
from safetensors.torch import load_file

from lambda_vit_hf.training.progress import ThroughputCallback
from tests.conftest import in_a_new_process
from tests.end_to_end.test_training import run


EVERYTHING = """
--random_shift 0 --random_resized_crop true --auto_augment rand-m9-mstd0.5-inc1 --random_erasing 0.25
--mixup 0.8 --cutmix 1.0 --label_smoothing_factor 0.1 --drop_path_rate 0.1 --ema_decay 0.5
--distillation soft --min_learning_rate 1e-5 --warmup_epochs 0.5 --learning_rate_batch_size 512 --learning_rate 4e-3
--base_num_train_epochs 0.3 --save_steps 3 --warmup_steps 0
""".split()
IN_MAP_STYLE = ["--repeated_augmentation", "3"]
STREAMED = ["--streaming", "true", "--shuffle_buffer_size", "50"]
NUM_STEPS = {"map_style": 20, "streamed": 24}  # repeated augmentation rounds an epoch down


def interrupted_run(folder, options, step, how):
    """Runs until `step` in a process of its own, which then gets a signal in the middle of its next step."""

    def end(callback, args, state, control, **kwargs):
        if state.global_step == step and "base-training" not in args.output_dir:
            os.kill(os.getpid(), how)

    ThroughputCallback.on_step_begin = end
    run(folder, *options)


@pytest.mark.parametrize("style", ["map_style", "streamed"])
def test_five_kills_and_a_sigterm_leave_no_trace(tmp_path, style):
    options = [*EVERYTHING, *(IN_MAP_STYLE if style == "map_style" else STREAMED)]
    run(tmp_path / "whole", *options)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    resume = [*options, "--resume_from_checkpoint", "true"]
    steps = sorted(random.Random(style).sample(range(1, NUM_STEPS[style] - 1), 6))
    for count, step in enumerate(steps):
        how = signal.SIGKILL if count < 5 else signal.SIGTERM
        code = in_a_new_process(interrupted_run, tmp_path / "killed", resume if count else options, step, how)
        assert code == (-signal.SIGKILL if count < 5 else 128 + signal.SIGTERM)
    assert (tmp_path / "killed" / f"checkpoint-{steps[5] + 1}").is_dir(), "SIGTERM should save a checkpoint at once"
    run(tmp_path / "killed", *resume)
    ended = load_file(tmp_path / "killed" / "model.safetensors")
    assert ended.keys() == expected.keys()
    assert [name for name, value in ended.items() if not torch.equal(value, expected[name])] == [], steps
