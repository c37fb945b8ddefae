"""The code that travels with the weights opens them where this package is not installed."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from lambda_vit_hf import (
    LambdaViTForImageClassification,
)


CODE = [
    "attention.py", "attention_removal.py", "blocks.py", "checksums.py", "configuration_lambda_vit.py",
    "configuration_removal.py", "features.py", "finite.py", "folding.py", "image_size.py", "inference.py",
    "loading.py", "mapped_attention.py", "modeling_lambda_vit.py", "pretrained_model.py", "token_merging.py",
]  # fmt: skip


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


HIDE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lambda_vit_hf":
            raise ImportError("lambda_vit_hf is hidden")

sys.meta_path.insert(0, Hidden())
"""


# One interpreter for all tests, for its imports take seconds; a script runs in a fork, which has imported no code of
# a model yet, and finds the folder for such code empty.
SERVER = """
import gc, json, os, shutil, signal
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

gc.freeze()
for line in sys.stdin:
    script, folder, images, out = json.loads(line)
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    child = os.fork()
    if not child:
        signal.alarm(120)
        os.dup2(2, 1)
        names = globals() | {"folder": folder, "images": load_file(images)["images"], "out": out, "results": {}}
        exec(script, names)
        results = {name: value.detach().contiguous() for name, value in names["results"].items()}
        save_file(results, out + "/results.safetensors")
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def run_without_package(tmp_path_factory):
    """Runs a script in a process that cannot import this package; returns the tensors it puts in `results`."""
    home = tmp_path_factory.mktemp("without_package")
    (home / "server.py").write_text(HIDE_PACKAGE + SERVER)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "home"), "HF_MODULES_CACHE": str(home / "modules")}
    with (home / "log").open("w") as log, subprocess.Popen(
        [sys.executable, "server.py"], cwd=home, env={**os.environ, **offline, "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
    ) as server:  # fmt: skip

        def run(script: str, tmp_path, *arguments) -> dict[str, torch.Tensor]:
            (tmp_path / "out").mkdir()
            request = [textwrap.dedent(script), *map(str, arguments), str(tmp_path / "out")]
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            assert server.stdout.readline() == "0\n", (home / "log").read_text()[-3000:]
            return load_file(tmp_path / "out" / "results.safetensors")

        yield run


def test_remote_code_opens_in_every_auto_class_and_can_be_saved_again(
    run_without_package, folder, removed, tmp_path, pixel_values
):
    save_file({"images": pixel_values}, tmp_path / "images.safetensors")
    script = """
        import huggingface_hub
        from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, pipeline
        from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling
        try:
            import lambda_vit_hf
        except ImportError:
            pass
        else:
            raise SystemExit("the package is not hidden")
        huggingface_hub.HfApi.repo_exists = lambda *_, **__: True
        trusted = {"trust_remote_code": True}
        torch.set_grad_enabled(False)
        assert type(AutoConfig.from_pretrained(folder, **trusted)).__module__.startswith("transformers_modules")
        model = AutoModelForImageClassification.from_pretrained(folder, **trusted)
        results["logits"] = model(images).logits
        results["bare"] = AutoModel.from_pretrained(folder, **trusted)(images).last_hidden_state
        masked = AutoModelForMaskedImageModeling.from_pretrained(folder, **trusted)
        results["masked"] = masked.vit(images).last_hidden_state
        backbone = AutoBackbone.from_pretrained(folder, reshape_hidden_states=False, **trusted)
        results["backbone"] = backbone(images).feature_maps[0]
        assert type(AutoImageProcessor.from_pretrained(folder, **trusted)).__name__ == "ViTImageProcessor"
        classify = pipeline("image-classification", model=folder, **trusted)
        results["pipeline"] = classify.model(images).logits
        model.save_pretrained(out + "/again")
        again = AutoModelForImageClassification.from_pretrained(out + "/again", **trusted)
        results["again"] = again(images).logits
    """
    results = run_without_package(script, tmp_path, folder, tmp_path / "images.safetensors")
    with torch.no_grad():
        hidden = removed.vit(pixel_values).last_hidden_state
    expected = logits(removed, pixel_values)
    different = [name for name in ("logits", "pipeline", "again") if not results[name].equal(expected)]
    different += [name for name in ("bare", "masked", "backbone") if not results[name].equal(hidden)]
    assert different == []
    again = tmp_path / "out" / "again"
    assert sorted(path.name for path in again.glob("*.py")) == CODE
    assert json.loads((again / "config.json").read_text())["auto_map"] == removed.config.auto_map
    here = LambdaViTForImageClassification.from_pretrained(again)
    assert torch.equal(logits(here, pixel_values), expected)


def test_remote_code_resumes_a_trainer_checkpoint_as_if_never_stopped(
    run_without_package, folder, tmp_path, pixel_values
):
    save_file({"images": pixel_values}, tmp_path / "images.safetensors")
    script = """
        from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

        data = [{"pixel_values": images[i % 3] + i, "labels": i % 5} for i in range(8)]
        options = dict(max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True)

        def train(name, **resume):
            model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
            arguments = TrainingArguments(out + name, report_to=[], disable_tqdm=True, save_total_limit=3, **options)
            Trainer(model, arguments, train_dataset=data).train(**resume)
            return model.eval()

        whole = train("/whole")
        resumed = train("/resumed", resume_from_checkpoint=out + "/whole/checkpoint-2")
        last = AutoModelForImageClassification.from_pretrained(out + "/whole/checkpoint-4", trust_remote_code=True)
        results = {"whole": whole(images).logits, "resumed": resumed(images).logits, "last": last(images).logits}
    """
    results = run_without_package(script, tmp_path, folder, tmp_path / "images.safetensors")
    assert torch.equal(results["resumed"], results["whole"])
    assert torch.equal(results["last"], results["whole"])
    checkpoint = tmp_path / "out" / "whole" / "checkpoint-4"
    assert sorted(path.name for path in checkpoint.glob("*.py")) == CODE
    here = LambdaViTForImageClassification.from_pretrained(checkpoint)
    assert torch.equal(logits(here, pixel_values), results["whole"])
