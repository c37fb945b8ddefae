"""Callbacks that stop a training before it spoils or loses what it has."""

import logging
import signal
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import DistributedType
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

_SPLIT_UP = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class OneModelInAllProcesses(TrainerCallback):
    """
    Stops a training whose processes train a model each instead of one together.

    Compared bit by bit between the processes: the gradient before the first optimizer step; parameters and buffers,
    lambda among them, at the end of each epoch and of training. All processes raise.

    [`EntropyGuidedRemovalCallback`] and `ImageClassificationTrainer` do so by themselves.

    Raises:
        ValueError: on FSDP and DeepSpeed, when training begins.
        RuntimeError: if processes differ, naming a cause and what to do.
    """

    def __init__(self):
        self._compared_gradients = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_model_is_whole(model, args, type(self).__name__)
        self._compared_gradients = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._compared_gradients or args.world_size == 1:
            return
        self._compared_gradients = True
        # Of the gradient itself, not of the model's class: the callbacks do not see what the Trainer wraps around it.
        parameters = model.named_parameters()
        gradients = ((name, torch.zeros(0) if one.grad is None else one.grad) for name, one in parameters)
        differing = differing_between_processes(gradients, args.device)
        if differing:
            raise RuntimeError(
                f"{args.world_size} processes train {args.world_size} different models: before their first step the"
                f" gradients of {len(differing)} parameters differ ({differing[0]}), so the model is not wrapped in"
                " DistributedDataParallel. accelerate leaves that out once a model was evaluated or predicted with"
                " before `train()`, in this Trainer or another one. Load the model anew; to evaluate it first, give a"
                " copy to a Trainer of its own (`Trainer(model=copy.deepcopy(model), ...).evaluate()`), or set"
                " `eval_on_start=True`."
            )

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        # During training too: with `load_best_model_at_end` all processes read the first one's weights before the end.
        check_weights_agree(model, args, f"the weights at step {state.global_step}")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        check_weights_agree(model, args, "the weights at the end of training")


def check_weights_agree(model: torch.nn.Module, args, what: str) -> None:
    """
    Raises:
        RuntimeError: in every process, if parameters or buffers differ between the processes in a single bit.
    """
    if args.world_size == 1:
        return
    differing = differing_between_processes(model.state_dict().items(), args.device)
    if differing:
        raise RuntimeError(
            f"The {args.world_size} processes hold different models: {what} differ in {len(differing)} tensors"
            f" ({differing[:3]}). Nothing was removed or saved as finished; checkpoints in {args.output_dir} are the"
            " first process's. Does a callback change the model in some processes only, or do their machines or"
            " libraries differ?"
        )


def differing_between_processes(tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> list[str]:
    """
    Names of the tensors that are not the same, to the bit, in all processes. All must ask together, all are answered.

    Args:
        tensors: names and tensors, the same names in every process.
        device (`torch.device`): which the processes exchange tensors on.
    """
    names, sums = zip(*((name, _sum_of_bits(tensor).to(device)) for name, tensor in tensors), strict=True)
    own = torch.stack(sums)
    least, most = own.clone(), own.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [name for name, differs in zip(names, (least != most).tolist(), strict=True) if differs]


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same in whatever order it is summed, unlike a sum of floats."""
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(-1).view(as_integer).sum(dtype=torch.int64)


def check_model_is_whole(model: torch.nn.Module, args, what: str) -> None:
    """
    Raises:
        ValueError: if the Trainer splits the model up among processes, whether its arguments or a launcher said so.
    """
    is_split_by_launcher = args.distributed_state.distributed_type in _SPLIT_UP
    is_split_by_loader = getattr(model, "is_distributed_loading_by_transformers", False)
    if args.fsdp or args.deepspeed or is_split_by_launcher or is_split_by_loader:
        raise ValueError(
            f"{what} needs the whole model in each process: train with DistributedDataParallel, as several processes"
            " do by default, without FSDP, DeepSpeed or anything else that splits it up."
        )


class StopOnNonFiniteGradient(TrainerCallback):
    """
    Stops before an optimizer step that would write NaN or infinity into the weights, so the last checkpoint is good.

    The Trainer replaces such losses in its log by default (`logging_nan_inf_filter`) and trains on. With fp16 the
    gradient scaler skips single overflows by itself; there, `patience` steps in a row stop the run.

    Args:
        patience (`int`, *optional*, defaults to 20): non-finite steps in a row tolerated under fp16.

    Raises:
        FloatingPointError: during training, naming the step.
    """

    def __init__(self, patience: int = 20):
        self.patience = patience
        self.non_finite_in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.non_finite_in_a_row = 0
            return
        self.non_finite_in_a_row += 1
        if not args.fp16 or self.non_finite_in_a_row > self.patience:
            raise FloatingPointError(
                f"The gradient of step {state.global_step} is NaN or infinite; stopped before it reached the weights."
                f" Checkpoints in {args.output_dir} are from before. Lower the learning rate, or look at the batch."
            )


class SaveOnSigterm(TrainerCallback):
    """
    Ends a training cleanly on SIGTERM, as clusters send it before they take a machine back: the running step is
    finished, a checkpoint saved, and the program exits with status 143 (128 + 15). Nothing else happens, so the run
    goes on from that checkpoint as if never stopped. Must stand before `EntropyGuidedRemovalCallback`.

    Unlike `enable_jit_checkpoint` of transformers 5.23, which saves between backward pass and optimizer step, three
    seconds after the signal.

    A signal after the last step is not needed any more: training is over, and goes on to its end.

    With several processes all must stop at the same step, so they agree on it in each: launchers kill what still runs
    30 seconds after the signal, which may be a few steps. That takes less than a millisecond (gloo, two processes).

    Args:
        check_every (`int`, *optional*): deprecated and without effect.

    Raises:
        SystemExit: when training ends by the signal.
    """

    def __init__(self, check_every: int | None = None):
        if check_every is not None:
            warnings.warn(
                "`check_every` has no effect and will be removed: processes agree on the signal in each step.",
                FutureWarning,
                stacklevel=2,
            )
        self.received = self.stopping = False
        self._previous_handler = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = self.stopping = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._remember)

    def on_step_end(self, args, state, control, **kwargs):
        if self._one_received(args):
            self.stopping = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # every second counts

    def on_epoch_end(self, args, state, control, **kwargs):
        # The Trainer ends the epoch that it leaves in the middle, too; this step's checkpoint is whole already.
        if self.stopping:
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        # A handler that was not set from Python is given as None, and cannot be put back.
        signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)
        if self.stopping:
            logger.warning(
                "SIGTERM: stopped after step %d of %d; checkpoint saved in %s. Go on with --resume_from_checkpoint"
                " true.",
                state.global_step,
                state.max_steps,
                args.output_dir,
            )
            raise SystemExit(128 + signal.SIGTERM)

    def _remember(self, signum, frame):
        self.received = True

    def _one_received(self, args) -> bool:
        if args.world_size == 1:
            return self.received
        received = torch.tensor(int(self.received), device=args.device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received.item())
