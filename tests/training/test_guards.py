"""What ends a training early: before it spoils its weights, and when the machine is taken away."""

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTForImageClassification, StopOnNonFiniteGradient
from lambda_vit_hf.training.checkpoints import what_is_broken
from lambda_vit_hf.training.ema import EMA_FILE, EmaCallback
from lambda_vit_hf.training.guards import SaveOnSigterm
from tests.conftest import in_two_processes
from tests.small_training import make_trainer


class PoisonAt(TrainerCallback):
    """Makes one weight NaN at a step's beginning, as a diverged run would."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            self.hook = model.classifier.register_forward_hook(lambda _m, _i, output: output * math.nan)


def test_a_nan_loss_stops_before_the_weights_are_spoiled(model, tmp_path):
    callbacks = [EntropyGuidedRemovalCallback(removed_layers=[1]), StopOnNonFiniteGradient(), PoisonAt()]
    trainer = make_trainer(model, tmp_path, callbacks, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match="step 3"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    kept = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


class TerminateAt(TrainerCallback):
    """Sends this process SIGTERM in the middle of a step, as a cluster does."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def callbacks(*more):
    return [SaveOnSigterm(), EntropyGuidedRemovalCallback(removed_layers=[1, 2]), *more]


def test_sigterm_finishes_the_step_saves_and_exits_with_143(model, tmp_path):
    trainer = make_trainer(model, tmp_path, callbacks(TerminateAt(4)))
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert what_is_broken(tmp_path / "checkpoint-5") is None
    assert model.config.removed_layers == [], "half-diluted attention was removed"


def test_a_run_that_sigterm_ended_goes_on_to_the_same_weights(model, vit_folder, tmp_path):
    expected = LambdaViTForImageClassification.from_pretrained(vit_folder)
    make_trainer(expected, tmp_path / "whole", callbacks()).train()
    with pytest.raises(SystemExit):
        make_trainer(model, tmp_path / "stopped", callbacks(TerminateAt(4))).train()
    resumed = LambdaViTForImageClassification.from_pretrained(vit_folder)
    trainer = make_trainer(resumed, tmp_path / "stopped", callbacks())
    trainer.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))
    assert resumed.config.removed_layers == [1, 2]
    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Notes(TrainerCallback):
    """What is evaluated and saved, at which step."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append(("evaluated", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(("saved", state.global_step))


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_after_sigterm_nothing_is_evaluated_and_one_checkpoint_saved(model, tmp_path, strategy):
    notes = Notes()
    guards = [SaveOnSigterm(), EmaCallback(decay=0.5), EntropyGuidedRemovalCallback(removed_layers=[1, 2])]
    trainer = make_trainer(
        model, tmp_path, [*guards, TerminateAt(3), notes], eval_strategy=strategy, save_strategy=strategy,
        eval_steps=4, save_steps=4,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        trainer.train()
    assert notes.seen == [("saved", 4)]
    assert what_is_broken(tmp_path / "checkpoint-4", needed=(EMA_FILE,)) is None


def test_the_handler_of_before_is_put_back(model, tmp_path):
    def before(signum, frame):
        raise AssertionError

    original = signal.signal(signal.SIGTERM, before)
    try:
        make_trainer(model, tmp_path, callbacks()).train()
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, original)


def terminate_one_of_two(folder, rank):
    torch.manual_seed(0)
    from tests.conftest import TINY

    model = LambdaViTForImageClassification(LambdaViTForImageClassification.config_class(**TINY))
    guard = SaveOnSigterm()
    more = [TerminateAt(4)] if rank == 1 else []
    trainer = make_trainer(model, folder, [guard, EntropyGuidedRemovalCallback(removed_layers=[1]), *more])
    try:
        trainer.train()
    except SystemExit as ended:
        return ended.code, trainer.state.global_step
    return None


def test_all_processes_stop_after_the_step_in_which_one_gets_the_signal(tmp_path):
    # Not some steps later: a launcher kills what still runs 30 seconds after the signal.
    assert in_two_processes(terminate_one_of_two, str(tmp_path)) == [[143, 5], [143, 5]]
    assert what_is_broken(tmp_path / "checkpoint-5") is None


def test_steps_between_two_agreements_are_no_longer_chosen():
    with pytest.warns(FutureWarning, match="each step"):
        SaveOnSigterm(check_every=8)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launcher_that_splits_up_the_model_is_refused(model, tmp_path, monkeypatch, kind):
    trainer = make_trainer(model, tmp_path, [EmaCallback(), EntropyGuidedRemovalCallback(removed_layers=[1])])
    monkeypatch.setattr(trainer.args.distributed_state, "distributed_type", DistributedType[kind])
    for event in (trainer.callback_handler.on_init_end, trainer.callback_handler.on_train_begin):
        with pytest.raises(ValueError, match="needs the whole model in each process"):
            event(trainer.args, trainer.state, trainer.control)


def test_under_fp16_some_overflows_in_a_row_are_left_to_the_gradient_scaler():
    guard, model = StopOnNonFiniteGradient(patience=2), torch.nn.Linear(1, 1, bias=False)
    state = TrainerState(global_step=7)

    def step(gradient: float, fp16: bool = True) -> None:
        model.weight.grad = torch.full((1, 1), gradient)
        guard.on_pre_optimizer_step(SimpleNamespace(fp16=fp16, output_dir="out"), state, None, model=model)

    for gradient in (math.inf, math.nan, 1.0, math.inf, math.inf):  # a good one in between begins anew
        step(gradient)
    with pytest.raises(FloatingPointError, match="step 7"):
        step(math.inf)
    step(1.0)
    with pytest.raises(FloatingPointError, match="step 7"):
        step(math.inf, fp16=False)
