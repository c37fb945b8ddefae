"""Callbacks that stop a training before it spoils what it has."""

import torch
from transformers import TrainerCallback


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
