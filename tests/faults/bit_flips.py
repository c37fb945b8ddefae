"""Single flipped bits, and files cut short, at random places, in every kind of folder that this package writes.

    python -m tests.faults.bit_flips --flips 200 --seed 0
    python -m tests.faults.bit_flips --flips 50 --cut --seed 0

Each must be refused with the file's name, or change nothing: the same weights, the same answers, to the bit.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from transformers import AutoImageProcessor

from lambda_vit_hf import AutoLambdaModelForImageClassification
from lambda_vit_hf.export.onnx_serving import OnnxImageClassifier
from lambda_vit_hf.export.serving_folder import export_for_serving
from lambda_vit_hf.hub.push import check_folder
from lambda_vit_hf.training.checkpoints import what_is_broken
from lambda_vit_hf.training.finishing import finish_checkpoint
from tests.end_to_end.test_training import run


SECRET = "hf_" + "kept" * 8
PICTURE = np.arange(300, dtype=np.uint8).reshape(10, 10, 3) * 7


@dataclass
class Kind:
    """A folder, and what its readers make of it: bytes that must not change, or an error."""

    folder: Path
    read: Callable[[Path], bytes]


def make_folders(folder: Path) -> dict[str, Kind]:
    """A small training with an average of the weights; its last checkpoint, its model, and an export of that."""
    options = ["--ema_decay", "0.5", "--base_num_train_epochs", "0.3", "--report_to", "tensorboard"]
    run(folder / "run", *options, "--hub_token", SECRET)
    checkpoint = max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    model = AutoLambdaModelForImageClassification.from_pretrained(folder / "run").eval()
    export_for_serving(model, AutoImageProcessor.from_pretrained(folder / "run"), folder / "export")
    return {
        "checkpoint": Kind(checkpoint, read_checkpoint),
        "finished model": Kind(folder / "run", read_model),
        "export": Kind(folder / "export", read_export),
    }


def read_checkpoint(folder: Path) -> bytes:
    """Resumed from, then finished: the weights."""
    damage = what_is_broken(folder)
    if damage:
        raise OSError(damage)
    with tempfile.TemporaryDirectory() as output:
        return (finish_checkpoint(folder, output) / "model.safetensors").read_bytes()


def read_model(folder: Path) -> bytes:
    """Loaded, and checked for a push: the logits."""
    model = AutoLambdaModelForImageClassification.from_pretrained(folder).eval()
    pixel_values = AutoImageProcessor.from_pretrained(folder)(PICTURE, return_tensors="pt")["pixel_values"]
    check_folder(folder)
    labels = json.dumps(model.config.id2label).encode()
    return model(pixel_values).logits.detach().numpy().tobytes() + labels


def read_export(folder: Path) -> bytes:
    """Served by this package: the answer. And by the code in the folder, where there is a picture beside it."""
    answer = json.dumps(OnnxImageClassifier(folder).classify([PIL.Image.fromarray(PICTURE)]))
    if (folder.parent / "picture.png").is_file():
        command = [sys.executable, "serve.py", "../picture.png"]
        served = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if served.returncode:
            raise OSError(served.stderr)
        answer += served.stdout
    return answer.encode()


@contextmanager
def damaged(path: Path, place: int, cut: bool) -> Iterator[None]:
    """Bit `place` of a file is the other one, or the file ends there, for a while."""
    whole = path.read_bytes()
    content = bytearray(whole)
    if cut:
        del content[place // 8 :]
    else:
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def damage_and_read(kind: Kind, expected: bytes, path: Path, place: int, cut: bool) -> str:
    """What came of it: `refused by name`, `harmless`, or `WRONG` and why."""
    with damaged(path, place, cut):
        try:
            found = kind.read(kind.folder)
        except Exception as error:  # of any type: the message is judged
            return "refused by name" if path.name in str(error) else f"WRONG: {error!r}"
    return "harmless" if found == expected else "WRONG: other bits out"


def damage_everywhere(kinds: dict[str, Kind], number: int, seed: int, cut: bool = False) -> dict[str, Counter]:
    """So many flips, or cuts, in each kind of folder: a file at random, then a bit in it at random."""
    generator, outcomes = random.Random(seed), {}
    for name, kind in kinds.items():
        found = (*kind.folder.iterdir(), *kind.folder.glob("onnx/*"))
        files = sorted(path for path in found if path.is_file() and path.stat().st_size)
        expected, outcomes[name] = kind.read(kind.folder), Counter()
        for _ in range(number):
            path = generator.choice(files)
            place = generator.randrange(8 * path.stat().st_size)
            outcome = damage_and_read(kind, expected, path, place, cut)
            outcomes[name][outcome.partition(":")[0]] += 1
            if outcome.startswith("WRONG"):
                print(f"{name}: bit {place} of {path.name}: {outcome}", file=sys.stderr)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="in each kind of folder")
    parser.add_argument("--cut", action="store_true", help="cut files short instead")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            kinds = make_folders(Path(folder))
        PIL.Image.fromarray(PICTURE).save(Path(folder, "picture.png"))
        outcomes = damage_everywhere(kinds, arguments.flips, arguments.seed, arguments.cut)
    print(f"seed {arguments.seed}\n{'folder':<18}{'flips':>7}{'refused by name':>18}{'harmless':>10}{'WRONG':>7}")
    for name, counts in outcomes.items():
        refused, harmless, wrong = (counts[outcome] for outcome in ("refused by name", "harmless", "WRONG"))
        print(f"{name:<18}{counts.total():>7}{refused:>18}{harmless:>10}{wrong:>7}")
    raise SystemExit(any(counts["WRONG"] for counts in outcomes.values()))


if __name__ == "__main__":
    main()
