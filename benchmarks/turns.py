"""Several programs in lock-step: threads of which one runs at a time, step by step, so that their speeds compare."""

import threading
import time
from collections.abc import Callable, Mapping

import torch
from transformers import TrainerCallback


class Turns:
    """
    Threads that take turns: each runs from one call of `next_turn` to its next, while all others wait.

    Args:
        names: of the threads, in the order of their turns.
    """

    def __init__(self, names):
        self.waiting = list(names)
        self.changed = threading.Condition()
        self.failure: BaseException | None = None

    def next_turn(self, name: str) -> None:
        """
        Let the others run, and return when it is `name`'s turn again.

        Raises:
            RuntimeError: if another thread has failed meanwhile.
        """
        with self.changed:
            if self.waiting[0] == name:
                self.waiting.append(self.waiting.pop(0))
                self.changed.notify_all()
            self.await_turn(name)

    def await_turn(self, name: str) -> None:
        """Return when it is `name`'s turn, without giving one up."""
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or self.waiting[0] == name)
            if self.failure is not None:
                raise RuntimeError(f"{name} stops: another one failed.") from self.failure

    def leave(self, name: str, failure: BaseException | None = None) -> None:
        """Take `name` out; with a failure, all others stop at their next turn."""
        with self.changed:
            self.waiting.remove(name)
            self.failure = self.failure or failure
            self.changed.notify_all()


def run_in_turns(programs: Mapping[str, Callable[[], object]], turns: Turns) -> None:
    """
    Run each program in a thread of its own; one that fails stops them all.

    Raises:
        Whatever the first failing program raised.
    """

    def work(name: str, program: Callable[[], object]) -> None:
        try:
            turns.await_turn(name)
            program()
            turns.leave(name)
        except BaseException as failure:  # raised again below, in the thread that asked
            turns.leave(name, failure)

    threads = [threading.Thread(target=work, args=item, name=item[0], daemon=True) for item in programs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if turns.failure is not None:
        raise turns.failure


class StepTimer(TrainerCallback):
    """
    Gives up its Trainer's turn before each optimizer step, and times the step: from the start of one to the start of
    the next, with everything that the Trainer does (data, forward, backward, clipping, optimizer, callbacks, logs).

    Put it first in the Trainer's callbacks, so that the others' work on a step is in its time.

    Attributes:
        seconds (`list[float]`): of each step but the last.
    """

    def __init__(self, name: str, turns: Turns, device: torch.device):
        self.name, self.turns, self.device = name, turns, device
        self.seconds: list[float] = []
        self.start: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.start is not None:
            self.seconds.append(time.perf_counter() - self.start)
        self.turns.next_turn(self.name)
        self.start = time.perf_counter()
