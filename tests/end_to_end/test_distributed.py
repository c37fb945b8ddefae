"""Two processes train one model: equal weights in both, and those of one process with the same global batch."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lambda_vit_hf import EmaCallback, EntropyGuidedRemovalCallback, LambdaViTForImageClassification
from lambda_vit_hf.training import callback, reporting
from lambda_vit_hf.training.guards import OneModelInAllProcesses
from lambda_vit_hf.training.trainer import ImageClassificationTrainer
from tests.conftest import TINY, in_two_processes
from tests.end_to_end.test_training import run
from tests.small_training import Blobs, make_trainer


# Gradient descent follows the gradient; Adam makes whole steps of what is rounding in one that is nearly zero. Less
# than an epoch: its last batch, which is not full, is filled up differently by two processes.
DETERMINISTIC = """
--drop_path_rate 0 --optim sgd --learning_rate 0.1 --base_learning_rate 0.1 --warmup_steps 0 --num_train_epochs 0.45
--save_strategy no --removed_layers 1 2 --per_device_train_batch_size 64
""".split()
NEW = ["--base_num_train_epochs", 0.15]
BEST = """
--load_best_model_at_end true --metric_for_best_model loss --save_strategy steps --save_steps 3 --eval_strategy steps
--eval_steps 3
""".split()
# Each: options in two processes; options in one process that sees the same images in each step, or `None`.
PROGRAM_RUNS = {
    "from a new model": (NEW, NEW),
    "interrupted": (["--save_strategy", "steps", "--save_steps", 8], []),
    "resumed": (["--resume_from_checkpoint", "interrupted/checkpoint-8"], []),
    "accumulated": (["--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 2], []),
    "averaged": (["--ema_decay", 0.5], ["--ema_decay", 0.5]),
    "best": (BEST, BEST),
    "streamed": (["--streaming", "true", "--shuffle_buffer_size", 50], None),
}

TRAINER_RUNS = {
    "plain": {},
    "interrupted": {"save_strategy": "steps", "save_steps": 6},
    "resumed": {"resume": "interrupted/checkpoint-6"},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "averaged": {"ema": 0.5},
    "best": {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps",
             "eval_steps": 4, "metric_for_best_model": "loss"},
    "evaluated on start": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 6},
    "a copy was evaluated": {"evaluate_copy": True},
}  # fmt: skip


def from_base(base: str, name: str) -> list:
    return [] if name == "from a new model" else ["--model_name_or_path", base]


def train_with_program(base: str, runs: str, rank: int) -> None:
    """All of `PROGRAM_RUNS`; this process's weights go beside each output folder."""
    save_model = ImageClassificationTrainer.save_model

    def keep_own_weights(trainer, *arguments, **options):
        save_file(trainer.model.state_dict(), weights_of(trainer.args.output_dir, rank))
        save_model(trainer, *arguments, **options)

    ImageClassificationTrainer.save_model = keep_own_weights
    draw_nothing()
    for name, (options, _) in PROGRAM_RUNS.items():
        options = [Path(runs, option) if str(option).startswith("interrupted") else option for option in options]
        options = ["--per_device_train_batch_size", 32, *options, *from_base(base, name)]
        run(Path(runs, name), *DETERMINISTIC, *options)


def draw_nothing() -> None:
    """In this process; whole trainings elsewhere draw theirs."""
    callback.plot_layer_entropies = reporting.plot_layer_entropies = lambda selection, path: None
    reporting.plot_training = lambda *arguments: None


def weights_of(output_dir, rank: int) -> str:
    return f"{output_dir}.process{rank}.safetensors"


def train_with_trainer(vit: str, runs: str, batch: int, name: str, resume=None, ema=None, evaluate_copy=False, **more):
    model = LambdaViTForImageClassification.from_pretrained(vit)
    callbacks = [*([EmaCallback(ema)] if ema else []), EntropyGuidedRemovalCallback(num_removed_layers=2)]
    arguments = {"per_device_train_batch_size": batch, "optim": "sgd", "learning_rate": 0.1, **more}
    if evaluate_copy:
        make_trainer(copy.deepcopy(model), Path(runs, name), [], **arguments).evaluate()
    trainer = make_trainer(model, Path(runs, name), callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume and str(Path(runs, resume)))
    return model.state_dict()


class Drift(TrainerCallback):
    """In the second process, something else happens to the model."""

    def __init__(self, event: str, rank: int, tensor):
        self.rank, self.tensor = rank, tensor
        setattr(self, event, self.drift)

    def drift(self, args, state, control, model=None, **kwargs):
        if self.rank == 1 and state.global_step in (6, 12):
            self.tensor(model).data.add_(1e-6)


def evaluated(trainer, rank):
    trainer.evaluate()


def predicted(trainer, rank):
    trainer.predict(Blobs())


def evaluated_by_another(trainer, rank):
    make_trainer(trainer.model, trainer.args.output_dir, []).evaluate()


def asking_for_fsdp(trainer, rank):
    make_trainer(
        trainer.model, trainer.args.output_dir, [EntropyGuidedRemovalCallback(removed_layers=[0, 1])], fsdp=True
    )


def drifting(event: str, tensor):
    def add(trainer, rank):
        trainer.callback_handler.callbacks.insert(0, Drift(event, rank, tensor))

    return add


def drifting_average(trainer, rank):
    ema = EmaCallback(0.5)
    callbacks = [ema, Drift("on_step_end", rank, lambda model: ema.average.module.classifier.bias)]
    trainer.callback_handler.callbacks[:0] = callbacks


def one_bias(model):
    return model.classifier.bias


