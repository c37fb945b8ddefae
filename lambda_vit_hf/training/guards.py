"""Callbacks that stop a training before it spoils or loses what it has."""

import logging
import signal

import torch
import torch.distributed as dist
from transformers import TrainerCallback


logger = logging.getLogger(__name__)


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

    With several processes all must stop at the same step, so they agree on it every `check_every` steps.

    Args:
        check_every (`int`, *optional*, defaults to 8): steps between two agreements, with several processes.

    Raises:
        SystemExit: when training ends by the signal.
    """

    def __init__(self, check_every: int = 8):
        self.check_every = check_every
        self.received = self.stopping = False
        self._previous_handler = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = self.stopping = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._remember)

    def on_step_end(self, args, state, control, **kwargs):
        if self._all_agree(args, state):
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

    def _all_agree(self, args, state) -> bool:
        if args.world_size == 1:
            return self.received
        if state.global_step % self.check_every:
            return False
        received = torch.tensor(int(self.received), device=args.device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received.item())
