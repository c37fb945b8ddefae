"""What a long training tells about itself: speed and time left, in every tracker that the Trainer reports to."""

import time

from transformers import TrainerCallback


class ThroughputCallback(TrainerCallback):
    """
    Adds `images_per_second` (training images of all processes, since the last log) and `hours_left` to the logs.

    Evaluation and saving are not counted in `images_per_second`, but in `hours_left`, which is reckoned from the whole
    run so far. Must stand before the trackers, as `on_log` callbacks run in order.
    """

    def __init__(self):
        self._images, self._seconds, self._step_began = 0, 0.0, 0.0
        self._began, self._first_step = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step = time.perf_counter(), state.global_step
        self._images, self._seconds = 0, 0.0
        self._step_began = self._began

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        # From the end of the step before: waiting for data belongs to the step.
        now = time.perf_counter()
        self._seconds += now - self._step_began
        self._images += args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._step_began = now

    def on_evaluate(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or not self._images or "loss" not in logs:
            return
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._began) / done * (state.max_steps - state.global_step)
        values = {
            "images_per_second": round(self._images / self._seconds, 2),
            "hours_left": round(left / 3600, 4),
        }
        self._images, self._seconds = 0, 0.0
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
