"""Trainings killed at random moments, resumed, killed again, and in the end compared with one that never was.

python -m tests.faults.kills --kills 20 --processes 1 --seed 0
python -m tests.faults.kills --kills 10 --processes 2 --seed 0
"""

import argparse
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from lambda_vit_hf.models.checksums import find_damage
from tests.end_to_end.test_training import run


OPTIONS = "--ema_decay 0.5 --base_num_train_epochs 0.3 --save_steps 2 --save_total_limit 3".split()
RESUME = ["--resume_from_checkpoint", "true"]
# Not forked from this process: tqdm's lock is a semaphore that all forks share, and a killed one never gives it back.
FORKSERVER = multiprocessing.get_context("forkserver")


def train(folder: Path, options: list[str], num_processes: int, seconds: float | None = None) -> bool:
    """Trains in processes of their own, which get SIGKILL after `seconds`. Returns whether it came to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [FORKSERVER.Process(target=_process, args=(folder, options, rank, num_processes, port))
             for rank in range(num_processes)]  # fmt: skip
    for process in group:
        process.start()
    deadline = None if seconds is None else time.monotonic() + seconds
    for process in group:
        process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
    ended = all(process.exitcode is not None for process in group)
    for process in group:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    if ended and any(process.exitcode for process in group):
        raise RuntimeError(f"The training in {folder} failed by itself: {[one.exitcode for one in group]}.")
    return ended


def _process(folder: Path, options: list[str], rank: int, num_processes: int, port: int) -> None:
    log = os.open(folder.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if num_processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run(folder, *options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def killed_and_whole(folder: Path, num_kills: int, num_processes: int, seed: int) -> tuple[int, list[str]]:
    """
    One training that nobody kills, and others that are, until `num_kills` have fallen.

    Returns:
        How many trainings it took, and the weights that differ from the first's: names, with the training's number.
    """
    generator, kills, count, differing = random.Random(seed), 0, 0, []
    start = time.monotonic()
    train(folder / "whole", OPTIONS, num_processes)
    duration = time.monotonic() - start
    expected = load_file(folder / "whole" / "model.safetensors")
    while kills < num_kills:
        output, options, count = folder / f"killed-{count}", OPTIONS, count + 1
        while kills < num_kills and not train(output, options, num_processes, generator.uniform(0, duration)):
            kills, options = kills + 1, [*OPTIONS, *RESUME]
        train(output, [*OPTIONS, *RESUME], num_processes)
        found = load_file(output / "model.safetensors")
        differing += [f"{count}: {name}" for name in expected if not torch.equal(expected[name], found[name])]
        damaged = [f"{count}: {path}: {find_damage(path)}" for path in [output, output / "base"] if find_damage(path)]
        differing += damaged
    return count, differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        count, differing = killed_and_whole(Path(folder), arguments.kills, arguments.processes, arguments.seed)
    trainings = f"{count} trainings of {arguments.processes} process(es)"
    print(f"seed {arguments.seed}: {arguments.kills} SIGKILLs in {trainings}; weights that differ: {len(differing)}")
    print(*differing, sep="\n", file=sys.stderr)
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