def one_lambda(model):
    return model.encoder_layers[model.config.num_hidden_layers - 1].attention_lambda


# Each: what happens before training; what the error says.
DIFFERENT = "2 processes train 2 different models.*accelerate leaves that out"
REFUSED = {
    "evaluated": (evaluated, DIFFERENT),
    "predicted": (predicted, DIFFERENT),
    "evaluated by another Trainer": (evaluated_by_another, DIFFERENT),
    "FSDP": (asking_for_fsdp, "needs the whole model in each process"),
    "a weight drifts": (drifting("on_step_end", one_bias), r"weights at step 6 differ in 1 tensors.*classifier\.bias"),
    "lambda drifts": (drifting("on_step_end", one_lambda), r"weights at step 6 differ in 1 tensors.*attention_lambda"),
    "the average drifts": (drifting_average, r"averaged weights at the end of training .*classifier\.bias"),
    "drifts at the end": (drifting("on_train_end", one_bias), r"weights at the end .*classifier\.bias"),
}


def train_with_trainer_in_two(vit: str, runs: str, rank: int) -> dict:
    """All of `TRAINER_RUNS`, whose weights go beside each output folder, and what became of `REFUSED`."""
    draw_nothing()
    for name, options in TRAINER_RUNS.items():
        state = train_with_trainer(vit, runs, 4, name, **options)
        save_file(state, weights_of(Path(runs, name), rank))
    train_twice(vit, runs, rank)
    return {name: refused_training(vit, runs, before, rank) for name, (before, _) in REFUSED.items()}


def train_twice(vit: str, runs: str, rank: int) -> None:
    """Without removal, which leaves nothing to train again; with an evaluation in between."""
    model = LambdaViTForImageClassification.from_pretrained(vit)
    trainer = make_trainer(model, Path(runs, "twice"), [OneModelInAllProcesses()], optim="sgd", learning_rate=0.1)
    for _ in range(2):
        trainer.train()
        trainer.evaluate()
    save_file(model.state_dict(), weights_of(Path(runs, "twice"), rank))


def refused_training(vit: str, runs: str, before, rank: int) -> list:
    model = LambdaViTForImageClassification.from_pretrained(vit)
    trainer = make_trainer(model, Path(runs, "refused"), [EntropyGuidedRemovalCallback(removed_layers=[0, 1])])
    try:
        before(trainer, rank)
        trainer.train()
    except (RuntimeError, ValueError) as error:
        return [str(error), model.config.removed_layers]
    return ["trained without an error", model.config.removed_layers]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model for digits, with its image processor, as the program trains it."""
    folder = tmp_path_factory.mktemp("start")
    run(folder / "out", *DETERMINISTIC, "--base_num_train_epochs", 0.15, "--max_steps", 4)
    return folder / "out" / "base"


@pytest.fixture(scope="module")
def programs(base, tmp_path_factory):
    runs = tmp_path_factory.mktemp("programs")
    in_two_processes(train_with_program, str(base), str(runs))
    return runs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "vit"
    LambdaViTForImageClassification(LambdaViTForImageClassification.config_class(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trainers(start, tmp_path_factory):
    runs = tmp_path_factory.mktemp("trainers")
    return runs, in_two_processes(train_with_trainer_in_two, str(start), str(runs))


def assert_equal_in_both(output_dir: Path) -> dict[str, torch.Tensor]:
    first, second = (load_file(weights_of(output_dir, rank)) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert max((value - second[name]).abs().max().item() for name, value in first.items()) == 0
    return first


def assert_close(weights: dict, expected: dict) -> None:
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        # Float32 sums in another order, over a dozen steps.
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(base, start, tmp_path_factory):
    """The weights that one process trains: of the program with some options, or of a plain Trainer; each once."""
    found = {}

    def program(name: str, options: list) -> dict[str, torch.Tensor]:
        arguments = (*DETERMINISTIC, *options, *from_base(base, name))
        if arguments not in found:
            folder = tmp_path_factory.mktemp("one")
            run(folder / "out", *arguments)
            found[arguments] = load_file(folder / "out" / "model.safetensors")
        return found[arguments]

    def trainer(**options) -> dict[str, torch.Tensor]:
        if str(options) not in found:
            folder = str(tmp_path_factory.mktemp("one"))
            found[str(options)] = train_with_trainer(str(start), folder, 8, "one", **options)
        return found[str(options)]

    return SimpleNamespace(program=program, trainer=trainer)


@pytest.mark.parametrize("name", PROGRAM_RUNS)
def test_the_program_trains_one_model_in_two_processes(programs, alone, name):
    weights = assert_equal_in_both(programs / name)
    saved = load_file(programs / name / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in weights.items())
    options = PROGRAM_RUNS[name][1]
    if options is not None:
        assert_close(weights, alone.program(name, options))


def test_the_base_model_is_one_in_two_processes(programs):
    assert_equal_in_both(programs / "from a new model" / "base-training")


@pytest.mark.parametrize("name", TRAINER_RUNS)
def test_a_plain_trainer_trains_one_model_in_two_processes(trainers, alone, name):
    weights = assert_equal_in_both(trainers[0] / name)
    assert_close(weights, alone.trainer(**(TRAINER_RUNS[name] if name in ("averaged", "best") else {})))


def test_a_trainer_that_evaluates_between_two_trainings_trains_one_model(trainers):
    assert_equal_in_both(trainers[0] / "twice")


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_would_train_different_models_all_stop(trainers, name):
    first, second = (outcome[name] for outcome in trainers[1])
    assert first == second
    said, removed = first
    assert re.search(REFUSED[name][1], said), said
    assert removed == []
